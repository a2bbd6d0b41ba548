//! One tenant beside another, and what is beside a grant.

use super::super::stages::Process;
use super::servers::Echo;
use super::*;

/// Two users with grants of the same host, each with a credential of its own: neither is ever the other to anybody.
#[test]
fn two_tenants_of_one_host_are_two() {
    let (adas, eves) = (secret(), secret() + "-eve");
    let (first, second, echo) = (Nginx::start(&adas), Nginx::start(&eves), Echo::start());
    let other = api(&second, READ_ALL)
        .replace("[grant.api]", "[grant.eves]")
        .replace("credential = \"api\"", "credential = \"eves\"");
    let more = format!(
        "{}{other}{}[credential.eves]\nsource = \"store:eves\"\n[[access]]\nuser = \"{EVE}\"\npolicies = [\"default\"]\ngrants = [\"eves\"]\n\
         [[access]]\nuser = \"{ADA}\"\ngrants = [\"api\", \"echo\"]\n",
        api(&first, READ_ALL),
        echo_grant(&echo, "")
    );
    let daemon = Daemon::start_with("true", &format!("[credential.api]\nsource = \"store:api\"\n{more}"));
    for (name, secret) in [("api", &adas), ("eves", &eves)] {
        let mut add = daemon.broker(0, &["credential", "add", name]);
        let mut add = add.stdin(Stdio::piped()).spawn().expect("it starts");
        std::io::Write::write_all(&mut add.stdin.take().expect("a pipe"), secret.as_bytes())
            .expect("it reads");
        assert!(add.wait().expect("it ends").success(), "{}", daemon.log());
    }
    // Side by side, several times, on the same addresses inside.
    std::thread::scope(|scope| {
        for (uid, grant) in [(ADA, "api"), (EVE, "eves")] {
            let daemon = &daemon;
            scope.spawn(move || {
                for _ in 0..5 {
                    let output =
                        daemon.exec(uid, &["--grant", grant], &["curl", "-sS", "https://api.test/echo"]);
                    let (said, errors) = said(&output);
                    // What nginx says it was sent is masked, each with its own.
                    assert!(said.starts_with("you sent Bearer ****"), "{said} {errors} {}", daemon.log());
                }
            });
        }
    });
    for nginx in [&first, &second] {
        assert_eq!(nginx.seen(), ["ada GET /echo 200"; 5], "each got its own, and nobody else's");
    }
    // What is Ada's, Eve neither sees nor ends, nor makes narrower.
    let mut held = daemon.broker(ADA, &["exec", "--grant", "echo"]);
    let mut held = held.args(["--", "sleep", "600"]).spawn().expect("it starts");
    let lists =
        |uid: u32| said(&daemon.broker(uid, &["grant", "list", "--json"]).output().expect("it runs")).0;
    assert!(within(Duration::from_secs(5), || lists(ADA).contains("\"echo\"")), "{}", daemon.log());
    assert_eq!(lists(EVE), "[]\n");
    let id = daemon.list(ADA)[0]["id"].as_str().expect("a name").to_owned();
    for words in [vec!["grant", "revoke", "echo"], vec!["grant", "revoke", "echo", "--sandbox", &id]] {
        let refused = daemon.broker(EVE, &words).output().expect("it runs");
        assert!(said(&refused).1.contains("no sandbox of yours has grant echo"), "{refused:?}");
    }
    let refused =
        daemon.broker(EVE, &["grant", "derive", "echo"]).args(["--", "true"]).output().expect("it runs");
    assert!(said(&refused).1.contains("grant-not-granted"), "{refused:?}");
    assert!(lists(ADA).contains("\"revoked\": false"), "{}", lists(ADA));
    let _ = held.kill();
    let _ = held.wait();
}

