//! A network of our own: each node in a network namespace, joined by a bridge in one more, the hub.
//!
//! ```text
//!   hub: bridge 10.77.0.254      <- the test's own threads, and so its clients (Network::within)
//!     |        |        |
//!   node 1   node 2   node 3     <- 10.77.0.1, .2, .3: one crema process each (Network::within_node)
//!            INPUT: DROP what node 1 sends     <- a cut, made where the packets arrive
//! ```
//!
//! Nothing of this is in the machine's own namespace: no interface, no route, no rule. A thread enters a namespace for
//! good and what it starts, threads and processes, begins there; so the code of the tests need not know about it. The
//! addresses cannot meet anybody else's, hence the ports are the same in each test. Only the names, in the list that
//! `ip netns` shows, are the machine's: they contain our process id, and go when the network is dropped.
//!
//! It needs Linux, root, `ip` and `iptables`. Where one is missing, [`available`] says which; tests are then skipped.

use super::ports::Use;
use super::{Context, Failure, Result, eventually};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Most nodes of a network.
pub const MAX_NODES: u64 = 9;
/// Limit of one call of `ip` or `iptables`, which take milliseconds.
const TOOL: Duration = Duration::from_secs(20);
/// The first three parts of each address.
const SUBNET: [u8; 3] = [10, 77, 0];
/// The last part of the hub's address.
const HUB: u8 = 254;

/// What a cut drops of what one node sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Every packet. TCP connections die in both directions, for want of answers.
    All,
    /// Every packet of the connections between the nodes; gossip gets through.
    Raft,
    /// The sender's own connections, on which its frames travel. What the other sends it, and the answers to that on the
    /// connections of the other, get through: a sender that is not heard and hears.
    Frames,
    /// Gossip only, by datagrams and by connections.
    Gossip,
}

/// A network namespace, removed on drop.
#[derive(Debug)]
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(name: String) -> Result<Namespace> {
        tool("ip", &["netns", "add", &name])?;
        let space = Namespace { name };
        space.ip(&["link", "set", "lo", "up"])?;
        Ok(space)
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        tool("ip", &[&["-n", &self.name], args].concat())
    }

    /// Runs `f` in a thread in this namespace and waits for its end. A panic goes on in the caller.
    fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let path = format!("/var/run/netns/{}", self.name);
        let file = File::open(&path).context(&path)?;
        std::thread::scope(|scope| {
            let entered = move || enter(&file).map(|()| f());
            let thread =
                std::thread::Builder::new().name(self.name.clone()).spawn_scoped(scope, entered).context("a thread")?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its interfaces and rules go with it, and the other ends of its cables.
        if let Err(e) = tool("ip", &["netns", "del", &self.name]) {
            eprintln!("the network namespace {} is left behind: {e}", self.name);
        }
    }
}

#[cfg(target_os = "linux")]
fn enter(namespace: &File) -> Result<()> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("entering a network namespace")
}

#[cfg(not(target_os = "linux"))]
fn enter(_: &File) -> Result<()> {
    Err(Failure::new("network namespaces are a thing of Linux"))
}

/// Namespaces of nodes 1 to n and the hub, removed when this is dropped. Drop the processes in it first.
#[derive(Debug)]
pub struct Network {
    // The hub goes first: then no bridge floods what the nodes still send.
    hub: Namespace,
    nodes: Vec<Namespace>,
}

impl Network {
    /// Namespaces for nodes 1 to `count`, that all reach each other and the hub.
    ///
    /// # Errors
    ///
    /// If a tool is missing or the system refuses; what was made is removed again.
    ///
    /// # Panics
    ///
    /// If `count` is not 1 to [`MAX_NODES`].
    pub fn new(count: u64) -> Result<Network> {
        assert!((1..=MAX_NODES).contains(&count), "1 to {MAX_NODES} nodes");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("crema-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut net = Network { hub: Namespace::new(format!("{prefix}-hub"))?, nodes: Vec::new() };
        net.hub.ip(&["link", "add", "bridge", "type", "bridge"])?;
        net.hub.ip(&["addr", "add", &cidr(HUB), "dev", "bridge"])?;
        net.hub.ip(&["link", "set", "bridge", "up"])?;
        for node in 1..=count {
            let space = Namespace::new(format!("{prefix}-n{node}"))?;
            let port = format!("port{node}");
            net.hub.ip(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space.name])?;
            net.hub.ip(&["link", "set", &port, "master", "bridge", "up"])?;
            space.ip(&["addr", "add", &cidr(node as u8), "dev", "eth0"])?;
            space.ip(&["link", "set", "eth0", "up"])?;
            net.nodes.push(space);
        }
        Ok(net)
    }

