//! A group's state on its way to a member whose log ended before the leader's begins.
//!
//! ```text
//!   leader:   wanted --begin at (index, term)--> chunks, at most a window without an acknowledgement --> complete
//!                                                   |-- a gap: sent again from the piece that is missing
//!                                                   |-- a cut: sent again from the last acknowledged one
//!                                                   \-- silence: the last one again, which shows a gap if there is one
//!                \-- complete: raft-rs may send MsgSnapshot, which is small and installs what is there already
//!   receiver: chunk 0 --> restoring --every chunk in order--> prepared --MsgSnapshot of the same point--> installed
//! ```
//!
//! The state travels on a stream of its own, ahead of Raft's message: heartbeats and requests never wait behind it, and
//! raft-rs learns of it only when nothing can fail any more. What was prepared is installed by replacing, never by merging,
//! and only for the very point that the message names.
//!
//! A transfer survives a cut connection: the receiver keeps what it has, the sender its window. It does not survive either
//! process, or a leader that is none any more.

use crate::members::{Member, Members};
use bytes::Bytes;
use crema_core::{MonoTime, ReplicaId, ShardId};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// Chunks that are on their way without an acknowledgement. With chunks of 256 KiB a megabyte: enough for a gigabyte a
/// second at a round trip of a millisecond, and little enough for many transfers.
const WINDOW: usize = 4;
/// Silence after which the last piece is sent again. A connection that breaks says so at once, and a piece that is lost shows
/// as a gap as soon as one behind it arrives; what is left is the loss of whatever nothing followed: the last piece, all of
/// the window, or the answers. For all three it is enough to send the last piece: the receiver takes it, tells of the gap
/// before it, or repeats its answer. (So does TCP: RFC 8985, tail loss probe.) On a slow way or before a slow disk it is only
/// early, and costs one piece in four: so it may come soon, and comes less and less often.
const PROBE: Duration = Duration::from_secs(1);
/// Between the later ones; more than a few of them fit into [`GIVE_UP`].
const MOST_PROBE: Duration = Duration::from_secs(5);
/// Without one for this long the transfer is given up.
const GIVE_UP: Duration = Duration::from_secs(30);
/// Without an answer to MsgSnapshot for this long it is sent again.
const ANNOUNCE_AGAIN: Duration = Duration::from_secs(1);
/// Times that it is sent before the transfer is given up.
const ANNOUNCEMENTS: u32 = 8;

/// The point in the log that a state stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Applied index.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// The members as of it.
    pub members: Members,
}

/// A piece of a state. The first one of a transfer is the encoded [`Point`]; those after it are the machine's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The group.
    pub shard: ShardId,
    /// The leader's replica.
    pub from: ReplicaId,
    /// The receiver's.
    pub to: ReplicaId,
    /// Tells the leader's transfers apart.
    pub transfer: u64,
    /// Position, from 0 without gaps.
    pub seq: u32,
    /// Whether it is the last one.
    pub last: bool,
    /// What it holds.
    pub data: Bytes,
}

/// What a receiver has of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkAck {
    /// The group.
    pub shard: ShardId,
    /// The receiver's replica.
    pub from: ReplicaId,
    /// The leader's.
    pub to: ReplicaId,
    /// The transfer.
    pub transfer: u64,
    /// The position that is expected next; everything before it is kept. In a gap: only received, and perhaps not on disk yet.
    pub next: u32,
    /// What becomes of it.
    pub verdict: Verdict,
}

/// How a receiver takes a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Go on.
    Going,
    /// All of it is there and proved whole.
    Complete,
    /// It is of no use: damaged, unknown here, or not needed.
    Refused,
    /// A later piece has come than the one that is expected: that one is lost.
    Gap,
}

