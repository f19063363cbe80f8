//! Commands that a connection answers by itself: greeting, settings, and what clients ask about the server.

use crate::resp::command::{self, COMMANDS, Cmd, FAST, FLAG_NAMES, READONLY, Spec, WRITE};
use crate::resp::decode::{Args, OwnedArgs, parse_i64};
use crate::resp::encode::{self, Proto};
use crate::resp::plan::{ClientState, Context};
use crate::resp::server::ClientInfo;
use crate::resp::topology;
use bytes::BytesMut;
use crema_core::glob::glob_match;
use crema_core::limits::{DATABASES, MAX_VALUE_BYTES};
use crema_core::{EvictionPolicy, MonoTime, slot_of};
use std::fmt::Write as _;
use std::sync::atomic::Ordering;

/// The version of Redis that clients are told: the newest whose commands and replies those of ours are taken from. Some
/// clients use a command only from some version on, and read it as a semantic version.
pub const REDIS_VERSION: &str = "7.4.0";
/// Longest name of a connection or of its client library, in bytes.
const MAX_NAME_BYTES: usize = 1024;

const WRONGPASS: &[u8] = b"WRONGPASS invalid username-password pair or user is disabled.";

/// Answers `spec`, one of the commands that need no shard.
pub fn run(ctx: &Context<'_>, state: &mut ClientState, spec: &'static Spec, args: Args<'_>, out: &mut BytesMut) {
    let proto = state.proto;
    let ok = |out: &mut BytesMut| encode::simple(out, "OK");
    match spec.cmd {
        Cmd::Ping => match args.len() {
            1 => encode::simple(out, "PONG"),
            2 => encode::bulk(out, args.get(1)),
            _ => encode::err(out, &command::wrong_arity(spec).0),
        },
        Cmd::Echo => encode::bulk(out, args.get(1)),
        Cmd::Hello => hello(ctx, state, args, out),
        Cmd::Auth => auth(ctx, state, args, out),
        Cmd::Reset => {
            *state = ClientState::new(state.info.clone(), ctx.front);
            state.info.set_name(&[]);
            encode::simple(out, "RESET");
        }
        Cmd::Select => select(state, args.get(1), out),
        Cmd::Readonly | Cmd::Readwrite | Cmd::Asking => ok(out),
        Cmd::Time => {
            let ms = ctx.now.wall.0;
            encode::array(out, 2);
            encode::bulk(out, (ms / 1000).to_string().as_bytes());
            encode::bulk(out, (ms % 1000 * 1000).to_string().as_bytes());
        }
        Cmd::Role => {
            encode::array(out, 3);
            encode::bulk(out, b"master");
            encode::int(out, 0);
            encode::array(out, 0);
        }
        Cmd::Wait => match (parse_i64(args.get(1)), parse_i64(args.get(2))) {
            (None, _) => encode::err(out, b"value is not an integer or out of range"),
            (_, None) => encode::err(out, b"timeout is not an integer or out of range"),
            (_, Some(timeout)) if timeout < 0 => encode::err(out, b"timeout is negative"),
            // A write is acknowledged once a quorum has it, so there is nothing to wait for.
            _ => encode::int(out, topology::quorum_others(ctx.view) as i64),
        },
        Cmd::Info => encode::verbatim(out, proto, info(ctx, args).as_bytes()),
        Cmd::ConfigGet => config_get(ctx, state, args, out),
        Cmd::ClientId => encode::int(out, state.info.id as i64),
        Cmd::ClientGetname => match state.info.name() {
            name if name.is_empty() => encode::nil(out, proto),
            name => encode::bulk(out, &name),
        },
        Cmd::ClientSetname => match check_name(args.get(2), "Client names") {
            Ok(()) => {
                state.info.set_name(args.get(2));
                ok(out);
            }
            Err(text) => encode::err(out, text.as_bytes()),
        },
        Cmd::ClientSetinfo => client_setinfo(state, args, out),
        Cmd::ClientInfo => encode::verbatim(out, proto, &client_line(&state.info, ctx.now.mono)),
        Cmd::ClientList => client_list(ctx, state, args, out),
        Cmd::ClientNoEvict | Cmd::ClientNoTouch => {
            let mode = args.get(2);
            match mode.eq_ignore_ascii_case(b"on") || mode.eq_ignore_ascii_case(b"off") {
                true => ok(out),
                false => encode::err(out, b"syntax error"),
            }
        }
        Cmd::ClusterSlots => topology::slots(out, proto, ctx.view, ctx.local),
        Cmd::ClusterShards => topology::shards(out, proto, ctx.view, ctx.local),
        Cmd::ClusterNodes => encode::verbatim(out, proto, topology::nodes(ctx.view, ctx.local).as_bytes()),
        Cmd::ClusterInfo => encode::verbatim(out, proto, topology::info(ctx.view).as_bytes()),
        Cmd::ClusterMyid => encode::bulk(out, topology::node_id(ctx.view, ctx.view.this).as_bytes()),
        Cmd::ClusterKeyslot => encode::int(out, i64::from(slot_of(args.get(2)).0)),
        Cmd::Command => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|c| details(out, proto, c));
        }
        Cmd::CommandCount => encode::int(out, COMMANDS.len() as i64),
        Cmd::CommandInfo if args.len() == 2 => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|c| details(out, proto, c));
        }
        Cmd::CommandInfo => {
            encode::array(out, args.len() - 2);
            for name in args.from(2) {
                match find(name) {
                    Some(c) => details(out, proto, c),
                    None => encode::nil(out, proto),
                }
            }
        }
        Cmd::CommandDocs => {
            let named: Vec<&Spec> = args.from(2).filter_map(find).collect();
            let all = || COMMANDS.iter().collect();
            let chosen: Vec<&Spec> = if args.len() == 2 { all() } else { named };
            encode::map(out, proto, chosen.len());
            chosen.into_iter().for_each(|c| docs(out, proto, c));
        }
        Cmd::CommandList => command_list(args, out),
        Cmd::CommandGetkeys => getkeys(args, out),
        Cmd::ClientHelp => help(out, "CLIENT"),
        Cmd::ClusterHelp => help(out, "CLUSTER"),
        Cmd::CommandHelp => help(out, "COMMAND"),
        Cmd::ConfigHelp => help(out, "CONFIG"),
        // Everything else is planned elsewhere, or a container, whose arity asks for a subcommand.
        _ => encode::err(out, b"internal error: no such local command"),
    }
    // What CLIENT LIST tells others.
    state.info.db.store(state.db, Ordering::Relaxed);
    state.info.resp3.store(state.proto == Proto::Resp3, Ordering::Relaxed);
}

