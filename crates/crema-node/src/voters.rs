//! Who may hold replicas, and how far they have moved: `crema voters`, `crema shards --moves`, and their paths.
//!
//! ```text
//!   crema voters add|remove --POST /v1/voters {node_id, approved}--> driver --> Host::change_voters --> meta group's log
//!   crema voters list ------GET /v1/voters          crema shards --moves [--watch] --GET /v1/moves--> MovesBody
//! ```
//!
//! An approval is done once it is committed; replicas move afterwards, and `--wait` waits for them.

use crate::admin::{AdminSource, VoterBody};
use crate::cli::{AskArgs, CliError, Door, HttpArgs, http_get, http_request, or_dash, plain, say, table, table_text};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use clap::{Args, Subcommand};
use crema_core::{NodeId, ReplicaId, ShardId};
use crema_shard::{HostStatus, Standing, VoterError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest time for an approval: the node itself gives it up before.
const APPROVE_TIMEOUT: Duration = Duration::from_secs(15);
/// Period of looking how far moves have come.
const LOOK: Duration = Duration::from_millis(500);
/// How often in a row a node that is watched may fail to answer.
const MOST_FAILURES: u32 = 20;
/// Longest answer read.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// `crema voters`.
#[derive(Clone, Debug, Subcommand)]
pub enum VotersCommand {
    /// Show the nodes that may hold replicas.
    List(AskArgs),
    /// Let nodes hold replicas: they get their share of them. They must have joined (`crema start --join`).
    Add(ChangeArgs),
    /// Take all replicas of nodes away, to stop the nodes for good. What would break a quorum is refused. A removed node goes
    /// on as a gateway until it is stopped.
    Remove(ChangeArgs),
}

/// Flags of `crema voters add` and `remove`.
#[derive(Clone, Debug, Args)]
pub struct ChangeArgs {
    /// The nodes, one after the other.
    #[arg(required = true, value_name = "NODE")]
    pub nodes: Vec<u64>,
    /// Where to ask.
    #[command(flatten)]
    pub at: HttpArgs,
    /// Wait until all replicas are where they should be.
    #[arg(long)]
    pub wait: bool,
}

/// The body of `POST /v1/voters`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeBody {
    /// The node.
    pub node_id: u64,
    /// Whether it shall hold replicas.
    pub approved: bool,
}

/// `GET /v1/moves`: replicas on their way, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovesBody {
    /// Groups, the meta group included, that are not where they should be: on their way, or waiting.
    pub open: usize,
    /// Those that are on their way.
    pub moves: Vec<MoveBody>,
}

/// One group on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveBody {
    /// The shard; null for the meta group.
    pub shard: Option<u32>,
    /// Nodes that are being filled, as far as the asked node knows.
    pub to: Vec<u64>,
    /// Nodes whose replicas go.
    pub from: Vec<u64>,
    /// Bytes that the asked node, which leads the group, has sent so far.
    pub sent_bytes: Option<u64>,
}

/// The body of `/v1/moves`.
pub fn moves_body(status: &HostStatus) -> MovesBody {
    let one = |shard: Option<ShardId>, replicas: &[(NodeId, ReplicaId, Standing)], sent_bytes| {
        let nodes = |standing: Standing| -> Vec<u64> {
            replicas.iter().filter(|(.., s)| *s == standing).map(|(node, ..)| node.0).collect()
        };
        let (to, from) = (nodes(Standing::Incoming), nodes(Standing::Outgoing));
        let moves = !to.is_empty() || !from.is_empty();
        moves.then(|| MoveBody { shard: shard.map(|s| s.0), to, from, sent_bytes })
    };
    let data = status.shards.iter().map(|s| one(Some(s.shard), &s.replicas, s.sent_bytes));
    MovesBody { open: status.moves_open, moves: data.chain([one(None, &status.meta, None)]).flatten().collect() }
}

fn refuse(code: StatusCode, reason: String) -> Response {
    (code, Json(serde_json::json!({ "reason": reason }))).into_response()
}

