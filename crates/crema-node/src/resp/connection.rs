//! One client: reads, plans, submits, and writes replies in the order of the commands.
//!
//! ```text
//!   loop: results of the driver -> commands in flight
//!         read buffer -> decode -> plan -> one batch of requests -> driver
//!         finished commands at the front of the queue -> output -> one write
//!         wait for: results, bytes to read, room to write, a timer
//! ```
//!
//! **Bounds.** At most [`MAX_IN_FLIGHT`] commands and about [`MAX_IN_FLIGHT_BYTES`] of requests and results are in
//! flight; at most about [`MAX_OUTPUT_BYTES`] wait for the client. Beyond either, nothing is read. A result that is still
//! to come counts as large as recent ones were, so a pipeline of large reads is short; but the first of them after small
//! ones come unannounced, up to [`MAX_IN_FLIGHT`] of them.
//!
//! **Order.** A shard executes a connection's requests in order; a read that is answered here, under the leader's lease, is
//! so only while the shard owes this connection nothing. Should slots move between shards, what follows waits
//! until everything planned under the old placement is answered, and the refused requests have been sent again.

use crate::client::{Client, Outbox};
use crate::clock;
use crate::resp::decode::Decoder;
use crate::resp::encode;
use crate::resp::inflight::{InFlight, result_size};
use crate::resp::order::Unanswered;
use crate::resp::plan::{ClientState, Context, Plan, plan};
use crate::resp::server::{ClientInfo, FrontConfig, ListenerKind};
use bytes::{Buf, Bytes, BytesMut};
use crema_core::{Epoch, MonoTime, Now};
use crema_shard::{ClientRequest, ClientResult, ConnId, Refusal, RoutingView, Token};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Most commands in flight on one connection.
pub const MAX_IN_FLIGHT: usize = 1024;
/// Most bytes of requests and unwritten results in flight; one command may exceed it alone.
pub const MAX_IN_FLIGHT_BYTES: usize = 8 * 1024 * 1024;
/// Most bytes of replies that wait for the client to read, one reply's excess excluded.
pub const MAX_OUTPUT_BYTES: usize = 1024 * 1024;
/// After so many commands others have their turn. Reads under a lease wait for nobody: whoever sends them without end would
/// keep a thread of the runtime to itself for as long as its socket has something to read.
pub const TURN: u64 = MAX_IN_FLIGHT as u64;
/// Commands in flight before the size of results is known; doubles with each round of results.
const FIRST_WINDOW: usize = 128;
/// Least commands in flight, however large results are.
const MIN_WINDOW: usize = 4;
/// First size of the read buffer; doubles while reads fill it.
const MIN_READ: usize = 4 * 1024;
/// Largest read at once.
const MAX_READ: usize = 64 * 1024;
/// Buffers larger than this are given back once they are empty.
const KEPT_BUFFER: usize = 256 * 1024;
/// Period of planning a held command again: a quarter of the time it is held already, within these limits. Thousands of
/// connections may be held at once.
const HOLD_CHECK: std::ops::RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(50);
/// Period of looking whether the driver has forgotten a request.
const GUARD_CHECK: Duration = Duration::from_secs(1);
/// A request without a result for this long past its deadline is given up: the driver has died or is stuck.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Longest wait for a client to read its last replies before its socket is closed.
const LINGER: Duration = Duration::from_secs(2);
/// Most bytes read and thrown away in that time.
const LINGER_BYTES: usize = 16 * 1024 * 1024;
/// A connection that is closing is dropped when its client has read nothing for this long.
const STALLED: Duration = Duration::from_secs(10);
/// Bits of a token that number the parts of a command: more than a command can have.
const PART_BITS: u32 = 20;

/// What a connection is connected to.
#[derive(Debug)]
pub struct Link {
    /// Its id with the driver.
    pub conn: ConnId,
    /// Where its results arrive.
    pub outbox: Arc<Outbox>,
    /// The driver.
    pub client: Client,
    /// What all connections share.
    pub front: Arc<FrontConfig>,
    /// The listener it came by.
    pub kind: ListenerKind,
    /// Its entry in the list of clients.
    pub info: Arc<ClientInfo>,
    /// Set when the listener shuts down; a delivery of nothing tells of it.
    pub draining: Arc<AtomicBool>,
}

