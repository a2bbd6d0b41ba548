//! Rows of the catalogue against the daemon, each with a control in which the same attack works. Those about frames, slow
//! peers and credentials stand in `hostile.rs`, those about ends in `lifetime.rs`, that about what is written down in `record.rs`.

use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use broker_tests::canary;
use serde_json::json;

use super::lifetime::sleeping;
use super::lives::Peer;
use super::*;

/// `python3 -c SCRIPT WORDS...` as `uid`, on the host.
pub fn python(uid: u32, script: &str, words: &[String]) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", script]).args(words).uid(uid).gid(uid).current_dir("/").stdin(Stdio::null());
    command
}

/// The same in a sandbox.
fn python_inside(daemon: &Daemon, options: &[&str], script: &str, words: &[String]) -> Command {
    let mut command = daemon.broker(ADA, &[&["exec"], options].concat());
    command.args(["--", "python3", "-c", script]).args(words);
    command
}

/// The cases that a script has printed, `open` or `denied` first.
fn said(command: &mut Command) -> Vec<String> {
    let output = command.stderr(Stdio::piped()).output().expect("it runs");
    let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    assert!(
        output.status.success() && !lines.is_empty(),
        "{} {}",
        text(&output.stdout),
        text(&output.stderr)
    );
    lines
}

fn assert_all(word: &str, lines: &[String]) {
    let others: Vec<_> = lines.iter().filter(|line| !line.starts_with(word)).collect();
    assert!(others.is_empty(), "not {word}: {others:?}");
}

