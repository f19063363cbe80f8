//! Real processes, real sockets, real kills. Few, and each with a deadline; protocols are proved in the simulator.
//!
//! Each test waits for its turn, so that clusters do not starve each other of processor time. A failed test shows the
//! last lines of every log and keeps them.

#[path = "process/addresses.rs"]
mod addresses;
#[path = "process/faults.rs"]
mod faults;
#[path = "process/kills.rs"]
mod kills;
#[path = "process/recovery.rs"]
mod recovery;
#[path = "process/voters.rs"]
mod voters;

use crema_tests::process::cluster::{self, Cluster};
use crema_tests::process::load::{Load, WriterReport, check_acknowledged};
use crema_tests::process::ports::{self, Use};
use crema_tests::process::resp::{Client, Value};
use crema_tests::process::{Failure, Process, Scratch, eventually, http, turn};
use rustix::process::Signal;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitStatus;
use std::time::Duration;

const SHARDS: u32 = 16;
/// A reply that takes longer than this is a failure; requests have a deadline of 5 s.
const REPLY: Duration = Duration::from_secs(15);
/// Pace of the writers: slow enough for an unoptimised build on a busy machine.
const PERIOD: Duration = Duration::from_millis(20);
/// Batches after which a writer ends by itself.
const MOST_BATCHES: u64 = 3_000;

fn client(cluster: &Cluster, node: u64) -> Client {
    Client::connect(cluster.addr(node, Use::Redis), REPLY).expect("the gateway accepts connections")
}

/// Sends a command and expects a reply.
#[track_caller]
fn expect(client: &mut Client, command: &str, reply: Value) {
    assert_eq!(client.call(command).expect(command), reply, "{command}");
}

#[track_caller]
fn expect_exit(status: ExitStatus, code: i32, output: &str) {
    assert_eq!(status.code(), Some(code), "{status}; output: {output}");
    assert!(!output.contains("panicked"), "{output}");
}

fn total_failed(reports: &[WriterReport]) -> u64 {
    reports.iter().map(|r| r.failed).sum()
}

fn survivors(cluster: &Cluster, gone: u64) -> Vec<(u64, SocketAddr)> {
    cluster.running().into_iter().filter(|n| *n != gone).map(|n| (n, cluster.addr(n, Use::Redis))).collect()
}

/// Everything the writers were told must be readable through every running gateway, and they were told no error.
#[track_caller]
fn expect_nothing_lost(cluster: &Cluster, reports: &[WriterReport]) {
    assert_eq!(
        total_failed(reports),
        0,
        "failed requests at surviving gateways: {reports:#?}",
        reports = failures(reports)
    );
    assert!(reports.iter().all(|r| !r.acknowledged.is_empty()), "every writer wrote");
    for node in cluster.running() {
        check_acknowledged(cluster.addr(node, Use::Redis), reports).unwrap();
    }
}

fn failures(reports: &[WriterReport]) -> Vec<&String> {
    reports.iter().flat_map(|r| &r.failures).collect()
}

