//! Faults under recorded load: what clients saw must be linearizable, and nothing acknowledged may be lost.

use crema_tests::process::scenarios::{self, Options, Report};
use crema_tests::process::{netns, partitions, turn};
use std::io::Write;

fn tell(report: &Report) {
    eprintln!("{report}");
}

#[test]
fn paused_and_killed_leaders_break_no_promise() {
    let _turn = turn().unwrap();
    scenarios::on_loopback(&Options::default(), &mut tell).unwrap();
}

#[test]
fn cut_off_leaders_break_no_promise() {
    let _turn = turn().unwrap();
    if let Err(reason) = netns::available() {
        // Past the capture of output, since the test passes: nobody should believe that this was tested.
        let _ = writeln!(std::io::stderr(), "skipped: partitions of real processes: {reason}");
        return;
    }
    scenarios::in_namespaces(&Options::default(), &mut tell).unwrap();
}

#[test]
fn no_cut_makes_a_second_cluster_or_changes_voters() {
    let _turn = turn().unwrap();
    if let Err(reason) = netns::available() {
        let _ = writeln!(std::io::stderr(), "skipped: cuts of gossip and raft: {reason}");
        return;
    }
    partitions::drill(&mut |cut| eprintln!("{cut}")).unwrap();
}
