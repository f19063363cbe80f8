//! The table of commands: names, arities, keys and flags, for dispatch and for COMMAND.
//!
//! Names are looked up without regard to case and without allocation, in a hash table that the compiler builds.

use crate::resp::decode::Args;

/// What a command is, for dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the command of its name")]
pub enum Cmd {
    Append,
    Asking,
    Auth,
    Client,
    ClientGetname,
    ClientHelp,
    ClientId,
    ClientInfo,
    ClientList,
    ClientNoEvict,
    ClientNoTouch,
    ClientSetinfo,
    ClientSetname,
    Cluster,
    ClusterHelp,
    ClusterInfo,
    ClusterKeyslot,
    ClusterMyid,
    ClusterNodes,
    ClusterShards,
    ClusterSlots,
    Command,
    CommandCount,
    CommandDocs,
    CommandGetkeys,
    CommandHelp,
    CommandInfo,
    CommandList,
    Config,
    ConfigGet,
    ConfigHelp,
    Dbsize,
    Decr,
    Decrby,
    Del,
    Discard,
    Echo,
    Exec,
    Exists,
    Expire,
    Expireat,
    Flushall,
    Flushdb,
    Get,
    Getdel,
    Getex,
    Getset,
    Hello,
    Incr,
    Incrby,
    Incrbyfloat,
    Info,
    Mget,
    Mset,
    Multi,
    Persist,
    Pexpire,
    Pexpireat,
    Ping,
    Psetex,
    Pttl,
    Quit,
    Readonly,
    Readwrite,
    Reset,
    Role,
    Scan,
    Select,
    Set,
    Setex,
    Setnx,
    Strlen,
    Time,
    Touch,
    Ttl,
    Type,
    Unlink,
    Wait,
}

/// Changes data.
pub const WRITE: u16 = 1;
/// Only looks at data.
pub const READONLY: u16 = 1 << 1;
/// May be refused for lack of memory.
pub const DENYOOM: u16 = 1 << 2;
/// Takes constant or logarithmic time.
pub const FAST: u16 = 1 << 3;
/// Works while the cluster is being founded or joined.
pub const LOADING: u16 = 1 << 4;
/// Works without contact to the cluster.
pub const STALE: u16 = 1 << 5;
/// Works before authentication.
pub const NO_AUTH: u16 = 1 << 6;
/// Not for scripts.
pub const NOSCRIPT: u16 = 1 << 7;
/// For operators.
pub const ADMIN: u16 = 1 << 8;
/// Answers at once inside MULTI instead of being queued.
pub const UNQUEUED: u16 = 1 << 9;
/// Not inside MULTI: it concerns all shards, and a transaction is one entry of one shard's log.
pub const NO_MULTI: u16 = 1 << 10;

/// The names of those flags that COMMAND tells.
pub const FLAG_NAMES: [(u16, &str); 10] = [
    (WRITE, "write"),
    (READONLY, "readonly"),
    (DENYOOM, "denyoom"),
    (ADMIN, "admin"),
    (NOSCRIPT, "noscript"),
    (LOADING, "loading"),
    (STALE, "stale"),
    (FAST, "fast"),
    (NO_AUTH, "no_auth"),
    (NO_MULTI, "no_multi"),
];

/// One command or subcommand.
#[derive(Debug)]
pub struct Spec {
    /// What it is.
    pub cmd: Cmd,
    /// Its name in lower case; a subcommand's with its container's, `client|id`.
    pub name: &'static str,
    /// Number of arguments, names included; the least one if negative.
    pub arity: i16,
    /// Sum of the flags of this module.
    pub flags: u16,
    /// Position of the first key, 0 without keys.
    pub first: i8,
    /// Position of the last key; from the end if negative.
    pub last: i8,
    /// Distance from key to key.
    pub step: i8,
    /// Group, as the documentation of Redis sorts commands.
    pub group: &'static str,
    /// The version of Redis that had it first.
    pub since: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Subcommands.
    pub subs: &'static [Spec],
}

