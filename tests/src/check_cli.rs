//! `crema-tests check`: judges histories from files.

use crate::history::{Operation, Reader, records};
use crate::sim::judge::judge;
use std::fs::File;
use std::io::{self, BufReader, Write};

/// What the command line understands.
pub const USAGE: &str = "usage: crema-tests check FILE…
  Judges histories (tests/HISTORIES.md), each file by itself. Exit code 0: all right; 1: violations; 2: not judged
  (a file that is no history, or keys that no check fits).
";

/// Operations on a key that is covered by checks without a search, from which on the search is left out: it would take
/// more memory and time than its second opinion is worth.
const MOST_SEARCHED: usize = 5_000;
/// Violations of a file that are printed; of further ones the number.
const MOST_REPORTS: usize = 10;

/// What came of all files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// Every key of every file was judged, and is right.
    Right,
    /// At least one violation.
    Wrong,
    /// No violation was found, but not everything could be judged.
    Unjudged,
}

/// Judges the files, and writes a line for each that is right, else what is wrong. The error is for the user.
pub fn run(files: &[String], out: &mut impl Write) -> Result<Checked, String> {
    if files.is_empty() {
        return Err("check takes at least one file".into());
    }
    let mut all = Checked::Right;
    for file in files {
        let operations = read(file).map_err(|e| format!("{file}: {e}"))?;
        let checked = check(file, &operations, out).map_err(|e| format!("{file}: {e}"))?;
        // A violation outweighs what was not judged.
        all = match (all, checked) {
            (Checked::Wrong, _) | (_, Checked::Wrong) => Checked::Wrong,
            (Checked::Unjudged, _) | (_, Checked::Unjudged) => Checked::Unjudged,
            _ => Checked::Right,
        };
    }
    Ok(all)
}

fn read(file: &str) -> Result<Vec<Operation>, String> {
    let open = File::open(file).map_err(|e| e.to_string())?;
    Reader::new(BufReader::new(open)).collect::<Result<_, _>>().map_err(|e| e.to_string())
}