fn select(state: &mut ClientState, arg: &[u8], out: &mut BytesMut) {
    match parse_i64(arg) {
        None => encode::err(out, b"value is not an integer or out of range"),
        Some(n) if i32::try_from(n).is_err() => {
            encode::err(out, b"value is out of range, value must between -2147483648 and 2147483647");
        }
        Some(n) => match u8::try_from(n).ok().filter(|db| *db < DATABASES) {
            Some(db) => {
                state.db = db;
                encode::simple(out, "OK");
            }
            None => encode::err(out, b"DB index is out of range"),
        },
    }
}

/// Whether a user with this password may come in. There is one user, `default`.
fn admits(ctx: &Context<'_>, user: &[u8], password: &[u8]) -> bool {
    let admitted = user == b"default" && ctx.front.requirepass.as_ref().is_none_or(|secret| secret.is(password));
    if !admitted {
        ctx.front.stats.auth_failures.fetch_add(1, Ordering::Relaxed);
    }
    admitted
}

fn auth(ctx: &Context<'_>, state: &mut ClientState, args: Args<'_>, out: &mut BytesMut) {
    let (user, password) = match args.len() {
        2 if ctx.front.requirepass.is_none() => {
            return encode::err(
                out,
                b"AUTH <password> called without any password configured for the default user. \
                  Are you sure your configuration is correct?",
            );
        }
        2 => (b"default".as_slice(), args.get(1)),
        3 => (args.get(1), args.get(2)),
        _ => return encode::err(out, b"syntax error"),
    };
    if admits(ctx, user, password) {
        state.authenticated = true;
        encode::simple(out, "OK");
    } else {
        encode::error(out, WRONGPASS);
    }
}

