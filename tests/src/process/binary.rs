//! Finds the `crema` program by asking cargo to build it, in the profile this program was built in.
//!
//! Cargo offers tests the path of a binary only within the binary's own package; so we ask it once a process and
//! take the path from its answer, which holds for any target directory. `CREMA_BIN` names a program to use instead.

use super::{Context, Failure, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The path of the program. The first call builds it, if it is not up to date.
///
/// # Errors
///
/// If it does not build; the text ends with the compiler's last lines.
pub fn crema() -> Result<&'static Path> {
    static PATH: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let found = PATH.get_or_init(|| find().map_err(|e| e.to_string()));
    found.as_deref().map_err(|e| Failure::new(e.as_str()))
}

fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CREMA_BIN") {
        let path = PathBuf::from(path);
        // Its processes run in directories of their own.
        return path.canonicalize().context(format!("CREMA_BIN {}", path.display()));
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join("Cargo.toml");
    let exe = std::env::current_exe().context("the path of this program")?;
    let output = Command::new(&cargo)
        // That package alone, as it ships: with the whole workspace the simulator's deliberate faults would be compiled in.
        .args(["build", "-p", "crema-node", "--bin", "crema", "--message-format", "json-render-diagnostics"])
        .args(["--profile", &profile_of(&exe), "--manifest-path"])
        .arg(&manifest)
        .stdin(Stdio::null())
        .output()
        .context(format!("starting {}", cargo.display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Failure::new(format!("crema does not build:\n{}", super::child::tail(&text, 40))));
    }
    executable_in(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| Failure::new("cargo built crema but did not say where it is"))
}

/// The path of the program `crema` in cargo's messages, one JSON object a line.
fn executable_in(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|m| m["reason"] == "compiler-artifact" && m["target"]["name"] == "crema")
        .find_map(|m| m["executable"].as_str().map(PathBuf::from))
}

/// The cargo profile in whose directory `exe` lies: `…/debug/deps/x` and `…/debug/x` are of profile `dev`.
fn profile_of(exe: &Path) -> String {
    let parent = exe.parent().filter(|p| !p.ends_with("deps")).or_else(|| exe.parent().and_then(Path::parent));
    match parent.and_then(Path::file_name).and_then(|name| name.to_str()) {
        None | Some("debug") => "dev".into(),
        Some(name) => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_is_that_of_the_directory() {
        assert_eq!(profile_of(Path::new("/t/debug/deps/process-0")), "dev");
        assert_eq!(profile_of(Path::new("/t/debug/crema-benches")), "dev");
        assert_eq!(profile_of(Path::new("/t/x86_64/release/crema-benches")), "release");
    }

    #[test]
    fn the_program_is_found_among_the_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"crema_core"},"executable":null}"#,
            "\nnot json\n",
            r#"{"reason":"compiler-artifact","target":{"name":"crema"},"executable":"/t/debug/crema"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable_in(messages), Some(PathBuf::from("/t/debug/crema")));
        assert_eq!(executable_in(""), None);
    }
}