impl Spec {
    /// Whether all of `flags` are set.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
    /// Whether it may have `len` arguments, names included.
    pub fn fits(&self, len: usize) -> bool {
        let wanted = usize::from(self.arity.unsigned_abs());
        if self.arity < 0 { len >= wanted } else { len == wanted }
    }
    /// The keys among `args`, which fit. None for a command without keys.
    pub fn keys<'a>(&self, args: Args<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let first = usize::try_from(self.first).unwrap_or(0);
        let end = match self.last {
            last if last < 0 => (args.len() + 1).saturating_sub(usize::from(last.unsigned_abs())),
            last => usize::from(last.unsigned_abs()) + 1,
        };
        let end = if first == 0 { 0 } else { end.min(args.len()) };
        let step = usize::from(self.step.unsigned_abs()).max(1);
        (first..end).step_by(step).map(move |i| args.get(i))
    }
    /// The name without its container's.
    pub fn short_name(&self) -> &'static str {
        self.name.rsplit_once('|').map_or(self.name, |(_, sub)| sub)
    }
}

const fn new(cmd: Cmd, name: &'static str, arity: i16, flags: u16, since: &'static str, summary: &'static str) -> Spec {
    Spec { cmd, name, arity, flags, first: 0, last: 0, step: 0, group: "server", since, summary, subs: &[] }
}

impl Spec {
    const fn group(mut self, group: &'static str) -> Spec {
        self.group = group;
        self
    }
    const fn keyed(mut self, first: i8, last: i8, step: i8) -> Spec {
        (self.first, self.last, self.step) = (first, last, step);
        self
    }
    const fn with(mut self, subs: &'static [Spec]) -> Spec {
        self.subs = subs;
        self
    }
}

const fn string(
    cmd: Cmd,
    name: &'static str,
    arity: i16,
    flags: u16,
    since: &'static str,
    summary: &'static str,
) -> Spec {
    new(cmd, name, arity, flags, since, summary).group("string").keyed(1, 1, 1)
}
const fn generic(
    cmd: Cmd,
    name: &'static str,
    arity: i16,
    flags: u16,
    since: &'static str,
    summary: &'static str,
) -> Spec {
    new(cmd, name, arity, flags, since, summary).group("generic").keyed(1, 1, 1)
}
const fn connection(
    cmd: Cmd,
    name: &'static str,
    arity: i16,
    flags: u16,
    since: &'static str,
    summary: &'static str,
) -> Spec {
    new(cmd, name, arity, flags, since, summary).group("connection")
}
const fn cluster(
    cmd: Cmd,
    name: &'static str,
    arity: i16,
    flags: u16,
    since: &'static str,
    summary: &'static str,
) -> Spec {
    new(cmd, name, arity, flags, since, summary).group("cluster")
}
const fn transactions(
    cmd: Cmd,
    name: &'static str,
    arity: i16,
    flags: u16,
    since: &'static str,
    summary: &'static str,
) -> Spec {
    new(cmd, name, arity, flags, since, summary).group("transactions")
}

const CALM: u16 = LOADING | STALE;
const GREETING: u16 = NOSCRIPT | LOADING | STALE | FAST | NO_AUTH;