    /// The address of `node` for `purpose`.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    pub fn addr(&self, node: u64, purpose: Use) -> SocketAddr {
        assert!((1..=self.nodes.len() as u64).contains(&node), "node {node} is not of this network");
        let port = match purpose {
            Use::Redis => 6379,
            Use::RedisCluster => 7379,
            Use::Gossip => 8001,
            Use::Raft => 9001,
            Use::Http => 8080,
        };
        SocketAddr::from((ip(node as u8), port))
    }

    /// Runs `f` in a thread in the hub, which reaches every node whatever is cut, and waits for its end. A panic goes on
    /// in the caller.
    ///
    /// # Errors
    ///
    /// If the hub cannot be entered.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.hub.within(f)
    }

    /// The same in the namespace of `node`.
    ///
    /// # Errors
    ///
    /// If it cannot be entered.
    pub fn within_node<T: Send>(&self, node: u64, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.node(node).within(f)
    }

    /// From now on `to` does not hear `from`. Clients in the hub still reach both.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn cut(&self, from: u64, to: u64, traffic: Traffic) -> Result<()> {
        let source = ip(from as u8).to_string();
        let port = |purpose| self.addr(from, purpose).port().to_string();
        let (raft, gossip) = (port(Use::Raft), port(Use::Gossip));
        let rules: &[&[&str]] = match traffic {
            Traffic::All => &[&[]],
            Traffic::Raft => &[&["-p", "tcp", "--dport", &raft], &["-p", "tcp", "--sport", &raft]],
            Traffic::Frames => &[&["-p", "tcp", "--dport", &raft]],
            Traffic::Gossip => &[
                &["-p", "udp", "--dport", &gossip],
                &["-p", "tcp", "--dport", &gossip],
                &["-p", "tcp", "--sport", &gossip],
            ],
        };
        for rule in rules {
            // At the receiver: a sender would see an error, which a network does not give.
            self.iptables(to, &[&["-A", "INPUT", "-s", &source], *rule, &["-j", "DROP"]].concat())?;
        }
        Ok(())
    }

    /// Cuts both directions between `node` and every other node.
    ///
    /// # Errors
    ///
    /// As [`Network::cut`].
    pub fn isolate(&self, node: u64, traffic: Traffic) -> Result<()> {
        self.mute(node, traffic)?;
        self.deafen(node, traffic)
    }

    /// From now on no other node hears `node`.
    ///
    /// # Errors
    ///
    /// As [`Network::cut`].
    pub fn mute(&self, node: u64, traffic: Traffic) -> Result<()> {
        self.others(node).try_for_each(|other| self.cut(node, other, traffic))
    }

    /// From now on `node` hears no other node.
    ///
    /// # Errors
    ///
    /// As [`Network::cut`].
    pub fn deafen(&self, node: u64, traffic: Traffic) -> Result<()> {
        self.others(node).try_for_each(|other| self.cut(other, node, traffic))
    }

    /// Ends every cut.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn heal(&self) -> Result<()> {
        (1..=self.nodes.len() as u64).try_for_each(|node| self.iptables(node, &["-F", "INPUT"]))
    }

    fn others(&self, node: u64) -> impl Iterator<Item = u64> + use<> {
        (1..=self.nodes.len() as u64).filter(move |n| *n != node)
    }

    fn node(&self, node: u64) -> &Namespace {
        &self.nodes[usize::try_from(node - 1).expect("a small number")]
    }

    fn iptables(&self, node: u64, args: &[&str]) -> Result<()> {
        // All of iptables' calls on a machine share one lock, whatever their namespace.
        self.within_node(node, || tool("iptables", &[&["-w", "10"], args].concat()))?
    }
}

fn ip(last: u8) -> Ipv4Addr {
    let [a, b, c] = SUBNET;
    Ipv4Addr::new(a, b, c, last)
}

fn cidr(last: u8) -> String {
    format!("{}/24", ip(last))
}