/// How a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// The client has closed its half; what it sent before is still answered.
    HalfClosed,
    /// Nothing more is planned; what is in flight is answered, and the client is given time to read it: closing a socket
    /// with unread bytes would destroy the replies on their way.
    Closing,
    /// Over, without another word.
    Dropped,
}

/// Why planning stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// The bytes at hand hold no further command.
    Starved,
    /// Too much is in flight or waits to be written.
    Full,
    /// The command at the front is held.
    Held,
    /// The placement changed: what is in flight is answered first.
    Barrier,
    /// It is the others' turn.
    Turn,
    /// Nothing will be planned any more.
    Ended,
}

struct Connection {
    link: Link,
    state: ClientState,
    decoder: Decoder,
    buf: BytesMut,
    out: BytesMut,
    scratch: BytesMut,
    queue: VecDeque<InFlight>,
    /// Number of the command at the front of the queue.
    first: u64,
    /// Commands of the queue without all their results.
    open: usize,
    /// Their requests, by shard.
    unanswered: Unanswered,
    /// Bytes of requests and unwritten results of the queue.
    bytes: usize,
    window: usize,
    /// A result's size of late: grows at once, shrinks slowly.
    large: usize,
    batch: Vec<ClientRequest>,
    results: Vec<(Token, ClientResult)>,
    resend: Vec<u32>,
    /// Placement under which everything in flight was planned.
    epoch: Epoch,
    /// Since when the command at the front of the buffer is held.
    held: Option<MonoTime>,
    phase: Phase,
    /// When the client last took bytes.
    progress: Instant,
    commands: u64,
    /// Since when every look has found requests long past their deadline.
    overdue_since: Option<Instant>,
    /// Commands when others last had their turn.
    turn: u64,
}

/// Serves one client until either side ends it, and tells the driver.
pub async fn run(mut stream: TcpStream, link: Link) {
    let (client, conn) = (link.client.clone(), link.conn);
    let mut connection = Connection::new(link);
    // An error means that the client has gone; nobody is left to be told.
    if connection.serve(&mut stream).await.is_ok() && connection.phase == Phase::Closing {
        // Bounded in time and bytes; whatever comes of it, the connection ends.
        let _ = tokio::time::timeout(LINGER, linger(&mut stream)).await;
    }
    client.close(conn).await;
}

/// Lets the client read its last reply: a socket closed with unread bytes would take it back.
async fn linger(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut nowhere = vec![0; MIN_READ];
    let mut left = LINGER_BYTES;
    while left > 0 {
        match stream.read(&mut nowhere).await? {
            0 => break,
            n => left = left.saturating_sub(n),
        }
    }
    Ok(())
}

impl Connection {
    fn new(link: Link) -> Connection {
        let state = ClientState::new(link.info.clone(), &link.front);
        Connection {
            state,
            decoder: Decoder::default(),
            buf: BytesMut::new(),
            out: BytesMut::new(),
            scratch: BytesMut::new(),
            queue: VecDeque::new(),
            first: 0,
            open: 0,
            unanswered: Unanswered::default(),
            bytes: 0,
            window: FIRST_WINDOW,
            large: 0,
            batch: Vec::new(),
            results: Vec::new(),
            resend: Vec::new(),
            epoch: Epoch::default(),
            held: None,
            phase: Phase::Open,
            progress: Instant::now(),
            commands: 0,
            overdue_since: None,
            turn: 0,
            link,
        }
    }