/// All commands.
pub static COMMANDS: &[Spec] = &[
    string(Cmd::Append, "append", 3, WRITE | DENYOOM | FAST, "2.0.0", "Append to a value, or set it"),
    cluster(Cmd::Asking, "asking", 1, FAST, "3.0.0", "Accepted; moves of slots need no asking here"),
    connection(Cmd::Auth, "auth", -2, GREETING, "1.0.0", "Authenticate the connection"),
    connection(Cmd::Client, "client", -2, 0, "2.4.0", "Commands about connections").with(&[
        connection(Cmd::ClientGetname, "client|getname", 2, NOSCRIPT | CALM, "2.6.9", "The connection's name"),
        connection(Cmd::ClientHelp, "client|help", 2, CALM, "5.0.0", "Lists the subcommands"),
        connection(Cmd::ClientId, "client|id", 2, NOSCRIPT | CALM, "5.0.0", "The connection's id"),
        connection(Cmd::ClientInfo, "client|info", 2, NOSCRIPT | CALM, "6.2.0", "What is known of the connection"),
        connection(
            Cmd::ClientList,
            "client|list",
            -2,
            ADMIN | NOSCRIPT | CALM,
            "2.4.0",
            "The connections of this node",
        ),
        connection(
            Cmd::ClientNoEvict,
            "client|no-evict",
            3,
            ADMIN | NOSCRIPT | CALM,
            "7.0.0",
            "Accepted without effect",
        ),
        connection(Cmd::ClientNoTouch, "client|no-touch", 3, NOSCRIPT | CALM, "7.2.0", "Accepted without effect"),
        connection(Cmd::ClientSetinfo, "client|setinfo", 4, NOSCRIPT | CALM, "7.2.0", "Tells the client's library"),
        connection(Cmd::ClientSetname, "client|setname", 3, NOSCRIPT | CALM, "2.6.9", "Names the connection"),
    ]),
    cluster(Cmd::Cluster, "cluster", -2, 0, "3.0.0", "Commands about the cluster").with(&[
        cluster(Cmd::ClusterHelp, "cluster|help", 2, CALM, "5.0.0", "Lists the subcommands"),
        cluster(Cmd::ClusterInfo, "cluster|info", 2, STALE, "3.0.0", "State of the cluster as this node sees it"),
        cluster(Cmd::ClusterKeyslot, "cluster|keyslot", 3, STALE, "3.0.0", "The hash slot of a key"),
        cluster(Cmd::ClusterMyid, "cluster|myid", 2, STALE, "3.0.0", "This node's id"),
        cluster(Cmd::ClusterNodes, "cluster|nodes", 2, STALE, "3.0.0", "The nodes, one a line"),
        cluster(Cmd::ClusterShards, "cluster|shards", 2, STALE, "7.0.0", "The shards with their slots and nodes"),
        cluster(Cmd::ClusterSlots, "cluster|slots", 2, STALE, "3.0.0", "Arcs of slots with their nodes"),
    ]),
    new(Cmd::Command, "command", -1, CALM, "2.8.13", "The commands").with(&[
        new(Cmd::CommandCount, "command|count", 2, CALM, "2.8.13", "Number of commands"),
        new(Cmd::CommandDocs, "command|docs", -2, CALM, "7.0.0", "Documentation of commands"),
        new(Cmd::CommandGetkeys, "command|getkeys", -4, CALM, "2.8.13", "The keys of a full command"),
        new(Cmd::CommandHelp, "command|help", 2, CALM, "5.0.0", "Lists the subcommands"),
        new(Cmd::CommandInfo, "command|info", -2, CALM, "2.8.13", "Details of commands"),
        new(Cmd::CommandList, "command|list", -2, CALM, "7.0.0", "Names of commands"),
    ]),
    new(Cmd::Config, "config", -2, 0, "2.0.0", "Commands about the configuration").with(&[
        new(Cmd::ConfigGet, "config|get", -3, ADMIN | NOSCRIPT | CALM, "2.0.0", "Values of settings"),
        new(Cmd::ConfigHelp, "config|help", 2, CALM, "5.0.0", "Lists the subcommands"),
    ]),
    new(Cmd::Dbsize, "dbsize", 1, READONLY | NO_MULTI, "1.0.0", "Number of keys in the selected database"),
    string(Cmd::Decr, "decr", 2, WRITE | DENYOOM | FAST, "1.0.0", "Subtract one"),
    string(Cmd::Decrby, "decrby", 3, WRITE | DENYOOM | FAST, "1.0.0", "Subtract a number"),
    generic(Cmd::Del, "del", -2, WRITE, "1.0.0", "Delete keys").keyed(1, -1, 1),
    transactions(Cmd::Discard, "discard", 1, NOSCRIPT | CALM | FAST | UNQUEUED, "2.0.0", "Forget the queued commands"),
    connection(Cmd::Echo, "echo", 2, CALM | FAST, "1.0.0", "Answer with the argument"),
    transactions(Cmd::Exec, "exec", 1, NOSCRIPT | CALM | UNQUEUED, "1.2.0", "Execute the queued commands at once"),
    generic(Cmd::Exists, "exists", -2, READONLY | FAST, "1.0.0", "Count the keys that exist").keyed(1, -1, 1),
    generic(Cmd::Expire, "expire", -3, WRITE | FAST, "1.0.0", "Let a key expire after seconds"),
    generic(Cmd::Expireat, "expireat", -3, WRITE | FAST, "1.2.0", "Let a key expire at a time in seconds"),
    new(Cmd::Flushall, "flushall", -1, WRITE | NO_MULTI, "1.0.0", "Delete all keys of all databases"),
    new(Cmd::Flushdb, "flushdb", -1, WRITE | NO_MULTI, "1.0.0", "Delete all keys of the selected database"),
    string(Cmd::Get, "get", 2, READONLY | FAST, "1.0.0", "The value of a key"),
    string(Cmd::Getdel, "getdel", 2, WRITE | FAST, "6.2.0", "The value of a key, which is deleted"),
    string(Cmd::Getex, "getex", -2, WRITE | FAST, "6.2.0", "The value of a key, whose expiry may change"),
    string(Cmd::Getset, "getset", 3, WRITE | DENYOOM | FAST, "1.0.0", "Set a value and answer with the old one"),
    connection(Cmd::Hello, "hello", -1, GREETING, "6.0.0", "Choose the protocol, authenticate and name the connection"),
    string(Cmd::Incr, "incr", 2, WRITE | DENYOOM | FAST, "1.0.0", "Add one"),
    string(Cmd::Incrby, "incrby", 3, WRITE | DENYOOM | FAST, "1.0.0", "Add a number"),
    string(Cmd::Incrbyfloat, "incrbyfloat", 3, WRITE | DENYOOM | FAST, "2.6.0", "Add a floating-point number"),
    new(Cmd::Info, "info", -1, CALM, "1.0.0", "State and statistics of this node"),
    string(Cmd::Mget, "mget", -2, READONLY | FAST, "1.0.0", "The values of keys").keyed(1, -1, 1),
    string(Cmd::Mset, "mset", -3, WRITE | DENYOOM, "1.0.1", "Set values").keyed(1, -1, 2),
    transactions(Cmd::Multi, "multi", 1, NOSCRIPT | CALM | FAST | UNQUEUED, "1.2.0", "Queue what follows until EXEC"),
    generic(Cmd::Persist, "persist", 2, WRITE | FAST, "2.2.0", "Remove a key's expiry"),
    generic(Cmd::Pexpire, "pexpire", -3, WRITE | FAST, "2.6.0", "Let a key expire after milliseconds"),
    generic(Cmd::Pexpireat, "pexpireat", -3, WRITE | FAST, "2.6.0", "Let a key expire at a time in milliseconds"),
    connection(Cmd::Ping, "ping", -1, FAST, "1.0.0", "Answer with PONG or the argument"),
    string(Cmd::Psetex, "psetex", 4, WRITE | DENYOOM, "2.6.0", "Set a value that expires after milliseconds"),
    generic(Cmd::Pttl, "pttl", 2, READONLY | FAST, "2.6.0", "Milliseconds until a key expires"),
    connection(Cmd::Quit, "quit", -1, GREETING | UNQUEUED, "1.0.0", "Close the connection"),
    cluster(Cmd::Readonly, "readonly", 1, CALM | FAST, "3.0.0", "Accepted; reads are answered by leaders all the same"),
    cluster(Cmd::Readwrite, "readwrite", 1, CALM | FAST, "3.0.0", "Accepted without effect"),
    connection(Cmd::Reset, "reset", 1, GREETING | UNQUEUED, "6.2.0", "Back to the state of a new connection"),
    new(Cmd::Role, "role", 1, NOSCRIPT | CALM | FAST, "2.8.12", "The node's role, which is always master"),
    generic(Cmd::Scan, "scan", -2, READONLY | NO_MULTI, "2.8.0", "Iterate over the keys of the selected database")
        .keyed(0, 0, 0),
    connection(Cmd::Select, "select", 2, CALM | FAST, "1.0.0", "Select a database"),
    string(Cmd::Set, "set", -3, WRITE | DENYOOM, "1.0.0", "Set a value"),
    string(Cmd::Setex, "setex", 4, WRITE | DENYOOM, "2.0.0", "Set a value that expires after seconds"),
    string(Cmd::Setnx, "setnx", 3, WRITE | DENYOOM | FAST, "1.0.0", "Set a value if the key does not exist"),
    string(Cmd::Strlen, "strlen", 2, READONLY | FAST, "2.2.0", "The length of a value"),
    new(Cmd::Time, "time", 1, CALM | FAST, "2.6.0", "This node's wall-clock time"),
    generic(Cmd::Touch, "touch", -2, READONLY | FAST, "3.2.1", "Count the keys that exist").keyed(1, -1, 1),
    generic(Cmd::Ttl, "ttl", 2, READONLY | FAST, "1.0.0", "Seconds until a key expires"),
    generic(Cmd::Type, "type", 2, READONLY | FAST, "1.0.0", "The type of a value"),
    generic(Cmd::Unlink, "unlink", -2, WRITE | FAST, "4.0.0", "Delete keys").keyed(1, -1, 1),
    generic(Cmd::Wait, "wait", 3, NOSCRIPT, "3.0.0", "How many further replicas have all acknowledged writes")
        .keyed(0, 0, 0),
];

