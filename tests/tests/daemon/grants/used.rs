//! Grants that are used as they are meant to be, by programs that know nothing of them.

use super::servers::{Echo, OneAnswer, Server};
use serde_json::json;

use super::*;

/// The control: without the grant the name is not there, and who brings no credential is nobody to the server.
#[test]
fn an_unmodified_curl_is_whom_the_credential_says() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let output = run(&daemon, &["api"], "curl -sS https://api.test/whoami");
    assert_eq!(said(&output), ("hello ada\n".into(), String::new()), "{}", daemon.log());
    assert_eq!(nginx.seen(), ["ada GET /whoami 200"]);

    let without = run(&daemon, &[], "curl -sS -m 5 https://api.test/whoami");
    assert_eq!(without.status.code(), Some(6), "curl: could not resolve host");
    let resolve = format!("api.test:{}:127.0.0.1", nginx.port);
    let direct = Command::new("curl")
        .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", &resolve, "--cacert"])
        .arg(nginx.authority())
        .arg(format!("https://api.test:{}/whoami", nginx.port))
        .output()
        .expect("curl runs");
    assert_eq!(said(&direct).0, "401");
}

/// Each tool that is on this host, with its own idea of where authorities stand.
#[test]
fn the_sandbox_s_authority_is_trusted_by_each_library() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let get =
        "import urllib.request as r; print(r.urlopen('https://api.test/python').read().decode(), end='')";
    let node = "fetch('https://api.test/node').then(r => r.text()).then(t => process.stdout.write(t))";
    for (tool, script) in [
        ("curl", "curl -sS https://api.test/curl".to_owned()),
        ("curl6", "curl -6 -sS https://api.test/curl6".to_owned()),
        ("wget", "wget -qO- https://api.test/wget".to_owned()),
        ("python", format!("python3 -c \"{get}\"")),
        ("node", format!("node -e \"{node}\"")),
    ] {
        let output = run(&daemon, &["api"], &script);
        assert_eq!(said(&output).0, "hello ada\n", "{tool}: {}", said(&output).1);
        assert!(nginx.seen().contains(&format!("ada GET /{tool} 200")), "{tool}");
    }
    // git speaks HTTP first; that it got an answer over TLS is enough.
    let git = run(&daemon, &["api"], "git ls-remote https://api.test/git 2>&1");
    assert!(nginx.seen().iter().any(|line| line.starts_with("ada GET /git/info/refs")), "{:?}", said(&git));
}

/// What the grant does not name does not reach the server, and the sandbox is told why.
#[test]
fn only_what_the_rules_name_goes_on() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let rules = "{ methods = [\"GET\"], path = \"/repos/acme/**\" }, { methods = [\"POST\"], path = \"/repos/*/issues\" }";
    let daemon = daemon(&api(&nginx, rules), &secret);
    let mut script = String::new();
    for (method, path, more) in [
        ("GET", "/repos/acme/a", ""),
        ("POST", "/repos/x/issues", ""),
        ("DELETE", "/repos/acme/a", ""),
        ("GET", "/repos/other/a", ""),
        ("GET", "/repos/acme/../other", ""),
        ("GET", "/repos/acme/%2e%2e/other", ""),
        ("GET", "/repos/acme/%2fother", ""),
        ("GET", "/repos/acme/a", "-H 'Host: other.test'"),
        ("GET", "/repos/acme/a", "-H 'Host:'"),
        ("GET", "/repos/acme/a", "--http1.0"),
    ] {
        script += &format!(
            "curl -s -o /dev/null -w '%{{http_code}}\\n' --path-as-is -X {method} {more} 'https://api.test{path}'\n"
        );
    }
    let output = run(&daemon, &["api"], &script);
    assert_eq!(said(&output).0, "200\n200\n403\n403\n400\n400\n400\n421\n421\n000\n", "{}", said(&output).1);
    assert_eq!(nginx.seen(), ["ada GET /repos/acme/a 200", "ada POST /repos/x/issues 200"]);
    let requests: Vec<Value> =
        of_kind(&daemon, "request").iter().map(|event| event["status"].clone()).collect();
    assert_eq!(requests, [200, 200, 403, 403, 400, 400, 400, 421, 421]);
}