/// Everything that would let one process look into another. A wrong address or number counts as open: the check was passed.
const TRESPASS: &str = "
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
ptrace, pidfd_open, pidfd_getfd, readv = map(int, sys.argv[1:5])
def tell(case, pid, opened, why): print('open' if opened else 'denied', case, pid, why)
def call(case, pid, *arguments):
    result = libc.syscall(*(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    why = 0 if result >= 0 else ctypes.get_errno()
    tell(case, pid, why in (0, errno.EFAULT, errno.EBADF, errno.EIO), errno.errorcode.get(why, 0))
    return result
def look(pid, name):
    path = f'/proc/{pid}/{name}'
    if name in ('fd', 'root'): return os.listdir(path)
    with open(path, 'rb') as file: return '' if name == 'mem' else file.read(4096)
class Vector(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
own = ctypes.create_string_buffer(8)
near, far = Vector(ctypes.addressof(own), 8), Vector(0x400000, 8)
for pid in map(int, sys.argv[5:]):
    for name in ('environ', 'mem', 'maps', 'fd', 'root'):
        try: tell(name, pid, True, look(pid, name))
        except OSError as error: tell(name, pid, False, error.strerror)
    call('process_vm_readv', pid, readv, pid, ctypes.byref(near), 1, ctypes.byref(far), 1, 0)
    handle = libc.syscall(pidfd_open, pid, 0)
    if handle < 0: tell('pidfd_open', pid, False, errno.errorcode[ctypes.get_errno()])
    else: call('pidfd_getfd', pid, pidfd_getfd, handle, 0, 0)
    call('ptrace', pid, ptrace, 0x4206, pid, 0, 0)
";

/// CB-01. What holds rights or other people's business is closed to who asks for a sandbox and to what runs in one. The
/// control: an ordinary process is open in every way to another of its uid.
#[test]
fn cb_01_nobody_looks_into_the_daemon_s_processes() {
    let (secret, token) = (canary(), canary());
    let daemon = Daemon::start_after(&format!("export SECRET={secret}"));
    let mut run = sleeping(&daemon, ADA, &token);
    let (launcher, core) = (daemon.process.id().cast_signed(), daemon.role("core").expect("there is a core"));
    let roles = ["vault", "resolver"].map(|role| daemon.role(role).expect("it lives"));
    let has_init = |pid: &i32| !children(pid.cast_unsigned()).is_empty();
    let supervisor = children(daemon.process.id()).into_iter().find(has_init).expect("a supervisor");
    let init = children(supervisor.cast_unsigned())[0];
    let numbers = [libc::SYS_ptrace, libc::SYS_pidfd_open, libc::SYS_pidfd_getfd, libc::SYS_process_vm_readv];
    let words = |pids: &[i32]| {
        let numbers = numbers.iter().map(ToString::to_string);
        numbers.chain(pids.iter().map(ToString::to_string)).collect::<Vec<_>>()
    };
    let victims = words(&[launcher, core, supervisor, init, roles[0], roles[1]]);
    for lines in [
        said(&mut python(ADA, TRESPASS, &victims)),
        said(&mut python_inside(&daemon, &[], TRESPASS, &victims)),
    ] {
        assert_eq!(lines.len(), 6 * 8);
        assert_all("denied", &lines);
        assert!(!lines.concat().contains(&secret));
    }
    // The controls: the secret is there, and a process without us is open to its like.
    assert!(
        text(&fs::read(format!("/proc/{core}/environ")).expect("root reads it")).is_empty(),
        "the core has none"
    );
    assert!(text(&fs::read(format!("/proc/{launcher}/environ")).expect("root reads it")).contains(&secret));
    let mut ordinary = Command::new("sleep");
    let mut ordinary = ordinary.arg("60").env("SECRET", &secret).uid(ADA).gid(ADA).spawn().expect("it runs");
    let lines = said(&mut python(ADA, TRESPASS, &words(&[ordinary.id().cast_signed()])));
    assert_all("open", &lines);
    assert!(lines.len() == 8 && lines.concat().contains(&secret));
    for child in [&mut ordinary, &mut run] {
        child.kill().expect("it lives");
        child.wait().expect("it is reaped");
    }
}

const KNOCK: &str = "
import os, socket, sys
def connect(address):
    s = socket.socket(socket.AF_UNIX)
    s.connect(address)
    s.send(b'{\"method\":\"org.varlink.service.GetInfo\"}\\0')
    return s.recv(4000)
def inherited():
    names = [os.readlink(f'/proc/self/fd/{number}') for number in range(64) if os.path.exists(f'/proc/self/fd/{number}')]
    return any(name.startswith('socket:') for name in names)
for case, attempt in [
    ('path', lambda: b'io.broker.Control' in connect(sys.argv[1])),
    ('workspace', lambda: b'io.broker.Control' in connect(sys.argv[2])),
    ('abstract', lambda: connect('\\0' + sys.argv[3]) == b''),
    ('listed', lambda: sys.argv[1] in open('/proc/net/unix').read()),
    ('inherited', inherited),
]:
    try: print('open' if attempt() else 'denied', case)
    except OSError as error: print('denied', case, error.strerror)
";

/// CB-04. The control socket is not to be had inside: by its path, in a lent directory, by an abstract name, as a descriptor
/// that a caller has; and where a sandbox is addressed nobody obeys a verb.
#[test]
fn cb_04_the_control_socket_is_not_inside() {
    let daemon = Daemon::start();
    let name = canary();
    let abstracted = SocketAddr::from_abstract_name(&name).and_then(|name| UnixListener::bind_addr(&name));
    let abstracted = abstracted.expect("a name of our own");
    let hang_up = std::thread::spawn(move || {
        let (mut caller, _) = abstracted.accept().expect("the control");
        std::io::Read::read(&mut caller, &mut [0; 64]).expect("it said something")
    });
    let connected = || OwnedFd::from(UnixStream::connect(daemon.socket()).expect("it listens"));
    let words = |workspace: &Path| {
        [daemon.socket(), workspace.join("broker.sock"), name.clone().into()]
            .map(|word| word.display().to_string())
    };
    // A directory that shows the socket is lent by who owns it.
    let folder = daemon.folder.path();
    let mut attack = daemon.broker(0, &["exec", "--workspace", &folder.display().to_string()]);
    attack.args(["--", "python3", "-c", KNOCK]).args(words(Path::new("/workspace")));
    let lines = said(attack.stdin(connected()));
    assert_eq!(lines.len(), 5);
    assert_all("denied", &lines);
    let lines = said(python(ADA, KNOCK, &words(folder)).stdin(connected()));
    assert_eq!(lines.len(), 5);
    assert_all("open", &lines);
    assert_ne!(hang_up.join().expect("it was called"), 0);

    let peer = Peer::new(&daemon);
    let run = json!({ "policy": "default", "command": ["true"], "environment": [], "path": "/bin", "streams": { "input": 0 } });
    peer.send("Run", &run, false, &[connected().as_fd()]);
    assert_eq!(peer.reply().0["parameters"]["code"], "descriptor", "a connection is no stream");
    let (one, handle) = peer.provision(None);
    let (other, _held) = peer.provision(None);
    let verb =
        format!("{{\"method\":\"io.broker.Control.Kill\",\"parameters\":{{\"sandbox\":\"{other}\"}}}}\0");
    rustix::net::send(&handle, verb.as_bytes(), rustix::net::SendFlags::NOSIGNAL).expect("it is a socket");
    let lives = |id: &str| daemon.list(0).iter().any(|sandbox| sandbox["id"] == id);
    assert!(
        within(Duration::from_secs(5), || !lives(&one)),
        "who speaks where nobody listens ends their own"
    );
    assert!(lives(&other), "a handle is no control socket");
    let mut heard = [0; 64];
    let got = rustix::net::recv(&handle, &mut heard[..], rustix::net::RecvFlags::DONTWAIT);
    assert!(!got.is_ok_and(|(count, _)| count > 0), "it was answered");
}

/// CB-05. What was sent once does nothing more when it is sent again, and names of others' are worth nothing.
#[test]
fn cb_05_a_frame_is_worth_what_its_channel_is() {
    let (daemon, foreign) = (Daemon::start(), Daemon::start());
    let own = folder_of(0);
    let count = || fs::read_to_string(own.path().join("count")).unwrap_or_default().len();
    let (peer, again, stranger) = (Peer::new(&daemon), Peer::new(&daemon), Peer::new(&foreign));
    let (id, handle) = peer.provision(Some(own.path()));
    let script = "printf x >> count";
    let (first, _) = peer.execute(&handle, "once", script);
    // The same frame on the same connection, on another, and with other words under the same name.
    assert_eq!(peer.execute(&handle, "once", script).0, first);
    assert_eq!(again.execute(&handle, "once", script).0, first);
    assert_eq!(again.execute(&handle, "once", "printf yyy >> count").0, first);
    assert_eq!(count(), 1, "an effect happened again");
    // The control: under a new name the frame does what it says; a captured one without its descriptors is nothing.
    assert_eq!(again.execute(&handle, "twice", script).0["state"], "finished");
    assert_eq!(count(), 2);
    let bare = json!({ "handle": 0, "effect": "bare", "command": ["true"], "environment": [], "path": "/bin", "streams": {} });
    again.send("Execute", &bare, false, &[]);
    assert_eq!(again.reply().0["parameters"]["code"], "descriptor");
    // Another daemon's handle, here and there.
    let (other, others) = stranger.provision(None);
    for (peer, handle) in [(&peer, &others), (&stranger, &handle)] {
        assert_eq!(peer.execute(handle, "new", script).0["error"], "io.broker.Control.NoSuchHandle");
    }
    // Names: of another daemon's sandbox, and of another user's.
    let mut run = sleeping(&daemon, ADA, &canary());
    let ada = daemon.list(ADA)[0]["id"].as_str().expect("a name").to_owned();
    for (uid, id) in [(0, &other), (EVE, &id), (EVE, &ada), (ADA, &id)] {
        let output = daemon.broker(uid, &["kill", id]).output().expect("it runs");
        assert!(text(&output.stderr).contains("no sandbox"), "{uid}: {}", text(&output.stderr));
    }
    assert_eq!(daemon.list(0).len(), 2);
    // After its end, and after another sandbox has taken its place.
    assert!(daemon.broker(0, &["kill", &id]).status().expect("it runs").success());
    assert!(within(Duration::from_secs(5), || daemon.list(0).len() == 1));
    let (_, new) = peer.provision(Some(own.path()));
    assert_eq!(peer.execute(&handle, "once", script).0["error"], "io.broker.Control.NoSuchHandle");
    assert_eq!(peer.execute(&handle, "late", script).0["error"], "io.broker.Control.NoSuchHandle");
    assert_eq!(peer.execute(&new, "once", script).0["state"], "finished", "another's effects are its own");
    assert_eq!(count(), 3);
    let of_effect =
        |kind: &str| daemon.records().iter().filter(|record| record["event"]["kind"] == kind).count();
    let known = || (of_effect("execute"), of_effect("executed")) == (3, 3);
    assert!(within(Duration::from_secs(2), known), "the record knows what happened");
    run.kill().expect("it lives");
    run.wait().expect("it is reaped");
}

/// Connects as Eve, and goes on as the grandchild of the process that did, whose number belongs to a process of Ada's meanwhile.
const RECYCLED: &str = "
import json, os, socket, struct, sys, time
server, eve, ada = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
naive = socket.socket(socket.AF_UNIX); naive.bind('\\0' + sys.argv[4]); naive.listen()
go, went = os.pipe()
def child(uid, work):
    pid = os.fork()
    if pid == 0:
        os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
        work()
        os._exit(0)
    return pid
def connector():
    real, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    real.connect(server); other.connect('\\0' + sys.argv[4])
    if os.fork(): os._exit(0)
    os.setsid(); os.read(go, 1)
    call = {'method': 'io.broker.Control.Run', 'parameters': {'policy': 'default', 'command': ['true', sys.argv[4]],
        'environment': [], 'path': '/bin', 'streams': {}}}
    real.sendall(json.dumps(call).encode() + b'\\0')
    print(real.recv(4000).decode(), flush=True)
first = child(eve, connector)
os.waitpid(first, 0)
# Until the number comes up again; other processes of this machine take some meanwhile.
for turn in range(500):
    open('/proc/sys/kernel/ns_last_pid', 'w').write(str(first - 1))
    again = child(ada, lambda: time.sleep(60))
    if again == first: break
    os.kill(again, 9); os.waitpid(again, 0)
peer = struct.unpack('iII', naive.accept()[0].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
def owner(): return next(line.split()[1] for line in open(f'/proc/{peer}/status') if line.startswith('Uid:'))
while again == first and owner() != str(ada): time.sleep(0.01)
print('naive', owner(), flush=True)
os.write(went, b'x')
time.sleep(0.5)
os.kill(again, 9)
";

/// CB-12. Who asked is who connected, whatever has become of that process; and of two at a time each is named right.
#[test]
fn cb_12_each_act_is_recorded_of_who_acted() {
    let daemon = Daemon::start();
    let (recycled, tokens) = (canary(), [canary(), canary()]);
    let words = [daemon.socket().display().to_string(), EVE.to_string(), ADA.to_string(), recycled];
    let lines = said(&mut python(0, RECYCLED, &words));
    // The control: by its number, who asks is Ada.
    assert!(lines.contains(&format!("naive {ADA}")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("policy-not-granted")), "{lines:?}");
    let denied = daemon.records();
    assert_eq!(
        (denied.len(), &denied[0]["event"]["kind"], &denied[0]["event"]["uid"]),
        (1, &json!("deny"), &json!(EVE))
    );

    std::thread::scope(|scope| {
        for (uid, token) in [(ADA, &tokens[0]), (0, &tokens[1])] {
            let daemon = &daemon;
            scope.spawn(move || {
                for _ in 0..10 {
                    assert!(daemon.exec(uid, &[], &["sh", "-c", ":", token]).status.success());
                }
            });
        }
    });
    // In one sandbox too: made by root, used by two to whom its handle was given.
    let peer = Peer::new(&daemon);
    let (id, handle) = peer.provision(None);
    for uid in [ADA, EVE] {
        let mut command = python(uid, EXECUTE, &[words[0].clone(), format!("by {uid}")]);
        let lines = said(command.stdin(handle.try_clone().expect("a copy")));
        assert!(lines[0].contains("finished"), "{lines:?}");
    }
    let records = daemon.records();
    let by = |uid: u32, token: &str| {
        let of =
            |event: &&Value| event["kind"] == "start" && event["command"][3] == token && event["uid"] == uid;
        records.iter().map(|record| &record["event"]).filter(of).count()
    };
    assert_eq!(
        [by(ADA, &tokens[0]), by(0, &tokens[1]), by(0, &tokens[0]), by(ADA, &tokens[1])],
        [10, 10, 0, 0]
    );
    for uid in [ADA, EVE] {
        let acted = json!({ "kind": "execute", "uid": uid, "sandbox": id, "effect": format!("by {uid}") });
        let is = |event: &Value| {
            acted.as_object().expect("fields").iter().all(|(key, value)| event[key] == *value)
        };
        assert_eq!(records.iter().filter(|record| is(&record["event"])).count(), 1, "{uid}");
    }
}

/// Executes in the sandbox whose handle is standard input.
const EXECUTE: &str = "
import array, json, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
call = {'method': 'io.broker.Control.Execute', 'parameters': {'handle': 0, 'effect': sys.argv[2], 'command': ['true'],
    'environment': [], 'path': '/bin', 'streams': {}}}
s.sendmsg([json.dumps(call).encode() + b'\\0'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])
print(s.recv(4000).decode())
";
