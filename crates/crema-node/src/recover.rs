//! `crema recover`: groups that have lost their majority are founded anew, by an operator's word alone.
//!
//! ```text
//!   crema recover --POST /v1/recover {accept_data_loss, stopped}--> driver --> Host::recover --> RecoverBody --> text
//! ```
//!
//! Without `accept_data_loss` the answer only says what would be done.

use crate::admin::AdminSource;
use crate::cli::{CliError, HttpArgs, http_request, plain, say};
use crate::driver::Recover;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use clap::Args;
use crema_core::NodeId;
use crema_shard::recovery::Recovered;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

/// Most nodes that one request may declare stopped.
const MAX_STOPPED: usize = 1024;
/// A recovery takes a census, asks, and waits for elections: each has an end, and together they have this.
pub(crate) const RECOVER_TIMEOUT: Duration = Duration::from_secs(40);

/// Flags of `crema recover`.
#[derive(Clone, Debug, Args)]
pub struct RecoverArgs {
    /// Where to ask.
    #[command(flatten)]
    pub at: HttpArgs,
    /// Do it: what only the lost replicas had is given up for ever. Without this, only say what would be done.
    #[arg(long)]
    pub accept_data_loss: bool,
    /// Nodes that do not answer, whose present lives are over: they and what they have will never speak for the cluster
    /// again. Make sure that their processes are stopped. Comma-separated.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub stopped: Vec<u64>,
    /// Print the API's JSON instead of text.
    #[arg(long)]
    pub json: bool,
}

/// The body of `POST /v1/recover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequestBody {
    /// See [`RecoverArgs::accept_data_loss`].
    #[serde(default)]
    pub accept_data_loss: bool,
    /// See [`RecoverArgs::stopped`].
    #[serde(default)]
    pub stopped: Vec<u64>,
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverBody {
    /// Whether it was done.
    pub done: bool,
    /// The groups that are founded anew, or would be.
    pub lost: Vec<LostBody>,
    /// Groups that nodes which do not answer may bring back.
    pub waiting: Vec<WaitingBody>,
    /// Those nodes.
    pub missing: Vec<u64>,
    /// Generation of the cluster's table that begins, if the meta group is among the lost.
    pub generation: Option<u32>,
    /// Whether nothing is left of the cluster but its identity.
    pub anew: bool,
    /// Groups that were founded anew but have no leader yet; null stands for the meta group.
    pub unfinished: Vec<Option<u32>>,
}

/// A lost group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostBody {
    /// The shard; null for the meta group.
    pub shard: Option<u32>,
    /// Why it is lost.
    pub reason: String,
    /// The node that begins it anew; null if none of its nodes answers.
    pub founder: Option<u64>,
    /// Whether that node has data of it.
    pub keeps_data: bool,
}

/// A group that waits for nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingBody {
    /// The shard; null for the meta group.
    pub shard: Option<u32>,
    /// Why it has no leader.
    pub reason: String,
}

fn number(shard: crema_core::ShardId) -> Option<u32> {
    (!shard.is_meta()).then_some(shard.0)
}

impl From<Recovered> for RecoverBody {
    fn from(r: Recovered) -> Self {
        let lost = |l: crema_shard::recovery::LostGroup| LostBody {
            shard: number(l.shard),
            reason: l.reason,
            founder: l.founder.map(|n| n.0),
            keeps_data: l.keeps_data,
        };
        RecoverBody {
            done: r.done,
            lost: r.lost.into_iter().map(lost).collect(),
            waiting: r
                .waiting
                .into_iter()
                .map(|(shard, reason)| WaitingBody { shard: number(shard), reason })
                .collect(),
            missing: r.missing.into_iter().map(|n| n.0).collect(),
            generation: r.generation,
            anew: r.anew,
            unfinished: r.unfinished.into_iter().map(number).collect(),
        }
    }
}