fn hello(ctx: &Context<'_>, state: &mut ClientState, args: Args<'_>, out: &mut BytesMut) {
    let mut proto = state.proto;
    if args.len() > 1 {
        proto = match parse_i64(args.get(1)) {
            None => return encode::err(out, b"Protocol version is not an integer or out of range"),
            Some(2) => Proto::Resp2,
            Some(3) => Proto::Resp3,
            Some(_) => return encode::error(out, b"NOPROTO unsupported protocol version"),
        };
    }
    let (mut login, mut name) = (None, None);
    let mut i = 2;
    while i < args.len() {
        let (option, left) = (args.get(i), args.len() - i - 1);
        if option.eq_ignore_ascii_case(b"auth") && left >= 2 {
            login = Some((args.get(i + 1), args.get(i + 2)));
            i += 3;
        } else if option.eq_ignore_ascii_case(b"setname") && left >= 1 {
            if let Err(text) = check_name(args.get(i + 1), "Client names") {
                return encode::err(out, text.as_bytes());
            }
            name = Some(args.get(i + 1));
            i += 2;
        } else {
            let shown = &option[..option.len().min(128)];
            return encode::err(out, &[b"Syntax error in HELLO option '", shown, b"'"].concat());
        }
    }
    if let Some((user, password)) = login {
        if !admits(ctx, user, password) {
            return encode::error(out, WRONGPASS);
        }
        state.authenticated = true;
    }
    if !state.authenticated {
        return encode::error(
            out,
            b"NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> \
              <pass> option can be used to authenticate the client and select the RESP protocol version at the same time",
        );
    }
    if let Some(name) = name {
        state.info.set_name(name);
    }
    state.proto = proto;
    encode::map(out, proto, 7);
    let mut text = |key: &str, value: &str| {
        encode::bulk(out, key.as_bytes());
        encode::bulk(out, value.as_bytes());
    };
    text("server", "redis");
    text("version", REDIS_VERSION);
    text("mode", "cluster");
    text("role", "master");
    encode::bulk(out, b"proto");
    encode::int(out, if proto == Proto::Resp3 { 3 } else { 2 });
    encode::bulk(out, b"id");
    encode::int(out, state.info.id as i64);
    encode::bulk(out, b"modules");
    encode::array(out, 0);
}

/// Names are listed as `key=value` pairs with blanks between, so they must not contain any.
fn check_name(name: &[u8], what: &str) -> Result<(), String> {
    if !name.iter().all(|b| (b'!'..=b'~').contains(b)) {
        return Err(format!("{what} cannot contain spaces, newlines or special characters."));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(format!("{what} cannot be longer than {MAX_NAME_BYTES} bytes"));
    }
    Ok(())
}

fn client_setinfo(state: &ClientState, args: Args<'_>, out: &mut BytesMut) {
    let (option, value) = (args.get(2), args.get(3));
    let lib_name = option.eq_ignore_ascii_case(b"lib-name");
    if !lib_name && !option.eq_ignore_ascii_case(b"lib-ver") {
        let shown = &option[..option.len().min(128)];
        return encode::err(out, &[b"Unrecognized option '", shown, b"'"].concat());
    }
    match check_name(value, if lib_name { "lib-name" } else { "lib-ver" }) {
        Ok(()) => {
            state.info.set_library(lib_name, value);
            encode::simple(out, "OK");
        }
        Err(text) => encode::err(out, text.as_bytes()),
    }
}

/// One line of CLIENT LIST.
fn client_line(client: &ClientInfo, now: MonoTime) -> Vec<u8> {
    let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (lib_name, lib_ver) = client.library();
    let last = MonoTime(client.last_active.load(Ordering::Relaxed));
    let resp = if client.resp3.load(Ordering::Relaxed) { 3 } else { 2 };
    format!(
        "id={} addr={} laddr={} fd=-1 name={} age={} idle={} flags=N db={} sub=0 psub=0 ssub=0 multi=-1 watch=0 events=r \
         user=default redir=-1 resp={resp} lib-name={} lib-ver={}\n",
        client.id,
        client.peer,
        client.local,
        show(&client.name()),
        now.since(client.since).as_secs(),
        now.since(last).as_secs(),
        client.db.load(Ordering::Relaxed),
        show(&lib_name),
        show(&lib_ver),
    )
    .into_bytes()
}

fn client_list(ctx: &Context<'_>, state: &ClientState, args: Args<'_>, out: &mut BytesMut) {
    let mut ids: Option<Vec<u64>> = None;
    let mut normal = true;
    match (args.len(), args.get(2)) {
        (2, _) => {}
        (4, option) if option.eq_ignore_ascii_case(b"type") => {
            normal = args.get(3).eq_ignore_ascii_case(b"normal");
            let known = ["normal", "master", "replica", "slave", "pubsub"];
            if !known.iter().any(|k| args.get(3).eq_ignore_ascii_case(k.as_bytes())) {
                let shown = &args.get(3)[..args.get(3).len().min(128)];
                return encode::err(out, &[b"Unknown client type '", shown, b"'"].concat());
            }
        }
        (4.., option) if option.eq_ignore_ascii_case(b"id") => {
            let given: Option<Vec<u64>> =
                args.from(3).map(|id| parse_i64(id).and_then(|n| u64::try_from(n).ok())).collect();
            match given {
                Some(given) => ids = Some(given),
                None => return encode::err(out, b"Invalid client ID"),
            }
        }
        _ => return encode::err(out, b"syntax error"),
    }
    let mut text = Vec::new();
    if normal {
        let clients = match ids {
            Some(ids) => ctx.front.clients_by_id(&ids),
            None => ctx.front.clients(),
        };
        clients.iter().for_each(|c| text.extend(client_line(c, ctx.now.mono)));
    }
    encode::verbatim(out, state.proto, &text);
}

