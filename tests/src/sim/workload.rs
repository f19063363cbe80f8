//! Clients: each talks to one gateway at a time, sends several commands without waiting, and goes elsewhere when its
//! gateway dies. What they sent and what became of it is the history that the checks judge.
//!
//! Keys shared by all clients come in seven kinds: registers, counters, lists, locks, sets (lists that see more traffic and
//! are judged without a search), keys with lifetimes, and pairs of keys that are written together. Besides, every
//! connection has keys of its own, where the order of its commands shows.

use super::judge::OWN;
use super::model::{Command, Ended, Half, Record, Value};
use super::rng::Rng;
use super::world::{Finished, MS, Pair, World};
use crate::history::{self, Operation};
use crema_core::{NodeId, Reply, ShardId};
use crema_shard::{ClientResult, ConnId, ReadLevel, Refusal, Token};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

/// Most commands of one client without an answer.
const MOST_DEPTH: u64 = 6;
/// Most records of one run: beyond, clients send nothing more.
const MOST_RECORDS: usize = 20_000;

/// Rates of clocks that steering towards wall time makes up for; with wilder ones nothing can be said of lifetimes.
const STEERED_PPM: u64 = 1_000;

/// Part of the reads of lists, in 1,000, that are bounded or local.
const RELAXED_PERMILLE: u64 = 300;

#[derive(Clone, Copy)]
enum Kind {
    Register,
    Counter,
    List,
    Lock,
    Set,
    /// With lifetimes. After some writes another key takes its place: on one key, the first write with an unknown outcome
    /// would explain every absence to the end.
    Ttl,
    Pair,
}

/// Chance of a shared command to be for a set, in 1,000, where there is one.
const SET_PERMILLE: u64 = 150;
/// Commands on a key with lifetimes before another takes its place.
const TTL_COMMANDS: u32 = 40;
/// The same of a lock: each write with an unknown outcome doubles the work of its judge.
const LOCK_COMMANDS: u32 = 150;
/// Lifetimes in milliseconds, from and to: so that some are over before the next write, and some are not.
const LIFETIMES: [(u64, u64); 3] = [(20, 200), (200, 1_500), (1_500, 6_000)];

struct Client {
    gateway: NodeId,
    conn: ConnId,
    /// The life of the gateway that the connection ends in.
    life: u64,
    depth: u64,
    think: (u64, u64),
    /// Part of its commands that are reads, in 1,000. Some clients only read: one whose writes hang asks nothing more,
    /// and would not see a stale leader's answers.
    reads: u64,
}

/// All clients and their history.
pub struct Workload {
    rng: Rng,
    clients: Vec<Client>,
    keys: Vec<(String, Kind)>,
    /// Commands sent to the present key of each place in `keys`.
    used: Vec<u32>,
    /// What a lock was last said to hold, by its key: what a comparison expects.
    held: BTreeMap<String, Value>,
    history: Vec<Record>,
    open: BTreeMap<(ConnId, Token), usize>,
    /// Position among all sends and ends: their order, where simulated time would have ties.
    stamp: u64,
    next_value: u64,
    /// Whether clients send anything.
    pub active: bool,
    /// Whether clients now and then leave one gateway for another.
    pub roam: bool,
}

impl Workload {
    /// Clients of a random number, with a random set of keys. Reminders with marks from 0 on belong to them: the caller
    /// passes them to [`Workload::turn`].
    /// `wrong_clocks`: whether wall clocks may jump.
    pub fn new(world: &mut World, mut rng: Rng, wrong_clocks: bool) -> Workload {
        // A group that was away as a whole asks the wall clock, which must then be right.
        let lifetimes = world.options().drift_ppm <= STEERED_PPM && !(wrong_clocks && world.options().durable > 0);
        let kinds = [
            (Kind::Register, "r", rng.range(1, 4)),
            (Kind::Counter, "c", rng.range(1, 2)),
            (Kind::List, "l", rng.range(1, 2)),
            (Kind::Lock, "n", rng.range(1, 2)),
            (Kind::Set, "s", rng.range(0, 1)),
            (Kind::Ttl, "t", if lifetimes { rng.range(0, 2) } else { 0 }),
            (Kind::Pair, "p", rng.range(0, 2)),
        ];
        let name = |kind, name, i| match kind {
            Kind::Pair => format!("{{{name}{i}}}"),
            _ => format!("{name}{i}"),
        };
        let keys: Vec<(String, Kind)> =
            kinds.into_iter().flat_map(|(k, n, most)| (0..most).map(move |i| (name(k, n, i), k))).collect();
        world.pairs = keys.iter().filter(|(_, k)| matches!(k, Kind::Pair)).map(|(name, _)| Pair::named(name)).collect();
        let gateways = world.alive();
        let busy = rng.range(20, 160);
        let clients: Vec<Client> = (0..rng.range(3, 8))
            .map(|_| Client {
                gateway: *rng.pick(&gateways),
                conn: world.connect(),
                life: 1,
                depth: rng.range(1, MOST_DEPTH),
                think: (MS, rng.range(busy / 2, busy * 2) * MS),
                reads: *rng.pick(&[100, 400, 600, 1_000]),
            })
            .collect();
        for i in 0..clients.len() as u64 {
            world.remind(rng.below(50 * MS), i);
        }
        Workload {
            rng,
            clients,
            used: vec![0; keys.len()],
            held: BTreeMap::new(),
            keys,
            history: Vec::new(),
            open: BTreeMap::new(),
            stamp: 0,
            next_value: 0,
            active: true,
            roam: true,
        }
    }

