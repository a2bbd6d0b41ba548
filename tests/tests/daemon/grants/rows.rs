//! Rows of the catalogue that are about grants.

use super::servers::Echo;
use super::*;

/// From inside: everything that can be read there is read.
#[test]
fn cb_02_the_credential_is_nowhere_inside() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let script = "curl -sS https://api.test/a > /tmp/reply
        { env; cat /proc/self/environ /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/self/auxv /proc/keys /proc/self/mountinfo /proc/net/tcp
          ls -l /proc/self/fd /proc/[0-9]*/fd; find /etc /run /tmp /var /home /dev -xdev -type f -exec cat {} +
          for pid in $(ls /proc | grep '^[0-9]'); do strings /proc/$pid/mem; done; cat /tmp/reply; } 2>&1";
    let output = run(&daemon, &["api"], script);
    let (inside, _) = said(&output);
    assert!(inside.contains("hello ada") && inside.contains("BEGIN CERTIFICATE"), "{inside}");
    assert!(!inside.contains(&secret));
    // The control: the same search finds what was put there.
    let control = run(&daemon, &["api"], &format!("export T={secret}; {script}"));
    assert!(said(&control).0.contains(&secret));
}

/// What is there and not granted, and what is not there, get one answer.
#[test]
fn cb_06_what_is_not_granted_looks_like_what_is_not_there() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let mut answers = Vec::new();
    for name in ["echo", "ech", "echoo", "ECHO", "echo2", "0", "-1"] {
        let output = daemon.exec(EVE, &[&format!("--grant={name}")], &["true"]);
        assert_eq!(output.status.code(), Some(125));
        answers.push(text(&output.stderr).replace(&format!("grant {name} "), "grant _ "));
    }
    // Eve has no policy either, and hears of that first; Ada has the policy, and not these grants.
    assert!(answers.iter().all(|answer| answer.contains("policy-not-granted")), "{answers:?}");
    for name in ["ech", "echoo", "ECHO", "echo2"] {
        let output = daemon.exec(ADA, &[&format!("--grant={name}")], &["true"]);
        assert!(text(&output.stderr).contains("grant-not-granted"), "{}", text(&output.stderr));
    }
    for name in ["echo/../echo", "%65cho", "echo*", "\u{435}cho", ""] {
        let output = daemon.exec(ADA, &[&format!("--grant={name}")], &["true"]);
        assert!(text(&output.stderr).contains("is no name"), "{name}: {}", text(&output.stderr));
    }
    // Two that exist, of which one is not Ada's.
    let two = format!(
        "{}{}",
        echo_grant(&echo, ""),
        echo_grant(&echo, "").replace("[grant.echo]", "[grant.other]").replace("echo.test", "other.test")
    );
    let more = format!("{two}\n[[access]]\nuser = \"{ADA}\"\ngrants = [\"echo\"]\n");
    let daemon = Daemon::start_with("true", &more);
    let answer = |name: &str| {
        let output = daemon.exec(ADA, &["--grant", name], &["true"]);
        text(&output.stderr).replace(name, "_")
    };
    assert_eq!(answer("other"), answer("absent"));
    assert!(daemon.exec(ADA, &["--grant", "echo"], &["true"]).status.success());
}

/// Uses, time, and what is open when the time is over.
#[test]
fn cb_07_a_grant_ends_with_its_uses_and_its_time() {
    let echo = Echo::start();
    let limited = daemon(&echo_grant(&echo, "uses = 2\n"), "unused");
    let script = "import socket
for n in range(4):
    s = socket.create_connection(('echo.test', 7)); s.settimeout(5)
    try: s.sendall(b'x'); print(s.recv(1))
    except OSError as e: print(b'')";
    let output = limited.exec(ADA, &["--grant", "echo"], &["python3", "-c", script]);
    assert_eq!(said(&output).0, "b'x'\nb'x'\nb''\nb''\n", "{}", said(&output).1);
    let denied: Vec<Value> =
        of_kind(&limited, "deny").into_iter().map(|mut event| event["message"].take()).collect();
    assert_eq!(denied, ["the grant is used up", "the grant is used up"]);

    let short = daemon(&echo_grant(&echo, "expires = \"1s\"\n"), "unused");
    let script = "import socket, time
s = socket.create_connection(('echo.test', 7)); s.settimeout(10)
began = time.monotonic(); s.sendall(b'x'); print(s.recv(1), s.recv(1), time.monotonic() - began < 5)
try: socket.create_connection(('echo.test', 7)).recv(1); print('open')
except OSError as e: print(e.errno)";
    let output = short.exec(ADA, &["--grant", "echo"], &["python3", "-c", script]);
    assert_eq!(said(&output).0, format!("b'x' b'' True\n{}\n", libc::ECONNREFUSED), "{}", said(&output).1);
}

/// A name leads to what the operator has pinned, whatever a resolver says: none is asked.
#[test]
fn nw_12_no_name_leads_anywhere_but_to_what_was_pinned() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    // The host's own idea of the name is another; inside it is the grant's, and the host's loopback is not there.
    let script = format!(
        "import socket
print(sorted({{a[4][0] for a in socket.getaddrinfo('echo.test', 7)}}))
for place in [('127.0.0.1', {port}), ('::1', {port}), ('198.18.0.53', {port}), ('169.254.169.254', 80), ('0.0.0.0', {port}), ('localhost', {port})]:
    try: socket.create_connection(place, 2); print('open', place)
    except OSError: pass
s = socket.create_connection(('echo.test', 7)); s.sendall(b'x'); print(s.recv(1))",
        port = echo.port
    );
    let output = run(&daemon, &["echo"], &format!("python3 -c \"{script}\""));
    let (inside, errors) = said(&output);
    assert_eq!(inside, "['198.19.0.1', 'fd62:726f:6b65:7200::1:1']\nb'x'\n", "{errors}");
    assert!(
        std::net::TcpStream::connect(("127.0.0.1", echo.port)).is_ok(),
        "the control: the host reaches it"
    );
}
