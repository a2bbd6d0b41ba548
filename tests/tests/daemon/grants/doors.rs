//! Grants as descriptors: what a holder asks for at a door, what it derives there, and how all copies end.

use super::super::rows::python;
use super::servers::Echo;
use super::*;

/// A client of doors, as short as it can be; it holds descriptor 3.
const DOOR: &str = "
import json, os, signal, socket, sys, time
class Door:
    def __init__(self, fd): self.s = socket.socket(fileno=fd); self.s.settimeout(10)
    def ask(self, method, **parameters):
        try: self.s.send(json.dumps({'method': 'io.broker.Grant.' + method, 'parameters': parameters}).encode())
        except BrokenPipeError: return {'message': 'dead'}, [], True
        reply, fds, flags, _ = socket.recv_fds(self.s, 65536, 4)
        if not reply: return {'message': 'dead'}, [], True
        reply = json.loads(reply.rstrip(b'\\0'))
        return reply['parameters'], fds, 'error' in reply
    def open(self, **which):
        parameters, fds, failed = self.ask('Open', **which)
        if failed: return parameters['message']
        assert os.get_blocking(fds[0])
        s = socket.socket(fileno=fds[0]); s.settimeout(10)
        return s
    def derive(self, **how):
        parameters, fds, failed = self.ask('Derive', **how)
        return parameters['message'] if failed else (parameters['grant'], Door(fds[0]))
def echoed(s):
    if isinstance(s, str): return s
    s.sendall(b'x')
    try: return s.recv(1)
    except OSError as e: return e.errno
def get(s, path, method='GET'):
    s.sendall(f'{method} {path} HTTP/1.1\\r\\nHost: api.test\\r\\nConnection: close\\r\\n\\r\\n'.encode())
    reply = b''
    while piece := s.recv(4096): reply += piece
    return int(reply.split()[1])
door = Door(3)
";

/// Runs Python inside, as Ada, with `grants` and a door.
fn inside(daemon: &Daemon, grants: &[&str], script: &str) -> Output {
    let options: Vec<&str> = grants.iter().flat_map(|grant| ["--grant", *grant]).collect();
    daemon.exec(ADA, &options, &["python3", "-c", &format!("{DOOR}{script}")])
}

/// As [`inside`], to be talked to.
fn begin(daemon: &Daemon, grant: &str, script: &str) -> Command {
    let mut command = daemon.broker(ADA, &["exec", "--grant", grant]);
    command.args(["--", "python3", "-c"]).arg(format!("{DOOR}{script}"));
    command
}

/// The same outside of any sandbox, with a door that was derived by `options`.
fn outside(daemon: &Daemon, grant: &str, options: &[&str], script: &str) -> Command {
    let mut command = daemon.broker(ADA, &[&["grant", "derive", grant], options].concat());
    command.args(["--", "python3", "-c"]).arg(format!("{DOOR}{script}"));
    command
}

fn both(nginx: &Nginx, echo: &Echo) -> String {
    format!("{}{}", api(nginx, READ_ALL), echo_grant(echo, ""))
}

/// Each program gets a connection of its own; without a grant there is no descriptor 3.
#[test]
fn a_program_inside_asks_for_private_connections() {
    let (secret, echo) = (secret(), Echo::start());
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&both(&nginx, &echo), &secret);
    let script = "
