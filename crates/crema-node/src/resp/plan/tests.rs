use super::*;
use crate::resp::testing::{Planner, three_shards};
use bytes::Bytes;
use crema_core::store::{Edit, TableWriter};
use crema_core::{KeyRef, LogTime, NodeId, OpsRef, Reply, Term};
use crema_shard::{ClientResult, Refusal};

/// Slots: a 15495, foo 12182, somekey 11058: shard 2. c 7365: shard 1. b 3300, bar 5061, hello 866: shard 0.
/// Node 1, which is this one, leads shard 0, node 2 shard 1, node 3 shard 2.
fn proxy() -> Planner {
    Planner::new(ListenerKind::Proxy, three_shards())
}
fn cluster() -> Planner {
    Planner::new(ListenerKind::Cluster, three_shards())
}

#[test]
fn a_key_goes_to_its_shard() {
    let mut p = proxy();
    assert_eq!(p.sent("get a"), [(2, false, 1)]);
    assert_eq!(p.sent("SET b v"), [(0, true, 1)]);
    assert_eq!(p.sent("mget a b c foo"), [(0, false, 1), (1, false, 1), (2, false, 2)]);
    assert_eq!(p.sent("mset a 1 foo 2"), [(2, true, 2)]);
    assert_eq!(p.sent("del a b"), [(0, true, 1), (2, true, 1)]);
    assert_eq!(p.sent("dbsize"), [(0, false, 1), (1, false, 1), (2, false, 1)]);
    assert_eq!(p.sent("flushall async"), [(0, true, 1), (1, true, 1), (2, true, 1)]);
    assert_eq!(p.local("flushdb foo"), "-ERR syntax error\r\n");
    assert_eq!(p.local("flushall sync sync"), "-ERR syntax error\r\n");
}

/// A view whose shard 2 (keys a, foo, somekey) is leased here until the clock reads 100, and its table: a = 1, and foo
/// as it expires at log time 1,000.
fn leased() -> (RoutingView, TableWriter, Arc<Published>) {
    let mut view = three_shards();
    let mut table = TableWriter::new(view.shards[2].range, 1);
    let published = Arc::new(Published::new(table.table().clone(), LogTime(500)));
    published.set_estimate(LogTime(500), Now::default());
    published.cell().open(5, 7, 100);
    for (key, expire_at) in [("a", 0), ("foo", 1_000)] {
        table.edit(KeyRef::new(0, key.as_bytes()).unwrap(), |_| ((), Edit::Put { value: b"1", expire_at }));
    }
    view.shards[2].published = Some(published.clone());
    (view, table, published)
}

#[test]
fn reads_of_one_key_are_answered_under_a_lease() {
    for kind in [ListenerKind::Proxy, ListenerKind::Cluster] {
        let (mut view, _table, _) = leased();
        view.shards[2].leader = Some(view.this);
        let mut p = Planner::new(kind, view);
        for (line, reply) in [
            ("get a", "$1\r\n1\r\n"),
            ("get foo", "$1\r\n1\r\n"),
            ("get somekey", "$-1\r\n"),
            ("strlen a", ":1\r\n"),
            ("strlen somekey", ":0\r\n"),
            ("exists a", ":1\r\n"),
            ("exists somekey", ":0\r\n"),
            ("type a", "+string\r\n"),
            ("type somekey", "+none\r\n"),
            ("mget a", "*1\r\n$1\r\n1\r\n"),
            ("getex a", "$1\r\n1\r\n"),
        ] {
            assert_eq!(p.local(line), reply, "{line}");
        }
        assert_eq!(p.state.reads_local, 11);
        // What is no read of one key, or not this shard's, takes the usual way.
        assert_eq!(p.sent("get b"), [(0, false, 1)]);
        assert_eq!(p.sent("mget a a"), [(2, false, 2)]);
        assert_eq!(p.sent("exists a a"), [(2, false, 2)]);
        assert_eq!(p.sent("ttl a"), [(2, false, 1)]);
        assert_eq!(p.sent("getdel a"), [(2, true, 1)]);
        // A transaction is one request, and queues.
        assert_eq!((p.local("multi"), p.local("get a")), ("+OK\r\n".into(), "+QUEUED\r\n".into()));
        assert_eq!(p.sent("exec"), [(2, false, 1)]);
        p.local("hello 3");
        assert_eq!(p.local("get somekey"), "_\r\n");
        p.local("select 1");
        assert_eq!(p.local("get a"), "_\r\n", "another database");
        assert_eq!(p.state.reads_local, 13);
    }
}

