//! The command line: what it accepts, and the commands that only ask a running node.
//!
//! ```text
//!   crema dev | start ------------------> dev.rs, node.rs           (run until told to stop)
//!   crema status | members | shards ----> GET over a plain TCP stream -> admin.rs's bodies -> table or JSON
//!   crema recover | voters -------------> POST, likewise -> recover.rs, voters.rs
//! ```
//!
//! Exit codes: 0 done, 1 it failed while running (also: the node cannot be reached), 2 a flag, file, address or other
//! configuration is wrong.

use crate::admin::{MemberBody, ShardBody, StatusBody};
use crate::config::{Reads, Secret, StartArgs};
use crate::recover::RecoverArgs;
use crate::voters::VotersCommand;
use clap::{Args, Parser, Subcommand};
use comfy_table::{Cell, CellAlignment, Table, presets};
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Longest time for connecting to one address of the admin API.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest time for a whole request.
const HTTP_TIMEOUT: Duration = Duration::from_secs(10);
/// Most groups without a leader that `crema status` names.
const MAX_DOWN_SHOWN: usize = 10;
/// Longest answer read; 16,384 shards with seven replicas stay far below.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// A strongly consistent, sharded, in-memory cache cluster.
#[derive(Debug, Parser)]
#[command(name = "crema", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole cluster on this machine, to try things out.
    Dev(DevArgs),
    /// Run one node.
    Start(Box<StartArgs>),
    /// Show one node and its cluster in a few lines.
    Status(AskArgs),
    /// Show the nodes.
    Members(AskArgs),
    /// Show every shard, its leader and replicas, or those that move.
    Shards(ShardsArgs),
    /// Show who may hold replicas, and change it.
    #[command(subcommand)]
    Voters(VotersCommand),
    /// Say which groups have lost their majority for good, and make them writable again with what is left.
    Recover(RecoverArgs),
}

/// Flags of `crema dev`. Node i adds i - 1 to each port.
#[derive(Clone, Debug, Args)]
pub struct DevArgs {
    /// Number of nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub nodes: u16,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub shards: u32,
    /// How reads are confirmed: see `crema start --help`.
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub reads: Reads,
    /// Keep each node's log and data on disk, in a directory node-I within this one.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<std::path::PathBuf>,
    /// Run each node as a process of its own, so that one can be killed. Their process ids are printed.
    #[arg(long)]
    pub processes: bool,
    /// First port for Redis clients.
    #[arg(long, value_name = "PORT", default_value_t = 6379, value_parser = clap::value_parser!(u16).range(1..))]
    pub redis_port: u16,
    /// First port for Redis Cluster clients.
    #[arg(long, value_name = "PORT", default_value_t = 7379, value_parser = clap::value_parser!(u16).range(1..))]
    pub redis_cluster_port: u16,
    /// First port for gossip, UDP and TCP.
    #[arg(long, value_name = "PORT", default_value_t = 8001, value_parser = clap::value_parser!(u16).range(1..))]
    pub gossip_port: u16,
    /// First port for connections between nodes.
    #[arg(long, value_name = "PORT", default_value_t = 9001, value_parser = clap::value_parser!(u16).range(1..))]
    pub raft_port: u16,
    /// First port for HTTP.
    #[arg(long, value_name = "PORT", default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    pub http_port: u16,
}

/// Where to ask, and with which password.
#[derive(Clone, Debug, Args)]
pub struct HttpArgs {
    /// HTTP address of any node.
    #[arg(long, value_name = "HOST:PORT", env = "CREMA_HTTP_ADDR", default_value = "127.0.0.1:8080")]
    pub http_addr: String,
    /// File with the password, if the nodes have one.
    #[arg(long, value_name = "FILE", env = "CREMA_REQUIREPASS_FILE")]
    pub requirepass_file: Option<PathBuf>,
}

impl HttpArgs {
    /// Reads the password.
    ///
    /// Errors: the file cannot be read ([`CliError::Usage`]).
    pub(crate) fn door(&self) -> Result<Door, CliError> {
        let password = self.requirepass_file.as_deref().map(crate::config::read_password).transpose();
        Ok(Door { addr: self.http_addr.clone(), password: password.map_err(|e| CliError::Usage(e.to_string()))? })
    }
}

