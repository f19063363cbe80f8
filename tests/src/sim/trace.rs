//! What happened: a running hash of everything, and the last events in readable form.

use bytes::Bytes;
use crema_core::{MonoTime, NodeId};
use crema_shard::Channel;
use crema_shard::message::{Body, KIND_ANSWERS, KIND_CHUNK, KIND_CHUNK_ACK, KIND_CONTROL, KIND_RAFT, KIND_REQUESTS};
use crema_shard::message::{
    Control, decode_answers, decode_chunk, decode_chunk_ack, decode_control, decode_envelopes, decode_requests,
    split_process,
};
use std::collections::VecDeque;
use std::fmt::Write;

/// Events kept for a report.
const KEPT: usize = 600;

enum What {
    Text(String),
    Frame { from: NodeId, to: NodeId, channel: Channel, frame: Bytes },
}

/// The trace of one run.
pub struct Trace {
    hash: u64,
    events: u64,
    kept: usize,
    last: VecDeque<(u64, What)>,
}

impl Default for Trace {
    fn default() -> Self {
        Trace { hash: 0xcbf2_9ce4_8422_2325, events: 0, kept: KEPT, last: VecDeque::new() }
    }
}

impl Trace {
    /// Mixes a number into the hash.
    pub fn mix(&mut self, x: u64) {
        self.hash = (self.hash ^ x).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(23);
    }

    /// Mixes bytes into the hash.
    pub fn mix_bytes(&mut self, bytes: &[u8]) {
        self.mix(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    /// Notes an event at `at` simulated nanoseconds.
    pub fn note(&mut self, at: u64, text: String) {
        self.mix(at);
        self.mix_bytes(text.as_bytes());
        self.push(at, What::Text(text));
    }

    /// Notes a frame that reached its receiver.
    pub fn frame(&mut self, at: u64, from: NodeId, to: NodeId, channel: Channel, frame: &Bytes) {
        self.mix(at);
        self.mix(from.0 << 8 | to.0);
        self.mix_bytes(frame);
        // Beats would drive everything else out of what is kept.
        let beat =
            frame.first() == Some(&KIND_CONTROL) && matches!(decode_control(&frame[1..]), Ok(Control::Beat { .. }));
        if !beat {
            self.push(at, What::Frame { from, to, channel, frame: frame.clone() });
        }
    }

    fn push(&mut self, at: u64, what: What) {
        self.events += 1;
        if self.last.len() >= self.kept {
            self.last.pop_front();
        }
        self.last.push_back((at, what));
    }

    /// Keeps everything from now on.
    pub fn keep_all(&mut self) {
        self.kept = usize::MAX;
    }

    /// The hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Events noted so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The last `count` events, one a line.
    pub fn tail(&self, count: usize) -> String {
        let mut out = String::new();
        for (at, what) in self.last.iter().skip(self.last.len().saturating_sub(count)) {
            let MonoTime(ns) = MonoTime(*at);
            let _ = write!(out, "{:>10}.{:06} ms  ", ns / 1_000_000, ns % 1_000_000);
            match what {
                What::Text(text) => out.push_str(text),
                What::Frame { from, to, channel, frame } => {
                    let _ = write!(out, "{from:?} > {to:?} ");
                    describe(&mut out, *channel, frame);
                }
            }
            out.push('\n');
        }
        out
    }
}

fn describe(out: &mut String, channel: Channel, frame: &Bytes) {
    let Some(kind) = frame.first().copied() else { return };
    let body = frame.slice(1..);
    let _ = match (channel, kind) {
        (Channel::Raft, KIND_RAFT) => decode_envelopes(&body).map(|envelopes| {
            for e in envelopes {
                let _ = match &e.body {
                    Body::Raft(m) => write!(
                        out,
                        "[{:?} {:?} t{} i{}/{} c{} +{}{}] ",
                        e.shard,
                        m.msg_type,
                        m.term,
                        m.index,
                        m.log_term,
                        m.commit,
                        m.entries.len(),
                        if m.reject { " reject" } else { "" }
                    ),
                    Body::Sleep { term, index, ok, .. } => {
                        write!(out, "[{:?} {} t{term} i{index}] ", e.shard, if *ok { "SleepOk" } else { "Sleep" })
                    }
                };
            }
        }),
        (Channel::Raft, KIND_CONTROL) => decode_control(&body).map(|c| {
            let text = format!("{c:?}");
            out.push_str(text.split_once([' ', '(']).map_or(text.as_str(), |(name, _)| name));
        }),
        (Channel::Requests, KIND_REQUESTS) => {
            split_process(&body).and_then(|(_, b)| decode_requests(&b)).map(|requests| {
                for r in requests {
                    let body = match &r.body {
                        crema_shard::message::RequestBody::Write { tag, .. } => {
                            format!("Write S{} q{} low {}", tag.session.0, tag.seq.0, tag.low.0)
                        }
                        crema_shard::message::RequestBody::Read { .. } => "Read".to_owned(),
                        crema_shard::message::RequestBody::OpenSession => "OpenSession".to_owned(),
                        crema_shard::message::RequestBody::ReadIndex => "ReadIndex".to_owned(),
                    };
                    let _ = write!(out, "[{:?} #{:x} {body}] ", r.shard, r.id);
                }
            })
        }
        (Channel::Requests, KIND_ANSWERS) => {
            split_process(&body).and_then(|(_, b)| decode_answers(&b)).map(|answers| {
                for (shard, id, answer) in answers {
                    let _ = write!(out, "[{shard:?} #{id:x} {answer:?}] ");
                }
            })
        }
        (Channel::Snapshot, KIND_CHUNK) => decode_chunk(&body).map(|c| {
            let last = if c.last { " last" } else { "" };
            let _ = write!(out, "[{:?} chunk {}.{} +{}{last}]", c.shard, c.transfer, c.seq, c.data.len());
        }),
        (Channel::Snapshot, KIND_CHUNK_ACK) => decode_chunk_ack(&body).map(|a| {
            let _ = write!(out, "[{:?} chunk ack {}.{} {:?}]", a.shard, a.transfer, a.next, a.verdict);
        }),
        _ => Ok(()),
    };
}