#[test]
fn a_read_that_may_not_be_answered_here_leaves_no_trace() {
    let (view, mut table, published) = leased();
    let mut p = Planner::new(ListenerKind::Proxy, view);
    let asks = |p: &mut Planner, why: &str| {
        for line in ["get a", "mget a"] {
            // `sent` refuses a plan that has written something.
            assert_eq!(p.sent(line), [(2, false, 1)], "{line}: {why}");
        }
        assert_eq!(p.state.reads_local, 0);
    };
    p.clock = || MonoTime(100);
    asks(&mut p, "the lease is over once the value is read");
    p.clock = || MonoTime(0);
    p.unanswered.sent(ShardId(2));
    asks(&mut p, "it would overtake");
    p.unanswered.answered(ShardId(2));
    p.unanswered.sent(ShardId(1));
    assert_eq!(p.local("get a"), "$1\r\n1\r\n", "another shard is not in the way");
    p.state.reads_local = 0;
    published.cell().changing();
    asks(&mut p, "half of a change");
    published.cell().changed();
    let soon = KeyRef::new(0, b"a").unwrap();
    table.edit(soon, |_| ((), Edit::Put { value: b"1", expire_at: 501 }));
    asks(&mut p, "only the log can say whether it has expired");
    table.edit(soon, |_| ((), Edit::Put { value: b"1", expire_at: 0 }));
    published.cell().close();
    asks(&mut p, "no lease");
    published.cell().open(6, 7, 100);
    assert_eq!(p.local("get a"), "$1\r\n1\r\n");
}

#[test]
fn the_selected_database_goes_into_the_operations() {
    let mut p = proxy();
    assert_eq!(p.local("select 3"), "+OK\r\n");
    let Plan::Send(c) = p.plan("get a").0 else { panic!() };
    let op = OpsRef::parse(&c.part(0).unwrap().ops).unwrap().iter().next().unwrap();
    assert_eq!(op.key().unwrap().db, 3);
}

#[test]
fn the_cluster_listener_sends_clients_to_the_leader() {
    let mut p = cluster();
    assert_eq!(p.sent("get b"), [(0, false, 1)]);
    assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
    assert_eq!(p.local("mget a b"), "-CROSSSLOT Keys in request don't hash to the same slot\r\n");
    assert_eq!(p.local("mget a a"), "-MOVED 15495 10.0.0.3:7381\r\n");
    assert_eq!(p.sent("mset {b}1 1 {b}2 2"), [(0, true, 2)]);
    // Reads stay linearizable: READONLY changes nothing.
    assert_eq!(p.local("readonly"), "+OK\r\n");
    assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
    assert_eq!((p.local("asking"), p.local("readwrite")), ("+OK\r\n".into(), "+OK\r\n".into()));
    assert_eq!(p.sent("dbsize"), [(0, false, 1)], "only what is led here");
    p.view.shards[2].leader = None;
    assert_eq!(p.sent("flushall"), [(0, true, 1), (2, true, 1)], "and what nobody leads, lest nobody covers it");
}

#[test]
fn nobody_is_sent_to_a_leader_that_is_not_sure() {
    let mut p = cluster();
    let cases: [fn(&mut RoutingView); 3] = [
        |v| v.shards[2].leader = None,
        |v| v.nodes.get_mut(&NodeId(3)).unwrap().live = false,
        |v| v.shards[2].own_term = Term(9),
    ];
    for change in cases {
        p.view = three_shards();
        change(&mut p.view);
        p.patient = true;
        assert!(matches!(p.plan("get a").0, Plan::Hold));
        p.patient = false;
        assert_eq!(p.sent("get a"), [(2, false, 1)], "proxied in the end");
    }
    p.view = three_shards();
    p.view.nodes.get_mut(&NodeId(3)).unwrap().addrs.redis_cluster = None;
    p.patient = true;
    assert_eq!(p.sent("get a"), [(2, false, 1)], "a node without a listener is never named");
}