/// A node's HTTP address, and what opens it.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    pub(crate) addr: String,
    pub(crate) password: Option<Secret>,
}

impl Door {
    /// One without a password.
    pub(crate) fn open(addr: impl Into<String>) -> Door {
        Door { addr: addr.into(), password: None }
    }
}

/// Flags of the commands that ask a running node.
#[derive(Clone, Debug, Args)]
pub struct AskArgs {
    /// Where to ask.
    #[command(flatten)]
    pub at: HttpArgs,
    /// Print the API's JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `crema shards`.
#[derive(Clone, Debug, Args)]
pub struct ShardsArgs {
    /// What they have in common.
    #[command(flatten)]
    pub ask: AskArgs,
    /// Show the shards whose replicas move, and how many are still to.
    #[arg(long)]
    pub moves: bool,
    /// Follow the moves to their end.
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
}

/// Why a command ended without success: what to print, and the exit code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// A flag, file or address is wrong: correct it. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It failed while running: see the reason. Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Ended at once by a second signal. Exit code 130.
    #[error("ended at once")]
    Interrupted,
}

impl CliError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Failed(_) => 1,
            CliError::Interrupted => 130,
        }
    }
}

/// Prints a line to standard output. A closed pipe is the reader's choice and no error.
pub(crate) fn say(line: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Runs `status`, `members` or `shards`.
///
/// Errors: the node cannot be reached or answers nonsense ([`CliError::Failed`]), or the address is none
/// ([`CliError::Usage`]).
pub fn ask(command: Ask, args: &AskArgs) -> Result<(), CliError> {
    let text = fetch(&args.at.door()?, command.path())?;
    if args.json {
        say(text.trim_end());
        return Ok(());
    }
    let unreadable = |e: serde_json::Error| {
        CliError::Failed(format!("{} answers something else than this program's admin API: {e}", args.at.http_addr))
    };
    say(match command {
        Ask::Status => show_status(&serde_json::from_str(&text).map_err(unreadable)?),
        Ask::Members => show_members(&serde_json::from_str::<Vec<MemberBody>>(&text).map_err(unreadable)?),
        Ask::Shards => show_shards(&serde_json::from_str::<Vec<ShardBody>>(&text).map_err(unreadable)?),
    });
    Ok(())
}

/// What to ask a node for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// `/v1/status`.
    Status,
    /// `/v1/members`.
    Members,
    /// `/v1/shards`.
    Shards,
}

impl Ask {
    fn path(self) -> &'static str {
        match self {
            Ask::Status => "/v1/status",
            Ask::Members => "/v1/members",
            Ask::Shards => "/v1/shards",
        }
    }
}

/// The body of a successful GET; any other answer is an error that carries the server's reason.
fn fetch(door: &Door, path: &str) -> Result<String, CliError> {
    let (code, body) = http_get(door, path, MAX_ANSWER_BYTES)?;
    if code == 200 {
        return Ok(body);
    }
    let reason = serde_json::from_str::<serde_json::Value>(&body).ok();
    let reason = reason.as_ref().and_then(|v| v["reason"].as_str()).unwrap_or("no reason given");
    Err(CliError::Failed(format!("{} answered {code} to {path}: {reason}", door.addr)))
}

/// One blocking GET, of at most about 13 seconds an address of the name.
///
/// Errors: as [`http_request`].
pub(crate) fn http_get(door: &Door, path: &str, most_bytes: usize) -> Result<(u16, String), CliError> {
    http_request(door, path, None, most_bytes, HTTP_TIMEOUT)
}