#[test]
fn commands_work_through_every_gateway() {
    let _turn = turn().unwrap();
    let cluster = Cluster::ready(3, SHARDS).unwrap();
    for node in 1..=3 {
        let mut here = client(&cluster, node);
        // What one gateway acknowledged, the next one reads.
        let mut there = client(&cluster, node % 3 + 1);
        expect(&mut here, "PING", Value::Simple("PONG".into()));
        // Twenty keys lie in most of the shards, so that nearly every gateway forwards some of them.
        for i in 0..20 {
            expect(&mut here, &format!("SET key:{node}:{i} value-{i}"), Value::ok());
            expect(&mut there, &format!("GET key:{node}:{i}"), Value::bulk(format!("value-{i}")));
        }
        expect(&mut there, "GET absent", Value::Nil);
        expect(&mut here, "INCR shared", Value::Int(node as i64));
        expect(&mut there, "GET shared", Value::bulk(node.to_string()));

        expect(&mut here, &format!("MSET m:{node}:a 1 m:{node}:b 2 m:{node}:c 3"), Value::ok());
        let all = Value::Array(vec![Value::bulk("3"), Value::Nil, Value::bulk("1"), Value::bulk("2")]);
        expect(&mut there, &format!("MGET m:{node}:c absent m:{node}:a m:{node}:b"), all);
        expect(&mut there, &format!("DEL m:{node}:a m:{node}:b absent"), Value::Int(2));
        let rest = Value::Array(vec![Value::Nil, Value::Nil, Value::bulk("3")]);
        expect(&mut here, &format!("MGET m:{node}:a m:{node}:b m:{node}:c"), rest);

        expect(&mut here, &format!("EXPIRE key:{node}:0 100"), Value::Int(1));
        let ttl = there.call(&format!("TTL key:{node}:0")).unwrap();
        assert!(matches!(ttl, Value::Int(90..=100)), "{ttl:?}");
        expect(&mut here, &format!("PEXPIRE key:{node}:1 1"), Value::Int(1));
        eventually("expiry of a key", Duration::from_secs(10), || match there.call(&format!("GET key:{node}:1")) {
            Ok(Value::Nil) => Ok(()),
            other => Err(Failure::new(format!("{other:?}"))),
        })
        .unwrap();
        // Once gone, it stays gone, whoever is asked.
        for other in 1..=3 {
            expect(&mut client(&cluster, other), &format!("EXISTS key:{node}:1"), Value::Int(0));
        }
        let wrong = here.call(&format!("INCR key:{node}:2")).unwrap();
        assert_eq!(wrong, Value::Error("ERR value is not an integer or out of range".into()));
    }

    // One connection's commands take effect in order, and reply i answers request i, whoever leads the keys.
    let mut pipelined = client(&cluster, 2);
    let mut bytes = Vec::new();
    for i in 0..200 {
        let (key, value) = (format!("order:{}", i % 7), i.to_string());
        crema_tests::process::resp::encode(&[b"SET", key.as_bytes(), value.as_bytes()], &mut bytes);
        crema_tests::process::resp::encode(&[b"GET", key.as_bytes()], &mut bytes);
    }
    pipelined.send(&bytes).unwrap();
    for i in 0..200 {
        assert_eq!(pipelined.read().unwrap(), Value::ok(), "SET number {i}");
        assert_eq!(pipelined.read().unwrap(), Value::bulk(i.to_string()), "GET number {i}");
    }

    // The other port redirects, and where it redirects to is the leader's port of the same kind.
    let cluster_ports: Vec<SocketAddr> = (1..=3).map(|n| cluster.addr(n, Use::RedisCluster)).collect();
    let mut redirected = 0;
    for i in 0..20 {
        let get = format!("GET key:1:{}", i % 18 + 2);
        let value = Value::bulk(format!("value-{}", i % 18 + 2));
        let first = Client::connect(cluster_ports[0], REPLY).unwrap().call(&get).unwrap();
        let Value::Error(error) = first else {
            assert_eq!(first, value, "{get}");
            continue;
        };
        let target: Vec<&str> = error.split(' ').collect();
        assert!(matches!(target[..], ["MOVED", _, _]), "{get}: {error}");
        let leader: SocketAddr = target[2].parse().expect("MOVED names an address");
        assert!(cluster_ports[1..].contains(&leader), "{get}: {error}");
        expect(&mut Client::connect(leader, REPLY).unwrap(), &get, value);
        redirected += 1;
    }
    assert!(redirected > 0, "one node does not lead all of these keys");

    // Leaders are spread: nobody leads everything, nobody nothing.
    eventually("an even spread of leaders", Duration::from_secs(20), || {
        let led = cluster.leaders(1)?;
        let counts: Vec<usize> = led.values().map(Vec::len).collect();
        if counts.len() == 3 && counts.iter().all(|n| (4..=7).contains(n)) {
            Ok(())
        } else {
            Err(Failure::new(format!("{led:?}")))
        }
    })
    .unwrap();
}