/// What COMMAND tells cluster clients about sending a command to several nodes and combining the answers. Clients may
/// act on it; what they do without a tip, such as asking one node for DBSIZE, is theirs.
pub fn tips(cmd: Cmd) -> &'static [&'static str] {
    const VARYING: &str = "nondeterministic_output";
    const ALL_SHARDS: &str = "request_policy:all_shards";
    const BY_KEY: &str = "request_policy:multi_shard";
    const SUM: &str = "response_policy:agg_sum";
    const ALL_DONE: &str = "response_policy:all_succeeded";
    match cmd {
        Cmd::Ping | Cmd::Flushall | Cmd::Flushdb => &[ALL_SHARDS, ALL_DONE],
        Cmd::Dbsize => &[ALL_SHARDS, SUM],
        Cmd::Wait => &[ALL_SHARDS, "response_policy:agg_min"],
        Cmd::Info => &[VARYING, ALL_SHARDS, "response_policy:special"],
        Cmd::Scan => &[VARYING, "request_policy:special"],
        Cmd::Mget => &[BY_KEY],
        Cmd::Mset => &[BY_KEY, ALL_DONE],
        Cmd::Del | Cmd::Unlink | Cmd::Exists | Cmd::Touch => &[BY_KEY, SUM],
        Cmd::Time | Cmd::Ttl | Cmd::Pttl | Cmd::ClientInfo | Cmd::ClientList => &[VARYING],
        Cmd::ClusterInfo | Cmd::ClusterNodes | Cmd::ClusterShards | Cmd::ClusterSlots => &[VARYING],
        Cmd::Command | Cmd::CommandInfo | Cmd::CommandDocs | Cmd::CommandList => &["nondeterministic_output_order"],
        _ => &[],
    }
}