/// One blocking request: GET, or POST of a body in JSON. HTTP/1.0, so that the answer is never chunked and ends with the
/// connection.
///
/// Errors: as [`ask`], and an answer of more than `most_bytes`, or after more than `timeout`.
pub(crate) fn http_request(
    door: &Door,
    path: &str,
    body: Option<&str>,
    most_bytes: usize,
    timeout: Duration,
) -> Result<(u16, String), CliError> {
    let addr = door.addr.as_str();
    let failed = |what: &str, e: &dyn std::fmt::Display| CliError::Failed(format!("{what} {addr}: {e}"));
    let well_formed = addr.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !well_formed || addr.bytes().any(|b| b.is_ascii_control() || b == b' ') {
        return Err(CliError::Usage(format!("{addr:?} is not of the form HOST:PORT")));
    }
    let targets: Vec<_> = addr.to_socket_addrs().map_err(|e| failed("cannot resolve", &e))?.take(8).collect();
    let mut stream = Err(std::io::Error::other("the name has no address"));
    for target in targets {
        stream = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT);
        if stream.is_ok() {
            break;
        }
    }
    let mut stream = stream.map_err(|e| failed("cannot connect to", &e))?;
    let deadline = Instant::now() + timeout;
    stream.set_write_timeout(Some(HTTP_TIMEOUT)).map_err(|e| failed("cannot use the connection to", &e))?;
    let password = door.password.as_ref().map(Secret::expose);
    if password.is_some_and(|p| !p.bytes().all(|b| b.is_ascii_graphic())) {
        return Err(CliError::Usage("the password has characters that HTTP cannot carry".to_owned()));
    }
    let bearer = password.map_or_else(String::new, |p| format!("Authorization: Bearer {p}\r\n"));
    let head = format!("Host: {addr}\r\nAccept: application/json\r\nConnection: close\r\n{bearer}");
    let request = match body {
        None => format!("GET {path} HTTP/1.0\r\n{head}\r\n"),
        Some(body) => {
            let length = body.len();
            format!(
                "POST {path} HTTP/1.0\r\n{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
            )
        }
    };
    stream.write_all(request.as_bytes()).map_err(|e| failed("cannot ask", &e))?;

    let mut answer = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        // The timeout of a socket is one of each read; a trickling server must not hold us for ever.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("no complete answer from", &"timed out"));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| failed("cannot use the connection to", &e))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed("no complete answer from", &e)),
        }
        if answer.len() > most_bytes {
            return Err(failed("no usable answer from", &"it is too long"));
        }
    }
    parse_answer(&answer).ok_or_else(|| failed("no complete HTTP answer from", &"is this a node's HTTP address?"))
}

/// Status code and body of a whole answer; `None` if it is not HTTP or shorter than it says.
fn parse_answer(answer: &[u8]) -> Option<(u16, String)> {
    let split = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..split]).ok()?;
    let body = &answer[split + 4..];
    let mut lines = head.split("\r\n");
    let mut status_line = lines.next()?.split(' ');
    if !status_line.next()?.starts_with("HTTP/1.") {
        return None;
    }
    let code = status_line.next()?.parse().ok()?;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") && value.trim().parse::<usize>().ok()? > body.len() {
            return None;
        }
    }
    Some((code, String::from_utf8_lossy(body).into_owned()))
}

/// Text from the network for a terminal: control characters would let a node rewrite what the operator sees.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(crate) fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A table as text, without the padding at its edges.
pub(crate) fn table_text(table: &Table) -> String {
    let edge = |line: String| line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()).to_owned();
    table.lines().map(edge).collect::<Vec<_>>().join("\n")
}

