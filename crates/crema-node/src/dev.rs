//! `crema dev`: a whole cluster on this machine.
//!
//! ```text
//!   crema dev -------------> n Nodes in this process
//!   crema dev --processes -> n children `crema start ... --stop-with-stdin`
//!                              stdin:  a pipe that we only hold open; it ends with us, however we end
//!                              stderr: read line by line, prefixed, passed on
//!                              stdout: its line that starts with `ready` is waited for
//! ```
//!
//! Prints the table of nodes and addresses at once, a line that starts with `ready` when every node is ready, and then
//! runs until it is told to stop. The cluster is stopped as a whole, so nobody waits for successors.

use crate::cli::{CliError, DevArgs, Door, http_get, say, table_text};
use crate::config::{Config, ConfigLayer};
use crate::node::Node;
use crate::run::Signals;
use comfy_table::{Table, presets};
use confique::{Config as _, Layer as _};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long children may take to end before they are killed.
const CHILD_GRACE: Duration = Duration::from_secs(5);
/// Period at which children and their readiness are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Period at which a cluster that is not ready yet says why.
const EXPLAIN: Duration = Duration::from_secs(5);
/// Longest line of a child's log that is passed on in one piece.
const MAX_LINE_BYTES: u64 = 16 * 1024;

/// Runs the cluster until it is told to stop, or fails.
///
/// Errors: ports that do not exist, overlap or are occupied ([`CliError::Usage`]); a node that fails
/// ([`CliError::Failed`]).
pub async fn dev(args: &DevArgs) -> Result<(), CliError> {
    let configs = plan(args)?;
    let _logs = crate::logs::start().map_err(CliError::Usage)?;
    let signals = Signals::listen()?;
    if args.processes { in_processes(args, &configs, signals).await } else { in_process(args, &configs, signals).await }
}

/// The configuration of every node.
fn plan(args: &DevArgs) -> Result<Vec<Config>, CliError> {
    let bases = [
        ("--redis-port", args.redis_port),
        ("--redis-cluster-port", args.redis_cluster_port),
        ("--raft-port", args.raft_port),
        ("--http-port", args.http_port),
        ("--gossip-port", args.gossip_port),
    ];
    for (i, (flag, base)) in bases.iter().enumerate() {
        if base.checked_add(args.nodes - 1).is_none() {
            return Err(CliError::Usage(format!("{flag} {base}: {} nodes need ports above 65535", args.nodes)));
        }
        let overlaps = |(_, other): &&(&str, u16)| base.abs_diff(*other) < args.nodes;
        if let Some((other_flag, other)) = bases[..i].iter().find(overlaps) {
            return Err(CliError::Usage(format!(
                "{other_flag} {other} and {flag} {base} overlap: node i of {} adds i - 1 to each",
                args.nodes
            )));
        }
    }
    let local = |base: u16, i: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, base + i));
    let seeds: Vec<_> = (0..args.nodes).map(|i| local(args.gossip_port, i).to_string()).collect();
    let node = |i: u16| {
        let layer = ConfigLayer {
            node_id: Some(u64::from(i) + 1),
            cluster: Some("dev".to_owned()),
            initial_members: Some((1..=u64::from(args.nodes)).collect()),
            seeds: Some(seeds.clone()),
            shards: Some(args.shards),
            replicas: Some(u32::from(args.nodes.min(3))),
            reads: Some(args.reads),
            data_dir: args.data_dir.as_ref().map(|dir| dir.join(format!("node-{}", i + 1))),
            gossip_addr: Some(local(args.gossip_port, i)),
            raft_addr: Some(local(args.raft_port, i)),
            redis_addr: Some(local(args.redis_port, i)),
            redis_cluster_addr: Some(local(args.redis_cluster_port, i)),
            http_addr: Some(local(args.http_port, i)),
            ..ConfigLayer::empty()
        };
        let config = Config::from_layer(layer.with_fallback(ConfigLayer::default_values()));
        config.map_err(|e| CliError::Usage(format!("{e:#}")))
    };
    (0..args.nodes).map(node).collect()
}

