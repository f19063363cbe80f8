//! A stage for one group: members that answer for one number, one clock, and a network that does what it is told.
//!
//! ```text
//!   tick: clock + 50 ms, every member ticks --> messages --Fate--> delivered at once | held until released | lost
//!   every leader is asked for the number at every tick: an answer below what was acknowledged when it was asked is stale
//! ```

use crema_core::{MonoTime, Now, WallTime};
use crema_shard::Timing;
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::{Message, MessageType};
use std::collections::BTreeMap;

/// A member's id: its node, its replica and its raft-rs peer alike.
pub(super) type Id = u64;

/// What a member has to say to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The number is written.
    Written(u64),
    /// The read with this mark found this number; 0 if there was none.
    Read { mark: u64, found: u64 },
}

/// One member of the group.
pub(super) trait Member {
    /// One member of a group of `of`; the `first` campaigns at once.
    fn new(id: Id, of: u64, first: bool, now: Now) -> Self;
    /// One tick.
    fn tick(&mut self, now: Now);
    /// A message arrives.
    fn receive(&mut self, m: Envelope, now: Now);
    /// Works off everything; what is to be sent, and what is answered.
    fn work(&mut self, now: Now) -> (Vec<Envelope>, Vec<Answer>);
    /// A client writes a number.
    fn write(&mut self, number: u64);
    /// A client asks for the number.
    fn read(&mut self, mark: u64);
    /// Leadership shall go to `to`.
    fn transfer(&mut self, to: Id);
    /// Its term, and whom it takes for the leader.
    fn standing(&self) -> (u64, Id);
    /// Whether it would answer a read without asking anybody.
    fn answers_alone(&self, now: Now) -> bool;
    /// Whether it may not help another candidate.
    fn promised(&self, now: Now) -> bool;
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Hold,
    Lose,
    /// It arrives, and a copy of it is held.
    Copy,
}

/// Sender, receiver and type of messages; `None` stands for any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Which {
    pub(super) from: Option<Id>,
    pub(super) to: Option<Id>,
    pub(super) kind: Option<MessageType>,
}

impl Which {
    fn fits(&self, m: &Message) -> bool {
        self.from.is_none_or(|id| id == m.from)
            && self.to.is_none_or(|id| id == m.to)
            && self.kind.is_none_or(|k| k == m.msg_type)
    }
}

pub(super) fn any() -> Which {
    Which::default()
}
pub(super) fn from(id: Id) -> Which {
    Which { from: Some(id), ..any() }
}
pub(super) fn to(id: Id) -> Which {
    Which { to: Some(id), ..any() }
}
pub(super) fn way(from: Id, to: Id) -> Which {
    Which { from: Some(from), to: Some(to), kind: None }
}

impl Which {
    pub(super) fn only(self, kind: MessageType) -> Which {
        Which { kind: Some(kind), ..self }
    }
}

/// The periods of a schedule. Nobody sleeps in it.
pub(super) fn timing() -> Timing {
    Timing { quiet_ticks: usize::MAX, ..Timing::default() }
}

/// Ticks without a leader after which the member `id` of `of` campaigns: as in our replica, for raft-rs alone too.
pub(super) fn campaigns_after(id: Id, of: u64, term: u64) -> usize {
    let t = timing();
    t.campaign_ticks + t.campaign_step_ticks * ((id - 1 + term) % of) as usize
}

fn message(e: &Envelope) -> &Message {
    match &e.body {
        Body::Raft(m) => m,
        Body::Sleep { .. } => unreachable!("nobody sleeps in a schedule"),
    }
}

/// The group and what surrounds it.
pub(super) struct Stage<M> {
    members: BTreeMap<Id, M>,
    now: Now,
    rules: Vec<(Which, Fate)>,
    held: Vec<Envelope>,
    next_mark: u64,
    /// What was acknowledged when a read was asked, and when it was.
    asked: BTreeMap<u64, (u64, MonoTime)>,
    /// The largest number that was acknowledged.
    pub(super) acknowledged: u64,
    /// Answers to reads, in order: who, and what.
    pub(super) reads: Vec<(Id, u64)>,
    /// Reads that did not see what was acknowledged before they were asked.
    pub(super) stale: Vec<String>,
    /// Moments in which somebody would have answered alone while another led a later term.
    pub(super) overlaps: Vec<String>,
}

impl<M: Member> Stage<M> {
    /// A group of `of` members, of which `first` leads before long.
    pub(super) fn new(of: u64, first: Id) -> Self {
        // Later than any period, so that nothing is measured from the beginning of the clock.
        let now = Now { mono: MonoTime(1_000_000_000_000), wall: WallTime(1_700_000_000_000) };
        let members = (1..=of).map(|id| (id, M::new(id, of, id == first, now))).collect();
        let mut stage = Stage {
            members,
            now,
            rules: Vec::new(),
            held: Vec::new(),
            next_mark: 0,
            asked: BTreeMap::new(),
            acknowledged: 0,
            reads: Vec::new(),
            stale: Vec::new(),
            overlaps: Vec::new(),
        };
        stage.ticks(2);
        assert_eq!(stage.leader(first), first);
        stage
    }

