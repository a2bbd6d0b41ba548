//! Grants whose upstream is a name: what a name server says decides where a connection goes, and whoever has that server may say anything.

use std::collections::BTreeSet;

use super::super::stages::Process;
use super::*;

/// Two hosts in network namespaces of their own, and a wire between them: the daemon's, and one with servers at a public address.
struct Hosts {
    folder: TempDir,
    near: Process,
    far: Process,
    _servers: Vec<Process>,
}

/// A name server whose answers are as hostile as they get, and a server that answers with what it was sent.
const SERVERS: &str = "
import ipaddress, socket, struct, sys, threading
PUBLIC = '93.184.216.34'
TABLE = {
    'good': [PUBLIC], 'loop': ['127.0.0.1'], 'zero': ['0.0.0.0'], 'meta': ['169.254.169.254'], 'private': ['10.0.0.1'],
    'own': ['93.184.216.1'], 'mixed': [PUBLIC, '::1'], 'two': [PUBLIC, '127.0.0.1'], 'mapped': ['::ffff:127.0.0.1'],
    'nat': ['64:ff9b::7f00:1'], 'local': ['fd00::1'], 'link': ['fe80::1'], 'sixtofour': ['2002:7f00:1::'], 'empty': [],
}
flips = 0
def name(text): return b''.join(bytes([len(p)]) + p.encode() for p in text.split('.')) + b'\\0'
def answer(query):
    global flips
    at, labels = 12, []
    while query[at]: labels.append(query[at+1:at+1+query[at]].decode().lower()); at += query[at] + 1
    kind, = struct.unpack('>H', query[at+1:at+3]); question = query[12:at+5]; label = labels[0]
    if label == 'silent': return None
    records, own = b'', b'\\xc0\\x0c'
    if label == 'alias':
        target = name('loop.test'); records += own + struct.pack('>HHIH', 5, 1, 0, len(target)) + target; own, label, count = target, 'loop', 1
    else: count = 0
    if label == 'flip':
        addresses = [PUBLIC] if flips % 2 == 0 else ['127.0.0.1']
        flips += kind == 1
    elif label in TABLE: addresses = TABLE[label]
    else: return query[:2] + b'\\x81\\x83' + query[4:6] + b'\\0' * 6 + question
    for address in map(ipaddress.ip_address, addresses):
        if (address.version == 4) == (kind == 1):
            records += own + struct.pack('>HHIH', kind, 1, 0, len(address.packed)) + address.packed; count += 1
    return query[:2] + b'\\x81\\x80' + query[4:6] + struct.pack('>HHH', count, 0, 0) + question + records
def echo(stream):
    while piece := stream.recv(4096): stream.sendall(sys.argv[1].encode() + piece)
def serve():
    s = socket.create_server(('', 7), backlog=64)
    while True: threading.Thread(target=echo, args=(s.accept()[0],), daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 53))
while True:
    query, who = s.recvfrom(512)
    reply = answer(query)
    if reply: s.sendto(reply, who)
";

fn at(host: &Process, words: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &host.0.id().to_string()]).args(words).stdin(Stdio::null());
    command
}

impl Hosts {
    fn start() -> Hosts {
        let folder = tempfile::Builder::new().prefix("broker-hosts-").tempdir().expect("a directory");
        fs::write(folder.path().join("resolv.conf"), "search test\nnameserver 93.184.216.34\n")
            .expect("it is ours");
        let host = || {
            let mut command = Command::new("unshare");
            let process = Process(command.args(["--net", "sleep", "600"]).spawn().expect("it starts"));
            let own = fs::read_link("/proc/self/ns/net").expect("there is one");
            let apart =
                || fs::read_link(format!("/proc/{}/ns/net", process.0.id())).is_ok_and(|other| other != own);
            assert!(within(Duration::from_secs(5), apart));
            process
        };
        let (near, far) = (host(), host());
        let peer = far.0.id().to_string();
        for (host, words) in [
            (&near, "ip link set lo up"),
            (&near, &*format!("ip link add wire type veth peer name wire netns {peer}")),
            (&near, "ip addr add 93.184.216.1/24 dev wire"),
            (&near, "ip link set wire up"),
            (&far, "ip addr add 93.184.216.34/24 dev wire"),
            (&far, "ip link set lo up"),
            (&far, "ip link set wire up"),
        ] {
            let words: Vec<&str> = words.split(' ').collect();
            assert!(at(host, &words).status().expect("ip runs").success(), "{words:?}");
        }
        let serve = |host: &Process, who: &str| {
            let server = at(host, &["python3", "-c", SERVERS, who]).spawn().expect("it starts");
            let probe = "import socket; socket.create_connection(('127.0.0.1', 7), 1)";
            let answers = || {
                let tried = at(host, &["python3", "-c", probe]).stderr(Stdio::null()).status();
                tried.is_ok_and(|status| status.success())
            };
            assert!(within(Duration::from_secs(10), answers), "{who} does not listen");
            Process(server)
        };
        let servers = vec![serve(&far, "far:"), serve(&near, "near:")];
        Hosts { folder, near, far, _servers: servers }
    }

