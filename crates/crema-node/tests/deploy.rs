//! What `deploy/` says is true of the program beside it: every variable and flag exists, every configuration is accepted,
//! ports agree wherever they are named, and nobody is killed while it may still drain. Without network or cluster.

use clap::Parser;
use confique::{Config as _, Layer as _};
use crema_node::cli::{Cli, Command};
use crema_node::config::{Config, ConfigLayer, Settings, sample};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use yaml_rust2::{Yaml, YamlLoader};

/// Seconds that a stop may take beyond the grace: clients' last answers (3 s at most), the goodbye (2 s), closing.
const REST_S: u64 = 10;
/// Seconds that must be left then.
const MARGIN_S: u64 = 5;

type Environment = BTreeMap<String, String>;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

fn text(name: &str) -> String {
    let path = deploy().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn documents(name: &str) -> Vec<Yaml> {
    YamlLoader::load_from_str(&text(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// All files below `deploy/`, but secrets that somebody made there to try it out.
fn files() -> Vec<String> {
    let (mut found, mut open) = (Vec::new(), vec![deploy()]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).expect("readable") {
            let path = entry.expect("readable").path();
            match path.is_dir() {
                true if path.ends_with("secrets") => {}
                true => open.push(path),
                false => found.push(path.strip_prefix(deploy()).expect("below").to_str().expect("UTF-8").to_owned()),
            }
        }
    }
    found.sort();
    found
}

/// The names in a text that are made of these characters and begin so.
fn names(text: &str, start: &str, allowed: fn(char) -> bool) -> BTreeSet<String> {
    let ends = |rest: &str| rest.find(|c| !allowed(c)).unwrap_or(rest.len());
    text.match_indices(start).map(|(at, _)| text[at..at + ends(&text[at..])].to_owned()).collect()
}

fn variables(text: &str) -> BTreeSet<String> {
    let mut found = names(text, "CREMA_", |c| c.is_ascii_uppercase() || c == '_');
    // `CREMA_*` in a sentence.
    found.remove("CREMA_");
    found
}

fn string(yaml: &Yaml) -> &str {
    yaml.as_str().unwrap_or_else(|| panic!("a text is expected, not {yaml:?}"))
}

fn number(yaml: &Yaml) -> u64 {
    yaml.as_i64().and_then(|n| n.try_into().ok()).unwrap_or_else(|| panic!("a number is expected, not {yaml:?}"))
}

fn list(yaml: &Yaml) -> &[Yaml] {
    yaml.as_vec().unwrap_or_else(|| panic!("a list is expected, not {yaml:?}"))
}

fn strings(yaml: &Yaml) -> Vec<&str> {
    list(yaml).iter().map(string).collect()
}

/// What an environment configures: each variable as the flag of its name, checked as `crema start` does.
fn settings(environment: &Environment) -> (Config, Settings) {
    let secrets = tempfile::tempdir().expect("a temporary directory");
    let secret = secrets.path().join("secret");
    std::fs::write(&secret, "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n").expect("writable");
    let mut words = vec!["crema".to_owned(), "start".to_owned()];
    for (name, value) in environment {
        let flag = name.strip_prefix("CREMA_").expect("ours").to_ascii_lowercase().replace('_', "-");
        let value = if flag.ends_with("-file") { secret.display().to_string() } else { value.clone() };
        words.push(format!("--{flag}={value}"));
    }
    let cli = Cli::try_parse_from(&words).unwrap_or_else(|e| panic!("{words:?}: {e}"));
    let Command::Start(start) = cli.command else { panic!("it is `start`") };
    let layer = start.settings.with_fallback(ConfigLayer::default_values());
    let config = Config::from_layer(layer).expect("complete");
    let settings = config.resolve().unwrap_or_else(|e| panic!("{words:?}: {e}"));
    (config, settings)
}

/// Checks a time to stop against the grace of the node, and what passes before that.
#[track_caller]
fn expect_time_to_stop(config: &Config, before_s: u64, killed_after_s: u64) {
    let needed = before_s + config.stop_grace_ms.div_ceil(1000) + REST_S + MARGIN_S;
    assert!(killed_after_s >= needed, "killed after {killed_after_s} s, but a stop may take {needed} s");
}

#[test]
fn every_file_parses_and_every_variable_exists() {
    let known = variables(&sample());
    assert!(known.contains("CREMA_NODE_ID_FROM_HOSTNAME") && known.len() > 20);
    let files = files();
    assert!(files.iter().filter(|name| name.ends_with(".yaml")).count() >= 7, "{files:?}");
    for name in files {
        if name.ends_with(".yaml") {
            assert!(!documents(&name).is_empty(), "{name} is empty");
        }
        let unknown: Vec<_> = variables(&text(&name)).difference(&known).cloned().collect();
        assert!(unknown.is_empty(), "{name} names {unknown:?}");
    }
}

fn kind<'a>(documents: &'a [Yaml], kind: &str, name: &str) -> &'a Yaml {
    let found =
        documents.iter().find(|d| d["kind"].as_str() == Some(kind) && d["metadata"]["name"].as_str() == Some(name));
    found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// The ports of a container or a service: name to port and protocol.
fn ports(list_of: &Yaml, key: &str) -> BTreeMap<String, (u16, String)> {
    let port = |p: &Yaml| (u16::try_from(number(&p[key])).expect("a port"), string(&p["protocol"]).to_owned());
    list(list_of).iter().map(|p| (string(&p["name"]).to_owned(), port(p))).collect()
}

#[test]
fn pods_and_services_agree() {
    let workloads = documents("kubernetes/base/statefulset.yaml");
    let set = kind(&workloads, "StatefulSet", "crema");
    let pod = &set["spec"]["template"]["spec"];
    let container = &list(&pod["containers"])[0];
    let mut environment = Environment::new();
    for variable in list(&container["env"]).iter().filter(|v| string(&v["name"]).starts_with("CREMA_")) {
        let value = string(&variable["value"]).replace("$(POD_NAME)", "crema-0").replace("$(POD_NAMESPACE)", "default");
        environment.insert(string(&variable["name"]).to_owned(), value);
    }
    // A pod's host name, which this machine does not have.
    assert_eq!(environment.remove("CREMA_NODE_ID_FROM_HOSTNAME").as_deref(), Some("true"));
    let replicas = number(&set["spec"]["replicas"]);
    for ordinal in 0..replicas + 1 {
        environment.insert("CREMA_NODE_ID".to_owned(), (ordinal + 1).to_string());
        let (config, settings) = settings(&environment);
        assert_eq!(config.initial_members, (1..=replicas).collect::<Vec<_>>(), "the first pods found, any other joins");
        assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
    }
    let (config, _) = settings(&environment);

    // By name: the address is another after each restart, and what is on disk must lead the pods to each other.
    let name = format!("crema-0.{}.default.svc.cluster.local", string(&set["spec"]["serviceName"]));
    assert_eq!(config.advertise_host.as_ref(), Some(&name));
    // Founding needs all members at once, and they must find each other before they are ready.
    assert_eq!(string(&set["spec"]["podManagementPolicy"]), "Parallel");
    let services = documents("kubernetes/base/services.yaml");
    let headless = kind(&services, "Service", string(&set["spec"]["serviceName"]));
    assert_eq!(string(&headless["metadata"]["name"]), "crema-headless");
    assert_eq!(string(&headless["spec"]["clusterIP"]), "None");
    assert_eq!(headless["spec"]["publishNotReadyAddresses"].as_bool(), Some(true));
    assert_eq!(config.seeds, ["crema-headless:8000"]);

    let exposed = ports(&container["ports"], "containerPort");
    let addrs = [
        ("memberlist", config.gossip_addr, "UDP"),
        ("memberlist-tcp", config.gossip_addr, "TCP"),
        ("raft", config.raft_addr, "TCP"),
        ("redis", config.redis_addr, "TCP"),
        ("redis-cluster", config.redis_cluster_addr, "TCP"),
        ("http", config.http_addr, "TCP"),
    ];
    assert_eq!(exposed.len(), addrs.len());
    for (name, addr, protocol) in addrs {
        assert_eq!(exposed[name], (addr.port(), protocol.to_owned()), "{name}");
        assert!(name.len() <= 15, "Kubernetes takes no longer name of a port");
        assert!(addr.ip().is_unspecified(), "a pod's address is not known beforehand");
    }
    let inside: BTreeSet<_> = ports(&headless["spec"]["ports"], "port").into_values().collect();
    let wanted = [(8000, "UDP"), (8000, "TCP"), (9000, "TCP")].map(|(port, protocol)| (port, protocol.to_owned()));
    assert_eq!(inside, BTreeSet::from(wanted), "gossip needs both protocols");
    let front = kind(&services, "Service", "crema");
    assert_eq!(ports(&front["spec"]["ports"], "port").into_keys().collect::<Vec<_>>(), ["redis", "redis-cluster"]);
    let labels = &set["spec"]["template"]["metadata"]["labels"];
    for service in [headless, front] {
        assert_eq!(&service["spec"]["selector"], labels);
        for port in list(&service["spec"]["ports"]) {
            let (name, target) = (string(&port["name"]), string(&port["targetPort"]));
            assert_eq!((name, number(&port["port"])), (target, u64::from(exposed[target].0)));
            assert_eq!(string(&port["protocol"]), exposed[target].1);
        }
    }
    for (probe, path) in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        let get = &container[probe]["httpGet"];
        assert_eq!((string(&get["path"]), string(&get["port"])), (path, "http"), "{probe}");
    }

    let pause = number(&container["lifecycle"]["preStop"]["sleep"]["seconds"]);
    expect_time_to_stop(&config, pause, number(&pod["terminationGracePeriodSeconds"]));
    let budget = documents("kubernetes/base/poddisruptionbudget.yaml");
    let budget = &kind(&budget, "PodDisruptionBudget", "crema")["spec"];
    assert_eq!((number(&budget["maxUnavailable"]), &budget["selector"]["matchLabels"]), (1, labels));

    // What is named is mounted, and nothing else can be written.
    let mounts = list(&container["volumeMounts"]);
    let mount = |path: &Path| mounts.iter().find(|m| path.starts_with(string(&m["mountPath"]))).expect("mounted");
    let data = mount(config.data_dir.as_deref().expect("on disk"));
    assert_eq!(data["name"], list(&set["spec"]["volumeClaimTemplates"])[0]["metadata"]["name"]);
    let secret = &list(&pod["volumes"])[0];
    for variable in ["CREMA_CLUSTER_KEY_FILE", "CREMA_REQUIREPASS_FILE"] {
        let path = Path::new(&environment[variable]);
        let mount = mount(path);
        assert_eq!((&mount["name"], mount["readOnly"].as_bool()), (&secret["name"], Some(true)));
        assert!(mount["subPath"].is_badvalue(), "such a file does not change with the Secret");
        let items = list(&secret["secret"]["items"]);
        assert!(items.iter().any(|i| path.ends_with(string(&i["path"]))), "{variable}");
    }
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"].as_bool(), Some(true));
    assert_eq!(pod["securityContext"]["runAsNonRoot"].as_bool(), Some(true));
    // A Service named `crema` would else add variables of its own.
    assert_eq!(pod["enableServiceLinks"].as_bool(), Some(false));

    let dockerfile = text("Dockerfile");
    let user = number(&pod["securityContext"]["runAsUser"]);
    assert!(dockerfile.contains(&format!("USER {user}:{user}\n")));
    for (port, protocol) in exposed.values() {
        assert!(dockerfile.contains(&format!("{port}/{}", protocol.to_ascii_lowercase())), "{port} {protocol}");
    }
    let rust = format!("RUST_VERSION={}\n", env!("CARGO_PKG_RUST_VERSION"));
    assert!(dockerfile.contains(&rust), "the image is built with the oldest Rust that is promised");
}

/// A mapping with what it merges (`<<`), which the parser leaves to its user.
fn merged(yaml: &Yaml) -> BTreeMap<&str, &Yaml> {
    let own = yaml.as_hash().unwrap_or_else(|| panic!("a mapping is expected, not {yaml:?}"));
    let mut all: BTreeMap<&str, &Yaml> = match own.get(&Yaml::String("<<".to_owned())) {
        Some(base) => merged(base),
        None => BTreeMap::new(),
    };
    all.extend(own.iter().map(|(key, value)| (string(key), value)));
    all.remove("<<");
    all
}

#[test]
fn composed_nodes_agree() {
    let compose = &documents("compose/compose.yaml")[0];
    let services = compose["services"].as_hash().expect("services");
    assert_eq!(services.len(), 3);
    let volumes = merged(&compose["volumes"]);
    let mut published = BTreeSet::new();
    for (index, (name, service)) in services.iter().enumerate() {
        let (name, service) = (string(name), merged(service));
        assert_eq!(string(service["hostname"]), name);
        let mut environment = Environment::new();
        for (variable, value) in merged(service["environment"]) {
            environment.insert(variable.to_owned(), string(value).to_owned());
        }
        let (config, settings) = settings(&environment);
        assert!(settings.warnings.is_empty());
        assert_eq!((config.node_id, &config.initial_members[..]), (index as u64 + 1, &[1, 2, 3][..]));
        assert_eq!(config.advertise_host.as_deref(), Some(name));
        let seeds: Vec<_> = services.keys().map(|s| format!("{}:{}", string(s), config.gossip_addr.port())).collect();
        assert_eq!(config.seeds, seeds);

        let killed_after_s = string(service["stop_grace_period"]).strip_suffix('s').expect("seconds").parse();
        expect_time_to_stop(&config, 0, killed_after_s.expect("a number"));
        let given = strings(service["secrets"]);
        for variable in ["CREMA_CLUSTER_KEY_FILE", "CREMA_REQUIREPASS_FILE"] {
            let secret = environment[variable].strip_prefix("/run/secrets/").expect("where compose mounts them");
            assert!(given.contains(&secret) && !compose["secrets"][secret].is_badvalue(), "{secret}");
        }
        let (volume, path) = strings(service["volumes"])[0].split_once(':').expect("volume:path");
        assert!(config.data_dir.expect("on disk").starts_with(path) && volumes.contains_key(volume));
        for port in strings(service["ports"]) {
            let (host, container) = port.rsplit_once(':').expect("host:container");
            let open = [config.redis_addr.port(), config.http_addr.port()];
            assert!(open.contains(&container.parse().expect("a port")), "{port}");
            assert!(published.insert(host.to_owned()) && host.starts_with("127.0.0.1:"), "{port}");
        }
        // It must be a command that the program has.
        assert!(string(&service["healthcheck"]["test"][1]).starts_with("crema status --json | "));
        Cli::try_parse_from(["crema", "status", "--json"]).expect("it has");
    }
}

#[test]
fn the_unit_and_its_configuration_agree() {
    let unit = text("systemd/crema.service");
    let value = |key: &str| {
        let found = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("the unit has no {key}"))
    };
    let command = value("ExecStart").strip_prefix("/usr/local/bin/").expect("where the README puts it");
    let cli = Cli::try_parse_from(command.split(' ')).expect(command);
    let Command::Start(start) = cli.command else { panic!("it is `start`") };
    assert_eq!(start.config.as_deref(), Some(Path::new("/etc/crema/crema.toml")));

    let layer: ConfigLayer = toml::from_str(&text("systemd/crema.toml")).expect("only known keys");
    let config = Config::from_layer(layer.with_fallback(ConfigLayer::default_values())).expect("complete");
    assert!(config.initial_members.contains(&config.node_id) && !config.insecure);
    assert_eq!(config.seeds.len(), config.initial_members.len());
    assert_eq!(config.seeds[0], config.gossip_addr.to_string());
    let state = Path::new("/var/lib").join(value("StateDirectory"));
    assert!(config.data_dir.as_ref().expect("on disk").starts_with(state), "all else is read-only");
    let killed_after_s = value("TimeoutStopSec").strip_suffix('s').expect("seconds").parse().expect("a number");
    expect_time_to_stop(&config, 0, killed_after_s);
    let files: usize = value("LimitNOFILE").parse().expect("a number");
    assert!(files > 2 * config.max_clients);
}