/// What happens when memory is full, in Redis's words where it has them.
fn eviction_name(front: &crate::resp::FrontConfig) -> &'static str {
    match front.memory.eviction {
        Some(EvictionPolicy::S3Fifo) => "s3-fifo",
        Some(EvictionPolicy::Sieve) => "sieve",
        Some(EvictionPolicy::Lru) => "allkeys-lru",
        _ => "noeviction",
    }
}

/// Settings as clients know them, with what they come to here.
fn settings(ctx: &Context<'_>) -> Vec<(&'static str, String)> {
    let front = ctx.front;
    vec![
        ("appendonly", if front.durable { "yes" } else { "no" }.into()),
        ("bind", ctx.local.ip().to_string()),
        ("cluster-enabled", "yes".into()),
        ("databases", DATABASES.to_string()),
        ("hz", "10".into()),
        ("maxclients", front.max_clients.to_string()),
        ("maxmemory", front.memory.max_memory.to_string()),
        ("maxmemory-policy", eviction_name(front).into()),
        ("notify-keyspace-events", String::new()),
        ("port", ctx.local.port().to_string()),
        ("proto-max-bulk-len", MAX_VALUE_BYTES.to_string()),
        ("replica-read-only", "no".into()),
        ("save", String::new()),
        ("slave-read-only", "no".into()),
        ("tcp-keepalive", crate::resp::server::KEEPALIVE.as_secs().to_string()),
        ("timeout", "0".into()),
    ]
}

fn config_get(ctx: &Context<'_>, state: &ClientState, args: Args<'_>, out: &mut BytesMut) {
    let patterns: Vec<Vec<u8>> = args.from(2).map(<[u8]>::to_ascii_lowercase).collect();
    let matches = |name: &str| patterns.iter().any(|p| glob_match(p, name.as_bytes()));
    let found: Vec<_> = settings(ctx).into_iter().filter(|(name, _)| matches(name)).collect();
    encode::map(out, state.proto, found.len());
    for (name, value) in found {
        encode::bulk(out, name.as_bytes());
        encode::bulk(out, value.as_bytes());
    }
}

/// The sections of INFO that are asked for; all of them without an argument.
fn info(ctx: &Context<'_>, args: Args<'_>) -> String {
    let everything = ["all", "default", "everything"];
    let is = |arg: &[u8], name: &str| arg.eq_ignore_ascii_case(name.as_bytes());
    let wanted =
        |section: &str| args.len() == 1 || args.from(1).any(|a| is(a, section) || everything.iter().any(|e| is(a, e)));
    let (front, view) = (ctx.front, ctx.view);
    let stats = &front.stats;
    let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    let mut text = String::new();
    let mut section = |name: &str, lines: String| {
        if wanted(name) {
            let gap = if text.is_empty() { "" } else { "\r\n" };
            // Writing to a string cannot fail.
            let _ = write!(text, "{gap}# {name}\r\n{lines}");
        }
    };
    let uptime = ctx.now.mono.since(front.started).as_secs();
    section(
        "Server",
        format!(
            "redis_version:{REDIS_VERSION}\r\nredis_mode:cluster\r\ncrema_version:{}\r\ncrema_cluster:{}\r\n\
             crema_node_id:{}\r\ncrema_uuid:{}\r\nos:{} {}\r\narch_bits:{}\r\nprocess_id:{}\r\ntcp_port:{}\r\n\
             server_time_usec:{}\r\nuptime_in_seconds:{uptime}\r\nuptime_in_days:{}\r\n",
            front.version,
            front.cluster.replace(['\r', '\n'], " "),
            front.node,
            view.uuid.map_or_else(String::new, |u| u.to_string()),
            std::env::consts::OS,
            std::env::consts::ARCH,
            usize::BITS,
            std::process::id(),
            ctx.local.port(),
            ctx.now.wall.0.saturating_mul(1000),
            uptime / 86_400,
        ),
    );
    section(
        "Clients",
        format!(
            "connected_clients:{}\r\nmaxclients:{}\r\nblocked_clients:0\r\n",
            get(&stats.connected),
            front.max_clients
        ),
    );
    section(
        "Memory",
        format!(
            "used_memory:{}\r\nmaxmemory:{}\r\nmaxmemory_policy:{}\r\n",
            get(&front.used_memory),
            front.memory.max_memory,
            eviction_name(front),
        ),
    );
    section(
        "Persistence",
        "loading:0\r\nasync_loading:0\r\nrdb_bgsave_in_progress:0\r\naof_enabled:0\r\naof_rewrite_in_progress:0\r\n"
            .into(),
    );
    section(
        "Stats",
        format!(
            "total_connections_received:{}\r\ntotal_commands_processed:{}\r\ntotal_net_input_bytes:{}\r\n\
             total_net_output_bytes:{}\r\nrejected_connections:{}\r\n",
            get(&stats.accepted),
            get(&stats.commands),
            get(&stats.bytes_in),
            get(&stats.bytes_out),
            get(&stats.rejected),
        ),
    );
    section("Replication", "role:master\r\nconnected_slaves:0\r\nmaster_repl_offset:0\r\n".into());
    section("Cluster", "cluster_enabled:1\r\n".into());
    let led = view.shards.iter().filter(|s| s.leader == Some(view.this)).count();
    section(
        "Crema",
        format!(
            "crema_ready:{}\r\ncrema_not_ready:{}\r\ncrema_shards:{}\r\ncrema_shards_led:{led}\r\ncrema_nodes:{}\r\n\
             crema_placement_epoch:{}\r\n",
            u8::from(view.not_ready.is_none()),
            view.not_ready.as_deref().unwrap_or_default().replace(['\r', '\n'], " "),
            view.shards.len(),
            view.nodes.len(),
            view.epoch,
        ),
    );
    text
}