/// A transfer as the leader sees it.
#[derive(Debug)]
pub struct Outgoing {
    /// Who gets it.
    pub to: Member,
    /// Its number.
    pub id: u64,
    /// What it stands for.
    pub point: Point,
    window: VecDeque<Chunk>,
    /// Position of the next chunk to be made.
    next: u32,
    /// Chunks of the window that were sent in this attempt.
    sent: usize,
    /// Whether the last chunk was made.
    whole: bool,
    complete: bool,
    progress: MonoTime,
    sent_at: MonoTime,
    /// Silence after which the last one is sent again.
    probe: Duration,
    /// Positions from here on have not been sent again because of a gap.
    mended: u32,
    announced: Option<MonoTime>,
    announcements: u32,
    bytes: u64,
}

/// What is to be done about a transfer that does not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// MsgSnapshot had no answer: raft-rs shall send it again.
    AnnounceAgain,
    /// Give it up.
    GiveUp,
}

impl Outgoing {
    /// A transfer that begins now.
    pub fn new(shard: ShardId, from: ReplicaId, to: Member, id: u64, point: Point, now: MonoTime) -> Self {
        let mut transfer = Outgoing {
            to,
            id,
            point,
            window: VecDeque::new(),
            next: 0,
            sent: 0,
            whole: false,
            complete: false,
            progress: now,
            sent_at: now,
            probe: PROBE,
            mended: 0,
            announced: None,
            announcements: 0,
            bytes: 0,
        };
        let head = postcard::to_stdvec(&transfer.point).expect("derived serializers of plain data do not fail");
        transfer.push(shard, from, head.into(), false);
        transfer
    }

    /// Whether another chunk may be made.
    pub fn has_room(&self) -> bool {
        !self.whole && self.window.len() < WINDOW
    }

    /// Adds a chunk.
    pub fn push(&mut self, shard: ShardId, from: ReplicaId, data: Bytes, last: bool) {
        debug_assert!(!self.whole);
        self.bytes += data.len() as u64;
        let (to, transfer, seq) = (self.to.id, self.id, self.next);
        self.window.push_back(Chunk { shard, from, to, transfer, seq, last, data });
        self.next += 1;
        self.whole = last;
    }

    /// Chunks that have not been sent yet, in order; call again after each [`Outgoing::push`].
    pub fn take_unsent(&mut self, now: MonoTime) -> Vec<Chunk> {
        let unsent: Vec<Chunk> = self.window.iter().skip(self.sent).cloned().collect();
        if !unsent.is_empty() {
            self.sent = self.window.len();
            self.sent_at = now;
        }
        unsent
    }

    /// Whether [`Outgoing::take_unsent`] has something.
    pub fn has_unsent(&self) -> bool {
        self.sent < self.window.len()
    }

    /// The receiver has everything before `next`. Returns whether all of it is there.
    pub fn acknowledged(&mut self, next: u32, complete: bool, now: MonoTime) -> bool {
        let mut moved = false;
        while self.window.front().is_some_and(|c| c.seq < next) {
            self.window.pop_front();
            self.sent = self.sent.saturating_sub(1);
            moved = true;
        }
        // Nobody can have what was never made.
        let complete = complete && self.whole && self.window.is_empty() && next == self.next;
        if moved || (complete && !self.complete) {
            self.progress = now;
            self.probe = PROBE;
        }
        self.complete |= complete;
        self.complete
    }

    /// What was sent without an acknowledgement may be lost: it is sent again.
    pub fn interrupted(&mut self) {
        self.sent = 0;
        self.mended = 0;
    }

    /// The receiver has everything before `next`, and then a later piece: those from there on are sent again. Once: each of
    /// the pieces that were on their way behind the gap tells of it. Should the piece get lost again, then the next probe
    /// is told of it. Returns whether the receiver lacks what it had acknowledged: nothing can mend that.
    pub fn gap(&mut self, next: u32) -> bool {
        let Some(first) = self.window.front().map(|c| c.seq) else { return next == 0 };
        if next < first {
            // What is older than an acknowledgement is a late frame. A receiver that lost its state begins at nothing.
            return next == 0;
        }
        let before = (next - first) as usize;
        if next >= self.mended && before < self.sent {
            self.sent = before;
            self.mended = next + 1;
        }
        false
    }