pub(crate) fn or_dash(value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// `1 shard`, `2 shards`.
fn shards(n: u32) -> String {
    format!("{n} shard{}", if n == 1 { "" } else { "s" })
}

fn show_status(s: &StatusBody) -> String {
    let ready = match &s.reason {
        None if s.ready => "yes".to_owned(),
        None => "no".to_owned(),
        Some(reason) => format!("no: {}", plain(reason)),
    };
    let mut leaders = format!("this node leads {} of {}", s.leaders, shards(s.shards));
    if s.leaderless > 0 {
        leaders.push_str(&format!("; {} without a known leader", s.leaderless));
    }
    let replication = s.replication.iter().map(|line| {
        let ReplicationLine { shards: n, standing, wanted } = *line;
        format!("{} at {standing} of {wanted} replicas", shards(n))
    });
    let replication = replication.collect::<Vec<_>>().join(", ");
    let rows = [
        (
            "cluster",
            format!("{} {}", plain(&s.cluster), s.uuid.as_deref().map_or("(not founded or joined yet)".into(), plain)),
        ),
        ("node", format!("{}, life {}", s.node_id, plain(&s.incarnation))),
        ("ready", ready),
        ("leaders", leaders),
        ("replicas", if replication.is_empty() { "-".to_owned() } else { replication }),
        ("meta leader", s.meta_leader.map_or("none known".to_owned(), |n| format!("node {n}"))),
        ("placement epoch", s.epoch.to_string()),
        ("version", plain(&s.version)),
    ];
    let away: Vec<String> = s.away.iter().map(u64::to_string).collect();
    let away = (!away.is_empty()).then(|| {
        let what = format!("node {} may hold replicas and does not answer", away.join(", "));
        ("AWAY", format!("{what}; `crema voters remove` gives them to others"))
    });
    let moving = (s.moving > 0).then(|| ("moving", format!("{}; see `crema shards --moves`", shards(s.moving))));
    let notice = s.notice.iter().map(|text| ("notice", plain(text)));
    let more = s.down.len().saturating_sub(MAX_DOWN_SHOWN);
    let down = s.down.iter().take(MAX_DOWN_SHOWN).map(|d| (if d.lost { "LOST" } else { "down" }, plain(&d.reason)));
    let more = (more > 0).then(|| ("", format!("and {more} groups more: see --json")));
    let hint = s.down.iter().any(|d| d.lost).then(|| ("", "`crema recover` says what can be done".to_owned()));
    rows.into_iter()
        .chain(away)
        .chain(moving)
        .chain(notice)
        .chain(down)
        .chain(more)
        .chain(hint)
        .map(|(name, value)| format!("{name:<17}{value}"))
        .collect::<Vec<_>>()
        .join("\n")
}
use crate::admin::ReplicationLine;

fn show_members(members: &[MemberBody]) -> String {
    let mut t =
        table(&["node", "state", "voter", "connected", "raft", "redis", "redis cluster", "http", "metadata"], &[0]);
    for m in members {
        let state = if m.draining { format!("{}, draining", m.state) } else { m.state.clone() };
        let metadata: Vec<_> = m.metadata.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let yes_no = |b| if b { "yes" } else { "no" }.to_owned();
        let cells = [
            m.node_id.to_string(),
            state,
            yes_no(m.voter),
            yes_no(m.connected),
            m.raft_addr.clone(),
            or_dash(m.redis_addr.as_ref()),
            or_dash(m.redis_cluster_addr.as_ref()),
            or_dash(m.http_addr.as_ref()),
            metadata.join(" "),
        ];
        t.add_row(cells.iter().map(|text| Cell::new(plain(text))));
    }
    table_text(&t)
}

fn show_shards(shards: &[ShardBody]) -> String {
    let header = ["shard", "slots", "leader", "term", "replicas on", "applied", "digest", "keys", "bytes", "asleep"];
    let mut t = table(&header, &[0, 2, 3, 5, 7, 8]);
    for s in shards {
        let slots = s.first_slot.zip(s.last_slot).map(|(first, last)| format!("{first}-{last}"));
        let replicas: Vec<_> = s
            .replicas
            .iter()
            // Only what is out of the ordinary is spelled out.
            .map(|r| if r.role == "voter" { r.node.to_string() } else { format!("{} ({})", r.node, r.role) })
            .collect();
        let cells = [
            s.shard.to_string(),
            or_dash(slots),
            if s.lost { "LOST".to_owned() } else { or_dash(s.leader) },
            s.term.to_string(),
            replicas.join(", "),
            or_dash(s.applied),
            or_dash(s.digest.as_ref()),
            or_dash(s.keys),
            or_dash(s.bytes),
            or_dash(s.asleep.map(|a| if a { "yes" } else { "no" })),
        ];
        t.add_row(cells.iter().map(|text| Cell::new(plain(text))));
    }
    table_text(&t)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin;
    use clap::CommandFactory;
    use std::net::TcpListener;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_the_design_are_accepted() {
        let line = "crema start --node-id 1 --initial-members 1,2,3 --seeds a:8001,b:8001 --shards 16 --replicas 3 \
                    --gossip-addr 127.0.0.1:8001 --raft-addr 127.0.0.1:9001 --redis-addr 127.0.0.1:6379 \
                    --redis-cluster-addr 127.0.0.1:7379 --http-addr 127.0.0.1:8080 --cluster c --join \
                    --metadata zone=a --metadata rack=7 --config f.toml --requirepass-file p --insecure";
        let Command::Start(start) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("start")
        };
        assert_eq!(start.metadata.len(), 2);
        assert_eq!((start.settings.join, start.settings.insecure), (Some(true), Some(true)));
        assert_eq!(start.settings.seeds.as_deref().unwrap().len(), 2);
        let line = "crema dev --nodes 5 --shards 64 --processes --redis-port 1 --redis-cluster-port 2 --gossip-port 3 \
                    --raft-port 4 --http-port 5 --reads read_index";
        assert!(Cli::try_parse_from(line.split_whitespace()).is_ok());
        for bad in [
            "crema",
            "crema dev --nodes 0",
            "crema dev --shards 0",
            "crema dev --reads maybe",
            "crema start --node-id x",
            "crema dev --http-port 0",
            "crema start --raft-addr 1",
            "crema status --metadata a=b",
            "crema start --metadata zone",
        ] {
            let error = Cli::try_parse_from(bad.split_whitespace()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn status_says_what_is_missing_and_why() {
        let mut body = admin::status_body(&admin::tests::fake());
        let text = show_status(&body);
        assert!(text.contains("1 shard at 1 of 3 replicas, 1 shard at 2 of 3 replicas"), "{text}");
        assert!(text.contains("this node leads 1 of 2 shards; 1 without a known leader"), "{text}");
        body.replication = vec![ReplicationLine { shards: 16, standing: 2, wanted: 3 }];
        (body.ready, body.reason) = (false, Some("shard 3 has\x1b[2J no leader".to_owned()));
        let text = show_status(&body);
        assert!(text.contains("16 shards at 2 of 3 replicas"), "{text}");
        assert!(text.contains("no: shard 3 has") && !text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn tables_show_every_row() {
        let fake = admin::tests::fake();
        let text = show_members(&admin::members_body(&fake));
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(lines[3][..5], ["3", "dead", "yes", "no", "127.0.0.1:9003"]);
        let text = show_shards(&admin::shards_body(&fake.status, &fake.view));
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..4], ["0", "0-8191", "1", "3"], "{text}");
        assert!(text.contains("1, 2 (outgoing), 3 (learner)"), "{text}");
        assert_eq!(lines[2].last(), Some(&"-"));
    }

    /// Answers one connection with `answer` once it has read a request's end.
    fn serve_once(answer: &'static [u8]) -> (String, std::thread::JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            stream.write_all(answer).unwrap();
            request
        });
        (addr, server)
    }

    #[test]
    fn http_answers_are_read_whole_or_refused() {
        let (addr, server) = serve_once(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]");
        assert_eq!(fetch(&Door::open(&addr), "/v1/shards").unwrap(), "[]");
        assert!(server.join().unwrap().starts_with(b"GET /v1/shards HTTP/1.0\r\n"));

        let (addr, _) = serve_once(b"HTTP/1.1 503 Service Unavailable\r\n\r\n{\"reason\":\"stopping\"}");
        let error = fetch(&Door::open(&addr), "/v1/shards").unwrap_err();
        assert!(error.to_string().contains(&addr) && error.to_string().contains("503"), "{error}");
        assert!(error.to_string().contains("stopping"));

        for answer in
            [&b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[]"[..], b"-ERR unknown command\r\n", b"", b"HTTP/1.1 200"]
        {
            let (addr, _) = serve_once(answer);
            let error = fetch(&Door::open(&addr), "/").unwrap_err();
            assert!(matches!(error, CliError::Failed(_)) && error.to_string().contains(&addr), "{error}");
        }
    }

    #[test]
    fn an_unreachable_node_and_a_bad_address_differ_in_exit_code() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let error = fetch(&Door::open(&free), "/").unwrap_err();
        assert!(error.to_string().contains(&free), "{error}");
        assert_eq!(error.exit_code(), 1);
        for bad in ["nonsense", ":80", "host:", "host:99999", "a b:1", "h\r\n:1"] {
            assert_eq!(fetch(&Door::open(bad), "/").unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