/// Two readings of where a request ends would let a second one through, unjudged and with the credential of the first.
#[test]
fn no_request_is_hidden_in_another() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, "{ methods = [\"POST\"], path = \"/a\" }"), &secret);
    let hidden = "GET /hidden HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n";
    let length = hidden.replace("\\r", "r").replace("\\n", "n").len();
    let heads = [
        format!("Content-Length: {length}\\r\\nTransfer-Encoding: chunked"),
        format!("Transfer-Encoding: chunked\\r\\nContent-Length: {length}"),
        format!("Content-Length: 0\\r\\nContent-Length: {length}"),
        format!("Content-Length: {length}, 0"),
        format!("Content-Length : {length}"),
        format!("Content-Length: +{length}"),
        format!("Transfer-Encoding: xchunked\\r\\nContent-Length: {length}"),
        "Transfer-Encoding: chunked, identity".into(),
        "Transfer-Encoding:\\x0bchunked".into(),
        "X: y\\n\\n".into(),
        "X: y\\r\\n Transfer-Encoding: chunked".into(),
        "Connection: content-length\\r\\nContent-Length: 0".into(),
        "Expect: 100-continue\\r\\nContent-Length: 0".into(),
        "Upgrade: websocket\\r\\nConnection: upgrade\\r\\nContent-Length: 0".into(),
    ];
    let mut script = "import socket, ssl
def ask(head):
    s = ssl.create_default_context().wrap_socket(socket.create_connection(('api.test', 443)), server_hostname='api.test')
    s.settimeout(3)
    s.sendall(b'POST /a HTTP/1.1\\r\\nHost: api.test\\r\\n' + head + b'\\r\\n\\r\\n0\\r\\n\\r\\nHIDDEN')
    try:
        while s.recv(4096): pass
    except OSError: pass
"
    .replace("HIDDEN", hidden);
    for head in &heads {
        script += &format!("ask(b'{head}')\n");
    }
    script += "print('done')";
    let output = daemon.exec(ADA, &["--grant", "api"], &["python3", "-c", &script]);
    assert_eq!(said(&output).0, "done\n", "{}", said(&output).1);
    let seen = nginx.seen();
    assert!(seen.iter().all(|line| line == "ada POST /a 200"), "{seen:?}");
    assert!(!seen.is_empty() && seen.len() <= heads.len(), "{seen:?}");
}

/// What the workload says of itself in the credential's place is not passed on, nor is what it wants kept between two hops.
#[test]
fn the_workload_s_own_header_is_replaced() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let script =
        "curl -sS -H 'Authorization: Bearer mine' -H 'Authorization: Bearer twice' https://api.test/a;
        curl -sS -H 'Connection: authorization, x-trace' -H 'X-Trace: no' https://api.test/b;
        curl -sS -H 'X-Trace: yes' https://api.test/c";
    let output = run(&daemon, &["api"], script);
    assert_eq!(said(&output).0, "hello ada\n".repeat(3), "{}", said(&output).1);
    assert_eq!(nginx.seen(), ["ada GET /a 200", "ada GET /b 200", "ada GET /c 200 yes"]);
}

/// A redirection is the workload's to follow, and where it leads to the credential does not go.
#[test]
fn a_redirection_is_not_followed() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let output = run(&daemon, &["api"], "curl -sS -L -m 5 https://api.test/away");
    assert_eq!(output.status.code(), Some(6), "{}", said(&output).1);
    assert_eq!(nginx.seen(), ["ada GET /away 302"]);
}

/// An upstream that is not who the grant says gets nothing: not even a request.
#[test]
fn an_upstream_with_another_name_or_authority_gets_no_request() {
    let secret = secret();
    let (other, right) = (Nginx::of_host(&secret, "other.test"), Nginx::start(&secret));
    let foreign = api(&right, READ_ALL)
        .replace(&right.authority().display().to_string(), &other.authority().display().to_string());
    for (what, grant, nginx) in [("name", api(&other, READ_ALL), &other), ("authority", foreign, &right)] {
        let daemon = daemon(&grant, &secret);
        let output = run(&daemon, &["api"], "curl -sS -o /dev/null -w '%{http_code}' https://api.test/");
        assert_eq!(said(&output).0, "502", "{what}");
        assert_eq!(nginx.seen(), Vec::<String>::new(), "{what}");
    }
}