    /// raft-rs has sent MsgSnapshot.
    pub fn announced(&mut self, now: MonoTime) {
        self.announced = Some(now);
        self.announcements += 1;
    }

    /// Whether the receiver has all of it.
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// Bytes that were made into chunks so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that wait for an acknowledgement.
    pub fn window_bytes(&self) -> u64 {
        self.window.iter().map(|c| c.data.len() as u64).sum()
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: MonoTime) -> Due {
        if self.complete {
            if self.announced.is_some_and(|at| now.since(at) >= ANNOUNCE_AGAIN) {
                self.announced = None;
                return if self.announcements < ANNOUNCEMENTS { Due::AnnounceAgain } else { Due::GiveUp };
            }
            // raft-rs asks with the next answer to a heartbeat; a member that gives none is gone.
            return if now.since(self.progress) >= GIVE_UP && self.announced.is_none() {
                Due::GiveUp
            } else {
                Due::Nothing
            };
        }
        if now.since(self.progress) >= GIVE_UP {
            return Due::GiveUp;
        }
        if self.sent > 0 && now.since(self.sent_at.max(self.progress)) >= self.probe {
            self.sent -= 1;
            self.mended = 0;
            self.probe = (self.probe * 2).min(MOST_PROBE);
        }
        Due::Nothing
    }
}

/// Where a receiver stands with the chunks of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Who sends it.
    pub sender: Member,
    /// The leader's replica.
    pub from: ReplicaId,
    /// The transfer.
    pub transfer: u64,
    /// Position of the chunk that is expected.
    pub next: u32,
    /// Whether all of it has come.
    pub complete: bool,
    /// The file that keeps it, where states are kept on disk.
    pub file: Option<u64>,
    /// Index that it stands for.
    pub index: u64,
    /// Pieces that were written to that file; when all were, the file is durable.
    pub written: u32,
    /// When the last piece came.
    pub last_piece: MonoTime,
}

