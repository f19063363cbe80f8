//! The front as clients meet it: real sockets, a driver made of state machines.

use crate::config::Secret;
use crate::resp::connection::{MAX_IN_FLIGHT, TURN};
use crate::resp::server::{FrontConfig, ListenerKind, Server, ServerHandle};
use crate::resp::testing::{FakeDriver, Verdict, key_of, three_shards};
use crema_core::{Epoch, NodeId, Reply, ShardId};
use crema_shard::{ClientRequest, ClientResult, Refusal, RoutingView};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longest time that anything here may take; reached only by a failure.
const LIMIT: Duration = Duration::from_secs(20);

struct Rig {
    server: ServerHandle,
    addr: SocketAddr,
    driver: FakeDriver,
    front: Arc<FrontConfig>,
}

async fn start(kind: ListenerKind, driver: FakeDriver, change: impl FnOnce(&mut FrontConfig)) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut front = FrontConfig::new(NodeId(1), "test");
    change(&mut front);
    let front = Arc::new(front);
    let server = Server::start(listener, kind, driver.client.clone(), front.clone());
    Rig { addr: server.local_addr().unwrap(), server, driver, front }
}

async fn proxy() -> Rig {
    start(ListenerKind::Proxy, FakeDriver::obedient(three_shards()), |_| {}).await
}

/// All shards leased to this node.
async fn leased(script: impl FnMut(&ClientRequest) -> Verdict + Send + 'static) -> Rig {
    start(ListenerKind::Proxy, FakeDriver::leased(three_shards(), Box::new(script)), |_| {}).await
}

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("nothing hangs")
}

/// Waits, by looking again, until something holds.
async fn until(holds: impl Fn() -> bool) {
    in_time(async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

impl Rig {
    async fn connect(&self) -> TcpStream {
        in_time(TcpStream::connect(self.addr)).await.unwrap()
    }

    /// Sends everything, closes its half, and reads until the server closes the other.
    async fn exchange(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        in_time(async {
            // Both ways at once: neither side may have room for everything.
            let (mut rd, mut wr) = stream.split();
            let send = async {
                wr.write_all(bytes).await.unwrap();
                wr.shutdown().await.unwrap();
            };
            let mut out = Vec::new();
            let (_, received) = tokio::join!(send, rd.read_to_end(&mut out));
            received.unwrap();
            out
        })
        .await
    }

    async fn says(&self, bytes: &[u8]) -> String {
        String::from_utf8(self.exchange(bytes).await).unwrap()
    }

    /// Makes sure that the server had time to do what it wrongly might: many round trips of another connection.
    async fn pings(&self) {
        let mut stream = self.connect().await;
        for _ in 0..50 {
            say(&mut stream, b"PING\r\n", "+PONG\r\n").await;
        }
    }
}

async fn say(stream: &mut TcpStream, bytes: &[u8], reply: &str) {
    stream.write_all(bytes).await.unwrap();
    hear(stream, reply).await;
}

async fn hear(stream: &mut TcpStream, reply: &str) {
    let mut got = vec![0; reply.len()];
    in_time(stream.read_exact(&mut got)).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&got), reply);
}

async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    in_time(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"", "nothing but the end");
}

fn bytes_of(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for w in words {
        bytes.extend(format!("${}\r\n{w}\r\n", w.len()).bytes());
    }
    bytes
}

fn lines(lines: &[&str]) -> Vec<u8> {
    lines.iter().flat_map(|l| bytes_of(&l.split(' ').collect::<Vec<_>>())).collect()
}