/// The command called `name`, or the subcommand called `container|name`.
fn find(name: &[u8]) -> Option<&'static Spec> {
    match name.iter().position(|b| *b == b'|') {
        None => command::lookup(name),
        Some(bar) => {
            let subs = command::lookup(&name[..bar])?.subs;
            subs.iter().find(|s| s.name.as_bytes().eq_ignore_ascii_case(name))
        }
    }
}

fn simple_set(out: &mut BytesMut, proto: Proto, items: &[&str]) {
    encode::set(out, proto, items.len());
    items.iter().for_each(|i| encode::simple(out, i));
}

fn categories(spec: &Spec) -> Vec<&'static str> {
    let mut list = Vec::new();
    let mut add = |when: bool, name| {
        if when {
            list.push(name);
        }
    };
    let whole = matches!(spec.cmd, Cmd::Dbsize | Cmd::Scan | Cmd::Flushall | Cmd::Flushdb);
    add(whole || spec.group == "generic" && spec.first > 0, "@keyspace");
    add(spec.has(READONLY), "@read");
    add(spec.has(WRITE), "@write");
    add(spec.group == "string", "@string");
    add(spec.has(command::ADMIN), "@admin");
    add(spec.has(FAST), "@fast");
    add(!spec.has(FAST), "@slow");
    add(spec.has(command::ADMIN) || matches!(spec.cmd, Cmd::Flushall | Cmd::Flushdb | Cmd::Info), "@dangerous");
    add(spec.group == "connection", "@connection");
    add(spec.group == "transactions", "@transaction");
    list
}

/// One command as COMMAND INFO tells it.
fn details(out: &mut BytesMut, proto: Proto, spec: &Spec) {
    encode::array(out, 10);
    encode::bulk(out, spec.name.as_bytes());
    encode::int(out, i64::from(spec.arity));
    let flags: Vec<&str> = FLAG_NAMES.iter().filter(|(flag, _)| spec.has(*flag)).map(|(_, name)| *name).collect();
    simple_set(out, proto, &flags);
    encode::int(out, i64::from(spec.first));
    encode::int(out, i64::from(spec.last));
    encode::int(out, i64::from(spec.step));
    simple_set(out, proto, &categories(spec));
    let tips = command::tips(spec.cmd);
    encode::set(out, proto, tips.len());
    tips.iter().for_each(|tip| encode::bulk(out, tip.as_bytes()));
    match spec.first {
        0 => encode::set(out, proto, 0),
        _ => {
            encode::set(out, proto, 1);
            key_spec(out, proto, spec);
        }
    }
    encode::array(out, spec.subs.len());
    // Subcommands have none of their own.
    spec.subs.iter().for_each(|sub| details(out, proto, sub));
}

