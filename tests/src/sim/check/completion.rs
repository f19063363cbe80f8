//! Every request is completed exactly once while its gateway lives, and by then is forgotten by it.

use crema_core::NodeId;
use crema_shard::{ConnId, Token};
use std::collections::BTreeMap;

/// Requests and their completions.
#[derive(Debug, Default)]
pub struct Ledger {
    open: BTreeMap<(ConnId, Token), NodeId>,
    completed: u64,
}

impl Ledger {
    /// A request goes in.
    pub fn submitted(&mut self, node: NodeId, conn: ConnId, token: Token) {
        let before = self.open.insert((conn, token), node);
        assert!(before.is_none(), "the workload uses a token once");
    }

    /// A completion comes out. The error says why it should not have.
    pub fn completed(&mut self, node: NodeId, conn: ConnId, token: Token) -> Result<(), String> {
        match self.open.remove(&(conn, token)) {
            Some(n) if n == node => {
                self.completed += 1;
                Ok(())
            }
            Some(n) => Err(format!("{conn:?} {token:?} of {n:?} completed at {node:?}")),
            None => Err(format!("{conn:?} {token:?} completed at {node:?} though it is not open there")),
        }
    }

    /// The gateway's process died: what was open there will never be completed.
    pub fn node_died(&mut self, node: NodeId) -> Vec<(ConnId, Token)> {
        let lost: Vec<(ConnId, Token)> = self.open.iter().filter(|(_, n)| **n == node).map(|(k, _)| *k).collect();
        lost.iter().for_each(|k| _ = self.open.remove(k));
        lost
    }

    /// The gateway has closed the connection: nothing of it is completed any more.
    pub fn closed(&mut self, conn: ConnId) {
        self.open.retain(|(c, _), _| *c != conn);
    }

    /// Requests of `node` that are not completed.
    pub fn open_at(&self, node: NodeId) -> Vec<(ConnId, Token)> {
        self.open.iter().filter(|(_, n)| **n == node).map(|(k, _)| *k).collect()
    }

    /// Requests completed so far.
    pub fn total(&self) -> u64 {
        self.completed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_completion_and_a_foreign_one_are_found() {
        let mut l = Ledger::default();
        let (a, b) = (NodeId(1), NodeId(2));
        l.submitted(a, ConnId(1), Token(1));
        l.submitted(a, ConnId(1), Token(2));
        assert!(l.completed(a, ConnId(1), Token(1)).is_ok());
        assert!(l.completed(a, ConnId(1), Token(1)).is_err());
        assert!(l.completed(b, ConnId(1), Token(2)).is_err());
        l.submitted(b, ConnId(2), Token(1));
        assert_eq!(l.open_at(b), [(ConnId(2), Token(1))]);
        assert_eq!(l.node_died(b), [(ConnId(2), Token(1))]);
        assert!(l.completed(b, ConnId(2), Token(1)).is_err());
    }
}