#[test]
fn before_the_placement_is_known_commands_are_held() {
    for kind in [ListenerKind::Proxy, ListenerKind::Cluster] {
        let mut p = Planner::new(kind, RoutingView::default());
        for line in ["get a", "mget a a", "dbsize", "scan 0", "flushall"] {
            p.patient = true;
            assert!(matches!(p.plan(line).0, Plan::Hold), "{line}");
            p.patient = false;
            let loading = "-LOADING Crema is founding or joining its cluster; the command was not executed\r\n";
            assert_eq!(p.local(line), loading, "{line}");
        }
        p.patient = true;
        assert_eq!(p.local("ping"), "+PONG\r\n");
    }
}

#[test]
fn a_transaction_is_one_request() {
    let mut p = proxy();
    assert_eq!(p.local("multi"), "+OK\r\n");
    for line in ["set a 1", "ping", "mget a foo", "set a 1 ex", "select 1", "mset a 2", "del a foo", "ttl a"] {
        let wanted = if line == "mset a 2" { "mset a 2 foo 3" } else { line };
        assert_eq!(p.local(wanted), "+QUEUED\r\n");
    }
    let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
    assert_eq!(c.part_count(), 1);
    let part = c.part(0).unwrap().clone();
    assert_eq!((part.shard, part.write), (ShardId(2), true));
    let ops: Vec<_> = OpsRef::parse(&part.ops).unwrap().iter().map(|op| op.key().unwrap().db).collect();
    assert_eq!(ops, [0, 0, 0, 1, 1, 1, 1, 1], "SELECT works within the queue");
    assert_eq!(p.state.db, 1, "and beyond it");
    let bulk = |s: &'static str| Reply::Bulk(Bytes::from_static(s.as_bytes()));
    let answers =
        vec![Reply::Ok, bulk("1"), Reply::Nil, Reply::Ok, Reply::Ok, Reply::Int(1), Reply::Int(1), Reply::Int(1500)];
    c.complete(0, ClientResult::Reply(Reply::Array(answers)), &p.view, &mut Vec::new());
    let mut out = BytesMut::new();
    c.write(&mut out);
    let wanted = "*8\r\n+OK\r\n+PONG\r\n*2\r\n$1\r\n1\r\n$-1\r\n-ERR syntax error\r\n+OK\r\n+OK\r\n:2\r\n:2\r\n";
    assert_eq!(out, wanted);
}

#[test]
fn a_transaction_of_one_operation_is_an_array_too() {
    let mut p = proxy();
    p.local("multi");
    p.local("get a");
    let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
    c.complete(0, ClientResult::Reply(Reply::Nil), &p.view, &mut Vec::new());
    let mut out = BytesMut::new();
    c.write(&mut out);
    assert_eq!(out, "*1\r\n$-1\r\n");
    p.local("multi");
    p.local("get a");
    let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
    c.complete(0, ClientResult::NotApplied(Refusal::NoLeader(ShardId(2))), &p.view, &mut Vec::new());
    out.clear();
    c.write(&mut out);
    assert_eq!(out, "-CLUSTERDOWN shard 2 has no leader; the command was not executed\r\n");
}