/// Buckets of the hash table, several times the number of commands: few collisions.
const BUCKETS: usize = 256;
/// An empty bucket.
const EMPTY: u8 = u8::MAX;

const fn bucket(name: &[u8]) -> usize {
    let mut hash: u32 = name.len() as u32;
    let mut i = 0;
    while i < name.len() {
        hash = hash.wrapping_mul(31).wrapping_add(name[i].to_ascii_lowercase() as u32);
        i += 1;
    }
    ((hash ^ hash >> 8) % BUCKETS as u32) as usize
}

/// Position in [`COMMANDS`] by hash of the name, collisions in the next free bucket.
static TABLE: [u8; BUCKETS] = {
    let mut table = [EMPTY; BUCKETS];
    let mut i = 0;
    while i < COMMANDS.len() {
        let mut at = bucket(COMMANDS[i].name.as_bytes());
        while table[at] != EMPTY {
            at = (at + 1) % BUCKETS;
        }
        table[at] = i as u8;
        i += 1;
    }
    table
};

/// Longest name in the table; longer ones are not hashed.
const LONGEST_NAME: usize = 16;

/// The command called `name`, in whatever case.
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    if name.len() > LONGEST_NAME {
        return None;
    }
    let mut at = bucket(name);
    while TABLE[at] != EMPTY {
        let spec = &COMMANDS[usize::from(TABLE[at])];
        if spec.name.as_bytes().eq_ignore_ascii_case(name) {
            return Some(spec);
        }
        at = (at + 1) % BUCKETS;
    }
    None
}

/// Why a command is not in the table, or not so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected(pub Vec<u8>);