#[test]
fn a_killed_node_loses_nothing_and_comes_back_as_a_voter() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready(3, SHARDS).unwrap();
    let victim = cluster.node_with_most_leaders().unwrap();
    let load = Load::start("kill", &survivors(&cluster, victim), SHARDS, PERIOD, MOST_BATCHES).unwrap();
    load.wait_batches(20, Duration::from_secs(20)).unwrap();
    cluster.kill(victim).unwrap();
    load.wait_batches(60, Duration::from_secs(30)).unwrap();
    let mut reports = load.finish().unwrap();
    expect_nothing_lost(&cluster, &reports);
    let survivor = cluster.running()[0];
    let led = cluster.leaders(survivor).unwrap();
    assert!(!led.contains_key(&victim), "the killed node leads nothing any more: {led:?}");

    // The same node again, under load: its memory is gone, so its replicas are made anew and filled by the others.
    let load = Load::start("restart", &survivors(&cluster, victim), SHARDS, PERIOD, MOST_BATCHES).unwrap();
    cluster.restart(victim).unwrap();
    cluster.wait_ready(Duration::from_secs(60)).unwrap();
    expect_voters_everywhere(&cluster, victim);
    load.wait_batches(20, Duration::from_secs(20)).unwrap();
    reports.extend(load.finish().unwrap());

    let (status, stdout, stderr) = cluster.client_command("status", victim, &[]).unwrap();
    expect_exit(status, 0, &stderr);
    assert!(stdout.contains(&format!("{SHARDS} shards at 3 of 3 replicas")), "{stdout}");
    assert!(!stdout.contains("2 of 3"), "{stdout}");

    // All that was acknowledged is served through the new gateway too, and it takes writes.
    expect_nothing_lost(&cluster, &reports);
    let mut gateway = client(&cluster, victim);
    for i in 0..20 {
        expect(&mut gateway, &format!("SET after:{i} {i}"), Value::ok());
        expect(&mut gateway, &format!("GET after:{i}"), Value::bulk(i.to_string()));
    }
    cluster.wait_equal_digests(Duration::from_secs(20)).unwrap();

    // It is a member like any other: it leads again, and what the others alone acknowledge meanwhile is its own as well.
    eventually("the restarted node leads again", Duration::from_secs(30), || {
        let led = cluster.leaders(victim)?;
        if led.contains_key(&victim) { Ok(()) } else { Err(Failure::new(format!("{led:?}"))) }
    })
    .unwrap();
    expect_nothing_lost(&cluster, &reports);
}

/// As `node` sees it, every shard has three voters, and it is one of them.
#[track_caller]
fn expect_voters_everywhere(cluster: &Cluster, node: u64) {
    let list = http::get_json(cluster.addr(node, Use::Http), "/v1/shards").unwrap();
    let list = list.as_array().expect("an array");
    assert_eq!(list.len(), SHARDS as usize);
    for shard in list {
        let replicas = shard["replicas"].as_array().expect("replicas");
        let voters = replicas.iter().filter(|r| r["role"] == "voter");
        let voters: Vec<u64> = voters.filter_map(|r| r["node"].as_u64()).collect();
        assert!(replicas.len() == 3 && voters.len() == 3 && voters.contains(&node), "{shard}");
    }
}

#[test]
fn a_stopped_node_fails_no_request() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready(3, SHARDS).unwrap();
    let victim = cluster.node_with_most_leaders().unwrap();
    let load = Load::start("stop", &survivors(&cluster, victim), SHARDS, PERIOD, MOST_BATCHES).unwrap();
    load.wait_batches(20, Duration::from_secs(20)).unwrap();
    let status = cluster.terminate(victim, Duration::from_secs(20)).unwrap();
    assert_eq!(status.code(), Some(0), "a planned stop ends well: {status}");
    load.wait_batches(40, Duration::from_secs(20)).unwrap();
    let reports = load.finish().unwrap();
    expect_nothing_lost(&cluster, &reports);
}

#[test]
fn bad_input_is_answered_and_the_node_lives() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready(3, SHARDS).unwrap();
    let mut good = client(&cluster, 1);
    expect(&mut good, "SET before 1", Value::ok());

    // What breaks the stream is answered with an error, then the connection closes.
    let too_long = format!("*1\r\n${}\r\n", u64::MAX);
    let broken: [&[u8]; 6] = [
        b"*99999999\r\n",
        b"*1\r\n$-5\r\n",
        b"*1\r\n:5\r\n",
        b"*x\r\n",
        b"*2\r\n$3\r\nGET\r\n$999999999999\r\n",
        too_long.as_bytes(),
    ];
    for bytes in broken {
        let mut bad = client(&cluster, 1);
        bad.send(bytes).unwrap();
        let text = String::from_utf8_lossy(bytes);
        match bad.read() {
            Ok(Value::Error(e)) => assert!(e.starts_with("ERR Protocol error"), "{text:?}: {e}"),
            other => panic!("{text:?}: {other:?}"),
        }
        assert!(bad.closes(), "{text:?}: the stream cannot be trusted any more");
    }
    // What is only wrong is answered, and the connection goes on.
    let mut wrong = client(&cluster, 1);
    for command in ["NOSUCHCOMMAND a b", "GET", "SET k", "SET k v EX nine", "INCRBY k x", "SELECT 99"] {
        let reply = wrong.call(command).unwrap();
        assert!(matches!(&reply, Value::Error(e) if e.starts_with("ERR ")), "{command}: {reply:?}");
    }
    let huge_key = "k".repeat(70_000);
    let reply = wrong.call(&format!("SET {huge_key} v")).unwrap();
    assert!(matches!(reply, Value::Error(_)), "a key over the limit: {reply:?}");
    expect(&mut wrong, "PING", Value::Simple("PONG".into()));

    // Garbage on every port of a node. The server may close while we still write.
    let noise: Vec<u8> = noise(64 * 1024);
    for purpose in [Use::Raft, Use::Http, Use::Redis, Use::RedisCluster] {
        for bytes in [&noise[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096], &[0; 4096]] {
            let mut stream = TcpStream::connect_timeout(&cluster.addr(1, purpose), REPLY).unwrap();
            stream.set_write_timeout(Some(REPLY)).unwrap();
            let _ = stream.write_all(bytes);
        }
    }
    let gossip = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for chunk in noise.chunks(1_000) {
        gossip.send_to(chunk, cluster.addr(1, Use::Gossip)).unwrap();
    }
    gossip.send_to(&[], cluster.addr(1, Use::Gossip)).unwrap();

    expect(&mut good, "GET before", Value::bulk("1"));
    for node in 1..=3 {
        let mut here = client(&cluster, node);
        for i in 0..10 {
            expect(&mut here, &format!("SET after:{node}:{i} x"), Value::ok());
        }
        assert_eq!(cluster.process(node).ended().unwrap(), None, "node {node} lives");
        assert_eq!(http::get(cluster.addr(node, Use::Http), "/livez").unwrap().0, 200);
        assert!(!cluster.process(node).stderr().contains("panicked"), "no panic at node {node}");
    }
    cluster.wait_ready(Duration::from_secs(10)).unwrap();
}