/// Kind `tcp`: nothing is looked at. The audit's counts are the kernel's, and the same as the server's.
#[test]
fn bytes_are_counted_as_the_server_counts_them() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let output = run(&daemon, &["echo"], "head -c 300000 /dev/zero | nc -N echo.test 7 | wc -c");
    assert_eq!(said(&output).0, "300000\n", "{}", said(&output).1);
    assert_eq!(echo.bytes(), 300_000);
    assert!(within(Duration::from_secs(5), || of_kind(&daemon, "close").len() == 1));
    let close = of_kind(&daemon, "close").remove(0);
    assert_eq!(
        (&close["sent_bytes"], &close["received_bytes"]),
        (&300_000.into(), &300_000.into()),
        "{close}"
    );
    assert_eq!(close["grant"], "echo");
}

#[test]
fn clients_of_databases_reach_what_is_granted_by_name_and_nothing_else() {
    let (redis, postgres) = (free_port(), free_port());
    let folder = tempfile::Builder::new().prefix("broker-db-").tempdir().expect("a directory");
    set_mode(folder.path(), 0o777);
    let mut command = Command::new("redis-server");
    command
        .args(["--port", &redis.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
        .arg(folder.path());
    let _redis = Server::start(&mut command, redis);
    let data = folder.path().join("data");
    let programs = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed").flatten().next();
    let programs = programs.expect("a version").path().join("bin");
    let as_postgres = |program: &str| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=postgres", "--regid=postgres", "--init-groups"])
            .arg(programs.join(program))
            .arg("-D")
            .arg(&data);
        command.current_dir("/");
        command
    };
    let made = as_postgres("initdb").args(["-U", "app", "--auth=trust", "-N"]).output().expect("it runs");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let mut command = as_postgres("postgres");
    command
        .args(["-p", &postgres.to_string(), "-h", "127.0.0.1", "-k"])
        .arg(folder.path())
        .args(["-c", "fsync=off"]);
    let _postgres = Server::start(&mut command, postgres);
    let grants = format!(
        "[grant.cache]\nkind = \"tcp\"\nhost = \"cache.test\"\nport = 6379\nupstream = \"127.0.0.1:{redis}\"\n\
         [grant.db]\nkind = \"tcp\"\nhost = \"db.test\"\nport = 5432\nupstream = \"127.0.0.1:{postgres}\"\n"
    );
    let daemon = daemon(&grants, "unused");
    let script = format!(
        "redis-cli -h cache.test set k v; redis-cli -h cache.test get k
         psql -h db.test -U app -d postgres -Atc 'select 6*7'
         for place in '127.0.0.1 {redis}' '127.0.0.1 {postgres}' 'cache.test 5432' 'db.test 6379' 'cache.test {redis}' '10.0.0.1 80'; do
           nc -z -w 2 $place && echo open $place
         done; nc -z -w 2 nobody.test 80 || echo closed"
    );
    let output = run(&daemon, &["cache", "db"], &script);
    assert_eq!(said(&output).0, "OK\nv\n42\nclosed\n", "{}", said(&output).1);
    let unknown = of_kind(&daemon, "deny");
    assert_eq!((unknown.len(), &unknown[0]["name"]), (1, &"nobody.test".into()), "{unknown:?}");
    let opened: Vec<Value> =
        of_kind(&daemon, "open").into_iter().map(|mut event| event["grant"].take()).collect();
    assert_eq!(opened, ["cache", "cache", "db"]);
}

/// What runs is cut, what is derived from nothing; what comes after is refused. The other sandbox's is another's.
#[test]
fn what_is_revoked_is_cut() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = "import socket, time
s = socket.create_connection(('echo.test', 7)); s.sendall(b'x'); s.recv(1); print('up', flush=True)
print(s.recv(1))
try: socket.create_connection(('echo.test', 7)).recv(1); print('open')
except OSError as e: print(e.errno)";
    let start = || {
        let mut command = daemon.broker(ADA, &["exec", "--grant", "echo"]);
        let mut child =
            command.args(["--", "python3", "-c", script]).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut output = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        std::io::BufRead::read_line(&mut output, &mut line).expect("text");
        assert_eq!(line, "up\n", "{}", daemon.log());
        (child, output)
    };
    let ((mut child, mut output), (mut other, _still)) = (start(), start());
    let grants = || -> Vec<Value> {
        let listed = daemon.broker(ADA, &["grant", "list", "--json"]).output().expect("it runs");
        serde_json::from_slice(&listed.stdout).expect("a list")
    };
    let first = grants()[0]["sandbox"].as_str().expect("a name").to_owned();
    assert_eq!((grants()[0]["open"].clone(), grants()[0]["revoked"].clone()), (1.into(), false.into()));
    // Nobody's but its user's, or who has the right.
    let foreign = daemon.broker(EVE, &["grant", "revoke", "echo"]).output().expect("it runs");
    assert_eq!(foreign.status.code(), Some(1), "{}", text(&foreign.stdout));
    let revoked =
        daemon.broker(ADA, &["grant", "revoke", "echo", "--sandbox", &first]).output().expect("it runs");
    assert_eq!(
        text(&revoked.stdout),
        "revoked in 1 sandboxes; 1 connections cut\n",
        "{}",
        text(&revoked.stderr)
    );
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut output, &mut rest).expect("text");
    assert_eq!(rest, format!("b''\n{}\n", libc::ECONNREFUSED));
    assert!(child.wait().expect("it ends").success());
    assert!(other.try_wait().expect("it is ours").is_none(), "the other goes on");
    let _ = other.kill();
    let _ = other.wait();
    assert_eq!(of_kind(&daemon, "revoke")[0]["sandbox"], first);
}