    async fn serve(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut auth_by = Some(Instant::now() + self.link.front.auth_timeout);
        let outbox = self.link.outbox.clone();
        let client = self.link.client.clone();
        let front = self.link.front.clone();
        let (mut rd, mut wr) = stream.split();
        let mut timer = std::pin::pin!(tokio::time::sleep(self.link.front.auth_timeout));
        let mut read_size = MIN_READ;
        loop {
            // Whatever else there is to do: nothing is owed to whoever does not say who it is.
            if auth_by.is_some_and(|by| Instant::now() >= by) {
                return Ok(());
            }
            if self.link.draining.load(Ordering::Acquire) && matches!(self.phase, Phase::Open | Phase::HalfClosed) {
                self.phase = Phase::Closing;
            }
            // The guard of the view is held for this round only: it must not outlive an await.
            let (fresh, pause) = {
                let view = client.view();
                self.collect(&view);
                let fresh = self.first + self.queue.len() as u64;
                (fresh, self.plan_all(&view))
            };
            if !self.batch.is_empty() && client.submit(std::mem::take(&mut self.batch)).await.is_err() {
                self.driver_gone(&client.view(), fresh);
            }
            if self.phase == Phase::Dropped {
                return Ok(());
            }
            // Until the socket takes no more or the front of the queue waits for a result: in either case something will
            // wake us. Stopping earlier could leave finished commands behind with nothing to come.
            loop {
                self.write_finished();
                if self.out.is_empty() {
                    break;
                }
                match wr.try_write(&self.out) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => self.written(n),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                }
            }
            let idle = self.queue.is_empty() && self.out.is_empty();
            let over = match self.phase {
                Phase::Open => false,
                Phase::HalfClosed => idle && matches!(pause, Pause::Starved | Pause::Ended),
                Phase::Closing | Phase::Dropped => idle,
            };
            if over {
                return Ok(());
            }
            if self.commands - self.turn >= TURN {
                tokio::task::yield_now().await;
                self.turn = self.commands;
                if pause == Pause::Turn {
                    continue;
                }
            }
            if matches!(pause, Pause::Full | Pause::Barrier) && !self.is_full() && self.may_plan(&client.view()) {
                // Writing has made room, and the commands are at hand already. Others have their turn before.
                tokio::task::yield_now().await;
                continue;
            }
            // Whoever gave up its authentication has the same time again.
            auth_by = match self.state.authenticated {
                true => None,
                false => auth_by.or_else(|| Some(Instant::now() + self.link.front.auth_timeout)),
            };
            let wake = self.next_wake(pause, auth_by);
            if let Some(at) = wake
                && (timer.is_elapsed() || timer.deadline() > at)
            {
                timer.as_mut().reset(at);
            }
            let read = self.phase == Phase::Open && pause == Pause::Starved && !self.output_full();
            let write = !self.out.is_empty();
            if read {
                self.make_room(read_size);
            }
            tokio::select! {
                biased;
                () = outbox.ready() => {}
                n = rd.read_buf(&mut self.buf), if read => {
                    let n = n?;
                    if n == 0 {
                        self.phase = Phase::HalfClosed;
                    } else {
                        front.stats.bytes_in.fetch_add(n as u64, Ordering::Relaxed);
                        read_size = if n >= read_size { (read_size * 2).min(MAX_READ) } else { read_size };
                    }
                }
                n = wr.write(&self.out), if write => {
                    let n = n?;
                    if n == 0 {
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    self.written(n);
                }
                () = timer.as_mut(), if wake.is_some() => {
                    if self.stalled().is_some_and(|at| Instant::now() >= at) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    // An empty batch does nothing, but tells whether the driver is still there.
                    if self.open > 0 && client.submit(Vec::new()).await.is_err() {
                        self.driver_gone(&client.view(), u64::MAX);
                    }
                    self.give_up_lost(&client.view(), clock::mono());
                }
            }
        }
    }

    /// Makes room for a read of about `read_size` bytes, or for what the argument at hand still needs, in steps that
    /// follow what has arrived.
    fn make_room(&mut self, read_size: usize) {
        let hint = self.decoder.wanted(self.buf.len()).min(4 * MAX_READ);
        let least = if self.buf.is_empty() { read_size } else { MIN_READ.max(hint.min(MAX_READ)) };
        if self.buf.capacity() - self.buf.len() < least {
            self.buf.reserve(read_size.max(hint));
        }
    }

    /// When to look again without an event.
    fn next_wake(&self, pause: Pause, auth_by: Option<Instant>) -> Option<Instant> {
        let held = self.held.filter(|_| pause == Pause::Held).map(|since| {
            let waited = clock::mono().since(since);
            Instant::now() + (waited / 4).clamp(*HOLD_CHECK.start(), *HOLD_CHECK.end())
        });
        let guard = (self.open > 0).then(|| Instant::now() + GUARD_CHECK);
        [held, auth_by, guard, self.stalled()].into_iter().flatten().min()
    }

    /// When a closing connection is dropped because its client does not read.
    fn stalled(&self) -> Option<Instant> {
        (self.phase == Phase::Closing && !self.out.is_empty()).then(|| self.progress + STALLED)
    }

    fn written(&mut self, n: usize) {
        self.link.front.stats.bytes_out.fetch_add(n as u64, Ordering::Relaxed);
        self.out.advance(n);
        self.progress = Instant::now();
        if self.out.is_empty() && self.out.capacity() > KEPT_BUFFER {
            self.out = BytesMut::new();
        }
    }