/// Bytes without structure, the same in every run.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn a_bad_start_ends_with_code_2_and_one_sentence() {
    let _turn = turn().unwrap();
    let scratch = Scratch::new().unwrap();
    let block = ports::reserve().unwrap();
    let base: Vec<String> = [
        ("node-id", "1".to_string()),
        ("initial-members", "1".to_string()),
        ("seeds", block.addr(1, Use::Gossip).to_string()),
        ("shards", "4".to_string()),
        ("gossip-addr", block.addr(1, Use::Gossip).to_string()),
        ("raft-addr", block.addr(1, Use::Raft).to_string()),
        ("redis-addr", block.addr(1, Use::Redis).to_string()),
        ("redis-cluster-addr", block.addr(1, Use::RedisCluster).to_string()),
        ("http-addr", block.addr(1, Use::Http).to_string()),
        ("advertise-host", "127.0.0.1".to_string()),
    ]
    .into_iter()
    .map(|(flag, value)| format!("--{flag}={value}"))
    .collect();
    // The start with one flag replaced or added, and a word that its sentence must have.
    let open = format!("--redis-addr=0.0.0.0:{}", block.port(1, Use::Redis));
    let open_raft = format!("--raft-addr=0.0.0.0:{}", block.port(1, Use::Raft));
    let cases = [
        ("--no-such-flag=1".to_string(), "--no-such-flag"),
        ("--node-id=zero".into(), "node-id"),
        ("--node-id=0".into(), "node"),
        ("--shards=0".into(), "shards"),
        ("--redis-addr=nowhere".into(), "redis-addr"),
        ("--config=/no/such/file.toml".into(), "/no/such/file.toml"),
        (open, "insecure"),
        (open_raft, "insecure"),
    ];
    for (number, (flag, word)) in cases.into_iter().enumerate() {
        let name = flag.split('=').next().unwrap_or_default().to_string();
        let mut args = vec!["start".to_string()];
        args.extend(base.iter().filter(|a| !a.starts_with(&format!("{name}="))).cloned());
        args.push(flag.clone());
        bad_start(&format!("case-{number}"), &scratch, &args, word);
    }

    let occupied = TcpListener::bind(block.addr(1, Use::Redis)).unwrap();
    let port = occupied.local_addr().unwrap().port().to_string();
    let mut args = vec!["start".to_string()];
    args.extend(base);
    bad_start("occupied", &scratch, &args, &port);
}

#[track_caller]
fn bad_start(name: &str, scratch: &Scratch, args: &[String], word: &str) {
    let shown = args.last().cloned().unwrap_or_default();
    let (status, stdout, stderr) = cluster::run(name, scratch, args).unwrap();
    expect_exit(status, 2, &format!("{shown}: {stderr}"));
    assert!(stderr.contains(word), "{shown}: the sentence names {word:?}: {stderr}");
    assert!(stdout.is_empty(), "{shown}: nothing on standard output: {stdout}");
    // One sentence; for flags the usage may follow.
    let lines = stderr.lines().filter(|l| !l.trim().is_empty()).count();
    assert!((1..=6).contains(&lines), "{shown}: {stderr}");
}