/// A sandbox that lives has its grants too, for each command in it, until another principal has it.
#[test]
fn a_sandbox_that_lives_has_grants_until_it_is_another_s() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let peer = lives::Peer::new(&daemon);
    let say = "echo hello | nc -N -w 2 echo.test 7 || echo none";
    let provision =
        json!({ "policy": "default", "environment": [], "path": "/usr/bin:/bin", "grants": ["echo"] });
    peer.send("Provision", &provision, false, &[]);
    let (reply, mut given) = peer.reply();
    assert!(reply["error"].is_null(), "{reply}");
    let handle = given.pop().expect("a handle");
    for effect in ["one", "two"] {
        assert_eq!(peer.execute(&handle, effect, say).1, "hello\n");
    }
    // A narrower channel has what was named for it, and what is run there is another principal's.
    let narrow = |session: &str, grants: &[&str]| {
        peer.send(
            "Narrow",
            &json!({ "session": session, "policies": ["default"], "grants": grants }),
            false,
            &[],
        );
        let (reply, mut given) = peer.reply();
        assert!(reply["error"].is_null(), "{reply}");
        lives::Peer::from(given.pop().expect("a channel"))
    };
    let (with, without) = (narrow("with", &["echo"]), narrow("without", &[]));
    with.send("Provision", &provision, false, &[]);
    assert!(with.reply().0["error"].is_null());
    without.send("Provision", &provision, false, &[]);
    assert_eq!(without.reply().0["parameters"]["code"], "grant-not-granted");
    peer.send("Narrow", &json!({ "session": "x", "policies": [], "grants": ["absent"] }), false, &[]);
    assert_eq!(peer.reply().0["parameters"]["code"], "grant-not-granted");
    assert_eq!(with.execute(&handle, "three", say).1, "none\n", "taken over, in new namespaces");
}

/// What an upstream says of the credential does not come inside, in headers or in the body.
#[test]
fn a_reply_does_not_tell_the_secret() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let output = run(&daemon, &["api"], "curl -sSi https://api.test/echo");
    let (reply, errors) = said(&output);
    let stars = "*".repeat(secret.len());
    assert!(reply.ends_with(&format!("you sent Bearer {stars}.\n")), "{reply}{errors}");
    assert!(
        reply.to_lowercase().contains(&format!("x-echo: bearer {stars}")) && !reply.contains(&secret),
        "{reply}"
    );
    // The control: who has the token sees it.
    let resolve = format!("api.test:{}:127.0.0.1", nginx.port);
    let direct = Command::new("curl")
        .args(["-sS", "-H", &format!("Authorization: Bearer {secret}"), "--resolve", &resolve, "--cacert"])
        .arg(nginx.authority())
        .arg(format!("https://api.test:{}/echo", nginx.port))
        .output()
        .expect("curl runs");
    assert!(said(&direct).0.contains(&secret));
}