    fn output_full(&self) -> bool {
        self.out.len() >= MAX_OUTPUT_BYTES
    }

    fn is_full(&self) -> bool {
        self.output_full()
            || self.queue.len() >= self.window
            || (self.bytes + self.open * self.large >= MAX_IN_FLIGHT_BYTES && !self.queue.is_empty())
    }

    /// Whether commands may be planned under `view`: not as long as something planned under another placement is
    /// unanswered, since it may have to be sent again, elsewhere, and what follows must not overtake it.
    fn may_plan(&self, view: &RoutingView) -> bool {
        self.open == 0 || view.epoch == self.epoch
    }

    /// Takes results from the outbox to their commands.
    fn collect(&mut self, view: &RoutingView) {
        let mut results = std::mem::take(&mut self.results);
        if self.link.outbox.take(&mut results) {
            let mut again = std::mem::take(&mut self.resend);
            for (token, result) in results.drain(..) {
                let (number, part) = (token.0 >> PART_BITS, (token.0 & ((1 << PART_BITS) - 1)) as u32);
                let index = number.checked_sub(self.first).and_then(|i| usize::try_from(i).ok());
                let Some(command) = index.and_then(|i| self.queue.get_mut(i)) else { continue };
                if command.is_finished() {
                    continue;
                }
                let size = result_size(&result);
                self.large = size.max(self.large - self.large / 16);
                self.bytes += size;
                command.held += size;
                let shard = command.part(part).map(|p| p.shard);
                if command.complete(part, result, view, &mut again)
                    && let Some(shard) = shard
                {
                    self.unanswered.answered(shard);
                }
                if command.is_finished() {
                    self.open -= 1;
                }
                for part in again.drain(..) {
                    push_request(&mut self.batch, &mut self.unanswered, self.link.conn, number, part, command);
                }
            }
            self.resend = again;
            let by_size = MAX_IN_FLIGHT_BYTES / self.large.max(1);
            self.window = (self.window * 2).min(by_size).clamp(MIN_WINDOW, MAX_IN_FLIGHT);
        }
        self.results = results;
    }

    /// Plans the commands at hand.
    fn plan_all(&mut self, view: &RoutingView) -> Pause {
        if self.buf.is_empty() && self.phase == Phase::Open {
            return Pause::Starved;
        }
        let now = clock::now();
        let before = self.commands;
        let pause = self.plan_each(view, now);
        let taken = self.commands - before;
        if taken > 0 {
            self.link.info.last_active.store(now.mono.0, Ordering::Relaxed);
            self.link.front.stats.commands.fetch_add(taken, Ordering::Relaxed);
        }
        let reads = std::mem::take(&mut self.state.reads_local);
        if reads > 0 {
            self.link.front.stats.reads_local.fetch_add(reads, Ordering::Relaxed);
        }
        if self.buf.is_empty() && self.buf.capacity() > KEPT_BUFFER {
            self.buf = BytesMut::new();
        }
        pause
    }

    fn plan_each(&mut self, view: &RoutingView, now: Now) -> Pause {
        loop {
            if matches!(self.phase, Phase::Closing | Phase::Dropped) {
                return Pause::Ended;
            }
            if self.is_full() {
                return Pause::Full;
            }
            if self.commands - self.turn >= TURN {
                return Pause::Turn;
            }
            match self.decoder.poll(&mut self.buf, self.state.authenticated) {
                Ok(true) => {}
                Ok(false) => return Pause::Starved,
                Err(e) => {
                    self.link.front.stats.protocol_errors.fetch_add(1, Ordering::Relaxed);
                    encode::err(&mut self.scratch, &e.text());
                    self.reply();
                    self.phase = Phase::Closing;
                    return Pause::Ended;
                }
            }
            if !self.may_plan(view) {
                return Pause::Barrier;
            }
            let since = self.held.unwrap_or(now.mono);
            let deadline = since.after(self.link.front.deadline);
            let context = Context {
                view,
                kind: self.link.kind,
                front: &self.link.front,
                now,
                deadline,
                local: self.link.info.local,
                patient: now.mono < since.after(self.patience(view)),
                unanswered: &self.unanswered,
                clock: clock::mono,
            };
            let args = self.decoder.args(&self.buf);
            // What is answered at once and stands behind nothing goes straight to the output.
            let out = if self.queue.is_empty() { &mut self.out } else { &mut self.scratch };
            match plan(&context, &mut self.state, args, out) {
                Plan::Hold => {
                    if self.held.is_none() {
                        self.link.front.stats.holds.fetch_add(1, Ordering::Relaxed);
                    }
                    self.held = Some(since);
                    return Pause::Held;
                }
                Plan::Local => self.reply(),
                Plan::Send(command) => self.send(view, command),
                Plan::Close => {
                    self.reply();
                    self.phase = Phase::Closing;
                }
                Plan::Drop => self.phase = Phase::Dropped,
            }
            self.held = None;
            self.commands += 1;
            self.decoder.finish(&mut self.buf);
        }
    }