fn key_spec(out: &mut BytesMut, proto: Proto, spec: &Spec) {
    let key = |out: &mut BytesMut, name: &str| encode::bulk(out, name.as_bytes());
    encode::map(out, proto, 3);
    key(out, "flags");
    match (spec.has(WRITE), spec.cmd) {
        (false, _) => simple_set(out, proto, &["RO", "access"]),
        (true, Cmd::Del | Cmd::Unlink) => simple_set(out, proto, &["RM", "delete"]),
        (true, _) => simple_set(out, proto, &["RW", "access", "update"]),
    }
    key(out, "begin_search");
    encode::map(out, proto, 2);
    key(out, "type");
    key(out, "index");
    key(out, "spec");
    encode::map(out, proto, 1);
    key(out, "index");
    encode::int(out, i64::from(spec.first));
    key(out, "find_keys");
    encode::map(out, proto, 2);
    key(out, "type");
    key(out, "range");
    key(out, "spec");
    encode::map(out, proto, 3);
    key(out, "lastkey");
    // Counted from the first key, unless from the end.
    encode::int(out, i64::from(if spec.last < 0 { spec.last } else { spec.last - spec.first }));
    key(out, "keystep");
    encode::int(out, i64::from(spec.step));
    key(out, "limit");
    encode::int(out, 0);
}

/// One command as COMMAND DOCS tells it, its name before.
fn docs(out: &mut BytesMut, proto: Proto, spec: &Spec) {
    encode::bulk(out, spec.name.as_bytes());
    encode::map(out, proto, 3 + usize::from(!spec.subs.is_empty()));
    for (key, value) in [("summary", spec.summary), ("since", spec.since), ("group", spec.group)] {
        encode::bulk(out, key.as_bytes());
        encode::bulk(out, value.as_bytes());
    }
    if !spec.subs.is_empty() {
        encode::bulk(out, b"subcommands");
        encode::map(out, proto, spec.subs.len());
        spec.subs.iter().for_each(|sub| docs(out, proto, sub));
    }
}

fn command_list(args: Args<'_>, out: &mut BytesMut) {
    let (filter, kind, value) = (args.get(2), args.get(3), args.get(4).to_ascii_lowercase());
    let names: Vec<&str> = match args.len() {
        2 => COMMANDS.iter().map(|c| c.name).collect(),
        5 if filter.eq_ignore_ascii_case(b"filterby") => {
            let fits = |c: &&Spec| match kind.to_ascii_lowercase().as_slice() {
                b"pattern" => glob_match(&value, c.name.as_bytes()),
                b"aclcat" => categories(c).iter().any(|cat| cat.as_bytes().strip_prefix(b"@") == Some(&value)),
                // No modules here.
                _ => false,
            };
            if ![b"pattern".as_slice(), b"aclcat", b"module"].iter().any(|k| kind.eq_ignore_ascii_case(k)) {
                return encode::err(out, b"syntax error");
            }
            COMMANDS.iter().filter(fits).map(|c| c.name).collect()
        }
        _ => return encode::err(out, b"syntax error"),
    };
    encode::array(out, names.len());
    names.iter().for_each(|n| encode::bulk(out, n.as_bytes()));
}

fn getkeys(args: Args<'_>, out: &mut BytesMut) {
    let inner = OwnedArgs::new(args.from(2));
    let inner = inner.args();
    let Some(mut spec) = command::lookup(inner.get(0)) else { return encode::err(out, b"Invalid command specified") };
    if !spec.subs.is_empty() {
        let sub = spec.subs.iter().find(|s| s.short_name().as_bytes().eq_ignore_ascii_case(inner.get(1)));
        spec = sub.unwrap_or(spec);
    }
    if spec.first == 0 {
        return encode::err(out, b"The command has no key arguments");
    }
    if !spec.fits(inner.len()) {
        return encode::err(out, b"Invalid number of arguments specified for command");
    }
    encode::array(out, spec.keys(inner).count());
    spec.keys(inner).for_each(|key| encode::bulk(out, key));
}

