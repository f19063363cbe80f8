//! One child process with its output in files, and the directory that holds them.

use super::{Context, Failure, Result, binary, eventually};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Lines of each log that a failed test shows.
const SHOWN_LINES: usize = 40;

/// A directory of one test: shown and kept when the test fails, removed when it passes.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    keep: AtomicBool,
}

impl Scratch {
    /// A new, empty directory among the system's temporary files.
    ///
    /// # Errors
    ///
    /// If it cannot be created.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("crema-process-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).context(format!("creating {}", path.display()))?;
        Ok(Scratch { path, keep: AtomicBool::new(false) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The test failed, without a panic so far: show and keep it.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() && !self.keep.load(Ordering::Relaxed) {
            // What cannot be removed is left to the system's own cleaning of temporary files.
            let _ = std::fs::remove_dir_all(&self.path);
            return;
        }
        eprintln!("the logs are kept in {}", self.path.display());
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        files.sort();
        let is_log = |f: &&PathBuf| f.is_file() && f.extension().is_some_and(|e| e == "out" || e == "err");
        for file in files.iter().filter(is_log) {
            let text = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
            if !text.is_empty() {
                eprintln!("---- {}, last lines ----\n{}", file.display(), tail(&text, SHOWN_LINES));
            }
        }
    }
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let skip = text.lines().count().saturating_sub(lines);
    text.lines().skip(skip).collect::<Vec<_>>().join("\n")
}

/// A running `crema`. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `crema ARGS` in `scratch`; its output goes to files there, named after `name`, to which a later process of
    /// that name appends.
    ///
    /// # Errors
    ///
    /// If the program does not build or does not start.
    pub fn spawn(name: &str, scratch: &Scratch, args: &[String]) -> Result<Process> {
        Process::spawn_logging(name, scratch, args, None)
    }

    /// As [`Process::spawn`], with this filter for its log in place of the default.
    ///
    /// # Errors
    ///
    /// As [`Process::spawn`].
    pub fn spawn_logging(name: &str, scratch: &Scratch, args: &[String], filter: Option<&str>) -> Result<Process> {
        let stdout = scratch.path().join(format!("{name}.out"));
        let stderr = scratch.path().join(format!("{name}.err"));
        let open = |path: &Path| {
            File::options().create(true).append(true).open(path).context(format!("opening {}", path.display()))
        };
        let mut command = Command::new(binary::crema()?);
        // Nothing is ever written to the pipe; it ends with us, and nodes started with `--stop-with-stdin` end with it.
        command.args(args).current_dir(scratch.path()).stdin(Stdio::piped());
        command.stdout(open(&stdout)?).stderr(open(&stderr)?);
        // Settings of whoever runs the tests must not change them.
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("CREMA_")) {
            command.env_remove(key);
        }
        command.env("RUST_BACKTRACE", "1");
        command.envs(filter.map(|filter| ("CREMA_LOG", filter)));
        let child = command.spawn().context(format!("starting crema {}", args.join(" ")))?;
        Ok(Process { child, name: name.into(), stdout, stderr })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it `signal`. A process that has ended already is left alone.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // Its end has not been waited for until `try_wait` says so, hence the id is still its own.
        if self.child.try_wait().context(&self.name)?.is_some() {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), signal).context(format!("signal to {}", self.name))
    }

    /// Kills it at once and waits for its end.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context(format!("killing {}", self.name))?;
        self.child.wait().context(format!("end of {}", self.name)).map(drop)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it still runs after `within`.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        eventually(&format!("end of {name}"), within, || {
            self.child.try_wait().context(&name)?.ok_or_else(|| Failure::new("it still runs"))
        })
    }

    /// Its exit status, or `None` while it runs.
    ///
    /// # Errors
    ///
    /// If the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context(&self.name)
    }

    /// What it wrote to standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stdout).unwrap_or_default()).into_owned()
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
        assert_eq!(tail("", 5), "");
    }
}
