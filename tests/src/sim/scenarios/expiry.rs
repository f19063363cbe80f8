//! Keys that expire: by log time, neither late nor for a while only.

use super::super::world::US;
use super::*;

fn px(value: &str, px: u64) -> Command {
    Command::SetPx { value: value.into(), px }
}

/// Log time once stood still while entries came faster than its unit.
#[test]
fn the_keys_of_a_busy_shard_expire() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [other, _] = s.others(leader);
    let writer = s.world.connect();
    let begun = s.world.now();
    s.expect(leader, "k", px("v", 200), Reply::Ok);
    let written = s.world.now();
    let mut seen_at = Vec::new();
    let mut reads = Vec::new();
    while s.world.now() < begun + 1_000 * MS {
        let conn = s.world.connect();
        let node = if reads.len() % 2 == 0 { leader } else { other };
        reads.push((s.world.now(), s.ask(node, conn, "k", &Command::Get, PATIENCE)));
        for _ in 0..14 {
            s.ask(leader, writer, "busy", &set("x"), PATIENCE);
            s.world.run_for(Duration::from_nanos(700 * US));
        }
        s.gather();
    }
    for (at, read) in reads {
        let Some(ClientResult::Reply(r)) = s.answer(read, 100) else { panic!("not answered") };
        seen_at.push((at, r));
    }
    for (at, r) in &seen_at {
        let (since, most) = ((at - written.min(*at)) / MS, (at - begun) / MS);
        if most < 190 {
            assert_eq!(*r, bulk("v"), "{since} ms after its write");
        } else if since > 250 {
            assert_eq!(*r, Reply::Nil, "{since} ms after its write");
        }
    }
    assert!(seen_at.len() > 90);
}

/// What a reader has seen expired is expired in the log, whoever leads next and whatever its clock says.
#[test]
fn an_expired_key_does_not_come_back_with_a_leader_whose_time_is_behind() {
    const BEHIND: u64 = 100 * MS;
    let first = NodeId(1);
    // Everything from the first node is late, the founding too: so the others' log time begins late and stays behind.
    let mut s = Story::with(Options::default(), |w| {
        for to in [NodeId(2), NodeId(3)] {
            w.conditions.lags.insert((first, to), BEHIND);
        }
    });
    if s.leader() != first {
        s.hand_over(first);
    }
    s.expect(first, "k", px("v", 600), Reply::Ok);
    s.expect(first, "k", Command::Get, bulk("v"));
    // Asked every 5 ms, until one finds nothing.
    let mut asked = Vec::new();
    for _ in 0..400 {
        let conn = s.world.connect();
        asked.push(s.ask(first, conn, "k", &Command::Get, PATIENCE));
        s.run(5);
        if asked.iter().any(|r| s.answers.get(r) == Some(&ClientResult::Reply(Reply::Nil))) {
            break;
        }
    }
    let gone = s.world.now();
    assert!(asked.iter().any(|r| s.answers.get(r) == Some(&ClientResult::Reply(Reply::Nil))), "it expires");
    // At once another leads, before it hears what time it is: what is on its way to it stays late.
    s.world.conditions.lags.clear();
    s.world.conditions.reordered = 1_000;
    s.hand_over(NodeId(2));
    s.expect(NodeId(2), "k", Command::Get, Reply::Nil);
    assert!(s.world.now() - gone < BEHIND, "while its estimate is behind");
    for node in s.world.ids() {
        s.expect(node, "k", Command::Get, Reply::Nil);
    }
}

/// A read that waits for log time behind another one: when the other's Advance has committed, its own key has expired by the
/// estimate but not by that Advance.
#[test]
fn a_read_behind_one_that_waited_for_log_time_is_answered_too() {
    let mut s = Story::begin();
    let leader = s.leader();
    let others = s.others(leader);
    // Until "a" is over and "b" is not. The lease stays in use, so that no read waits for a round.
    let end = s.world.now() + 505 * MS;
    s.expect(leader, "a", px("v", 500), Reply::Ok);
    s.expect(leader, "b", px("v", 520), Reply::Ok);
    while s.world.now() < end {
        let conn = s.world.connect();
        s.ask(leader, conn, "other", &Command::Get, PATIENCE);
        s.world.run_for(Duration::from_nanos((end - s.world.now()).min(50 * MS)));
    }
    s.gather();
    assert_eq!(lease_holders(&s.world), [leader]);
    // An Advance takes 60 ms and more to commit.
    for to in others {
        s.world.conditions.lags.insert((leader, to), 60 * MS);
    }
    let mut asked = Vec::new();
    for key in ["a", "b"] {
        let conn = s.world.connect();
        asked.push(s.ask(leader, conn, key, &Command::Get, PATIENCE));
        s.run(30);
    }
    for (read, key) in asked.into_iter().zip(["a", "b"]) {
        assert_eq!(s.answer(read, 1_000), Some(ClientResult::Reply(Reply::Nil)), "{key}\n{}", s.world.trace.tail(40));
    }
}