/// The flags that give a child this configuration.
fn flags(c: &Config) -> Vec<String> {
    let ids: Vec<_> = c.initial_members.iter().map(u64::to_string).collect();
    let pairs = [
        ("--node-id", c.node_id.to_string()),
        ("--cluster", c.cluster.clone()),
        ("--initial-members", ids.join(",")),
        ("--seeds", c.seeds.join(",")),
        ("--shards", c.shards.to_string()),
        ("--replicas", c.replicas.to_string()),
        ("--reads", c.reads.to_string()),
        ("--gossip-addr", c.gossip_addr.to_string()),
        ("--raft-addr", c.raft_addr.to_string()),
        ("--redis-addr", c.redis_addr.to_string()),
        ("--redis-cluster-addr", c.redis_cluster_addr.to_string()),
        ("--http-addr", c.http_addr.to_string()),
    ];
    let data_dir = c.data_dir.as_ref().map(|dir| ("--data-dir", dir.display().to_string()));
    pairs.into_iter().chain(data_dir).flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

/// The table of nodes and where to find them; `pids` is empty for nodes of this process.
fn show(configs: &[Config], pids: &[u32]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut header = vec!["node", "redis", "redis cluster", "http", "raft", "gossip"];
    if !pids.is_empty() {
        header.push("pid");
    }
    table.set_header(header);
    for (i, c) in configs.iter().enumerate() {
        let addrs = [c.redis_addr, c.redis_cluster_addr, c.http_addr, c.raft_addr, c.gossip_addr];
        let mut row = vec![c.node_id.to_string()];
        row.extend(addrs.iter().map(SocketAddr::to_string));
        row.extend(pids.get(i).map(u32::to_string));
        table.add_row(row);
    }
    let first = &configs[0];
    format!(
        "{}\n\nTry:  redis-cli -p {}\n      crema status --http-addr {}\n",
        table_text(&table),
        first.redis_addr.port(),
        first.http_addr
    )
}

fn say_ready(args: &DevArgs, begin: Instant) {
    let nodes = if args.nodes == 1 { "1 node".to_owned() } else { format!("{} nodes", args.nodes) };
    let seconds = begin.elapsed().as_secs_f64();
    say(format!("ready: {nodes}, {} shards, in {seconds:.1} s (Ctrl-C stops the cluster)", args.shards));
}

async fn in_process(args: &DevArgs, configs: &[Config], mut signals: Signals) -> Result<(), CliError> {
    let begin = Instant::now();
    let mut nodes = Vec::new();
    let mut result = Ok(());
    for config in configs {
        let settings = config.resolve().map_err(|e| CliError::Usage(e.to_string()))?;
        match Node::start(settings.node).await {
            Ok(node) => nodes.push(node),
            Err(error) => {
                result = Err(error.into());
                break;
            }
        }
    }
    if result.is_ok() {
        say(show(configs, &[]));
        let all_ready = async {
            for node in &nodes {
                if node.ready().await.is_err() {
                    return;
                }
            }
            say_ready(args, begin);
        };
        let serving = async {
            tokio::pin!(all_ready);
            let mut explain = tokio::time::interval(EXPLAIN);
            explain.tick().await;
            loop {
                tokio::select! {
                    () = &mut all_ready => break,
                    _ = explain.tick() => {
                        for node in &nodes {
                            if let Some(reason) = node.not_ready() {
                                tracing::info!("node {} is not ready: {reason}", node.config().node_id);
                            }
                        }
                    }
                }
            }
            std::future::pending::<()>().await
        };
        result = tokio::select! {
            _ = signals.next() => Ok(()),
            failed = first_failure(&nodes) => Err(failed),
            () = serving => Ok(()),
        };
    }
    let stop = async {
        // All at once: each would otherwise wait for the next to go.
        nodes.iter().for_each(Node::hurry);
        let mut stopping = tokio::task::JoinSet::new();
        for node in nodes.clone() {
            stopping.spawn(async move { node.shutdown().await });
        }
        while stopping.join_next().await.is_some() {}
    };
    tokio::select! {
        () = stop => result,
        _ = signals.next() => Err(CliError::Interrupted),
    }
}

/// Waits until any node fails.
async fn first_failure(nodes: &[Node]) -> CliError {
    let mut waiting = tokio::task::JoinSet::new();
    for node in nodes {
        let node = node.clone();
        waiting.spawn(async move {
            let failure = node.failed().await;
            CliError::Failed(format!("node {}: {failure}", node.config().node_id))
        });
    }
    loop {
        match waiting.join_next().await {
            Some(Ok(error)) => return error,
            Some(Err(_)) => {}
            None => std::future::pending().await,
        }
    }
}

/// One node's process.
struct Process {
    node: u64,
    child: Child,
    http_addr: String,
    ended: Option<ExitStatus>,
    ready: Arc<AtomicBool>,
}

/// The cluster's processes. However this is dropped, none of them survives it.
struct Processes(Vec<Process>);

impl Drop for Processes {
    fn drop(&mut self) {
        for process in &mut self.0 {
            if process.ended.is_none() {
                // An orderly end was tried before; this is the way out of an error.
                let _ = process.child.kill();
                let _ = process.child.wait();
            }
        }
    }
}

impl Processes {
    /// Notes which have ended; returns those that did just now.
    fn reap(&mut self) -> Vec<(u64, ExitStatus)> {
        let mut ended = Vec::new();
        for process in self.0.iter_mut().filter(|p| p.ended.is_none()) {
            if let Ok(Some(status)) = process.child.try_wait() {
                process.ended = Some(status);
                ended.push((process.node, status));
            }
        }
        ended
    }

    fn all_ended(&self) -> bool {
        self.0.iter().all(|p| p.ended.is_some())
    }

    /// Asks all to end, and kills after the grace those that did not.
    async fn stop(&mut self) {
        for process in &mut self.0 {
            // The end of the pipe says: the whole cluster stops, do not wait for others to take over.
            drop(process.child.stdin.take());
            if process.ended.is_none() {
                let _ = kill_process(Pid::from_child(&process.child), Signal::TERM);
            }
        }
        let until = Instant::now() + CHILD_GRACE;
        while Instant::now() < until {
            self.reap();
            if self.all_ended() {
                return;
            }
            tokio::time::sleep(LOOK / 2).await;
        }
        for process in self.0.iter_mut().filter(|p| p.ended.is_none()) {
            tracing::warn!("node {} (pid {}) did not end in time and is killed", process.node, process.child.id());
        }
    }
}

fn spawn(config: &Config) -> Result<Process, CliError> {
    use std::os::unix::process::CommandExt;
    let failed =
        |e: std::io::Error| CliError::Failed(format!("cannot start the process of node {}: {e}", config.node_id));
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg("start").args(flags(config)).arg("--stop-with-stdin");
    // The nodes are what the flags of `dev` say, whatever is set for others in this environment.
    for (name, _) in std::env::vars_os() {
        let ours = name.to_str().is_some_and(|n| n.starts_with("CREMA_") && n != crate::logs::LOG_VARIABLE);
        if ours {
            command.env_remove(&name);
        }
    }
    // A group of its own: Ctrl-C reaches only us, and we stop the nodes in order.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(failed)?;
    if let Some(log) = child.stderr.take() {
        let prefix = format!("[node {}] ", config.node_id);
        let reader = std::thread::Builder::new().name(format!("log {}", config.node_id));
        // Without its reader, the child's log is closed and the child goes on without one.
        let _ = reader.spawn(move || pass_on(log, &prefix, std::io::stderr()));
    }
    let ready = Arc::new(AtomicBool::new(false));
    if let Some(said) = child.stdout.take() {
        let ready = ready.clone();
        let reader = std::thread::Builder::new().name(format!("out {}", config.node_id));
        // Not by its HTTP port: another process may hold that, which is when the child is about to fail.
        let spawned = reader.spawn(move || await_ready(said, &ready));
        if let Err(error) = spawned {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(failed(error));
        }
    }
    Ok(Process { node: config.node_id, child, http_addr: config.http_addr.to_string(), ended: None, ready })
}

/// Reads a node's output to its end and notes when it says that it is ready.
fn await_ready(from: impl Read, ready: &AtomicBool) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.starts_with(b"ready") => ready.store(true, Ordering::Release),
            Ok(_) => {}
        }
    }
}