/// A conversation that Redis 7.0.15 has word for word.
const CONVERSATION: &[(&str, &str)] = &[
    ("SET a 1", "+OK\r\n"),
    ("get a", "$1\r\n1\r\n"),
    ("GET nosuch", "$-1\r\n"),
    ("SET a 2 NX", "$-1\r\n"),
    ("SET a 2 NX GET", "$1\r\n1\r\n"),
    ("SET a 2 XX GET", "$1\r\n1\r\n"),
    ("SETNX a 3", ":0\r\n"),
    ("SETNX b 3", ":1\r\n"),
    ("GETSET b 4", "$1\r\n3\r\n"),
    ("INCR a", ":3\r\n"),
    ("DECRBY a 10", ":-7\r\n"),
    ("INCRBYFLOAT a 0.5", "$4\r\n-6.5\r\n"),
    ("INCR a", "-ERR value is not an integer or out of range\r\n"),
    ("SET n 9223372036854775807", "+OK\r\n"),
    ("INCR n", "-ERR increment or decrement would overflow\r\n"),
    ("APPEND s abc", ":3\r\n"),
    ("APPEND s def", ":6\r\n"),
    ("STRLEN s", ":6\r\n"),
    ("TYPE s", "+string\r\n"),
    ("TYPE nosuch", "+none\r\n"),
    ("MSET k1 v1 k2 v2 k3 v3", "+OK\r\n"),
    ("MGET k1 nosuch k3 k2", "*4\r\n$2\r\nv1\r\n$-1\r\n$2\r\nv3\r\n$2\r\nv2\r\n"),
    ("EXISTS k1 k1 k2 nosuch", ":3\r\n"),
    ("TOUCH k1 k2", ":2\r\n"),
    ("DEL k1 k2 nosuch", ":2\r\n"),
    ("UNLINK k3", ":1\r\n"),
    ("TTL s", ":-1\r\n"),
    ("TTL nosuch", ":-2\r\n"),
    ("EXPIRE s 100", ":1\r\n"),
    ("TTL s", ":100\r\n"),
    ("EXPIRE s 50 GT", ":0\r\n"),
    ("EXPIRE s 200 NX", ":0\r\n"),
    ("PERSIST s", ":1\r\n"),
    ("PERSIST s", ":0\r\n"),
    ("PTTL s", ":-1\r\n"),
    ("SET a x EXAT 1", "+OK\r\n"),
    ("GET a", "$-1\r\n"),
    ("GETEX s EX 1000", "$6\r\nabcdef\r\n"),
    ("TTL s", ":1000\r\n"),
    ("GETEX s PERSIST", "$6\r\nabcdef\r\n"),
    ("GETDEL s", "$6\r\nabcdef\r\n"),
    ("GETDEL s", "$-1\r\n"),
    ("SETEX e 100 v", "+OK\r\n"),
    ("PSETEX e 100000 v", "+OK\r\n"),
    ("TTL e", ":100\r\n"),
    ("EXPIRE e -1", ":1\r\n"),
    ("GET e", "$-1\r\n"),
    ("SELECT 5", "+OK\r\n"),
    ("GET b", "$-1\r\n"),
    ("SET b five", "+OK\r\n"),
    ("DBSIZE", ":1\r\n"),
    ("SELECT 0", "+OK\r\n"),
    ("DBSIZE", ":2\r\n"),
    ("GET b", "$1\r\n4\r\n"),
    ("MULTI", "+OK\r\n"),
    ("SET {t}a 1", "+QUEUED\r\n"),
    ("INCR {t}a", "+QUEUED\r\n"),
    ("SET {t}a 1 foo", "+QUEUED\r\n"),
    ("MGET {t}a {t}b", "+QUEUED\r\n"),
    ("PING", "+QUEUED\r\n"),
    ("APPEND {t}a x", "+QUEUED\r\n"),
    ("INCR {t}a", "+QUEUED\r\n"),
    ("DEL {t}a {t}b", "+QUEUED\r\n"),
    (
        "EXEC",
        "*8\r\n+OK\r\n:2\r\n-ERR syntax error\r\n*2\r\n$1\r\n2\r\n$-1\r\n+PONG\r\n:2\r\n\
         -ERR value is not an integer or out of range\r\n:1\r\n",
    ),
    ("FLUSHDB", "+OK\r\n"),
    ("DBSIZE", ":0\r\n"),
    ("SCAN 0 TYPE list", "*2\r\n$1\r\n0\r\n*0\r\n"),
    ("FLUSHALL", "+OK\r\n"),
    ("SELECT 5", "+OK\r\n"),
    ("DBSIZE", ":0\r\n"),
    ("GET", "-ERR wrong number of arguments for 'get' command\r\n"),
    ("NOSUCH a", "-ERR unknown command 'NOSUCH', with args beginning with: 'a' \r\n"),
    ("QUIT", "+OK\r\n"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_as_redis_has_it() {
    let rig = proxy().await;
    let wanted: String = CONVERSATION.iter().map(|(_, r)| *r).collect();
    let stream = lines(&CONVERSATION.iter().map(|(c, _)| *c).collect::<Vec<_>>());
    assert_eq!(rig.says(&stream).await, wanted, "in one piece");
    // One by one, each answered before the next.
    let mut one = rig.connect().await;
    for (command, reply) in CONVERSATION {
        say(&mut one, &lines(&[command]), reply).await;
    }
    closed(&mut one).await;
    // In small pieces, as a slow network delivers them.
    let mut slow = rig.connect().await;
    slow.set_nodelay(true).unwrap();
    for chunk in stream.chunks(7) {
        slow.write_all(chunk).await.unwrap();
        tokio::task::yield_now().await;
    }
    hear(&mut slow, &wanted).await;
    closed(&mut slow).await;
    assert_eq!(rig.front.stats.commands.load(Ordering::Relaxed), 3 * CONVERSATION.len() as u64);
    assert_eq!(rig.front.stats.bytes_in.load(Ordering::Relaxed), 3 * stream.len() as u64);
    assert_eq!(rig.front.stats.bytes_out.load(Ordering::Relaxed), 3 * wanted.len() as u64);
    until(|| rig.driver.open_connections() == 0 && rig.front.stats.connected.load(Ordering::Relaxed) == 0).await;
    assert!(rig.front.clients().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scan_shows_every_key_once_over_all_shards() {
    let rig = proxy().await;
    let mut stream = rig.connect().await;
    let sets: Vec<u8> = (0..500).flat_map(|i| bytes_of(&["SET", &format!("key:{i}"), "v"])).collect();
    say(&mut stream, &sets, &"+OK\r\n".repeat(500)).await;
    let (mut cursor, mut keys, mut steps) = ("0".to_owned(), Vec::new(), 0);
    loop {
        steps += 1;
        // *2, the length of the cursor, the cursor, the number of keys, and a length before each key.
        let text = rig.says(&lines(&[&format!("SCAN {cursor} COUNT 50 MATCH key:*")])).await;
        cursor = text.split("\r\n").nth(2).unwrap().to_owned();
        keys.extend(text.split("\r\n").filter(|l| l.starts_with("key:")).map(str::to_owned));
        if cursor == "0" {
            break;
        }
    }
    keys.sort_unstable();
    let shown = keys.len();
    keys.dedup();
    assert_eq!((keys.len(), shown), (500, 500), "no key was moved meanwhile");
    assert!(steps > 3, "{steps}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_keep_the_order_of_the_commands() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let mut stream = rig.connect().await;
    // Slots of a, b and c lie on three shards; PING is answered here, behind what came before it.
    stream.write_all(&lines(&["GET a", "PING", "GET b", "ECHO x", "MGET c a", "CLIENT GETNAME"])).await.unwrap();
    until(|| rig.driver.kept() == 4).await;
    rig.driver.release(|r| ClientResult::Reply(Reply::Bulk(key_of(r).into())));
    hear(&mut stream, "$1\r\na\r\n+PONG\r\n$1\r\nb\r\n$1\r\nx\r\n*2\r\n$1\r\nc\r\n$1\r\na\r\n$-1\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_in_flight_are_bounded() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let mut stream = rig.connect().await;
    let (mut rd, mut wr) = stream.split();
    let total = 20_000;
    let all: Vec<u8> = (0..total).flat_map(|_| lines(&["GET a"])).collect();
    let driver = &rig.driver;
    let mut out = Vec::new();
    let mut most = 0;
    let work = async {
        while driver.seen().len() < total || driver.kept() > 0 {
            let kept = driver.kept();
            most = most.max(kept);
            driver.release(|_| ClientResult::Reply(Reply::Nil));
            tokio::task::yield_now().await;
        }
    };
    let send = async {
        wr.write_all(&all).await.unwrap();
        wr.shutdown().await.unwrap();
    };
    in_time(async { tokio::join!(work, send, rd.read_to_end(&mut out)) }).await.2.unwrap();
    assert_eq!(out.len(), total * "$-1\r\n".len());
    assert!(most <= MAX_IN_FLIGHT, "{most}");
    assert!(most > 100, "{most} is no pipeline");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_in_flight_are_bounded() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let stream = rig.connect().await;
    let (mut rd, mut wr) = stream.into_split();
    let megabyte = "x".repeat(1 << 20);
    let sender = tokio::spawn(async move {
        for _ in 0..40 {
            wr.write_all(&bytes_of(&["SET", "a", &megabyte])).await.unwrap();
        }
        wr
    });
    until(|| rig.driver.kept() == 8).await;
    rig.pings().await;
    assert_eq!(rig.driver.kept(), 8, "eight requests of a megabyte reach the limit");
    let mut out = vec![0; 40 * 5];
    let read = rd.read_exact(&mut out);
    let work = async {
        while rig.driver.seen().len() < 40 || rig.driver.kept() > 0 {
            assert!(rig.driver.kept() <= 9);
            rig.driver.release(|_| ClientResult::Reply(Reply::Ok));
            tokio::task::yield_now().await;
        }
    };
    in_time(async { tokio::join!(read, work) }).await.0.unwrap();
    assert_eq!(out, b"+OK\r\n".repeat(40));
    drop(in_time(sender).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_not_read_from() {
    let rig = proxy().await;
    let value = "v".repeat(256 * 1024);
    let mut stream = rig.connect().await;
    say(&mut stream, &bytes_of(&["SET", "a", &value]), "+OK\r\n").await;
    let total = 600;
    let gets: Vec<u8> = (0..total).flat_map(|_| lines(&["GET a"])).collect();
    stream.write_all(&gets).await.unwrap();
    until(|| rig.driver.seen().len() > 100).await;
    rig.pings().await;
    let seen = rig.driver.seen().len();
    assert!(seen < 400, "{seen} reads of 256 KiB were asked for, and none was taken away");
    let one = format!("${}\r\n{value}\r\n", value.len());
    for _ in 0..total {
        hear(&mut stream, &one).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_wait_for_the_placement() {
    let driver = FakeDriver::obedient(RoutingView::default());
    let rig = start(ListenerKind::Proxy, driver, |_| {}).await;
    let mut stream = rig.connect().await;
    stream.write_all(&lines(&["PING", "SET a 1", "GET a"])).await.unwrap();
    hear(&mut stream, "+PONG\r\n").await;
    until(|| rig.front.stats.holds.load(Ordering::Relaxed) == 1).await;
    rig.driver.view.store(Arc::new(three_shards()));
    hear(&mut stream, "+OK\r\n$1\r\n1\r\n").await;

    let driver = FakeDriver::obedient(RoutingView::default());
    let rig = start(ListenerKind::Proxy, driver, |f| f.deadline = Duration::from_millis(60)).await;
    let loading = "-LOADING Crema is founding or joining its cluster; the command was not executed\r\n";
    assert_eq!(rig.says(&lines(&["SET a 1", "PING"])).await, format!("{loading}+PONG\r\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_listener_names_leaders_and_waits_for_them() {
    let rig = start(ListenerKind::Cluster, FakeDriver::obedient(three_shards()), |_| {}).await;
    let mut stream = rig.connect().await;
    say(&mut stream, &lines(&["GET a", "SET b 1"]), "-MOVED 15495 10.0.0.3:7381\r\n+OK\r\n").await;
    let mut view = three_shards();
    view.shards[2].leader = None;
    rig.driver.view.store(Arc::new(view));
    stream.write_all(&lines(&["GET a", "GET b"])).await.unwrap();
    until(|| rig.front.stats.holds.load(Ordering::Relaxed) == 1).await;
    let mut view = three_shards();
    view.shards[2].leader = Some(NodeId(2));
    rig.driver.view.store(Arc::new(view));
    hear(&mut stream, "-MOVED 15495 10.0.0.2:7380\r\n$1\r\n1\r\n").await;

    let mut view = three_shards();
    view.shards[2].leader = None;
    let rig =
        start(ListenerKind::Cluster, FakeDriver::obedient(view), |f| f.deadline = Duration::from_millis(80)).await;
    assert_eq!(rig.says(&lines(&["GET a"])).await, "$-1\r\n", "proxied in the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protocol_error_ends_the_connection_after_what_came_before() {
    let rig = proxy().await;
    let mut bytes = lines(&["SET a 1", "PING"]);
    bytes.extend_from_slice(b"*1\r\n#oops\r\n");
    bytes.extend(lines(&["SET a 2"]).repeat(10_000));
    let mut stream = rig.connect().await;
    // The server may close while we still write.
    let _ = stream.write_all(&bytes).await;
    hear(&mut stream, "+OK\r\n+PONG\r\n-ERR Protocol error: expected '$', got '#'\r\n").await;
    closed(&mut stream).await;
    assert_eq!(rig.front.stats.protocol_errors.load(Ordering::Relaxed), 1);
    assert_eq!(rig.says(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n").await, "");
    assert_eq!(rig.says(&lines(&["GET a"])).await, "$1\r\n1\r\n", "nothing of what followed was executed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_and_their_time() {
    let driver = FakeDriver::obedient(three_shards());
    let rig = start(ListenerKind::Proxy, driver, |f| {
        f.requirepass = Some(Secret::new("secret"));
        f.auth_timeout = Duration::from_millis(200);
    })
    .await;
    let text = rig.says(&lines(&["GET a", "AUTH wrong", "AUTH secret", "GET a"])).await;
    let wanted = "-NOAUTH Authentication required.\r\n\
        -WRONGPASS invalid username-password pair or user is disabled.\r\n+OK\r\n$-1\r\n";
    assert_eq!(text, wanted);
    assert_eq!(rig.says(b"*11\r\n").await, "-ERR Protocol error: unauthenticated multibulk length\r\n");
    let mut known = rig.connect().await;
    say(&mut known, &lines(&["AUTH secret"]), "+OK\r\n").await;
    let mut silent = rig.connect().await;
    closed(&mut silent).await;
    say(&mut known, b"PING\r\n", "+PONG\r\n").await;
    // Back to a stranger, with a stranger's time.
    say(&mut known, b"RESET\r\n", "+RESET\r\n").await;
    say(&mut known, &lines(&["AUTH default secret"]), "+OK\r\n").await;
    assert_eq!(rig.front.stats.auth_failures.load(Ordering::Relaxed), 1);
    assert!(!format!("{:?}", rig.front).contains("secret"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_beyond_the_limit_are_told() {
    let driver = FakeDriver::obedient(three_shards());
    let rig = start(ListenerKind::Proxy, driver, |f| f.max_clients = 2).await;
    let (mut one, mut two) = (rig.connect().await, rig.connect().await);
    say(&mut one, &lines(&["CLIENT SETNAME first"]), "+OK\r\n").await;
    say(&mut two, &lines(&["PING"]), "+PONG\r\n").await;
    let mut three = rig.connect().await;
    hear(&mut three, "-ERR max number of clients reached\r\n").await;
    closed(&mut three).await;
    assert_eq!(rig.front.stats.rejected.load(Ordering::Relaxed), 1);
    let names: Vec<_> = rig.front.clients().iter().map(|c| c.name()).collect();
    assert_eq!(names, [b"first".as_slice().into(), b"".as_slice().into()]);
    drop(one);
    until(|| rig.front.stats.connected.load(Ordering::Relaxed) == 1).await;
    assert_eq!(rig.says(&lines(&["PING"])).await, "+PONG\r\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_lets_what_is_in_flight_finish() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let (mut busy, mut idle) = (rig.connect().await, rig.connect().await);
    say(&mut idle, b"PING\r\n", "+PONG\r\n").await;
    busy.write_all(&lines(&["GET a"])).await.unwrap();
    until(|| rig.driver.kept() == 1).await;
    let stop = rig.server.shutdown(LIMIT);
    let story = async {
        closed(&mut idle).await;
        rig.driver.release(|_| ClientResult::Reply(Reply::Nil));
        hear(&mut busy, "$-1\r\n").await;
        closed(&mut busy).await;
    };
    in_time(async { tokio::join!(stop, story) }).await;
    assert!(TcpStream::connect(rig.addr).await.is_err(), "nobody listens any more");
    in_time(rig.server.shutdown(LIMIT)).await;
    until(|| rig.driver.open_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_even_what_never_finishes() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let mut busy = rig.connect().await;
    busy.write_all(&lines(&["GET a"])).await.unwrap();
    until(|| rig.driver.kept() == 1).await;
    in_time(rig.server.shutdown(Duration::from_millis(20))).await;
    closed(&mut busy).await;
    until(|| rig.driver.open_connections() == 0).await;
    assert_eq!(rig.front.stats.connected.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_ends_leaves_nobody_waiting() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let mut rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let (mut waiting, mut later) = (rig.connect().await, rig.connect().await);
    say(&mut later, b"PING\r\n", "+PONG\r\n").await;
    waiting.write_all(&lines(&["SET a 1", "GET a"])).await.unwrap();
    until(|| rig.driver.kept() == 2).await;
    rig.driver.stop();
    hear(&mut waiting, "-UNKNOWN outcome unknown: the command may or may not have been executed\r\n-TRYAGAIN ").await;
    let gone = "-CLUSTERDOWN this node is shutting down; the command was not executed\r\n";
    say(&mut later, &lines(&["SET a 1"]), gone).await;
    closed(&mut later).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_requests_are_planned_again_once() {
    let mut refuse = [true, false, true, true, true, false].into_iter();
    let script = move |r: &crema_shard::ClientRequest| match r.shard == ShardId(2) && refuse.next() == Some(true) {
        true => Verdict::Answer(ClientResult::NotApplied(Refusal::WrongShard)),
        false => Verdict::Execute,
    };
    let rig = start(ListenerKind::Proxy, FakeDriver::new(three_shards(), Box::new(script)), |_| {}).await;
    let mut stream = rig.connect().await;
    say(&mut stream, &lines(&["SET a 1"]), "+OK\r\n").await;
    let twice = "-TRYAGAIN the slot is moving between shards; the command was not executed\r\n";
    say(&mut stream, &lines(&["SET a 2"]), twice).await;
    say(&mut stream, &lines(&["MGET b a c"]), "*3\r\n$-1\r\n$1\r\n1\r\n$-1\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_overtakes_what_was_planned_under_an_older_placement() {
    let keep = FakeDriver::new(three_shards(), Box::new(|_| Verdict::Keep));
    let rig = start(ListenerKind::Proxy, keep, |_| {}).await;
    let mut stream = rig.connect().await;
    stream.write_all(&lines(&["SET a 1"])).await.unwrap();
    until(|| rig.driver.kept() == 1).await;
    rig.driver.view.store(Arc::new(RoutingView { epoch: Epoch(8), ..three_shards() }));
    stream.write_all(&lines(&["SET a 2"])).await.unwrap();
    rig.pings().await;
    assert_eq!(rig.driver.kept(), 1);
    // It is sent again, and only what becomes of that lets the next one go.
    rig.driver.release(|_| ClientResult::NotApplied(Refusal::WrongShard));
    until(|| rig.driver.seen().len() == 2).await;
    rig.pings().await;
    assert_eq!((rig.driver.kept(), rig.driver.seen().len()), (1, 2));
    rig.driver.release(|_| ClientResult::Reply(Reply::Ok));
    until(|| rig.driver.kept() == 1).await;
    rig.driver.release(|_| ClientResult::Reply(Reply::Ok));
    hear(&mut stream, "+OK\r\n+OK\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_under_a_lease_is_the_same() {
    let rig = leased(|_| Verdict::Execute).await;
    let wanted: String = CONVERSATION.iter().map(|(_, r)| *r).collect();
    let stream = lines(&CONVERSATION.iter().map(|(c, _)| *c).collect::<Vec<_>>());
    assert_eq!(rig.says(&stream).await, wanted, "in one piece, where reads stand behind writes");
    let before = rig.front.stats.reads_local.load(Ordering::Relaxed);
    let mut one = rig.connect().await;
    for (command, reply) in CONVERSATION {
        say(&mut one, &lines(&[command]), reply).await;
    }
    closed(&mut one).await;
    let local = rig.front.stats.reads_local.load(Ordering::Relaxed) - before;
    // Six GET, three of STRLEN and TYPE; none of those within MULTI.
    assert_eq!(local, 9, "answered without the driver");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_does_not_overtake_its_connections_writes() {
    let rig = leased(|r| if r.write { Verdict::Keep } else { Verdict::Execute }).await;
    let (mut busy, mut idle) = (rig.connect().await, rig.connect().await);
    // a is of shard 2, b of shard 0: the read of b need not wait, but its reply must.
    busy.write_all(&lines(&["SET a 1", "GET b", "GET a", "GET b"])).await.unwrap();
    until(|| rig.driver.seen().len() == 2).await;
    say(&mut idle, &lines(&["GET a", "GET b"]), "$-1\r\n$-1\r\n").await;
    let seen: Vec<_> = rig.driver.seen().into_iter().map(|(_, shard, write)| (shard.0, write)).collect();
    assert_eq!(seen, [(2, true), (2, false)], "only what stands behind the write asks the driver");
    rig.driver.release(|_| ClientResult::Reply(Reply::Ok));
    hear(&mut busy, "+OK\r\n$-1\r\n$-1\r\n$-1\r\n").await;
    // Nothing is on its way any more.
    say(&mut busy, &lines(&["GET a"]), "$-1\r\n").await;
    assert_eq!(rig.driver.seen().len(), 2);
    assert_eq!(rig.front.stats.reads_local.load(Ordering::Relaxed), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_reads_under_a_lease_is_answered_whole() {
    let rig = leased(|_| Verdict::Execute).await;
    let mut stream = rig.connect().await;
    let value = "v".repeat(10_000);
    say(&mut stream, &bytes_of(&["SET", "a", &value]), "+OK\r\n").await;
    // More than the output may hold: the connection stops planning, and goes on when the client has read.
    let total = 2_000;
    let one = format!("${}\r\n{value}\r\n", value.len());
    let got = rig.exchange(&lines(&["GET a"]).repeat(total)).await;
    assert_eq!(got.len(), total * one.len());
    assert!(got.chunks(one.len()).all(|c| c == one.as_bytes()));
    assert_eq!(rig.driver.seen().len(), 1, "the driver has only seen the write");
    assert_eq!(rig.front.stats.reads_local.load(Ordering::Relaxed), total as u64);
}

#[tokio::test]
async fn a_flood_of_reads_leaves_others_their_turn() {
    let rig = leased(|_| Verdict::Execute).await;
    let mut stream = std::net::TcpStream::connect(rig.addr).unwrap();
    let mut replies = stream.try_clone().unwrap();
    // Both ends of the client have threads of their own; all of the server shares one with this test.
    let line = b"GET a\r\n";
    let total = 500_000;
    let sender = std::thread::spawn(move || {
        std::io::Write::write_all(&mut stream, &line.repeat(total)).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let receiver = std::thread::spawn(move || std::io::copy(&mut replies, &mut std::io::sink()).unwrap());
    let commands = || rig.front.stats.commands.load(Ordering::Relaxed);
    let (mut last, mut most) = (0, 0);
    in_time(async {
        while commands() < total as u64 {
            tokio::task::yield_now().await;
            most = most.max(commands() - last);
            last = commands();
        }
    })
    .await;
    assert!(most <= TURN, "{most} commands in a row");
    sender.join().unwrap();
    let received = in_time(tokio::task::spawn_blocking(|| receiver.join().unwrap())).await.unwrap();
    assert_eq!(received, total as u64 * 5, "every reply is $-1 and its line end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_lost_leads_back_to_the_driver() {
    let rig = leased(|_| Verdict::Execute).await;
    let mut stream = rig.connect().await;
    say(&mut stream, &lines(&["SET a 1"]), "+OK\r\n").await;
    say(&mut stream, &lines(&["GET a"]), "$1\r\n1\r\n").await;
    assert_eq!(rig.driver.seen().len(), 1);
    for shard in &rig.driver.view.load().shards {
        shard.published.as_ref().unwrap().cell().close();
    }
    say(&mut stream, &lines(&["GET a", "PING"]), "$1\r\n1\r\n+PONG\r\n").await;
    assert_eq!(rig.driver.seen().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_reach_the_client() {
    let script = |r: &crema_shard::ClientRequest| {
        Verdict::Answer(match r.shard.0 {
            0 => ClientResult::NotApplied(Refusal::NoLeader(r.shard)),
            1 => ClientResult::Unknown,
            _ => ClientResult::NotApplied(Refusal::Busy(r.shard)),
        })
    };
    let rig = start(ListenerKind::Proxy, FakeDriver::new(three_shards(), Box::new(script)), |_| {}).await;
    let text = rig.says(&lines(&["SET b 1", "SET c 1", "SET a 1"])).await;
    let wanted = "-CLUSTERDOWN shard 0 has no leader; the command was not executed\r\n\
        -UNKNOWN outcome unknown: the command may or may not have been executed\r\n\
        -TRYAGAIN shard 2 did not take the command in time; it was not executed\r\n";
    assert_eq!(text, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn noise_on_the_wire_ends_in_a_reply_or_a_close() {
    let rig = proxy().await;
    let mut seed: u64 = 0xcafe_f00d_dead_beef;
    eprintln!("seed {seed:#x}");
    let mut noise = move || {
        seed ^= seed >> 12;
        seed ^= seed << 25;
        seed ^= seed >> 27;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let words = [
        "GET",
        "SET",
        "a",
        "b",
        "1",
        "-1",
        "MULTI",
        "EXEC",
        "MGET",
        "SCAN",
        "0",
        "COUNT",
        "HELLO",
        "3",
        "CLIENT",
        "LIST",
        "COMMAND",
        "GETKEYS",
        "EX",
        "MSET",
        "INFO",
        "CONFIG",
        "*",
        "[a-",
        "CLUSTER",
        "NODES",
        "DEL",
        "EXPIRE",
        "x{y}",
        "GETEX",
        "PERSIST",
        "INCRBYFLOAT",
        "1e400",
        "DOCS",
        "SELECT",
        "15",
        "RESET",
        "DISCARD",
        "KEYSLOT",
        "WAIT",
    ];
    for _ in 0..300 {
        let mut bytes = Vec::new();
        for _ in 0..noise() % 30 {
            let chosen: Vec<&str> = (0..=noise() % 5).map(|_| words[(noise() % words.len() as u64) as usize]).collect();
            bytes.extend(bytes_of(&chosen));
            if noise().is_multiple_of(40) {
                bytes.push(noise() as u8);
            }
        }
        rig.exchange(&bytes).await;
    }
    until(|| rig.front.stats.connected.load(Ordering::Relaxed) == 0).await;
}