#[test]
fn every_command_of_the_readme_exists() {
    let readme = text("README.md");
    let mut commands = 0;
    for block in readme.split("```").skip(1).step_by(2) {
        let Some(lines) = block.strip_prefix("sh\n") else { continue };
        for line in lines.replace("\\\n", " ").lines() {
            let line = line.split(" #").next().unwrap_or_default();
            let words: Vec<_> = line.split(" | ").next().unwrap_or_default().split_whitespace().collect();
            // Alone, or behind `kubectl exec … --` or `docker compose exec crema-1`.
            let begins = |at: &usize| *at == 0 || words[at - 1] == "--" || words[at - 1].starts_with("crema-");
            let Some(at) = (0..words.len()).filter(|at| words[*at] == "crema").find(begins) else { continue };
            if let Err(error) = Cli::try_parse_from(&words[at..]) {
                panic!("{line}: {error}");
            }
            commands += 1;
        }
    }
    assert!(commands >= 8, "only {commands} are found");
    for name in files().iter().filter(|name| name.ends_with(".yaml") || name.contains("systemd/")) {
        let file = Path::new(name).file_name().and_then(|n| n.to_str()).expect("a name");
        let folder = Path::new(name).parent().and_then(Path::to_str).expect("a folder");
        assert!(readme.contains(file) || readme.contains(folder), "the README does not tell of {name}");
    }
}