impl Incoming {
    /// The piece that is expected next, and whether all are there: on disk, if they are kept there.
    pub fn acknowledged(&self) -> (u32, bool) {
        match self.file {
            Some(_) => (self.written, self.complete && self.written == self.next),
            None => (self.next, self.complete),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{Epoch, Incarnation, NodeId};

    fn at(ms: u64) -> MonoTime {
        MonoTime(ms * 1_000_000)
    }

    fn transfer() -> Outgoing {
        let to = Member { id: ReplicaId(9), node: NodeId(2), incarnation: Incarnation(1) };
        let members = Members { voters: vec![to], epoch: Epoch(1), ..Members::default() };
        Outgoing::new(ShardId(1), ReplicaId(8), to, 5, Point { index: 7, term: 2, members }, at(0))
    }

    fn push(t: &mut Outgoing, last: bool) {
        t.push(ShardId(1), ReplicaId(8), Bytes::from_static(b"x"), last);
    }

    fn seqs(chunks: &[Chunk]) -> Vec<u32> {
        chunks.iter().map(|c| c.seq).collect()
    }

    #[test]
    fn a_window_bounds_what_is_on_its_way() {
        let mut t = transfer();
        while t.has_room() {
            push(&mut t, false);
        }
        assert_eq!(seqs(&t.take_unsent(at(1))), [0, 1, 2, 3]);
        assert!(t.take_unsent(at(1)).is_empty());
        assert!(!t.acknowledged(2, false, at(2)));
        assert!(t.has_room());
        push(&mut t, false);
        push(&mut t, true);
        assert!(!t.has_room());
        assert_eq!(seqs(&t.take_unsent(at(2))), [4, 5]);
        assert!(!t.acknowledged(5, true, at(3)), "complete, but not all of it");
        assert!(t.acknowledged(6, true, at(3)));
    }

    #[test]
    fn a_cut_sends_the_window_again_and_nothing_else() {
        let mut t = transfer();
        push(&mut t, false);
        push(&mut t, false);
        t.take_unsent(at(0));
        t.acknowledged(1, false, at(1));
        assert!(!t.has_unsent());
        t.interrupted();
        assert_eq!(seqs(&t.take_unsent(at(2))), [1, 2]);
    }

    #[test]
    fn a_gap_sends_what_is_missing_again_at_once_and_once() {
        let mut t = transfer();
        (0..3).for_each(|_| push(&mut t, false));
        t.take_unsent(at(0));
        t.acknowledged(1, false, at(1));
        push(&mut t, false);
        t.take_unsent(at(1));
        // 2 is lost; 3 and 4 arrive. In between, 1 may be received but not written yet: it is not sent again.
        assert!(!t.gap(2));
        assert_eq!(seqs(&t.take_unsent(at(2))), [2, 3, 4]);
        assert!(!t.gap(2));
        assert!(!t.has_unsent(), "the other piece behind the gap tells of the same one");
        t.acknowledged(2, false, at(3));
        assert!(!t.gap(1), "late");
        assert!(!t.has_unsent());
        assert!(!t.gap(3), "another one");
        assert_eq!(seqs(&t.take_unsent(at(4))), [3, 4]);
        assert!(!t.gap(9), "nobody expects what was never made");
        assert!(!t.has_unsent());
        // A new connection, and the same is lost again.
        t.interrupted();
        t.take_unsent(at(5));
        assert!(!t.gap(3));
        assert_eq!(seqs(&t.take_unsent(at(5))), [3, 4]);
    }

    #[test]
    fn a_receiver_that_has_nothing_any_more_cannot_be_mended() {
        let mut t = transfer();
        push(&mut t, false);
        t.take_unsent(at(0));
        assert!(!t.gap(0), "the first piece may be lost like others");
        assert_eq!(seqs(&t.take_unsent(at(1))), [0, 1]);
        t.acknowledged(1, false, at(2));
        assert!(t.gap(0));
        t.acknowledged(2, false, at(3));
        assert!(t.gap(0));
    }

    #[test]
    fn silence_sends_the_last_piece_again_less_and_less_often() {
        let mut t = transfer();
        push(&mut t, false);
        push(&mut t, false);
        t.take_unsent(at(0));
        t.acknowledged(1, false, at(100));
        let mut probes = Vec::new();
        for now in (101..30_100).step_by(1) {
            assert_eq!(t.tick(at(now)), Due::Nothing);
            if t.has_unsent() {
                assert_eq!(seqs(&t.take_unsent(at(now))), [2]);
                probes.push(now);
            }
        }
        assert_eq!(probes, [1_100, 3_100, 7_100, 12_100, 17_100, 22_100, 27_100]);
        // Each may be told of a gap.
        assert!(!t.gap(1));
        assert_eq!(seqs(&t.take_unsent(at(30_000))), [1, 2]);
        assert_eq!(t.tick(at(30_100)), Due::GiveUp);
        t.acknowledged(2, false, at(30_100));
        assert_eq!(t.tick(at(31_099)), Due::Nothing);
        assert!(!t.has_unsent());
        assert_eq!(t.tick(at(31_100)), Due::Nothing);
        assert!(t.has_unsent(), "soon again, after an answer");
    }

    #[test]
    fn an_unanswered_announcement_is_repeated_a_few_times() {
        let mut t = transfer();
        push(&mut t, true);
        t.take_unsent(at(0));
        assert!(t.acknowledged(2, true, at(1)));
        let mut now = 1;
        for i in 0..ANNOUNCEMENTS {
            t.announced(at(now));
            assert_eq!(t.tick(at(now + 999)), Due::Nothing);
            now += 1_000;
            let due = if i + 1 < ANNOUNCEMENTS { Due::AnnounceAgain } else { Due::GiveUp };
            assert_eq!(t.tick(at(now)), due);
        }
        let mut silent = transfer();
        push(&mut silent, true);
        assert!(silent.acknowledged(2, true, at(1)));
        assert_eq!(silent.tick(at(30_001)), Due::GiveUp, "raft-rs never asked for it");
    }
}