fn check(file: &str, operations: &[Operation], out: &mut impl Write) -> Result<Checked, String> {
    let history = records(operations)?;
    let verdict = judge(&history, |_, operations| operations > MOST_SEARCHED);
    let (wrong, unjudged) = (&verdict.violations, &verdict.unjudged);
    let mut print = || -> io::Result<()> {
        for v in wrong.iter().take(MOST_REPORTS) {
            write!(out, "{file}: violation: {v}")?;
        }
        if wrong.len() > MOST_REPORTS {
            writeln!(out, "{file}: {} further violations", wrong.len() - MOST_REPORTS)?;
        }
        for u in unjudged.iter().take(MOST_REPORTS) {
            writeln!(out, "{file}: not judged: {u}")?;
        }
        if unjudged.len() > MOST_REPORTS {
            writeln!(out, "{file}: {} further keys not judged", unjudged.len() - MOST_REPORTS)?;
        }
        let word = if !wrong.is_empty() {
            "FAILED"
        } else if !unjudged.is_empty() {
            "UNJUDGED"
        } else {
            "ok"
        };
        write!(out, "{word} keys={} ops={}", verdict.keys, history.len())?;
        if word != "ok" {
            write!(out, " violations={} unjudged={}", wrong.len(), unjudged.len())?;
        }
        writeln!(out, " file={file}")
    };
    print().map_err(|e| e.to_string())?;
    Ok(match (wrong.is_empty(), unjudged.is_empty()) {
        (false, _) => Checked::Wrong,
        (true, false) => Checked::Unjudged,
        (true, true) => Checked::Right,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::rng::Rng;
    use crate::sim::workload::Workload;
    use crate::sim::world::{MS, Options, S, Step, World};
    use std::path::PathBuf;

    /// A file that goes away with the test.
    struct Temp(PathBuf);
    impl Temp {
        fn new(name: &str, content: &[u8]) -> Temp {
            let path = std::env::temp_dir().join(format!("crema-check-{}-{name}", std::process::id()));
            std::fs::write(&path, content).expect("a temporary file");
            Temp(path)
        }
        fn name(&self) -> String {
            self.0.to_string_lossy().into_owned()
        }
    }
    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn judged(files: &[&Temp]) -> (Result<Checked, String>, String) {
        let mut out = Vec::new();
        let names: Vec<String> = files.iter().map(|f| f.name()).collect();
        let checked = run(&names, &mut out);
        (checked, String::from_utf8(out).expect("text"))
    }

    const RIGHT: &str = r#"{"client":1,"call":1,"ret":2,"op":"incr","key":"c","outcome":"ok","reply":{"int":1}}
{"client":2,"call":3,"ret":4,"op":"get","key":"c","outcome":"ok","reply":{"bulk":"1"}}
{"client":2,"call":3,"ret":4,"op":"get","key":"r","outcome":"ok","reply":"nil"}
"#;
    const WRONG: &str = r#"{"client":1,"call":1,"ret":2,"op":"append","key":"l","value":"a,","outcome":"ok","reply":{"int":2}}
{"client":2,"call":3,"ret":4,"op":"get","key":"l","outcome":"ok","reply":"nil"}
"#;
    const ODD: &str = r#"{"client":1,"call":1,"ret":2,"op":"incr","key":"t","outcome":"ok","reply":{"int":1}}
{"client":1,"call":3,"ret":4,"op":"set_px","key":"t","value":"a,","px":5,"outcome":"ok","reply":"ok"}
"#;

    #[test]
    fn right_wrong_and_odd_histories_are_told_apart() {
        let right = Temp::new("right", RIGHT.as_bytes());
        let wrong = Temp::new("wrong", WRONG.as_bytes());
        let odd = Temp::new("odd", ODD.as_bytes());
        let (checked, text) = judged(&[&right]);
        assert_eq!((checked, text), (Ok(Checked::Right), format!("ok keys=2 ops=3 file={}\n", right.name())));
        let (checked, text) = judged(&[&wrong, &right]);
        assert_eq!(checked, Ok(Checked::Wrong));
        assert!(text.contains("violation: l: a is there since 2"), "{text}");
        assert!(text.contains("FAILED keys=1 ops=2 violations=2 unjudged=0") && text.contains("ok keys=2"), "{text}");
        let (checked, text) = judged(&[&right, &odd]);
        assert_eq!(checked, Ok(Checked::Unjudged));
        assert!(text.contains("not judged: t: ") && text.contains("UNJUDGED keys=1"), "{text}");
        assert_eq!(judged(&[&odd, &wrong]).0, Ok(Checked::Wrong), "a violation outweighs it");
    }

    #[test]
    fn what_is_no_history_is_an_error() {
        let cut = Temp::new("cut", &RIGHT.as_bytes()[..RIGHT.len() - 9]);
        assert!(judged(&[&cut]).0.expect_err("a cut line").contains(": line 3: "));
        assert!(run(&["/does/not/exist".into()], &mut io::sink()).is_err());
        assert!(run(&[], &mut io::sink()).is_err());
    }

    /// What the simulator exports is what it judged: the verdict is the same, and a planted violation is found.
    #[test]
    fn an_exported_run_is_judged_alike() {
        let mut world = World::new(Options::default());
        let mut load = Workload::new(&mut world, Rng::new(11), false);
        let until = 8 * S;
        loop {
            match world.step(until) {
                Step::Reached => break,
                Step::Worked => {}
                Step::User(client) => load.turn(&mut world, client),
            }
            load.take(&mut world).expect("no odd answers");
        }
        assert!(world.violations.is_empty() && world.now() > 1_000 * MS);
        let mut exported = Vec::new();
        load.export(&mut exported).expect("memory takes it");
        let text = String::from_utf8(exported).expect("JSON is UTF-8");
        assert_eq!(text.lines().count(), load.history().len());
        assert!(text.lines().count() > 200, "the run did something: {} lines", text.lines().count());
        let file = Temp::new("exported", text.as_bytes());
        let (checked, said) = judged(&[&file]);
        assert_eq!(checked, Ok(Checked::Right), "{said}");
        // Somebody reads what nobody wrote.
        let last = text.lines().rev().find(|l| l.contains(r#""op":"get""#) && l.contains("bulk")).expect("a read");
        let (head, _) = last.split_once(r#""reply""#).expect("a reply");
        let planted = text.replace(last, &format!(r#"{head}"reply":{{"bulk":"v0,"}}}}"#));
        let file = Temp::new("planted", planted.as_bytes());
        assert_eq!(judged(&[&file]).0, Ok(Checked::Wrong));
    }
}