print(os.environ['GRANT_FDS'])
one, other = door.open(grant='echo'), door.open(grant='echo')
one.sendall(b'1'); other.sendall(b'2'); print(one.recv(9), other.recv(9))
print(get(door.open(grant='api'), '/inside'), get(door.open(grant='api'), '/inside', 'PUT'))
print(door.open(grant='other'), '|', door.open(), '|', door.ask('Take')[2])
";
    let output = inside(&daemon, &["api", "echo"], script);
    let expected = "3:api,3:echo\nb'1' b'2'\n200 403\n\
                    other is no grant of this door | this door has several grants; name one | True\n";
    assert_eq!(said(&output).0, expected, "{} {}", said(&output).1, daemon.log());
    assert_eq!(nginx.seen(), ["ada GET /inside 200"]);
    let without = daemon.exec(ADA, &[], &["sh", "-c", "ls /proc/self/fd; echo $GRANT_FDS"]);
    assert_eq!(said(&without).0, "0\n1\n2\n3\n\n", "3 is the directory that ls reads");
    // The record has what the server counted, for connections of this form too.
    let closed = of_kind(&daemon, "close");
    let bytes: u64 = closed
        .iter()
        .filter(|event| event["grant"] == "echo")
        .filter_map(|event| event["sent_bytes"].as_u64())
        .sum();
    assert_eq!(bytes, echo.bytes());
}

/// A command in a sandbox that lives has it too, whatever its other descriptors are.
#[test]
fn every_command_of_a_sandbox_that_lives_has_the_door() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let client = format!(
        "
import array, json, os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
def call(method, parameters, given=()):
    message = json.dumps({{'method': 'io.broker.Control.' + method, 'parameters': parameters}}).encode() + b'\\0'
    s.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', given))] if given else [])
    return socket.recv_fds(s, 65536, 4)[:2]
common = {{'environment': [], 'path': '/usr/bin:/bin'}}
_, (handle,) = call('Provision', common | {{'policy': 'default', 'grants': ['echo']}})
for n in range(2):
    read, write = os.pipe()
    words = ['python3', '-c', {DOOR:?} + 'print(echoed(door.open()))']
    reply, _ = call('Execute', common | {{'handle': 0, 'effect': str(n), 'command': words, 'streams': {{'output': 1}}}}, [handle, write])
    os.close(write); print(os.read(read, 4096).decode(), end='')
"
    );
    let socket = daemon.socket().display().to_string();
    let mut command = python(ADA, &client, &[socket]);
    let output = command.output().expect("python3 runs");
    assert_eq!(said(&output).0, "b'x'\nb'x'\n", "{} {}", said(&output).1, daemon.log());
}

/// Rules, uses, bytes and time of one that is derived are its own and those of every one above it.
#[test]
fn what_is_derived_is_narrower() {
    let (secret, echo) = (secret(), Echo::start());
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&format!("{}uses = 6\n", both(&nginx, &echo)), &secret);
    let script = "
rule = lambda path, *methods: {'methods': list(methods), 'path': path}
name, child = door.derive(grant='api', by={'allow': [rule('/a/**', 'GET', 'PUT'), rule('/b', 'GET')]})
print(name, [get(child.open(), p) for p in ('/a/x', '/b', '/c')], get(child.open(), '/a/x', 'PUT'), get(door.open(grant='api'), '/c'))
name, grandchild = child.derive(by={'allow': [rule('/**', 'GET')]})
print(name, [get(grandchild.open(), p) for p in ('/a/x', '/b', '/c')])
print(child.derive(by={'allow': [rule('/a/../b', 'GET')]}), '|', child.derive(by={'more': 1}), '|', child.open(grant='api'))
_, twice = door.derive(grant='echo', by={'uses': 2}); _, more = twice.derive(by={'uses': 100})
print([echoed(more.open()) for n in range(2)], echoed(more.open()), echoed(twice.open()), twice.derive())
_, little = door.derive(grant='echo', by={'bytes': '100B'}); s = little.open()
s.sendall(b'y' * 60); got = b''
while piece := s.recv(100): got += piece
print(len(got), little.open())
_, short = door.derive(grant='echo', by={'expires': '500ms'}); s = short.open(); began = time.monotonic()
print(echoed(s), s.recv(1), time.monotonic() - began < 5, short.s.recv(1), echoed(door.open(grant='echo')))
try: short.s.send(b'{}')
except OSError as e: print(e.errno)
";
    let output = inside(&daemon, &["api", "echo"], script);
    let expected = format!(
        "api/1 [200, 200, 403] 403 200\napi/1/1 [200, 200, 403]\n\
         allow: \"/a/../b\": methods in capitals, a path that begins with `/`, `**` at its end only | \
         unknown field `more`, expected one of `allow`, `uses`, `bytes`, `expires` at line 1 column 14 | \
         api is no grant of this door\n\
         [b'x', b'x'] the grant is used up the grant is used up the grant is used up\n60 dead\nb'x' b'' True b'' b'x'\n{}\n",
        libc::EPIPE
    );
    assert_eq!(said(&output).0, expected, "{} {}", said(&output).1, daemon.log());
    let derived: Vec<String> = of_kind(&daemon, "derive")
        .iter()
        .map(|event| event["grant"].as_str().unwrap_or_default().into())
        .collect();
    assert_eq!(derived, ["api/1", "api/1/1", "echo/1", "echo/1/1", "echo/2", "echo/3"]);
}