/// The route's handler.
pub(crate) async fn handle(
    State(source): State<Arc<dyn AdminSource>>,
    Json(request): Json<RecoverRequestBody>,
) -> Response {
    let refuse =
        |code: StatusCode, reason: String| (code, Json(serde_json::json!({ "reason": reason }))).into_response();
    if request.stopped.len() > MAX_STOPPED {
        return refuse(StatusCode::BAD_REQUEST, format!("more than {MAX_STOPPED} nodes"));
    }
    let stopped = request.stopped.into_iter().map(NodeId).collect();
    match source.recover(Recover { accept_data_loss: request.accept_data_loss, stopped }).await {
        Ok(Ok(recovered)) => Json(RecoverBody::from(recovered)).into_response(),
        Ok(Err(reason)) => refuse(StatusCode::CONFLICT, reason),
        Err(reason) => refuse(StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

/// Runs `crema recover`.
///
/// Errors: the node cannot be reached or refuses, or something is lost and was to be recovered but was not
/// ([`CliError::Failed`]); the address is none ([`CliError::Usage`]).
pub fn recover(args: &RecoverArgs) -> Result<(), CliError> {
    let request = RecoverRequestBody { accept_data_loss: args.accept_data_loss, stopped: args.stopped.clone() };
    let body = serde_json::to_string(&request).map_err(|e| CliError::Failed(e.to_string()))?;
    let (code, text) = http_request(&args.at.door()?, "/v1/recover", Some(&body), 64 << 20, RECOVER_TIMEOUT)?;
    if code != 200 {
        let reason = serde_json::from_str::<serde_json::Value>(&text).ok();
        let reason = reason.as_ref().and_then(|v| v["reason"].as_str()).unwrap_or("no reason given");
        return Err(CliError::Failed(plain(reason)));
    }
    let answer: RecoverBody = serde_json::from_str(&text)
        .map_err(|e| CliError::Failed(format!("{} answers something else: {e}", args.at.http_addr)))?;
    say(if args.json { text.trim_end().to_owned() } else { in_words(&answer, args.accept_data_loss) });
    if args.accept_data_loss && !answer.done && !(answer.lost.is_empty() && answer.waiting.is_empty()) {
        return Err(CliError::Failed("nothing was recovered".to_owned()));
    }
    if !answer.unfinished.is_empty() {
        return Err(CliError::Failed("not all of it has a leader yet: look at `crema status`".to_owned()));
    }
    Ok(())
}

fn in_words(answer: &RecoverBody, accepted: bool) -> String {
    let mut text = String::new();
    let (begins, would) = if answer.done { ("begins", "") } else { ("would begin", "would ") };
    if answer.anew && answer.missing.is_empty() {
        let _ = writeln!(text, "nothing is left of this cluster: it {begins} empty, under its old identity");
    }
    for lost in answer.lost.iter().filter(|_| !answer.anew) {
        let how = match (lost.founder, lost.keeps_data) {
            (Some(node), true) => format!("it {begins} anew with what node {node} has of it"),
            (Some(node), false) => format!("it {begins} anew on node {node}, empty"),
            (None, _) => "none of its nodes answers, so it cannot begin anew yet".to_owned(),
        };
        let _ = writeln!(text, "{}: {how}", plain(&lost.reason));
    }
    for waiting in &answer.waiting {
        let _ = writeln!(text, "{}: it is left alone", plain(&waiting.reason));
    }
    if let Some(generation) = answer.generation {
        let _ = writeln!(
            text,
            "the cluster's table {would}become{} generation {generation}",
            if answer.done { "s" } else { "" }
        );
    }
    let missing: Vec<String> = answer.missing.iter().map(u64::to_string).collect();
    let missing = missing.join(",");
    if !missing.is_empty() {
        let _ = writeln!(
            text,
            "start node {missing} to get back what it has; if its process is stopped and shall not come back with it, add \
             --stopped {missing}"
        );
    }
    match (answer.done, answer.lost.is_empty() && !answer.anew) {
        (true, _) if answer.lost.iter().any(|l| l.founder.is_none()) => {
            text.push_str("done, but for what cannot begin")
        }
        (true, _) => text.push_str("done: the cluster takes writes again"),
        (false, true) if answer.waiting.is_empty() => text.push_str("nothing is lost, nothing was changed"),
        (false, true) => text.push_str("nothing was changed"),
        (false, false) if accepted => text.push_str("nothing was changed"),
        (false, false) => text.push_str("nothing was changed; --accept-data-loss does it"),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(shard: Option<u32>, founder: Option<u64>, keeps_data: bool) -> LostBody {
        LostBody { shard, reason: format!("{shard:?} lost its majority\x1b"), founder, keeps_data }
    }

    #[test]
    fn the_answer_says_what_happens_and_what_to_do() {
        let mut answer = RecoverBody {
            done: false,
            lost: vec![lost(Some(3), Some(1), true), lost(Some(4), None, false)],
            waiting: vec![WaitingBody { shard: None, reason: "the meta group waits".into() }],
            missing: vec![2, 3],
            generation: None,
            anew: false,
            unfinished: Vec::new(),
        };
        let text = in_words(&answer, false);
        assert!(text.contains("would begin anew with what node 1 has") && !text.contains('\x1b'), "{text}");
        assert!(text.contains("none of its nodes answers") && text.contains("--stopped 2,3"), "{text}");
        assert!(text.ends_with("--accept-data-loss does it"), "{text}");
        (answer.done, answer.generation) = (true, Some(2));
        let text = in_words(&answer, true);
        assert!(text.contains("it begins anew with") && text.contains("table becomes generation 2"), "{text}");
        let nothing = RecoverBody { lost: vec![], waiting: vec![], missing: vec![], done: false, ..answer };
        assert!(in_words(&RecoverBody { generation: None, ..nothing }, true).contains("nothing is lost"));
    }
}