/// Whether this machine lets us have networks with cuts: tries it.
///
/// # Errors
///
/// The reason why not.
pub fn available() -> Result<()> {
    let net = Network::new(2)?;
    net.isolate(1, Traffic::Raft)?;
    net.cut(1, 2, Traffic::Gossip)?;
    net.cut(1, 2, Traffic::All)?;
    net.heal()?;
    net.within(|| ())
}

/// Runs a program of the system to its end.
fn tool(name: &str, args: &[&str]) -> Result<()> {
    let what = format!("{name} {}", args.join(" "));
    let mut command = Command::new(name);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context(&what)?;
    let ended =
        eventually(&what, TOOL, || child.try_wait().context(&what)?.ok_or_else(|| Failure::new("it still runs")));
    if ended.is_err() {
        // It hangs: there is nothing to read from it.
        let _ = child.kill();
    }
    let output = child.wait_with_output().context(&what)?;
    match ended? {
        status if status.success() => Ok(()),
        status => Err(Failure::new(format!("{what}: {status}: {}", String::from_utf8_lossy(&output.stderr).trim()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    const SHORT: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(20);

    /// Accepts connections at `node` for ever and echoes one byte of each.
    fn echo(net: &Network, node: u64, purpose: Use) {
        let addr = net.addr(node, purpose);
        let listener = net.within_node(node, || TcpListener::bind(addr)).unwrap().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, mut byte) = (stream.unwrap(), [0]);
                // A peer that gave up is no matter.
                let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
            }
        });
    }

    fn ask(addr: SocketAddr, within: Duration) -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&addr, within)?;
        stream.set_read_timeout(Some(within))?;
        stream.write_all(&[7])?;
        stream.read_exact(&mut [0])
    }

    #[test]
    fn a_cut_has_a_direction_and_ports_and_ends() {
        if let Err(reason) = available() {
            let _ = writeln!(std::io::stderr(), "skipped: {reason}");
            return;
        }
        let net = Network::new(3).unwrap();
        for node in 1..=3 {
            echo(&net, node, Use::Raft);
            echo(&net, node, Use::Http);
            echo(&net, node, Use::Gossip);
        }
        let from_to = |from, to, purpose, within| net.within_node(from, || ask(net.addr(to, purpose), within)).unwrap();
        from_to(1, 2, Use::Raft, LONG).unwrap();
        net.within(|| ask(net.addr(3, Use::Raft), LONG)).unwrap().unwrap();

        net.cut(1, 2, Traffic::Frames).unwrap();
        from_to(1, 2, Use::Raft, SHORT).unwrap_err();
        from_to(2, 1, Use::Raft, LONG).unwrap();
        from_to(1, 2, Use::Http, LONG).unwrap();
        from_to(1, 3, Use::Raft, LONG).unwrap();
        net.heal().unwrap();
        from_to(1, 2, Use::Raft, LONG).unwrap();

        net.cut(1, 2, Traffic::Raft).unwrap();
        from_to(2, 1, Use::Raft, SHORT).expect_err("the answers are lost");
        from_to(2, 1, Use::Http, LONG).unwrap();
        net.heal().unwrap();

        net.cut(1, 2, Traffic::Gossip).unwrap();
        from_to(1, 2, Use::Gossip, SHORT).unwrap_err();
        from_to(2, 1, Use::Gossip, SHORT).expect_err("the answers are lost");
        from_to(1, 2, Use::Raft, LONG).unwrap();
        net.heal().unwrap();
        from_to(1, 2, Use::Gossip, LONG).unwrap();

        net.isolate(1, Traffic::All).unwrap();
        from_to(3, 1, Use::Http, SHORT).unwrap_err();
        from_to(1, 3, Use::Http, SHORT).unwrap_err();
        from_to(2, 3, Use::Http, LONG).unwrap();
        net.within(|| ask(net.addr(1, Use::Http), LONG)).unwrap().expect("the hub reaches every node");
    }

    #[test]
    fn a_tool_that_fails_or_is_missing_says_so() {
        assert!(tool("no-such-program", &["x"]).unwrap_err().to_string().starts_with("no-such-program x: "));
        assert!(tool("false", &[]).unwrap_err().to_string().starts_with("false : exit status: 1"));
    }
}