/// Outside of any sandbox: what is passed on works for whoever holds it, and the last copy ends it all.
#[test]
fn a_door_is_held_passed_on_and_ends_with_its_last_copy() {
    let (secret, echo) = (secret(), Echo::start());
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&both(&nginx, &echo), &secret);
    let script = "
print(os.environ['GRANT_FDS'], get(door.open(), '/a'), get(door.open(), '/b'), flush=True)
parent = os.getpid()
ours, theirs = socket.socketpair()
if os.fork() == 0:
    os.close(3); theirs.close(); _, (passed,), _, _ = socket.recv_fds(ours, 10, 1)
    while os.getppid() == parent: time.sleep(0.01)
    held = Door(passed); print(get(held.open(), '/a'), flush=True); sys.stdin.read(); os._exit(0)
socket.send_fds(theirs, [b'x'], [3])
";
    let options = ["--allow", "GET,HEAD /a"];
    let mut command = outside(&daemon, "api", &options, script);
    let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(holder.stdout.take().expect("a pipe")));
    let mut line = || lines.next().expect("a line").expect("text");
    assert_eq!([line(), line()], ["3:api/1 200 403", "200"], "{}", daemon.log());
    assert_eq!(nginx.seen(), ["ada GET /a 200", "ada GET /a 200"]);
    let gateways = || children(daemon.process.id()).into_iter().filter(|pid| is_gateway(*pid)).count();
    assert_eq!(gateways(), 1);
    let listed = daemon.broker(ADA, &["grant", "list", "--json"]).output().expect("it runs");
    assert!(said(&listed).0.contains("\"api/1\"") && said(&listed).0.contains("\"held-"), "{listed:?}");
    drop(holder.stdin.take());
    assert!(within(Duration::from_secs(5), || gateways() == 0), "{}", daemon.log());
    let _ = holder.wait();
    // Who has not been given the grant derives nothing of it.
    let refused =
        daemon.broker(EVE, &["grant", "derive", "api"]).args(["--", "true"]).output().expect("it runs");
    assert!(said(&refused).1.contains("grant-not-granted"), "{refused:?}");
}

fn is_gateway(pid: i32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"gateway")
}

/// A copy that was dup'ed, one that a child has, one that travels in a message: none is good for anything after.
#[test]
fn revoking_ends_every_copy_and_what_was_derived() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = "
_, child = door.derive(); _, grandchild = child.derive()
ends = [door.open(), child.open(), grandchild.open()]
assert [echoed(s) for s in ends] == [b'x'] * 3
copy = socket.socket(fileno=os.dup(ends[1].fileno()))
ours, theirs = socket.socketpair(); socket.send_fds(theirs, [b'x'], [ends[2].fileno(), grandchild.s.fileno()])
read, write = os.pipe()
if os.fork() == 0:
    s = ends[2]
    os.write(write, repr((s.recv(1), s.recv(1))).encode()); os._exit(0)