    /// Number of clients: marks below it are theirs.
    pub fn clients(&self) -> u64 {
        self.clients.len() as u64
    }

    /// Everything sent so far.
    pub fn history(&self) -> &[Record] {
        &self.history
    }

    /// Writes the history as JSON lines (`tests/HISTORIES.md`), with simulated times.
    pub fn export(&self, out: &mut impl Write) -> io::Result<()> {
        history::write(out, self.history.iter().map(Operation::from))
    }

    /// The shared keys, and how each is read.
    pub fn shared_keys(&self) -> Vec<(String, Command)> {
        let read = |kind: &Kind| if matches!(kind, Kind::Pair) { Command::PairGet } else { Command::Get };
        self.keys.iter().map(|(k, kind)| (k.clone(), read(kind))).collect()
    }

    /// Whether a key of ours is to be judged without a search: sets are too long for it.
    pub fn without_search(key: &str, _operations: usize) -> bool {
        key.starts_with('s')
    }

    fn tick(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// It is client `i`'s turn.
    pub fn turn(&mut self, world: &mut World, i: u64) {
        let c = &mut self.clients[i as usize];
        let pause = self.rng.range(c.think.0, c.think.1);
        world.remind(pause, i);
        if !self.active || self.history.len() >= MOST_RECORDS {
            return;
        }
        let alive = world.alive();
        // A connection does not outlive the process at its end, though that may be back before its client's next turn.
        let gone = !alive.contains(&c.gateway) || world.life(c.gateway) != c.life;
        let leaves = self.roam && self.rng.permille(10);
        if gone || leaves {
            if alive.is_empty() {
                return;
            }
            let (gateway, conn) = (c.gateway, c.conn);
            c.gateway = *self.rng.pick(&alive);
            c.conn = world.connect();
            c.life = world.life(c.gateway);
            if !gone {
                world.close(gateway, conn);
            }
            self.abandon(|k| k.0 == conn);
        }
        let Client { gateway, conn, depth, reads, .. } = self.clients[i as usize];
        let waiting = self.open.range((conn, Token(0))..=(conn, Token(u64::MAX))).count() as u64;
        let burst = self.rng.range(0, depth.saturating_sub(waiting));
        for _ in 0..burst {
            let (key, command) = self.next_command(conn, reads);
            let patience = Duration::from_millis(self.rng.range(1_000, 5_000));
            self.send(world, gateway, conn, &key, command, patience);
        }
    }

    fn value(&mut self) -> Vec<u8> {
        self.next_value += 1;
        format!("v{},", self.next_value).into_bytes()
    }

    fn next_command(&mut self, conn: ConnId, reads: u64) -> (String, Command) {
        let only_reads = reads == 1_000;
        let reads = self.rng.permille(reads);
        if !only_reads && self.rng.permille(300) {
            let key = format!("{OWN}{}-{}", conn.0, self.rng.below(3));
            let number = key.ends_with("-0");
            let command = match self.rng.below(3) {
                _ if reads => Command::Get,
                _ if number => Command::Incr,
                0 => Command::Append(self.value()),
                _ => Command::Set(self.value()),
            };
            return (key, command);
        }
        let set = self.keys.iter().position(|(_, kind)| matches!(kind, Kind::Set));
        let place = match set.filter(|_| self.rng.permille(SET_PERMILLE)) {
            Some(place) => place,
            None => self.rng.below(self.keys.len() as u64) as usize,
        };
        let kind = self.keys[place].1;
        let command = match kind {
            Kind::Pair if reads => match self.rng.below(4) {
                0 => Command::PairGet,
                1 => Command::PairHalf(Half::A),
                _ => Command::PairHalf(Half::B),
            },
            Kind::List | Kind::Set if reads && self.rng.permille(RELAXED_PERMILLE) => {
                let bounded = self.rng.permille(700);
                Command::GetRelaxed { max_age_ms: bounded.then_some(self.rng.range(0, 1_000)) }
            }
            _ if reads => Command::Get,
            Kind::Register => Command::Set(self.value()),
            Kind::Counter => Command::Incr,
            Kind::List | Kind::Set => Command::Append(self.value()),
            Kind::Lock if self.rng.permille(300) => Command::Del,
            // Often right, now and then out of date by the time it is looked at.
            Kind::Lock if self.rng.permille(400) => {
                let expected = self.held.get(&self.keys[place].0).cloned().flatten();
                Command::CompareAndSet { expected, value: self.value() }
            }
            Kind::Lock => Command::SetNx(self.value()),
            Kind::Ttl if self.rng.permille(50) => Command::Del,
            Kind::Ttl if self.rng.permille(100) => Command::Set(self.value()),
            Kind::Ttl => {
                let (from, to) = *self.rng.pick(&LIFETIMES);
                Command::SetPx { value: self.value(), px: self.rng.range(from, to) }
            }
            Kind::Pair => Command::PairSet(self.value()),
        };
        self.used[place] += 1;
        let most = match kind {
            Kind::Ttl => TTL_COMMANDS,
            Kind::Lock => LOCK_COMMANDS,
            _ => u32::MAX,
        };
        if self.used[place] > most {
            self.used[place] = 0;
            self.next_value += 1;
            self.held.remove(&self.keys[place].0);
            let first = self.keys[place].0.split('.').next().unwrap_or("t").to_owned();
            self.keys[place].0 = format!("{first}.{}", self.next_value);
        }
        (self.keys[place].0.clone(), command)
    }

    /// Sends one command. `None`: the gateway does not know the placement, and nothing was sent.
    pub fn send(
        &mut self,
        world: &mut World,
        gateway: NodeId,
        conn: ConnId,
        key: &str,
        command: Command,
        patience: Duration,
    ) -> Option<usize> {
        let ops = command.encode(key);
        let token = match command {
            Command::GetRelaxed { max_age_ms } => {
                let level = max_age_ms.map_or(ReadLevel::Local, |ms| ReadLevel::Bounded(Duration::from_millis(ms)));
                world.submit_read(gateway, conn, key, ops, level, patience)?
            }
            _ => world.submit(gateway, conn, key, command.is_write(), ops, patience)?,
        };
        let call = self.tick();
        let place = self.history.len();
        let (key, call_ns) = (key.to_owned(), world.now());
        let record = Record { key, conn: conn.0, command, call, ret: 0, call_ns, ret_ns: 0, ended: None };
        self.history.push(record);
        self.open.insert((conn, token), place);
        Some(place)
    }

    /// Writes a value of its own to a key of `shard`.
    pub fn probe(&mut self, world: &mut World, gateway: NodeId, shard: ShardId, patience: Duration) -> Option<usize> {
        world.shard_of("any")?;
        let key = world.key_of(shard, "probe");
        let conn = world.connect();
        let command = Command::Set(self.value());
        self.send(world, gateway, conn, &key, command, patience)
    }

    /// Takes the completions of the world. The error is an answer that can only be wrong.
    pub fn take(&mut self, world: &mut World) -> Result<(), String> {
        for Finished { conn, token, result } in std::mem::take(&mut world.finished) {
            let ret = self.tick();
            // Absent: its client has gone away.
            let Some(place) = self.open.remove(&(conn, token)) else { continue };
            let record = &mut self.history[place];
            if let ClientResult::Reply(reply) = &result
                && record.key.starts_with('n')
            {
                let held = match (&record.command, reply) {
                    (Command::SetNx(v), Reply::Ok) => Some(Some(v.clone())),
                    (Command::CompareAndSet { value, .. }, Reply::Int(1)) => Some(Some(value.clone())),
                    (Command::Del, _) => Some(None),
                    (command, reply) => command.finds(reply),
                };
                if let Some(held) = held {
                    self.held.insert(record.key.clone(), held);
                }
            }
            record.ret = ret;
            record.ret_ns = world.now();
            record.ended = Some(match result {
                ClientResult::Reply(reply) => Ended::Replied(reply),
                ClientResult::NotApplied(Refusal::WrongShard) => {
                    return Err(format!("{} of {conn:?}: wrong shard, though no slot ever moved", record.key));
                }
                ClientResult::NotApplied(_) => Ended::NotApplied,
                ClientResult::Unknown => Ended::Unknown,
            });
        }
        Ok(())
    }

    /// The outcome of these will never be known to their clients.
    pub fn abandon(&mut self, these: impl Fn(&(ConnId, Token)) -> bool) {
        let ret = self.tick();
        self.open.retain(|k, place| {
            let hit = these(k);
            if hit {
                self.history[*place].ret = ret;
                self.history[*place].ended = Some(Ended::Unknown);
            }
            !hit
        });
    }
}