#[test]
fn transactions_end_as_in_redis() {
    // Each as Redis 7.0.15 answers.
    let mut p = proxy();
    let mut all = |lines: &[&str]| lines.iter().map(|l| p.local(l)).collect::<String>();
    assert_eq!(all(&["exec"]), "-ERR EXEC without MULTI\r\n");
    assert_eq!(all(&["discard"]), "-ERR DISCARD without MULTI\r\n");
    assert_eq!(all(&["multi", "multi", "exec"]), "+OK\r\n-ERR MULTI calls can not be nested\r\n*0\r\n");
    assert_eq!(all(&["multi", "set a 1", "discard", "exec"]), "+OK\r\n+QUEUED\r\n+OK\r\n-ERR EXEC without MULTI\r\n");
    assert_eq!(
        all(&["multi", "FOO", "set a 1", "exec", "exec"]),
        "+OK\r\n-ERR unknown command 'FOO', with args beginning with: \r\n+QUEUED\r\n\
         -EXECABORT Transaction discarded because of previous errors.\r\n-ERR EXEC without MULTI\r\n"
    );
    assert_eq!(
        all(&["multi", "client FOO", "exec"]),
        "+OK\r\n-ERR unknown subcommand 'FOO'. Try CLIENT HELP.\r\n\
         -EXECABORT Transaction discarded because of previous errors.\r\n"
    );
    assert_eq!(
        all(&["multi", "exec a", "exec"]),
        "+OK\r\n-EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command\r\n\
         -ERR EXEC without MULTI\r\n"
    );
    assert_eq!(all(&["multi", "reset", "exec"]), "+OK\r\n+RESET\r\n-ERR EXEC without MULTI\r\n");
    assert_eq!(
        all(&["multi", "hello 3", "client getname", "exec", "client getname"])
            .split("*2\r\n")
            .map(|half| half.contains("%7\r\n") && half.ends_with("_\r\n_\r\n"))
            .collect::<Vec<_>>(),
        [false, true]
    );
    // Ours: what concerns all shards is no part of one entry.
    assert_eq!(
        all(&["hello 2", "multi", "dbsize", "exec"]).split_once("+OK").unwrap().1,
        "\r\n-ERR Command not allowed inside a transaction\r\n\
         -EXECABORT Transaction discarded because of previous errors.\r\n"
    );
}

#[test]
fn a_transaction_stays_on_one_shard() {
    let mut p = proxy();
    let crossslot = "-CROSSSLOT Keys in request don't hash to the same slot\r\n";
    for line in ["multi", "set a 1", "set b 1"] {
        p.local(line);
    }
    assert_eq!(p.local("exec"), crossslot);
    assert_eq!(p.local("exec"), "-ERR EXEC without MULTI\r\n");
    // Two slots of one shard are one shard; on the cluster listener they are two slots.
    for line in ["multi", "set a 1", "set foo 1"] {
        p.local(line);
    }
    assert_eq!(p.sent("exec"), [(2, true, 2)]);
    let mut p = cluster();
    for line in ["multi", "set b 1", "set bar 1"] {
        p.local(line);
    }
    assert_eq!(p.local("exec"), crossslot);
    assert_eq!(p.local("multi"), "+OK\r\n");
    assert_eq!(p.local("mget b bar"), crossslot);
    assert_eq!(p.local("exec"), "-EXECABORT Transaction discarded because of previous errors.\r\n");
    p.local("multi");
    assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
    assert_eq!(p.local("exec"), "-EXECABORT Transaction discarded because of previous errors.\r\n");
}

#[test]
fn a_held_transaction_loses_nothing() {
    let mut p = cluster();
    p.local("multi");
    p.local("set b 1");
    p.view.shards[0].leader = None;
    p.patient = true;
    assert!(matches!(p.plan("exec").0, Plan::Hold));
    assert!(matches!(p.plan("set b 2").0, Plan::Hold));
    p.view.shards[0].leader = Some(NodeId(1));
    assert_eq!(p.local("set b 2"), "+QUEUED\r\n");
    assert_eq!(p.sent("exec"), [(0, true, 2)]);
}

#[test]
fn queues_are_bounded() {
    let mut p = proxy();
    p.local("multi");
    let large = format!("set a {}", "x".repeat(1 << 20));
    let queued = (0..20).filter(|_| p.local(&large) == "+QUEUED\r\n").count();
    assert_eq!(queued, 7);
    assert!(p.local("exec").starts_with("-EXECABORT "));
    p.local("multi");
    for _ in 0..MAX_QUEUED {
        assert_eq!(p.local("get a"), "+QUEUED\r\n");
    }
    assert_eq!(p.local("get a"), "-ERR the transaction is too large\r\n");
}