    fn ids(&self) -> Vec<Id> {
        self.members.keys().copied().collect()
    }
    pub(super) fn term(&self, id: Id) -> u64 {
        self.members[&id].standing().0
    }
    /// Whom `id` takes for the leader, 0 for nobody.
    pub(super) fn leader(&self, id: Id) -> Id {
        self.members[&id].standing().1
    }
    pub(super) fn answers_alone(&self, id: Id) -> bool {
        self.members[&id].answers_alone(self.now)
    }
    pub(super) fn promised(&self, id: Id) -> bool {
        self.members[&id].promised(self.now)
    }

    /// From now on such messages are held or lost; the newest rule that fits counts.
    pub(super) fn rule(&mut self, which: Which, fate: Fate) {
        self.rules.push((which, fate));
    }
    /// The rule ends. What it held stays held.
    pub(super) fn lift(&mut self, which: Which) {
        self.rules.retain(|(w, _)| *w != which);
    }
    /// All rules end.
    pub(super) fn lift_all(&mut self) {
        self.rules.clear();
    }
    /// Nothing that `id` sends arrives, and nothing arrives at it.
    pub(super) fn cut(&mut self, id: Id) {
        self.rule(from(id), Fate::Lose);
        self.rule(to(id), Fate::Lose);
    }
    pub(super) fn member(&self, id: Id) -> &M {
        &self.members[&id]
    }
    pub(super) fn member_mut(&mut self, id: Id) -> &mut M {
        self.members.get_mut(&id).expect("a member")
    }
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }
    /// The first message held, for whoever delivers it otherwise.
    pub(super) fn take_held(&mut self) -> Envelope {
        self.held.remove(0)
    }
    pub(super) fn now(&self) -> Now {
        self.now
    }
    /// The first message held arrives after all, whatever the rules say.
    pub(super) fn release(&mut self) {
        let e = self.held.remove(0);
        self.deliver(e);
        self.settle();
    }

    /// Ticks that fell due together, as after a stall, at one member.
    pub(super) fn burst(&mut self, id: Id, n: usize) {
        for _ in 0..n {
            self.members.get_mut(&id).expect("a member").tick(self.now);
        }
        self.settle();
    }

    /// One tick at all members, and a question to every leader.
    pub(super) fn tick(&mut self) {
        let tick = timing().tick;
        self.now.mono = self.now.mono.after(tick);
        self.now.wall = WallTime(self.now.wall.0 + tick.as_millis() as u64);
        for id in self.ids() {
            self.members.get_mut(&id).expect("a member").tick(self.now);
            self.settle();
        }
        for id in self.ids() {
            self.read(id);
        }
    }
    pub(super) fn ticks(&mut self, n: usize) {
        (0..n).for_each(|_| self.tick());
    }
    /// Ticks until it holds.
    #[track_caller]
    pub(super) fn ticks_until(&mut self, most: usize, what: &str, condition: impl Fn(&Self) -> bool) {
        for _ in 0..most {
            if condition(self) {
                return;
            }
            self.tick();
        }
        assert!(condition(self), "{what}");
    }

    pub(super) fn write(&mut self, id: Id, number: u64) {
        self.members.get_mut(&id).expect("a member").write(number);
        self.settle();
    }
    /// Asks `id`, if it takes itself for the leader.
    pub(super) fn read(&mut self, id: Id) {
        if self.leader(id) != id {
            return;
        }
        self.next_mark += 1;
        self.asked.insert(self.next_mark, (self.acknowledged, self.now.mono));
        self.members.get_mut(&id).expect("a member").read(self.next_mark);
        self.settle();
    }
    pub(super) fn transfer(&mut self, id: Id, to: Id) {
        self.members.get_mut(&id).expect("a member").transfer(to);
        self.settle();
    }

    /// Until nobody has anything to do.
    fn settle(&mut self) {
        loop {
            let mut quiet = true;
            for id in self.ids() {
                let (messages, answers) = self.members.get_mut(&id).expect("a member").work(self.now);
                quiet &= messages.is_empty() && answers.is_empty();
                answers.into_iter().for_each(|a| self.take(id, a));
                self.watch();
                for e in messages {
                    let rule = self.rules.iter().rev().find(|(w, _)| w.fits(message(&e)));
                    match rule.map(|(_, fate)| *fate) {
                        None => self.deliver(e),
                        Some(Fate::Hold) => self.held.push(e),
                        Some(Fate::Lose) => {}
                        Some(Fate::Copy) => {
                            self.held.push(e.clone());
                            self.deliver(e);
                        }
                    }
                }
            }
            if quiet {
                return;
            }
        }
    }

    fn deliver(&mut self, e: Envelope) {
        let to = message(&e).to;
        self.members.get_mut(&to).expect("a member").receive(e, self.now);
    }

    fn take(&mut self, id: Id, answer: Answer) {
        match answer {
            Answer::Written(n) => self.acknowledged = self.acknowledged.max(n),
            Answer::Read { mark, found } => {
                let (least, at) = self.asked.remove(&mark).expect("answered once");
                self.reads.push((id, found));
                if found < least {
                    let late = self.now.mono.since(at);
                    self.stale.push(format!("{id} answers {found} after {late:?}, though {least} was acknowledged"));
                }
            }
        }
    }

    fn watch(&mut self) {
        for (id, m) in &self.members {
            let (term, leader) = m.standing();
            if leader != *id || !m.answers_alone(self.now) {
                continue;
            }
            for (other, o) in self.members.iter().filter(|(other, _)| *other != id) {
                let (later, leads) = o.standing();
                if leads == *other && later > term {
                    self.overlaps.push(format!("{id} answers alone in term {term} while {other} leads term {later}"));
                }
            }
        }
    }
}