    /// How long a command may be held. Without a placement nothing else can be done until its deadline. Without a leader
    /// that could be named, the command is proxied in the end, and needs time for that as well.
    fn patience(&self, view: &RoutingView) -> Duration {
        let deadline = self.link.front.deadline;
        if view.shards.is_empty() { deadline } else { deadline / 2 }
    }

    /// The reply in the scratch buffer, if it is not in the output already, takes its place: at once if nothing is before
    /// it.
    fn reply(&mut self) {
        if self.queue.is_empty() {
            self.out.extend_from_slice(&self.scratch);
            self.scratch.clear();
        } else {
            let reply: Bytes = self.scratch.split().freeze();
            self.bytes += reply.len();
            // Its length is what the command holds.
            self.queue.push_back(InFlight::ready(reply));
        }
    }

    fn send(&mut self, view: &RoutingView, command: InFlight) {
        let number = self.first + self.queue.len() as u64;
        for part in 0..command.part_count() {
            push_request(&mut self.batch, &mut self.unanswered, self.link.conn, number, part, &command);
        }
        self.bytes += command.held;
        if !command.is_finished() {
            if self.open == 0 {
                self.epoch = view.epoch;
            }
            self.open += 1;
        }
        self.queue.push_back(command);
    }

    /// Moves the replies of finished commands to the output, as far as they stand at the front and there is room.
    fn write_finished(&mut self) {
        while !self.output_full() && self.queue.front().is_some_and(InFlight::is_finished) {
            let Some(command) = self.queue.pop_front() else { return };
            self.first += 1;
            self.bytes -= command.held;
            command.write(&mut self.out);
        }
    }

    /// The driver has stopped: the commands from `fresh` on never reached it; of earlier ones nothing will be heard.
    fn driver_gone(&mut self, view: &RoutingView, fresh: u64) {
        for (i, command) in self.queue.iter_mut().enumerate().filter(|(_, c)| !c.is_finished()) {
            let result = match self.first + i as u64 >= fresh {
                true => ClientResult::NotApplied(Refusal::ShuttingDown),
                false => ClientResult::Unknown,
            };
            command.abandon(&result, view);
        }
        self.open = 0;
        self.unanswered.give_up();
        self.phase = Phase::Closing;
    }

    /// Ends commands whose results are long overdue.
    fn give_up_lost(&mut self, view: &RoutingView, now: MonoTime) {
        let lost = |c: &InFlight| !c.is_finished() && c.deadline.after(LOST_AFTER) < now;
        let overdue = self.open > 0 && self.queue.iter().any(lost);
        // For a guard's period on end: a process that stood still wakes to overdue requests that its driver, too, has only
        // now a chance to answer.
        let since = overdue.then(|| self.overdue_since.unwrap_or_else(Instant::now));
        self.overdue_since = since;
        if since.is_none_or(|since| since.elapsed() < GUARD_CHECK) {
            return;
        }
        tracing::error!(conn = self.link.conn.0, "the driver has not answered requests long past their deadline");
        self.driver_gone(view, u64::MAX);
    }
}

fn push_request(
    batch: &mut Vec<ClientRequest>,
    unanswered: &mut Unanswered,
    conn: ConnId,
    number: u64,
    part: u32,
    command: &InFlight,
) {
    let Some(p) = command.part(part) else { return };
    unanswered.sent(p.shard);
    batch.push(ClientRequest {
        conn,
        token: Token(number << PART_BITS | u64::from(part)),
        shard: p.shard,
        write: p.write,
        level: crema_shard::ReadLevel::Linearizable,
        ops: p.ops.clone(),
        deadline: command.deadline,
    });
}