    /// A daemon on the near one, with `grants`, all of them Ada's.
    fn daemon(&self, grants: &str) -> Daemon {
        let names = self.folder.path().join("resolv.conf").display().to_string();
        let script = format!(
            "mount --bind {names} /etc/resolv.conf && exec nsenter --net --target {} \"$@\"; true",
            self.near.0.id()
        );
        daemon_after(&script, grants, "unused")
    }
}

/// Of one grant for each of `labels`, below `test`.
fn named(labels: &[&str]) -> String {
    let grant =
        |label: &&str| format!("[grant.{label}]\nkind = \"tcp\"\nhost = \"{label}.test\"\nport = 7\n");
    labels.iter().map(grant).collect()
}

/// What comes back from the grant's host, over `count` connections.
fn tried(daemon: &Daemon, label: &str, count: usize) -> String {
    let script = format!(
        "import socket
for n in range({count}):
    try:
        s = socket.create_connection(('{label}.test', 7)); s.settimeout(20); s.sendall(b'x'); print((s.recv(9) or b'-').decode(), end=' ')
    except OSError as e: print('-', end=' ')"
    );
    said(&daemon.exec(ADA, &["--grant", label], &["python3", "-c", &script])).0.trim_end().to_owned()
}

/// Loopback, metadata, private networks, this host itself, IPv4 in IPv6's clothes; one among several is enough.
#[test]
fn a_name_leads_to_no_address_that_is_not_public() {
    let hosts = Hosts::start();
    let refused = [
        ("loop", "127.0.0.1, this host itself"),
        ("zero", "0.0.0.0, this network"),
        ("meta", "169.254.169.254, link-local"),
        ("private", "10.0.0.1, a private network's"),
        ("own", "93.184.216.1, this host itself"),
        ("mixed", "::1, this host itself"),
        ("two", "127.0.0.1, this host itself"),
        ("mapped", "::ffff:127.0.0.1, not of the public Internet"),
        ("nat", "64:ff9b::7f00:1, not of the public Internet"),
        ("local", "fd00::1, a private network's"),
        ("link", "fe80::1, link-local"),
        ("sixtofour", "2002:7f00:1::, no host's"),
        ("alias", "127.0.0.1, this host itself"),
        ("empty", "no records found"),
        ("absent", "no records found"),
    ];
    let labels: Vec<&str> = refused.iter().map(|(label, _)| *label).chain(["good"]).collect();
    let daemon = hosts.daemon(&named(&labels));
    assert_eq!(tried(&daemon, "good", 2), "far:x far:x", "{}", daemon.log());
    for (label, why) in refused {
        assert_eq!(tried(&daemon, label, 1), "-", "{label}");
        let denied = of_kind(&daemon, "deny");
        let last = denied.last().expect("a record");
        let message = last["message"].as_str().unwrap_or_default();
        assert!(last["grant"] == label && message.contains(why), "{label}: {message}");
    }
    let opened: BTreeSet<String> =
        of_kind(&daemon, "open").iter().map(|event| event["upstream"].to_string()).collect();
    assert_eq!(opened, ["[\"93.184.216.34:7\"]".to_owned()].into());
    // The control: what was refused is there, and an operator who says so gets it.
    let pin = |label: &str, place: &str| format!("{}upstream = \"{place}\"\n", named(&[label]));
    let pinned = hosts.daemon(&format!("{}{}", pin("loop", "127.0.0.1:7"), pin("own", "93.184.216.1:7")));
    assert_eq!((tried(&pinned, "loop", 1), tried(&pinned, "own", 1)), ("near:x".into(), "near:x".into()));
}

/// The answer that was looked at is the one that is connected to: a server that changes its mind between two questions gains nothing.
#[test]
fn what_was_looked_at_is_what_is_connected_to() {
    let hosts = Hosts::start();
    let daemon = hosts.daemon(&named(&["flip"]));
    let seen = tried(&daemon, "flip", 12);
    let words: Vec<&str> = seen.split(' ').collect();
    assert_eq!(words.len(), 12, "{seen}");
    assert!(words.iter().all(|word| ["far:x", "-"].contains(word)), "the near one is never reached: {seen}");
    assert!(words.contains(&"far:x") && words.contains(&"-"), "it does flip: {seen}");
}

/// A name server that never answers holds up nobody else's names.
#[test]
fn a_silent_name_holds_up_nobody_else() {
    let hosts = Hosts::start();
    let daemon = hosts.daemon(&named(&["silent", "good"]));
    let waits = std::thread::scope(|scope| {
        let silent = scope.spawn(|| tried(&daemon, "silent", 1));
        std::thread::sleep(Duration::from_millis(300));
        let began = std::time::Instant::now();
        assert_eq!(tried(&daemon, "good", 1), "far:x", "{}", daemon.log());
        let took = began.elapsed();
        assert!(!silent.is_finished() && took < Duration::from_secs(5), "{took:?}");
        silent.join().expect("it does not panic")
    });
    assert_eq!(waits, "-");
    drop(hosts.far);
}