print('ready', flush=True); sys.stdin.readline()
print([s.recv(1) for s in ends[:2]], copy.recv(1), os.read(read, 99).decode())
_, passed, _, _ = socket.recv_fds(ours, 9, 2)
s = socket.socket(fileno=passed[0]); print(s.recv(1))
for d in (child, grandchild, Door(passed[1])):
    try: print(d.s.send(b'{}'))
    except OSError as e: print(e.errno, end=' ')
print(door.open())
";
    let mut command = begin(&daemon, "echo", script);
    let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut out = std::io::BufReader::new(run.stdout.take().expect("a pipe"));
    let mut ready = String::new();
    std::io::BufRead::read_line(&mut out, &mut ready).expect("text");
    assert_eq!(ready, "ready\n", "{}", daemon.log());
    let revoked = daemon.broker(ADA, &["grant", "revoke", "echo"]).output().expect("it runs");
    assert_eq!(said(&revoked).0, "revoked in 1 sandboxes; 3 connections cut\n");
    std::io::Write::write_all(&mut run.stdin.take().expect("a pipe"), b"go\n").expect("it reads");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut out, &mut said).expect("text");
    // Its own door has no grant left, and is dead too.
    assert_eq!(said, "[b'', b''] b'' (b'', b'')\nb''\n32 32 32 dead\n");
    let _ = run.wait();
    let revoked: Vec<Value> =
        of_kind(&daemon, "revoke").into_iter().map(|mut event| event["grant"].take()).collect();
    assert_eq!(revoked, ["echo"]);
}

/// The sibling of a derived grant that is revoked, and what it was derived from, go on.
#[test]
fn revoking_what_was_derived_leaves_the_rest() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = "
(one, first), (other, second) = door.derive(), door.derive()
ends = [d.open() for d in (door, first, second)]
assert [echoed(s) for s in ends] == [b'x'] * 3
print(one, other, flush=True); sys.stdin.readline()
print(ends[1].recv(1), echoed(ends[0]), echoed(ends[2]), echoed(door.open()), echoed(second.open()))
print(door.ask('Drop')[0], door.s.recv(1), ends[0].recv(1), ends[2].recv(1))
";
    let mut command = begin(&daemon, "echo", script);
    let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut out = std::io::BufReader::new(run.stdout.take().expect("a pipe"));
    let mut first = String::new();
    std::io::BufRead::read_line(&mut out, &mut first).expect("text");
    assert_eq!(first, "echo/1 echo/2\n", "{}", daemon.log());
    assert!(daemon.broker(ADA, &["grant", "revoke", "echo/1"]).status().expect("it runs").success());
    std::io::Write::write_all(&mut run.stdin.take().expect("a pipe"), b"go\n").expect("it reads");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut out, &mut said).expect("text");
    let _ = run.wait();
    assert_eq!(said, "b'' b'x' b'x' b'x' b'x'\n{'grant': 'echo'} b'' b'' b''\n", "{}", daemon.log());
}

/// Garbage, floods, descriptors that are sent in, answers that nobody reads: whoever does it has no door any more, and others have.
#[test]
fn who_misuses_a_door_loses_it() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = "
def dead(d):
    try:
        d.s.settimeout(8); return d.s.recv(1) == b''
    except OSError as e: return e.errno
for bad in (b'x', b'{}', b'[' * 9000, b'{\"method\":1}', b'\\0', b'\\xff' * 16384):
    _, d = door.derive(); d.s.send(bad); print(dead(d), end=' ')
# Descriptors are not taken: nobody has them after, and the message is answered.
_, d = door.derive(); read, write = os.pipe()
try: socket.send_fds(d.s, [json.dumps({'method': 'io.broker.Grant.Open'}).encode()], [write] * 100)
except PermissionError: d.s.send(json.dumps({'method': 'io.broker.Grant.Open'}).encode())
os.close(write); print(os.read(read, 1), len(socket.recv_fds(d.s, 9999, 9)[1]))
# Answers that nobody reads.
_, d = door.derive(); d.s.settimeout(0.2); asked = 0
try:
    while asked < 5000: d.s.send(json.dumps({'method': 'io.broker.Grant.Open'}).encode()); asked += 1
