//! Every example runs to its end: what the documentation shows is true.
//!
//! `cargo test` builds the examples beside this test. Each is a process of its own with a small cluster in it; they run one after the
//! other, so that clusters do not starve each other of processor time.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// An unoptimised build on a busy machine; it takes seconds.
const LIMIT: Duration = Duration::from_secs(180);

static TURN: Mutex<()> = Mutex::new(());

/// `target/debug/deps/examples-…` is this test, `target/debug/examples/…` are they.
fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("a test has a path");
    let profile = this.parent().and_then(Path::parent).expect("it lies in deps of a profile");
    profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

fn run(name: &str) {
    // A test that failed has told so itself.
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let path = binary(name);
    assert!(path.exists(), "{} is missing: run `cargo build -p crema-node --examples`", path.display());
    // What it writes goes to files: a pipe that nobody reads would stop it.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = |name: &str| std::fs::File::create(dir.path().join(name)).expect("writable");
    let mut child = Command::new(&path)
        .stdin(Stdio::null())
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let begin = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child can be asked") {
            Some(status) => break Some(status),
            None if begin.elapsed() > LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    let (stdout, stderr) = (text("stdout"), text("stderr"));
    match status {
        Some(status) => assert!(status.success(), "{name}: {status}\n{stdout}\n{stderr}"),
        None => panic!("{name} did not end within {LIMIT:?}\n{stdout}\n{stderr}"),
    }
    assert!(!stdout.is_empty(), "{name} shows nothing");
}

macro_rules! examples {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_example_is_run() {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
            let files = std::fs::read_dir(&dir).expect("there are examples").map(|entry| entry.expect("readable").path());
            let examples: BTreeSet<String> = files
                .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
                .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
                .collect();
            assert_eq!(examples, [$(stringify!($name).to_owned()),*].into());
        }
    };
}

examples! {
    basic_setup
    dns_seeds
    events
    graceful_shutdown
    headless_service
    memberlist_document
    members
    metadata
    nat
    shard_leaders
    static_seeds
    tuning
    two_tiers
}