/// The handler of `POST /v1/voters`.
pub(crate) async fn change(
    State(source): State<Arc<dyn AdminSource>>,
    Json(ChangeBody { node_id, approved }): Json<ChangeBody>,
) -> Response {
    match source.change_voters(NodeId(node_id), approved).await {
        Ok(()) => Json(ChangeBody { node_id, approved }).into_response(),
        Err(e @ (VoterError::Refused(_) | VoterError::NotNow(_) | VoterError::NotJoined(_))) => {
            refuse(StatusCode::CONFLICT, e.to_string())
        }
        Err(e @ (VoterError::NoLeader | VoterError::Stopped)) => refuse(StatusCode::SERVICE_UNAVAILABLE, e.to_string()),
        Err(e) => refuse(StatusCode::GATEWAY_TIMEOUT, e.to_string()),
    }
}

/// The handler of `GET /v1/moves`.
pub(crate) async fn moves(State(source): State<Arc<dyn AdminSource>>) -> Response {
    match source.host_status().await {
        Ok(status) => Json(moves_body(&status)).into_response(),
        Err(reason) => refuse(StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

fn read<T: DeserializeOwned>(addr: &str, (code, text): (u16, String)) -> Result<(T, String), CliError> {
    if code != 200 {
        let reason = serde_json::from_str::<serde_json::Value>(&text).ok();
        let reason = reason.as_ref().and_then(|v| v["reason"].as_str()).unwrap_or("no reason given");
        return Err(CliError::Failed(plain(reason)));
    }
    match serde_json::from_str(&text) {
        Ok(body) => Ok((body, text)),
        Err(e) => Err(CliError::Failed(format!("{addr} answers something else than this program's admin API: {e}"))),
    }
}

/// Runs `crema voters`.
///
/// Errors: the node cannot be reached, or refuses ([`CliError::Failed`]); the address is none ([`CliError::Usage`]).
pub fn voters(command: &VotersCommand) -> Result<(), CliError> {
    match command {
        VotersCommand::List(args) => {
            let answer = http_get(&args.at.door()?, "/v1/voters", MAX_ANSWER_BYTES)?;
            let (voters, text): (Vec<VoterBody>, _) = read(&args.at.http_addr, answer)?;
            say(if args.json { text.trim_end().to_owned() } else { show_voters(&voters) });
            Ok(())
        }
        VotersCommand::Add(args) => change_all(args, true),
        VotersCommand::Remove(args) => change_all(args, false),
    }
}

fn change_all(args: &ChangeArgs, approved: bool) -> Result<(), CliError> {
    let door = args.at.door()?;
    for node_id in &args.nodes {
        let body = serde_json::to_string(&ChangeBody { node_id: *node_id, approved });
        let body = body.map_err(|e| CliError::Failed(e.to_string()))?;
        let answer = http_request(&door, "/v1/voters", Some(&body), MAX_ANSWER_BYTES, APPROVE_TIMEOUT)?;
        let _: (ChangeBody, _) = read(&args.at.http_addr, answer)?;
        say(if approved {
            format!("node {node_id} may hold replicas")
        } else {
            format!("node {node_id} shall hold no replicas; stop it once they have moved")
        });
    }
    match shortage(&door, args, approved) {
        Ok(None) => {}
        Ok(Some(warning)) => say(warning),
        // What was asked for is done all the same.
        Err(error) => say(format!("whether enough nodes are left could not be read: {error}")),
    }
    if args.wait { watch(&door, true) } else { Ok(()) }
}

/// What of [`crate::admin::StatusBody`] matters here: nodes of other versions say it, too.
#[derive(Debug, Deserialize)]
struct Wanted {
    replicas: u32,
}

/// Whether a removal has left fewer nodes than replicas are wanted, in a sentence.
fn shortage(door: &Door, args: &ChangeArgs, approved: bool) -> Result<Option<String>, CliError> {
    if approved {
        return Ok(None);
    }
    let (voters, _): (Vec<VoterBody>, _) = read(&door.addr, http_get(door, "/v1/voters", MAX_ANSWER_BYTES)?)?;
    let (wanted, _): (Wanted, _) = read(&door.addr, http_get(door, "/v1/status", MAX_ANSWER_BYTES)?)?;
    // The asked node may not have heard yet of what it was answered.
    let left = voters.iter().filter(|voter| !args.nodes.contains(&voter.node_id)).count();
    Ok(warn_of_shortage(left, wanted.replicas as usize))
}

fn warn_of_shortage(left: usize, wanted: usize) -> Option<String> {
    if left >= wanted {
        return None;
    }
    let nodes = if left == 1 { "1 node".to_owned() } else { format!("{left} nodes") };
    // As many as leave no majority of those that are left.
    let failures = match left - left / 2 {
        0 | 1 => "one failure stops".to_owned(),
        2 => "two failures stop".to_owned(),
        n => format!("{n} failures stop"),
    };
    Some(format!("warning: {nodes} may hold replicas, shards want {wanted}: until another is added, {failures} writes"))
}

/// Runs `crema shards --moves`; with `follow`, until nothing moves any more.
///
/// Errors: the node cannot be reached ([`CliError::Failed`]); the address is none ([`CliError::Usage`]).
pub fn show_moves(args: &AskArgs, follow: bool) -> Result<(), CliError> {
    if follow {
        return watch(&args.at.door()?, false);
    }
    let answer = http_get(&args.at.door()?, "/v1/moves", MAX_ANSWER_BYTES)?;
    let (moves, text): (MovesBody, _) = read(&args.at.http_addr, answer)?;
    say(if args.json { text.trim_end().to_owned() } else { moves_table(&moves) });
    Ok(())
}

/// Follows moves to their end, with a bar where there is a terminal. `begins`: something was asked for just now, which the
/// asked node may not have heard of yet.
fn watch(door: &Door, begins: bool) -> Result<(), CliError> {
    let style = indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} groups in place, {elapsed}  {msg}");
    let bar = indicatif::ProgressBar::new(0).with_style(style.map_err(|e| CliError::Failed(e.to_string()))?);
    let began = Instant::now();
    let (mut most, mut failures, mut quiet) = (0, 0, 0);
    loop {
        let answer = http_get(door, "/v1/moves", MAX_ANSWER_BYTES);
        let answer = answer.and_then(|answer| read::<MovesBody>(&door.addr, answer));
        match answer {
            Ok((MovesBody { open, moves }, _)) => {
                failures = 0;
                most = most.max(open);
                quiet = if open == 0 { quiet + 1 } else { 0 };
                bar.set_length(most as u64);
                bar.set_position((most - open) as u64);
                let names: Vec<_> = moves.iter().take(4).map(|m| or_dash(m.shard.as_ref())).collect();
                bar.set_message(if names.is_empty() { String::new() } else { format!("moving {}", names.join(", ")) });
                // Twice in a row, since the table comes to a node a moment after the approval.
                if open == 0 && (!begins || quiet >= 2) {
                    bar.finish_and_clear();
                    say(format!("all replicas are in place, after {:.1} s", began.elapsed().as_secs_f64()));
                    return Ok(());
                }
            }
            Err(e @ CliError::Usage(_)) => return Err(e),
            Err(e) => {
                failures += 1;
                if failures >= MOST_FAILURES {
                    return Err(e);
                }
            }
        }
        std::thread::sleep(LOOK);
    }
}

fn show_voters(voters: &[VoterBody]) -> String {
    let mut t = table(&["node", "connected", "replicas", "raft"], &[0, 2]);
    for v in voters {
        let connected = match (v.connected, v.draining) {
            (true, false) => "yes",
            (true, true) => "yes, draining",
            (false, _) => "NO",
        };
        t.add_row([v.node_id.to_string(), connected.to_owned(), v.replicas.to_string(), plain(&v.raft_addr)]);
    }
    table_text(&t)
}

fn moves_table(moves: &MovesBody) -> String {
    let mut t = table(&["shard", "to", "from", "sent"], &[0, 3]);
    let nodes = |of: &[u64]| {
        let names: Vec<_> = of.iter().map(u64::to_string).collect();
        if names.is_empty() { "-".to_owned() } else { names.join(", ") }
    };
    for m in &moves.moves {
        let shard = m.shard.map_or("meta".to_owned(), |s| s.to_string());
        let sent = m.sent_bytes.map(|b| format!("{:.1} MB", b as f64 / 1e6));
        t.add_row([shard, nodes(&m.to), nodes(&m.from), or_dash(sent)]);
    }
    match (moves.moves.is_empty(), moves.open) {
        (true, 0) => "all replicas are in place".to_owned(),
        (true, open) => format!("{open} groups wait to move"),
        (false, open) => format!("{}\n{open} groups to go", table_text(&t)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin;

    #[test]
    fn moves_are_told_with_their_ends() {
        let mut status = admin::tests::fake().status;
        assert_eq!(moves_body(&status), MovesBody { open: 0, moves: vec![] });
        assert_eq!(moves_table(&moves_body(&status)), "all replicas are in place");
        status.moves_open = 3;
        status.shards[0].replicas[1].2 = Standing::Incoming;
        status.shards[0].replicas.push((NodeId(9), ReplicaId(9), Standing::Outgoing));
        status.shards[0].sent_bytes = Some(2_500_000);
        status.meta = vec![(NodeId(4), ReplicaId(7), Standing::Incoming)];
        let body = moves_body(&status);
        let first = MoveBody { shard: Some(0), to: vec![2], from: vec![9], sent_bytes: Some(2_500_000) };
        let meta = MoveBody { shard: None, to: vec![4], from: vec![], sent_bytes: None };
        assert_eq!(body, MovesBody { open: 3, moves: vec![first, meta] });
        let text = moves_table(&body);
        assert!(text.contains("2.5 MB") && text.contains("meta") && text.ends_with("3 groups to go"), "{text}");
    }

    #[test]
    fn too_few_voters_are_told_with_what_that_means() {
        let warning = |left, wanted| warn_of_shortage(left, wanted).unwrap_or_default();
        assert_eq!(
            warning(2, 3),
            "warning: 2 nodes may hold replicas, shards want 3: until another is added, one failure stops writes"
        );
        assert_eq!((warning(3, 3), warning(4, 3), warning(1, 1)), (String::new(), String::new(), String::new()));
        for (left, wanted, failures) in
            [(1, 3, "one failure stops"), (3, 5, "two failures stop"), (4, 5, "two"), (6, 7, "3")]
        {
            assert!(warning(left, wanted).contains(failures), "{left} of {wanted}");
        }
    }

    /// The table as the asked node has it may still name who was just removed.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_removal_that_leaves_too_few_is_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let router = admin::router(Arc::new(admin::tests::fake()), None);
        let _server = admin::AdminServer::start(listener, router);
        let ask = move |nodes: Vec<u64>, approved| {
            let at = HttpArgs { http_addr: addr.clone(), requirepass_file: None };
            let args = ChangeArgs { nodes, at, wait: false };
            tokio::task::spawn_blocking(move || shortage(&args.at.door().unwrap(), &args, approved).unwrap())
        };
        // Three nodes are approved, three replicas wanted.
        let warning = ask(vec![3], false).await.unwrap().expect("a warning");
        assert!(warning.starts_with("warning: 2 nodes may hold replicas, shards want 3"), "{warning}");
        assert_eq!(ask(vec![9], false).await.unwrap(), None, "whoever was none is not missed");
        assert_eq!(ask(vec![3], true).await.unwrap(), None, "nothing is taken away");
    }

    #[test]
    fn voters_are_listed_with_what_they_hold() {
        let text = show_voters(&admin::voters_body(&admin::tests::fake().view));
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!(lines[1][..3], ["1", "yes", "2"]);
        assert_eq!(lines[3][..2], ["3", "NO"]);
    }
}
