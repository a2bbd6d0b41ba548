//! Many runs through one daemon leave it, and the host, as they were.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::time::Instant;

use broker_tests::{leftovers, network_namespaces, settle};
use serde_json::json;

use super::lives::Peer;
use super::*;

const POOL: &str = "[pool]\nnetworks = 2\nwarm = { default = 2 }\n";
const ROLES: [&str; 4] = ["launcher", "core", "vault", "resolver"];
/// Two workers, and as many runs in a turn of each: five cold, three in a sandbox that lives, two warm.
const WORKERS: usize = 2;
const TURN: usize = 10;
/// How much more memory a process may have after any number of runs. After 20,000 the core had 80 KiB more and the others
/// none; 48 bytes lost in each of 100,000 runs, about what an entry of a table takes, would be 4,700.
const GROWN_KIB_MAX: u64 = 2_048;

/// What `scripts/soak` asks for. Nothing else runs on the host then.
fn asked() -> Option<usize> {
    std::env::var("BROKER_SOAK_RUNS").ok().and_then(|count| count.parse().ok())
}

/// What a process of the daemon holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    threads: u64,
    resident_kib: u64,
}

/// What the descriptors of a process lead to.
fn descriptors(pid: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("root may look").flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

fn held(daemon: &Daemon) -> BTreeMap<&'static str, Held> {
    let of = |role| {
        let pid = daemon.role(role).expect("it lives");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let number = |name| {
            let words = broker_tests::field(&status, name);
            words.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
        };
        Held {
            descriptors: descriptors(pid.cast_unsigned()).len(),
            threads: number("Threads"),
            resident_kib: number("VmRSS"),
        }
    };
    ROLES.into_iter().map(|role| (role, of(role))).collect()
}

/// Mounts that the launcher sees.
fn mounts(daemon: &Daemon) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", daemon.process.id())).expect("it lives");
    table.lines().map(str::to_owned).collect()
}

/// A call whose reply brings no descriptor.
fn ask(peer: &Peer, method: &str, parameters: &Value) -> Value {
    peer.send(method, parameters, false, &[]);
    let mut said = Vec::new();
    BufReader::new(&peer.0).read_until(0, &mut said).expect("an answer");
    said.pop();
    serde_json::from_slice(&said).expect("JSON")
}

fn ready(peer: &Peer) -> usize {
    let reply = ask(peer, "Metrics", &json!({}));
    let text = reply["parameters"]["text"].as_str().unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("broker_pool{policy=\"default\"} "));
    count.and_then(|count| count.parse().ok()).unwrap_or_default()
}

fn run(peer: &Peer, limits: &Value) {
    let mut parameters = json!({
        "policy": "default", "command": ["sh", "-c", "sleep 9 & exit 3"], "environment": [],
        "path": "/usr/bin:/bin", "streams": {},
    });
    if !limits.is_null() {
        parameters["limits"] = limits.clone();
    }
    let reply = ask(peer, "Run", &parameters);
    assert_eq!(reply["parameters"]["report"]["outcome"], json!({ "kind": "exited", "code": 3 }), "{reply}");
}

fn turn(peer: &Peer) {
    for _ in 0..5 {
        // Tighter than what is made ahead.
        run(peer, &json!({ "timeout": "9m" }));
    }
    let (_, handle) = peer.provision(None);
    for effect in ["one", "two", "three"] {
        let (reply, said) = peer.execute(&handle, effect, "sleep 9 > /dev/null & echo said; exit 3");
        assert_eq!((&reply["outcome"]["code"], said.as_str()), (&json!(3), "said\n"), "{reply}");
    }
    drop(handle);
    for _ in 0..2 {
        assert!(within(Duration::from_secs(10), || ready(peer) > 0), "nothing is made ahead");
        run(peer, &Value::Null);
    }
}

fn many(daemon: &Daemon, runs: usize) {
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let peer = Peer::new(daemon);
                (0..runs.div_ceil(WORKERS * TURN)).for_each(|_| turn(&peer));
            });
        }
    });
    // Until there is what is made ahead, and nothing else.
    let launcher = daemon.process.id();
    let rests = || {
        let networks = descriptors(launcher)
            .iter()
            .filter(|target| target.as_os_str().as_encoded_bytes().starts_with(b"net:"))
            .count();
        daemon.list(0).is_empty() && networks == 2 && children(launcher).len() == ROLES.len() - 1 + 2
    };
    assert!(within(Duration::from_secs(20), rests), "{:?}: {}", daemon.list(0), daemon.log());
}

/// Method: two callers, all ways that a sandbox begins. Oracle: the kernel's tables of descriptors, threads, memory, mounts,
/// control groups, processes and network namespaces before and after.
#[test]
fn runs_leave_the_daemon_as_it_was() {
    let (before, namespaces) = (leftovers(), network_namespaces());
    let mut daemon = Daemon::start_with("true", POOL);
    let runs = asked().unwrap_or(300);
    many(&daemon, runs.min(1_000));
    let (first, mounted) = (held(&daemon), mounts(&daemon));
    let start = Instant::now();
    many(&daemon, runs);
    let taken = start.elapsed();

    let more = |last: &BTreeMap<&str, Held>| {
        let grown = |(role, last): (&&str, &Held)| {
            last.descriptors > first[role].descriptors || last.threads > first[role].threads
        };
        last.iter().any(grown)
    };
    // Threads of the core that close what peers sent wait a while for more.
    let flat = within(Duration::from_secs(20), || !more(&held(&daemon)));
    let last = held(&daemon);
    let files = fs::read_dir(daemon.state().join("record")).expect("root may look").flatten();
    let bytes: u64 = files.map(|file| file.metadata().expect("it is there").len()).sum();
    println!("{runs} runs in {:.1} s; the record has {bytes} bytes", taken.as_secs_f64());
    for role in ROLES {
        println!("{role}: {:?}, then {:?}", first[role], last[role]);
    }
    assert!(flat, "{first:?}, then {last:?}");
    for role in ROLES {
        let grown = last[role].resident_kib.saturating_sub(first[role].resident_kib);
        assert!(grown < GROWN_KIB_MAX, "{role}: {grown} KiB more");
    }
    assert_eq!(mounts(&daemon), mounted);

    daemon.stop();
    let verified = daemon.audit("verify");
    assert!(verified.status.success(), "{}", text(&verified.stderr));
    // Beside other tests the host has sandboxes of theirs.
    if asked().is_some() {
        settle(|| leftovers() == before, || format!("{runs} runs left {}", leftovers().beyond(&before)));
        let slack = 40;
        let given_back = || network_namespaces() <= namespaces + slack;
        settle(given_back, || {
            format!("{namespaces} network namespaces before, {} after", network_namespaces())
        });
    }
}