except OSError: pass
print(asked < 5000, echoed(door.open()))
doors = []
while isinstance(made := door.derive(), tuple): doors.append(made)
print(50 < len(doors) < 64, made, echoed(door.open()))
del doors, made
print([isinstance(door.derive(), tuple) for n in range(3)])
";
    let output = inside(&daemon, &["echo"], script);
    let expected = "True True True True True True b'' 1\nTrue b'x'\nTrue 64 doors are there already b'x'\n[True, True, True]\n";
    assert_eq!(said(&output).0, expected, "{} {}", said(&output).1, daemon.log());
    // One after the other, and nothing of them is left with the core.
    let script = "
before = None
for n in range(300):
    _, d = door.derive(); s = d.open(); assert echoed(s) == b'x'; del d, s
print('done')
";
    let descriptors = || {
        fs::read_dir(format!("/proc/{}/fd", daemon.role("core").expect("it lives")))
            .expect("root may")
            .count()
    };
    let before = descriptors();
    assert_eq!(said(&inside(&daemon, &["echo"], script)).0, "done\n", "{}", daemon.log());
    assert!(within(Duration::from_secs(5), || descriptors() <= before), "{} {before}", descriptors());
}

/// A secret that is replaced is used with the next request, whatever connections are there; one that is removed is not used any more.
#[test]
fn a_rotated_credential_is_used_by_what_runs_already() {
    let (old, new) = (secret(), secret() + "-new");
    let nginx = Nginx::start(&new);
    let daemon = daemon(&api(&nginx, READ_ALL), &old);
    let script = "
import http.client, ssl
kept = http.client.HTTPSConnection('api.test', context=ssl.create_default_context())
def status():
    try: kept.request('GET', '/a'); r = kept.getresponse(); r.read(); return r.status
    except (OSError, http.client.HTTPException) as e: return type(e).__name__
for n in range(3): print(status(), get(door.open(), '/a') if n < 2 else door.open(), flush=True); sys.stdin.readline()
";
    let mut command = begin(&daemon, "api", script);
    let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut input = run.stdin.take().expect("a pipe");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(run.stdout.take().expect("a pipe")));
    let mut line = || lines.next().expect("a line").expect("text");
    assert_eq!(line(), "401 401", "the control: the old one is nobody's: {}", daemon.log());
    let missing = daemon.broker(0, &["credential", "rotate", "none"]).output().expect("it runs");
    assert!(said(&missing).1.contains("no credential none"), "{missing:?}");
    let mut rotate = daemon.broker(0, &["credential", "rotate", "api"]);
    let mut rotate = rotate.stdin(Stdio::piped()).spawn().expect("it starts");
    std::io::Write::write_all(&mut rotate.stdin.take().expect("a pipe"), new.as_bytes()).expect("it reads");
    assert!(rotate.wait().expect("it ends").success(), "{}", daemon.log());
    std::io::Write::write_all(&mut input, b"\n").expect("it reads");
    assert_eq!(line(), "200 200", "{}", daemon.log());
    assert!(daemon.broker(0, &["credential", "remove", "api"]).status().expect("it runs").success());
    assert!(within(Duration::from_secs(5), || {
        let listed = daemon.broker(ADA, &["grant", "list"]).output().expect("it runs");
        said(&listed).0.contains("revoked")
    }));
    std::io::Write::write_all(&mut input, b"\n").expect("it reads");
    let last = line();
    assert!(!last.contains("200"), "{last}");
    assert_eq!(nginx.seen(), ["nobody GET /a 401", "nobody GET /a 401", "ada GET /a 200", "ada GET /a 200"]);
    drop(input);
    let _ = run.wait();
}