#[test]
fn scan_goes_from_shard_to_shard() {
    let step = |p: &mut Planner, line: &str| {
        let (plan, _) = p.plan(line);
        let Plan::Send(c) = plan else { panic!("{line}: {plan:?}") };
        let part = c.part(0).unwrap();
        let op = OpsRef::parse(&part.ops).unwrap().iter().next();
        let Some(Op::Scan { cursor, count, pattern, .. }) = op else { panic!() };
        let crate::resp::inflight::Body::One { fmt: Fmt::Scan { then }, .. } = c.body else { panic!() };
        (part.shard.0, cursor, then, count, pattern.map(|p| String::from_utf8(p.to_vec()).unwrap()))
    };
    let slot = |s: u64| s << SCAN_SLOT_SHIFT;
    let mut p = proxy();
    assert_eq!(step(&mut p, "scan 0"), (0, 0, slot(5462), 10, None));
    let line = format!("scan {} match k* count 99999999 TYPE string", slot(5462));
    assert_eq!(step(&mut p, &line), (1, slot(5462), slot(10923), MAX_SCAN_COUNT, Some("k*".into())));
    let inside = slot(16383) + 77;
    assert_eq!(step(&mut p, &format!("scan {inside} match *")), (2, inside, 0, 10, None));
    let end = "*2\r\n$1\r\n0\r\n*0\r\n";
    assert_eq!(p.local(&format!("scan {}", u64::MAX)), end);
    assert_eq!(p.local("scan 0 type list"), end);
    for (line, error) in [
        ("scan x", "invalid cursor"),
        ("scan -1", "invalid cursor"),
        ("scan 18446744073709551616", "invalid cursor"),
        ("scan 0 count 0", "syntax error"),
        ("scan 0 count x", "value is not an integer or out of range"),
        ("scan 0 foo", "syntax error"),
        ("scan 0 foo bar", "syntax error"),
        ("scan 0 match", "syntax error"),
    ] {
        assert_eq!(p.local(line), format!("-ERR {error}\r\n"), "{line}");
    }
    // The shards led here; one that was begun is finished even if its leader has moved.
    let mut p = cluster();
    p.view.shards[0].leader = Some(NodeId(2));
    p.view.shards[1].leader = Some(NodeId(1));
    assert_eq!(step(&mut p, "scan 0"), (1, slot(5462), 0, 10, None));
    assert_eq!(step(&mut p, "scan 5"), (0, 5, slot(5462), 10, None));
    p.view.shards[1].leader = Some(NodeId(3));
    assert_eq!(p.local("scan 0"), end);
}

#[test]
fn passwords_guard_everything_but_the_greeting() {
    let mut p = proxy().with_password("secret");
    let noauth = "-NOAUTH Authentication required.\r\n";
    for line in ["get a", "ping", "multi", "command", "info"] {
        assert_eq!(p.local(line), noauth, "{line}");
    }
    // As in Redis, the table of commands comes first.
    assert!(p.local("FOO").starts_with("-ERR unknown command"));
    assert_eq!(p.local("get"), "-ERR wrong number of arguments for 'get' command\r\n");
    assert_eq!(p.local("auth x"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
    assert_eq!(p.local("auth default x"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
    assert_eq!(p.local("auth other secret"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
    assert_eq!(p.local("auth default secret x"), "-ERR syntax error\r\n");
    assert!(p.local("hello 3").starts_with("-NOAUTH HELLO must be called with the client already authenticated"));
    assert_eq!(p.local("hello 4"), "-NOPROTO unsupported protocol version\r\n");
    assert_eq!(p.local("ping"), noauth);
    assert_eq!(p.local("auth secret"), "+OK\r\n");
    assert_eq!(p.local("ping"), "+PONG\r\n");
    assert_eq!(p.local("reset"), "+RESET\r\n");
    assert_eq!(p.local("ping"), noauth);
    assert!(p.local("hello 3 auth default secret setname me").starts_with("%7\r\n"));
    assert_eq!(p.local("client getname"), "$2\r\nme\r\n");
}

#[test]
fn browsers_are_dropped_and_quit_closes() {
    let mut p = proxy();
    assert!(matches!(p.plan("POST / HTTP/1.1").0, Plan::Drop));
    assert!(matches!(p.plan("host: a").0, Plan::Drop));
    p.local("multi");
    let (plan, reply) = p.plan("quit");
    assert!(matches!(plan, Plan::Close));
    assert_eq!(reply, "+OK\r\n");
}

#[test]
fn what_fits_no_request_is_refused() {
    let mut p = proxy();
    let line = format!("mget{}", " a".repeat(MAX_OPS_PER_REQUEST + 1));
    let reply = p.local(&line);
    assert!(reply.starts_with("-ERR more than 16384 keys"), "{reply}");
}