/// Whoever takes all that it may have of connections, doors and names leaves the others what they have.
#[test]
fn a_tenant_that_takes_all_it_may_leaves_the_others_theirs() {
    let echo = Echo::start();
    let more = format!(
        "{}[[access]]\nuser = \"{EVE}\"\npolicies = [\"default\"]\ngrants = [\"echo\"]\n[[access]]\nuser = \"{ADA}\"\ngrants = [\"echo\"]\n",
        echo_grant(&echo, "")
    );
    let daemon = Daemon::start_with("true", &more);
    let flood = "
import json, resource, socket, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
streams, door = [], socket.socket(fileno=3)
for n in range(900):
    try: s = socket.create_connection(('echo.test', 7), 5); streams.append(s)
    except OSError: break
def ask():
    try:
        while True: door.send(json.dumps({'method': 'io.broker.Grant.Derive'}).encode())
    except OSError: pass
def names():
    for n in range(100000):
        try: socket.getaddrinfo(f'n{n}.test', 7)
        except OSError: pass
for target in (ask, names, names): threading.Thread(target=target, daemon=True).start()
print(len(streams), flush=True)
time.sleep(600)
";
    let mut floods = Vec::new();
    for _ in 0..2 {
        let mut command = daemon.broker(ADA, &["exec", "--grant", "echo"]);
        let mut run =
            command.args(["--", "python3", "-c", flood]).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(run.stdout.as_mut().expect("a pipe")),
            &mut line,
        )
        .expect("text");
        assert!(line.trim().parse::<u32>().is_ok_and(|count| count >= 200), "{line} {}", daemon.log());
        floods.push(Process(run));
    }
    for _ in 0..5 {
        let script = "import socket
s = socket.create_connection(('echo.test', 7), 10); s.sendall(b'x'); print(s.recv(1))";
        let output = daemon.exec(EVE, &["--grant", "echo"], &["python3", "-c", script]);
        assert_eq!(said(&output).0, "b'x'\n", "{} {}", said(&output).1, daemon.log());
    }
    drop(floods);
    assert!(within(Duration::from_secs(10), || daemon.list(0).is_empty()), "{}", daemon.log());
    assert!(daemon.audit("verify").status.success());
}

/// No other protocol, address or port leads anywhere from a sandbox that has a grant.
#[test]
fn there_is_no_way_around_the_gateway() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = format!(
        "import errno, socket
def tried(what, act):
    try: act(); print(what, 'REACHED')
    except OSError as e: print(what, errno.errorcode.get(e.errno, e.errno))
def udp(place):
    s = socket.socket(socket.AF_INET6 if ':' in place[0] else socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1); s.connect(place); s.send(b'x'); s.recv(1)
tcp = lambda place: socket.create_connection(place, 2).recv(1)
for place in [('echo.test', 8), ('198.19.0.1', 80), ('198.19.0.2', 7), ('198.18.0.53', 7), ('192.0.2.1', 80), ('127.0.0.1', {port}), ('2001:db8::1', 80), ('fd62:726f:6b65:7200::1:2', 7)]:
    tried(f'tcp {{place}}', lambda: tcp(place))
for place in [('echo.test', 7), ('8.8.8.8', 53), ('192.0.2.1', 443), ('2001:db8::1', 443), ('255.255.255.255', 67)]:
    tried(f'udp {{place}}', lambda: udp(place))
for what, family, kind, protocol in [('raw', socket.AF_INET, socket.SOCK_RAW, 1), ('ping', socket.AF_INET, socket.SOCK_DGRAM, 1), ('packet', 17, socket.SOCK_RAW, 768),
    ('vsock', 40, 1, 0), ('route', 16, 3, 0), ('diag', 16, 3, 4), ('bluetooth', 31, 3, 0), ('alg', 38, 5, 0), ('unix', 1, 1, 0), ('xdp', 44, 3, 0), ('mptcp', 2, 1, 262), ('sctp', 2, 1, 132)]:
    def act():
        s = socket.socket(family, kind, protocol); s.settimeout(1)
        s.connect(('192.0.2.1', 80)) if family == 2 else s.send(b'x')
    tried(what, act)
s = socket.create_connection(('echo.test', 7)); s.sendall(b'x'); print('granted', s.recv(1))",
        port = echo.port
    );
    let output = daemon.exec(ADA, &["--grant", "echo"], &["python3", "-c", &script]);
    let (inside, errors) = said(&output);
    assert!(inside.ends_with("granted b'x'\n") && !inside.contains("REACHED"), "{inside}{errors}");
    assert_eq!(inside.lines().count(), 26, "{inside}{errors}");
    // The controls: each is there to be tried on the host.
    let control = Command::new("python3")
        .args(["-c", &format!("import socket; socket.create_connection(('127.0.0.1', {}), 2); [socket.socket(*k) for k in [(2, 3, 1), (17, 3, 768), (16, 3, 0), (1, 1, 0)]]; print('REACHED')", echo.port)])
        .output()
        .expect("python3 runs");
    assert_eq!(said(&control).0, "REACHED\n", "{}", said(&control).1);
}
