//! Proposals on their way: who waits for which log entry.
//!
//! An entry is known by (term, index). Popping a queue whenever "I am leader" would answer the wrong request after a
//! change of leadership (raft-rs's own five-node example does).

use crema_core::{Incarnation, NodeId};
use std::collections::VecDeque;

/// Who asked: where an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The gateway's node.
    pub origin: NodeId,
    /// Its life: an answer for an earlier one is dropped.
    pub incarnation: Incarnation,
    /// Its process: one that comes back with its log has the same life, but knows nothing of the requests before.
    pub process: u64,
    /// The gateway's mark.
    pub id: u64,
}

#[derive(Debug)]
struct Proposal {
    term: u64,
    index: u64,
    tickets: Vec<Ticket>,
}

/// The proposals of one replica, ascending by index.
#[derive(Debug, Default)]
pub struct Proposals {
    waiting: VecDeque<Proposal>,
    tickets: usize,
}

/// What applying an entry means for those who wait.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// Nobody here proposed the entry.
    Nobody,
    /// The entry is the one these proposed, in the order of its requests.
    Ours(Vec<Ticket>),
    /// Another leader's entry stands where theirs was to be: theirs is lost.
    Lost(Vec<Ticket>),
}

impl Proposals {
    /// Takes note of an entry appended at (term, index).
    pub fn push(&mut self, term: u64, index: u64, tickets: Vec<Ticket>) {
        debug_assert!(self.waiting.back().is_none_or(|p| p.index < index));
        self.tickets += tickets.len();
        self.waiting.push_back(Proposal { term, index, tickets });
    }

    /// The entry (term, index) is committed and about to be answered.
    pub fn settle(&mut self, term: u64, index: u64) -> Settled {
        match self.waiting.front() {
            Some(p) if p.index == index => {
                let p = self.waiting.pop_front().expect("just seen");
                self.tickets -= p.tickets.len();
                if p.term == term { Settled::Ours(p.tickets) } else { Settled::Lost(p.tickets) }
            }
            _ => Settled::Nobody,
        }
    }

    /// Leadership is lost: all of them may or may not commit.
    pub fn drain(&mut self) -> Vec<Ticket> {
        self.tickets = 0;
        self.waiting.drain(..).flat_map(|p| p.tickets).collect()
    }

    /// Number of requests waiting.
    pub fn len(&self) -> usize {
        self.tickets
    }

    /// Whether no entry is waited for.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(id: u64) -> Ticket {
        Ticket { origin: NodeId(1), incarnation: Incarnation(1), process: 1, id }
    }

    #[test]
    fn entries_are_matched_by_term_and_index() {
        let mut p = Proposals::default();
        p.push(2, 10, vec![ticket(1), ticket(2)]);
        p.push(2, 11, vec![ticket(3)]);
        assert_eq!(p.settle(2, 9), Settled::Nobody);
        assert_eq!(p.settle(2, 10), Settled::Ours(vec![ticket(1), ticket(2)]));
        assert_eq!(p.settle(3, 11), Settled::Lost(vec![ticket(3)]), "another leader's entry at our index");
        assert!(p.is_empty());
    }
}