/// The command that `args` call, subcommands resolved, with a fitting number of arguments. The error is worded as Redis
/// 7.0 words it, without its leading code.
pub fn resolve(args: Args<'_>) -> Result<&'static Spec, Rejected> {
    let Some(spec) = lookup(args.get(0)) else { return Err(unknown(args)) };
    let spec = match spec.subs {
        subs if !subs.is_empty() && args.len() > 1 => {
            let sub = subs.iter().find(|s| s.short_name().as_bytes().eq_ignore_ascii_case(args.get(1)));
            sub.ok_or_else(|| unknown_sub(spec, args.get(1)))?
        }
        _ => spec,
    };
    if spec.fits(args.len()) { Ok(spec) } else { Err(wrong_arity(spec)) }
}

/// The error of a command with a number of arguments that does not fit.
pub fn wrong_arity(spec: &Spec) -> Rejected {
    Rejected(format!("wrong number of arguments for '{}' command", spec.name).into_bytes())
}

/// Bytes of a client's words that an error repeats.
const REPEATED: usize = 128;

fn unknown(args: Args<'_>) -> Rejected {
    let mut text = b"unknown command '".to_vec();
    text.extend(args.get(0).iter().take(REPEATED));
    text.extend_from_slice(b"', with args beginning with: ");
    let from = text.len();
    for arg in args.from(1) {
        let left = REPEATED.saturating_sub(text.len() - from);
        if left == 0 {
            break;
        }
        text.push(b'\'');
        text.extend(arg.iter().take(left));
        text.extend_from_slice(b"' ");
    }
    Rejected(text)
}

fn unknown_sub(spec: &Spec, sub: &[u8]) -> Rejected {
    let mut text = b"unknown subcommand '".to_vec();
    text.extend(sub.iter().take(REPEATED));
    text.extend_from_slice(format!("'. Try {} HELP.", spec.name.to_ascii_uppercase()).as_bytes());
    Rejected(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::decode::OwnedArgs;

    fn resolved(words: &[&str]) -> Result<&'static str, String> {
        let owned = OwnedArgs::new(words.iter().map(|w| w.as_bytes()));
        resolve(owned.args()).map(|s| s.name).map_err(|Rejected(e)| String::from_utf8(e).unwrap())
    }

    #[test]
    fn every_command_is_found_in_any_case() {
        for spec in COMMANDS {
            assert!(spec.name.len() <= LONGEST_NAME && spec.name == spec.name.to_ascii_lowercase());
            for name in [spec.name.to_owned(), spec.name.to_ascii_uppercase()] {
                assert!(std::ptr::eq(lookup(name.as_bytes()).unwrap(), spec), "{name}");
            }
            for sub in spec.subs {
                assert!(sub.name.starts_with(spec.name) && sub.flags & UNQUEUED == 0);
            }
        }
        for name in ["", "ge", "gett", "nosuch", "averyveryverylongname"] {
            assert!(lookup(name.as_bytes()).is_none());
        }
        assert!(COMMANDS.is_sorted_by_key(|s| s.name), "so that nobody enters one twice");
    }

    #[test]
    fn rejections_are_worded_as_redis_words_them() {
        assert_eq!(resolved(&["GeT", "a"]), Ok("get"));
        assert_eq!(resolved(&["client", "SETNAME", "a"]), Ok("client|setname"));
        assert_eq!(resolved(&["command"]), Ok("command"));
        let failed = |words: &[&str]| resolved(words).unwrap_err();
        assert_eq!(failed(&["FOO", "a", "b"]), "unknown command 'FOO', with args beginning with: 'a' 'b' ");
        assert_eq!(failed(&["FOO"]), "unknown command 'FOO', with args beginning with: ");
        assert_eq!(failed(&["Get"]), "wrong number of arguments for 'get' command");
        assert_eq!(failed(&["get", "a", "b"]), "wrong number of arguments for 'get' command");
        assert_eq!(failed(&["set", "a"]), "wrong number of arguments for 'set' command");
        assert_eq!(failed(&["client"]), "wrong number of arguments for 'client' command");
        assert_eq!(failed(&["client", "foo"]), "unknown subcommand 'foo'. Try CLIENT HELP.");
        assert_eq!(failed(&["client", "setname"]), "wrong number of arguments for 'client|setname' command");
        assert_eq!(failed(&["config", "get"]), "wrong number of arguments for 'config|get' command");
        let (f, a, b) = ("F".repeat(300), "a".repeat(100), "b".repeat(100));
        // Checked against Redis 7.0.15: the quotes and the blank of the first argument count.
        let wanted = format!("unknown command '{}', with args beginning with: '{a}' '{}' ", &f[..128], &b[..25]);
        assert_eq!(failed(&[&f, &a, &b, "c"]), wanted);
    }

    #[test]
    fn keys_are_where_the_table_says() {
        let keys = |words: &[&str]| -> Vec<String> {
            let owned = OwnedArgs::new(words.iter().map(|w| w.as_bytes()));
            let spec = resolve(owned.args()).unwrap();
            spec.keys(owned.args()).map(|k| String::from_utf8(k.to_vec()).unwrap()).collect()
        };
        assert_eq!(keys(&["get", "a"]), ["a"]);
        assert_eq!(keys(&["mset", "a", "1", "b", "2"]), ["a", "b"]);
        assert_eq!(keys(&["mset", "a", "1", "b"]), ["a", "b"]);
        assert_eq!(keys(&["del", "a", "b", "c"]), ["a", "b", "c"]);
        assert_eq!(keys(&["set", "a", "b", "ex", "1"]), ["a"]);
        for keyless in [&["ping"][..], &["scan", "0"], &["wait", "1", "2"], &["info"]] {
            assert!(keys(keyless).is_empty());
        }
    }
}