#[test]
fn a_second_node_of_the_same_id_is_refused() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready(3, SHARDS).unwrap();
    let mut first = client(&cluster, 1);
    expect(&mut first, "SET mine 1", Value::ok());
    // Clients of all three nodes work on meanwhile: a mistaken start must not disturb the one it imitates.
    let slow = Duration::from_millis(60);
    let load = Load::start("impostor", &survivors(&cluster, 0), SHARDS, slow, MOST_BATCHES).unwrap();
    let own = ports::reserve().unwrap();
    let mut second = cluster.impostor(1, &own).unwrap();
    let status = second.wait(Duration::from_secs(40)).unwrap();
    expect_exit(status, 2, &second.stderr());
    let text = second.stderr().to_lowercase();
    assert!(text.contains("in use") || text.contains("already"), "says that the id is taken: {text}");

    // The first goes on: it serves, is ready, and nobody lost anything.
    load.wait_batches(30, Duration::from_secs(20)).unwrap();
    let reports = load.finish().unwrap();
    expect_nothing_lost(&cluster, &reports);
    expect(&mut first, "GET mine", Value::bulk("1"));
    cluster.wait_ready(Duration::from_secs(20)).unwrap();
}

#[test]
fn dev_says_ready_and_ends_well() {
    let _turn = turn().unwrap();
    let scratch = Scratch::new().unwrap();
    let block = ports::reserve().unwrap();
    let mut dev = ready_dev(&scratch, &block, &[]);
    // Ready means that it serves at once, at every node.
    for node in 1..=3 {
        let mut here = Client::connect(block.addr(node, Use::Redis), REPLY).unwrap();
        expect(&mut here, &format!("SET at:{node} x"), Value::ok());
        expect(&mut here, &format!("GET at:{node}"), Value::bulk("x"));
        assert_eq!(http::get(block.addr(node, Use::Http), "/readyz").unwrap().0, 200, "node {node}");
    }
    dev.signal(Signal::TERM).unwrap();
    let status = dev.wait(Duration::from_secs(30)).unwrap();
    expect_exit(status, 0, &dev.stderr());
}

#[test]
fn dev_on_disk_goes_on_where_it_was_killed() {
    let _turn = turn().unwrap();
    let scratch = Scratch::new().unwrap();
    let block = ports::reserve().unwrap();
    let data = format!("--data-dir={}", scratch.path().join("data").display());
    for start in 0..3 {
        let mut dev = ready_dev(&scratch, &block, &[&data]);
        for node in 1..=3 {
            let mut here = Client::connect(block.addr(node, Use::Redis), REPLY).unwrap();
            for key in 0..start * 20 {
                expect(&mut here, &format!("GET key:{key}"), Value::bulk(key.to_string()));
            }
        }
        let mut here = Client::connect(block.addr(start % 3 + 1, Use::Redis), REPLY).unwrap();
        for key in start * 20..(start + 1) * 20 {
            expect(&mut here, &format!("SET key:{key} {key}"), Value::ok());
        }
        dev.kill().unwrap();
    }
}

/// `crema dev` with all its ports in `block`, once it says that it is ready.
#[track_caller]
fn ready_dev(scratch: &Scratch, block: &ports::Block, flags: &[&str]) -> Process {
    let mut args = vec!["dev".to_string(), "--shards=4".into()];
    let bases = [
        ("redis-port", Use::Redis),
        ("redis-cluster-port", Use::RedisCluster),
        ("gossip-port", Use::Gossip),
        ("raft-port", Use::Raft),
        ("http-port", Use::Http),
    ];
    args.extend(bases.map(|(flag, purpose)| format!("--{flag}={}", block.port(1, purpose))));
    args.extend(flags.iter().map(|flag| flag.to_string()));
    // A later one of that name appends to what the earlier ones wrote.
    let told = |text: &str| text.lines().filter(|l| l.starts_with("ready")).count();
    let before = told(&std::fs::read_to_string(scratch.path().join("dev.out")).unwrap_or_default());
    let mut dev = Process::spawn("dev", scratch, &args).unwrap();
    let ready = eventually("the line that begins with ready", Duration::from_secs(60), || {
        if let Some(status) = dev.ended()? {
            return Ok(Err(Failure::new(format!("dev ended: {status}"))));
        }
        if told(&dev.stdout()) > before { Ok(Ok(())) } else { Err(Failure::new(dev.stdout())) }
    });
    ready.unwrap().unwrap();
    dev
}