/// The subcommands of a container, as its HELP lists them.
fn help(out: &mut BytesMut, container: &str) {
    let subs = command::lookup(container.as_bytes()).map_or(&[][..], |c| c.subs);
    encode::array(out, 1 + 2 * subs.len());
    encode::simple(out, &format!("{container} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"));
    for sub in subs {
        encode::simple(out, &sub.short_name().to_ascii_uppercase());
        encode::simple(out, &format!("    {}.", sub.summary));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::server::ListenerKind;
    use crate::resp::testing::{Planner, three_shards};

    fn p() -> Planner {
        Planner::new(ListenerKind::Proxy, three_shards())
    }

    #[test]
    fn small_commands_answer_as_in_redis() {
        // Each as Redis 7.0.15 answers.
        let cases = [
            ("ping", "+PONG\r\n"),
            ("PING a", "$1\r\na\r\n"),
            ("ping a b", "-ERR wrong number of arguments for 'ping' command\r\n"),
            ("echo hi", "$2\r\nhi\r\n"),
            ("select x", "-ERR value is not an integer or out of range\r\n"),
            ("select 16", "-ERR DB index is out of range\r\n"),
            ("select -1", "-ERR DB index is out of range\r\n"),
            ("select 99999999999", "-ERR value is out of range, value must between -2147483648 and 2147483647\r\n"),
            (
                "auth x",
                "-ERR AUTH <password> called without any password configured for the default user. \
                 Are you sure your configuration is correct?\r\n",
            ),
            ("auth default x", "+OK\r\n"),
            ("auth foo x", "-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
            ("hello 4", "-NOPROTO unsupported protocol version\r\n"),
            ("hello x", "-ERR Protocol version is not an integer or out of range\r\n"),
            ("hello 3 foo", "-ERR Syntax error in HELLO option 'foo'\r\n"),
            ("hello 2 setname", "-ERR Syntax error in HELLO option 'setname'\r\n"),
            ("hello 2 auth a", "-ERR Syntax error in HELLO option 'auth'\r\n"),
            ("client getname", "$-1\r\n"),
            ("client list foo", "-ERR syntax error\r\n"),
            ("client no-evict x", "-ERR syntax error\r\n"),
            ("client no-evict on", "+OK\r\n"),
            ("client list id 99", "$0\r\n\r\n"),
            ("config get save", "*2\r\n$4\r\nsave\r\n$0\r\n\r\n"),
            ("wait x 0", "-ERR value is not an integer or out of range\r\n"),
            ("wait 0 x", "-ERR timeout is not an integer or out of range\r\n"),
            ("wait 0 -1", "-ERR timeout is negative\r\n"),
            ("role", "*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"),
            ("reset", "+RESET\r\n"),
            ("info nosuch", "$0\r\n\r\n"),
            ("command getkeys get a", "*1\r\n$1\r\na\r\n"),
            ("command getkeys mset a 1 b 2", "*2\r\n$1\r\na\r\n$1\r\nb\r\n"),
            ("command getkeys ping", "-ERR wrong number of arguments for 'command|getkeys' command\r\n"),
            ("command getkeys nosuch a", "-ERR Invalid command specified\r\n"),
            ("command getkeys get a b c", "-ERR Invalid number of arguments specified for command\r\n"),
            ("command getkeys echo a", "-ERR The command has no key arguments\r\n"),
            ("command list filterby pattern gets*", "*1\r\n$6\r\ngetset\r\n"),
            ("command docs nosuch", "*0\r\n"),
            ("cluster keyslot a", ":15495\r\n"),
        ];
        for (line, reply) in cases {
            assert_eq!(p().local(line), reply, "{line}");
        }
    }

    #[test]
    fn wait_tells_what_a_quorum_guarantees() {
        assert_eq!(p().local("wait 2 0"), ":1\r\n");
    }

    #[test]
    fn hello_switches_protocols() {
        let mut p = p();
        let three = p.local("hello 3 setname lib");
        assert!(three.starts_with("%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.4.0\r\n"), "{three}");
        assert!(three.contains("$5\r\nproto\r\n:3\r\n"));
        assert_eq!(p.local("config get save"), "%1\r\n$4\r\nsave\r\n$0\r\n\r\n");
        assert!(p.local("client info").starts_with("="));
        assert!(p.local("info cluster").starts_with("=34\r\ntxt:# Cluster\r\ncluster_enabled:1\r\n"));
        // Without a version the protocol stays.
        assert!(p.local("hello").starts_with("%7"));
        assert!(p.local("hello 2").starts_with("*14"));
        assert_eq!(p.local("client getname"), "$3\r\nlib\r\n");
        p.local("select 4");
        p.local("hello 3");
        assert_eq!(p.local("reset"), "+RESET\r\n");
        assert_eq!((p.state.db, p.state.proto), (0, Proto::Resp2));
        assert_eq!(p.local("client getname"), "$-1\r\n");
    }

    #[test]
    fn names_have_no_blanks() {
        let mut p = p();
        let refused = "-ERR Client names cannot contain spaces, newlines or special characters.\r\n";
        assert_eq!(p.words(&[b"client", b"setname", b"a b"]), refused);
        assert_eq!(p.words(&[b"client", b"setname", b"a\nb"]), refused);
        assert_eq!(p.local("client setname ok"), "+OK\r\n");
        assert_eq!(p.words(&[b"client", b"setname", b""]), "+OK\r\n");
        assert_eq!(p.local("client getname"), "$-1\r\n");
        assert_eq!(p.local("client setinfo LIB-NAME redis-py"), "+OK\r\n");
        assert_eq!(p.local("client setinfo lib-ver 1.2"), "+OK\r\n");
        assert_eq!(p.local("client setinfo foo 1"), "-ERR Unrecognized option 'foo'\r\n");
        let line = p.local("client info");
        assert!(line.ends_with("lib-name=redis-py lib-ver=1.2\n\r\n"), "{line}");
        assert!(line.contains("id=1 ") && line.contains("addr=192.0.2.1:5000 laddr=192.0.2.9:6379 "));
        assert_eq!(
            p.local("client maint_notifications on"),
            "-ERR unknown subcommand 'maint_notifications'. Try CLIENT HELP.\r\n"
        );
    }

    #[test]
    fn settings_are_found_by_pattern() {
        let mut p = p();
        assert_eq!(p.local("config get databases"), "*2\r\n$9\r\ndatabases\r\n$2\r\n16\r\n");
        let all = p.local("config get *");
        assert!(all.contains("maxmemory-policy") && all.contains("proto-max-bulk-len"));
        assert_eq!(p.local("config get MAXMEMORY* timeout").matches("max").count(), 2);
        assert_eq!(p.local("config get nosuch"), "*0\r\n");
        assert!(p.local("config set save 1").starts_with("-ERR unknown subcommand 'set'"));
    }

    #[test]
    fn info_has_what_clients_look_for() {
        let mut p = p();
        let all = p.local("info");
        for line in [
            "redis_version:7.4.0",
            "redis_mode:cluster",
            "role:master",
            "loading:0",
            "cluster_enabled:1",
            "tcp_port:6379",
            "crema_shards_led:1",
            "crema_ready:1",
        ] {
            assert!(all.lines().any(|l| l == line), "{line} in {all}");
        }
        assert!(all.contains("\r\n\r\n# Clients\r\n"));
        let some = p.local("info SERVER replication");
        assert!(some.contains("# Server") && some.contains("# Replication") && !some.contains("# Stats"));
        assert_eq!(p.local("info everything").lines().count(), all.lines().count());
    }

    #[test]
    fn commands_describe_themselves() {
        let mut p = p();
        // As Redis 7.0.15, but for the order of sets.
        let get = p.local("command info GET nosuch");
        let wanted = "*2\r\n*10\r\n$3\r\nget\r\n:2\r\n*2\r\n+readonly\r\n+fast\r\n:1\r\n:1\r\n:1\r\n\
            *3\r\n+@read\r\n+@string\r\n+@fast\r\n*0\r\n*1\r\n*6\r\n$5\r\nflags\r\n*2\r\n+RO\r\n+access\r\n\
            $12\r\nbegin_search\r\n*4\r\n$4\r\ntype\r\n$5\r\nindex\r\n$4\r\nspec\r\n*2\r\n$5\r\nindex\r\n:1\r\n\
            $9\r\nfind_keys\r\n*4\r\n$4\r\ntype\r\n$5\r\nrange\r\n$4\r\nspec\r\n*6\r\n$7\r\nlastkey\r\n:0\r\n\
            $7\r\nkeystep\r\n:1\r\n$5\r\nlimit\r\n:0\r\n*0\r\n$-1\r\n";
        assert_eq!(get, wanted);
        let dbsize = p.local("command info dbsize");
        let tips = "*2\r\n$25\r\nrequest_policy:all_shards\r\n$23\r\nresponse_policy:agg_sum\r\n";
        assert!(dbsize.contains(tips), "{dbsize}");
        let mset = p.local("command info mset");
        assert!(mset.contains("$7\r\nlastkey\r\n:-1\r\n$7\r\nkeystep\r\n:2\r\n"));
        assert_eq!(p.local("command count"), format!(":{}\r\n", COMMANDS.len()));
        assert!(p.local("command").starts_with(&format!("*{}\r\n*10\r\n", COMMANDS.len())));
        assert_eq!(p.local("command info"), p.local("command"));
        let docs = p.local("command docs get client|id");
        assert!(docs.starts_with("*4\r\n$3\r\nget\r\n*6\r\n$7\r\nsummary\r\n") && docs.contains("client|id"), "{docs}");
        assert!(p.local("client help").starts_with(&format!("*{}\r\n+CLIENT <subcommand>", 1 + 2 * 9)));
    }

    #[test]
    fn passwords_are_compared_as_a_whole() {
        let secret = crate::config::Secret::new("secret");
        assert!(secret.is(b"secret"));
        for wrong in [&b""[..], b"s", b"secre", b"secrets", b"Secret", b"secret\0", b"secretsecret"] {
            assert!(!secret.is(wrong), "{wrong:?}");
        }
    }
}