/// In the clear on both sides, where the configuration says so; what the upstream closes between two requests is opened again.
#[test]
fn an_upstream_may_close_between_two_requests() {
    let upstream = OneAnswer::start();
    let grant = format!(
        "[grant.api]\nkind = \"http\"\nhost = \"api.test\"\ncredential = \"api\"\n\
         inject = {{ header = \"X-Key\", value = \"{{secret}}\" }}\nallow = [ {READ_ALL} ]\n\
         upstream = \"127.0.0.1:{}\"\nupstream_tls = \"off\"\nplain = true\n",
        upstream.port
    );
    let secret = secret();
    let daemon = daemon(&grant, &secret);
    let script = "import http.client, time
c = http.client.HTTPConnection('api.test'); c.connect(); own = c.sock
for n in range(3):
    c.request('GET', '/%d' % n); r = c.getresponse(); print(r.status, r.read().decode(), c.sock is own); time.sleep(.3)";
    let output = daemon.exec(ADA, &["--grant", "api"], &["python3", "-c", script]);
    assert_eq!(said(&output).0, "200 yes True\n".repeat(3), "{}", said(&output).1);
    let heads = upstream.heads();
    assert_eq!(heads.len(), 3);
    assert!(heads.iter().all(|head| head.contains(&format!("x-key: {secret}\r\n")) && head.contains("host: api.test\r\n")), "{heads:?}");
    assert_eq!(of_kind(&daemon, "open").len(), 3);
}

/// Without `upstream_ca` the host's own authorities vouch for the upstream: for each sandbox anew, and for nobody else.
#[test]
fn the_host_s_authorities_vouch_where_no_other_is_named() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let grant: String = api(&nginx, READ_ALL)
        .lines()
        .filter(|line| !line.starts_with("upstream_ca"))
        .map(|line| format!("{line}\n"))
        .collect();
    let own = format!(
        "cat /etc/ssl/certs/ca-certificates.crt {} > $STATE/bundle && mount --bind $STATE/bundle /etc/ssl/certs/ca-certificates.crt",
        nginx.authority().display()
    );
    let (with, without) = (daemon_after(&own, &grant, &secret), daemon(&grant, &secret));
    for number in 0..3 {
        let output = run(&with, &["api"], &format!("curl -sS https://api.test/{number}"));
        assert_eq!(said(&output).0, "hello ada\n", "{}{}", said(&output).1, with.log());
    }
    let output = run(&without, &["api"], "curl -sS -o /dev/null -w '%{http_code}' https://api.test/");
    assert_eq!((said(&output).0.as_str(), nginx.seen().len()), ("502", 3), "{}", said(&output).1);
    assert!(without.log().contains("invalid peer certificate"), "{}", without.log());
}

/// Each says what is wrong with it, and nothing is kept.
#[test]
fn a_secret_that_no_header_can_carry_is_refused() {
    let daemon = daemon("", "a secret");
    for (secret, why) in [
        ("", "is empty"),
        ("\n", "is empty"),
        ("one\ntwo\n", "more than one line"),
        ("one\r\n", "carriage return"),
        ("\u{e4}", "no printable ASCII"),
        ("one \n", "a blank"),
    ] {
        let mut add = daemon.broker(0, &["credential", "add", "bad"]);
        let mut add = add.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        std::io::Write::write_all(&mut add.stdin.take().expect("a pipe"), secret.as_bytes())
            .expect("it reads");
        let output = add.wait_with_output().expect("it ends");
        assert!(
            !output.status.success() && text(&output.stderr).contains(why),
            "{secret:?}: {}",
            text(&output.stderr)
        );
    }
    let listed = daemon.broker(0, &["credential", "list"]).output().expect("it runs");
    assert_eq!(text(&listed.stdout), "api\n");
}