/// Copies lines, each with the prefix, until there are no more. Overlong lines are broken.
fn pass_on(from: impl Read, prefix: &str, mut to: impl Write) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        line.extend_from_slice(prefix.as_bytes());
        match from.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // In one write, so that lines of several nodes do not mix; a reader that is gone is no reason to stop reading.
        let _ = to.write_all(&line);
    }
}

async fn in_processes(args: &DevArgs, configs: &[Config], mut signals: Signals) -> Result<(), CliError> {
    let begin = Instant::now();
    let mut processes = Processes(Vec::new());
    for config in configs {
        processes.0.push(spawn(config)?);
    }
    let pids: Vec<u32> = processes.0.iter().map(|p| p.child.id()).collect();
    say(show(configs, &pids));
    let result = tokio::select! {
        _ = signals.next() => Ok(()),
        result = attend(args, &mut processes, begin) => result,
    };
    tokio::select! {
        () = processes.stop() => result,
        _ = signals.next() => Err(CliError::Interrupted),
    }
}

/// Waits until all are ready, says so, and watches them. A node may be killed to see what happens, so that its end is
/// only told; before all were ready, or when none is left, it is an error.
async fn attend(args: &DevArgs, processes: &mut Processes, begin: Instant) -> Result<(), CliError> {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut told_ready, mut explain_at) = (false, begin + EXPLAIN);
    loop {
        look.tick().await;
        for (node, status) in processes.reap() {
            let text = format!("node {node} ended: {status}");
            if !told_ready {
                // Its own message, prefixed, says why; its exit code says whose fault it is.
                return Err(if status.code() == Some(2) { CliError::Usage(text) } else { CliError::Failed(text) });
            }
            say(&text);
        }
        if processes.all_ended() {
            return Err(CliError::Failed("no node is left".to_owned()));
        }
        if told_ready {
            continue;
        }
        let explain = Instant::now() >= explain_at;
        let is_ready = |p: &Process| p.ready.load(Ordering::Acquire);
        if explain {
            for process in processes.0.iter().filter(|p| !is_ready(p)) {
                let addr = process.http_addr.clone();
                let answer =
                    tokio::task::spawn_blocking(move || http_get(&Door::open(addr), "/readyz", 64 * 1024)).await;
                match answer {
                    Ok(Ok((_, body))) => {
                        tracing::info!("node {} is not ready: {}", process.node, body.trim())
                    }
                    Ok(Err(error)) => tracing::info!("node {} is not ready: {error}", process.node),
                    Err(_) => {}
                }
            }
        }
        if explain {
            explain_at += EXPLAIN;
        }
        if processes.0.iter().all(is_ready) {
            told_ready = true;
            say_ready(args, begin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as CliCommand};
    use clap::Parser;

    fn args(line: &str) -> DevArgs {
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            CliCommand::Dev(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn node_i_adds_i_minus_one_to_each_port() {
        let configs = plan(&args("crema dev")).unwrap();
        assert_eq!(configs.len(), 3);
        let third = &configs[2];
        let ports = [third.redis_addr, third.redis_cluster_addr, third.gossip_addr, third.raft_addr, third.http_addr];
        assert_eq!(ports.map(|a| a.port()), [6381, 7381, 8003, 9003, 8082]);
        assert!(ports.iter().all(|a| a.ip().is_loopback()));
        for config in &configs {
            config.resolve().unwrap();
        }
        let one = plan(&args("crema dev --nodes 1")).unwrap();
        assert_eq!((one.len(), one[0].replicas), (1, 1));
    }

    #[test]
    fn ports_that_overlap_or_do_not_exist_are_usage_errors() {
        let error = plan(&args("crema dev --redis-cluster-port 6381")).unwrap_err();
        assert!(
            matches!(&error, CliError::Usage(text) if text.contains("--redis-port 6379 and --redis-cluster-port 6381")),
            "{error}"
        );
        plan(&args("crema dev --redis-cluster-port 6382")).unwrap();
        // Gossip listens on TCP too.
        let error = plan(&args("crema dev --gossip-port 9001")).unwrap_err();
        assert!(matches!(&error, CliError::Usage(text) if text.contains("--raft-port 9001")), "{error}");
        let error = plan(&args("crema dev --http-port 65534")).unwrap_err();
        assert!(matches!(&error, CliError::Usage(text) if text.contains("65535")), "{error}");
    }

    #[test]
    fn a_child_gets_the_same_configuration_by_flags() {
        for config in plan(&args("crema dev --nodes 4 --shards 32")).unwrap() {
            let line = ["crema".to_owned(), "start".to_owned()].into_iter().chain(flags(&config));
            let CliCommand::Start(start) = Cli::try_parse_from(line).unwrap().command else { panic!("start") };
            let parsed = Config::from_layer(start.settings.with_fallback(ConfigLayer::default_values())).unwrap();
            assert_eq!(format!("{parsed:?}"), format!("{config:?}"));
        }
    }

    #[test]
    fn the_table_names_every_address_and_pid() {
        let configs = plan(&args("crema dev")).unwrap();
        let text = show(&configs, &[11, 12, 13]);
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(
            rows[2],
            ["2", "127.0.0.1:6380", "127.0.0.1:7380", "127.0.0.1:8081", "127.0.0.1:9002", "127.0.0.1:8002", "12"]
        );
        assert!(text.contains("redis-cli -p 6379"));
        assert!(!show(&configs, &[]).contains("pid"));
        assert!(!text.lines().any(|l| l.starts_with("ready")), "scripts wait for that word");
    }

    #[test]
    fn only_the_word_itself_means_ready() {
        let ready = AtomicBool::new(false);
        await_ready(&b"not ready\nalmost\n"[..], &ready);
        assert!(!ready.load(Ordering::Acquire));
        await_ready(&b"hello\nready: node 1\nbye"[..], &ready);
        assert!(ready.load(Ordering::Acquire));
    }

    #[test]
    fn lines_are_prefixed_and_bounded() {
        let long = vec![b'x'; MAX_LINE_BYTES as usize + 1];
        let input = [b"one\ntwo\n".as_slice(), &long, b"\nend"].concat();
        let mut output = Vec::new();
        pass_on(&input[..], "[n] ", &mut output);
        let text = String::from_utf8(output).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[1], lines[3], lines[4]), ("[n] one", "[n] two", "[n] x", "[n] end"));
        assert_eq!(lines[2].len(), MAX_LINE_BYTES as usize + 4);
    }
}
