//! Sandboxes that live: handles, commands, effects, what ends them.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::json;

use super::*;

/// A caller of the interface itself, as any program could write one.
pub struct Peer(pub UnixStream);

impl From<OwnedFd> for Peer {
    fn from(descriptor: OwnedFd) -> Peer {
        Peer::on(UnixStream::from(descriptor))
    }
}

impl Peer {
    pub fn new(daemon: &Daemon) -> Peer {
        Peer::on(UnixStream::connect(daemon.socket()).expect("it listens"))
    }

    fn on(stream: UnixStream) -> Peer {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
        Peer(stream)
    }

    pub fn send(&self, method: &str, parameters: &Value, more: bool, descriptors: &[BorrowedFd<'_>]) {
        let call = json!({ "method": format!("io.broker.Control.{method}"), "parameters": parameters, "more": more });
        let bytes = format!("{call}\0");
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let parts = [IoSlice::new(bytes.as_bytes())];
        sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL).expect("it listens");
    }

    pub fn reply(&self) -> (Value, Vec<OwnedFd>) {
        let (mut said, mut descriptors) = (Vec::new(), Vec::new());
        while said.last() != Some(&0) {
            let mut byte = [0];
            let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let parts = &mut [IoSliceMut::new(&mut byte)];
            let got = recvmsg(&self.0, parts, &mut control, RecvFlags::CMSG_CLOEXEC).expect("an answer");
            assert_ne!(got.bytes, 0, "it went away: {}", text(&said));
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(got) = message {
                    descriptors.extend(got);
                }
            }
            said.push(byte[0]);
        }
        said.pop();
        (serde_json::from_slice(&said).expect("JSON"), descriptors)
    }

    pub fn provision(&self, workspace: Option<&Path>) -> (String, OwnedFd) {
        self.provision_as(workspace, "rw")
    }

    pub fn provision_as(&self, workspace: Option<&Path>, mode: &str) -> (String, OwnedFd) {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let open = |path: &Path| rustix::fs::open(path, flags, rustix::fs::Mode::empty());
        let directory = workspace.map(|path| open(path).expect("it is there"));
        let mut parameters = json!({ "policy": "default", "environment": [], "path": "/usr/bin:/bin" });
        if let Some(path) = workspace {
            parameters["workspace"] = json!({ "descriptor": 0, "name": path, "mode": mode });
        }
        let given: Vec<_> = directory.iter().map(AsFd::as_fd).collect();
        self.send("Provision", &parameters, false, &given);
        let (reply, mut descriptors) = self.reply();
        assert_eq!((descriptors.len(), &reply["parameters"]["handle"]), (1, &json!(0)), "{reply}");
        let id = reply["parameters"]["sandbox"].as_str().expect("a name").to_owned();
        (id, descriptors.remove(0))
    }

    /// Asks for a command; the end of its output.
    pub fn ask(&self, handle: &OwnedFd, effect: &str, script: &str) -> std::io::PipeReader {
        let (out, into) = std::io::pipe().expect("a pipe");
        let parameters = json!({
            "handle": 0, "effect": effect, "command": ["sh", "-c", script], "environment": [],
            "path": "/usr/bin:/bin", "streams": { "output": 1 },
        });
        self.send("Execute", &parameters, false, &[handle.as_fd(), into.as_fd()]);
        out
    }

    /// A command, its reply and its output.
    pub fn execute(&self, handle: &OwnedFd, effect: &str, script: &str) -> (Value, String) {
        let mut out = self.ask(handle, effect, script);
        let reply = self.reply().0;
        let mut said = String::new();
        if reply["error"].is_null() {
            out.read_to_string(&mut said).expect("its output");
        }
        (
            reply["parameters"].clone().as_object_mut().map_or(Value::Null, |parameters| {
                if let Some(error) = reply["error"].as_str() {
                    parameters.insert("error".into(), error.into());
                }
                Value::Object(parameters.clone())
            }),
            said,
        )
    }
}

#[test]
fn commands_share_a_sandbox_and_its_files() {
    let daemon = Daemon::start();
    let own = folder_of(0);
    let peer = Peer::new(&daemon);
    let (id, handle) = peer.provision(Some(own.path()));
    let (reply, _) = peer.execute(
        &handle,
        "one",
        "echo kept > /tmp/file; echo out > result; sleep 300 > /dev/null & exit 3",
    );
    assert_eq!(
        reply,
        json!({ "sandbox": id, "state": "finished", "outcome": { "kind": "exited", "code": 3 } })
    );
    assert_eq!(fs::read_to_string(own.path().join("result")).expect("it was written"), "out\n");
    let (reply, said) = peer.execute(&handle, "two", "cat /tmp/file; pgrep -c sleep; kill -9 $$");
    assert_eq!(reply["outcome"], json!({ "kind": "signaled", "signal": 9 }));
    assert_eq!(said, "kept\n1\n", "the same files, the same processes");
    let (reply, _) = peer.execute(&handle, "three", "exec /no/such");
    assert_eq!(reply["outcome"]["code"], 127);
    assert_eq!(daemon.list(0).len(), 1);
    drop(handle);
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()), "its last handle is closed");
    let kinds: Vec<_> = daemon
        .records()
        .iter()
        .map(|record| record["event"]["kind"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(
        kinds,
        ["provision", "execute", "executed", "execute", "executed", "execute", "executed", "end"]
    );
    assert!(daemon.audit("verify").status.success());
}

/// The handle is the right: a process that was given it goes on where its giver ended, as another user too. What is not the
/// descriptor (its number, a copy of its name, another socket) is worth nothing.
#[test]
fn a_handle_is_passed_on_and_outlives_its_giver() {
    let daemon = Daemon::start();
    let giver = Peer::new(&daemon);
    let (id, handle) = giver.provision(None);
    giver.execute(&handle, "one", "echo from the giver > /tmp/file");
    // Process B, without any right in the configuration, gets it as its standard input.
    let script = "
import array, json, socket, sys
handle = socket.socket(fileno=0)
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
import os
read, write = os.pipe()
call = {'method': 'io.broker.Control.Execute', 'parameters': {'handle': 0, 'effect': 'two', 'command': ['cat', '/tmp/file'],
    'environment': [], 'path': '/bin', 'streams': { 'output': 1 }}}
def ask(first):
    s.sendmsg([json.dumps(call).encode() + b'\\0'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [first, write]))])
    return s.recv(4000).decode()
lone, (one, other) = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
print(ask(lone.fileno()))
print(ask(one.fileno()))
print(ask(os.open('/dev/null', os.O_RDWR)))
print(ask(handle.fileno()))
print(os.read(read, 100).decode())
";
    let mut receiver = Command::new("python3");
    receiver.args(["-c", script]).arg(daemon.socket()).uid(EVE).gid(EVE);
    receiver.stdin(handle).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = receiver.spawn().expect("python3 runs");
    drop(receiver);
    // The giver is gone, and its copy of the handle with it.
    drop(giver);
    let output = child.wait_with_output().expect("it ends");
    let said = text(&output.stdout);
    assert_eq!(said.matches("NoSuchHandle").count(), 3, "{said} {}", text(&output.stderr));
    assert!(said.contains("finished") && said.contains("from the giver"), "{said} {}", text(&output.stderr));
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()), "{id} ends with the last copy");
}

/// Asking again under the same name starts nothing: while it runs, when it has ended, and by another core.
#[test]
fn an_effect_happens_once() {
    let daemon = Daemon::start();
    let own = folder_of(0);
    let (peer, again) = (Peer::new(&daemon), Peer::new(&daemon));
    let (_, handle) = peer.provision(Some(own.path()));
    let script = "echo x >> count; until [ -e go ]; do sleep 0.02; done; exit 4";
    let _out = peer.ask(&handle, "once", script);
    assert!(within(Duration::from_secs(5), || own.path().join("count").exists()));
    let running = again.execute(&handle, "once", script).0;
    assert_eq!((&running["state"], &running["outcome"]), (&json!("running"), &Value::Null), "{running}");
    // The sandbox, its command and the handle live on.
    daemon.kill_core();
    let later = Peer::new(&daemon);
    let known = || later.execute(&handle, "once", script).0;
    assert!(within(Duration::from_secs(2), || known()["state"] == "running"), "{}", known());
    let mut go = fs::File::create(own.path().join("go")).expect("a file");
    go.write_all(b"now").expect("it is written");
    assert!(within(Duration::from_secs(5), || known()["outcome"]["code"] == 4), "{}", known());
    assert_eq!(
        fs::read_to_string(own.path().join("count")).expect("it counts"),
        "x\n",
        "it ran more than once"
    );
    assert_eq!(
        later.execute(&handle, "other", "echo y >> count").0["outcome"]["code"],
        0,
        "the sandbox goes on"
    );
    drop(handle);
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()));
}

#[test]
fn a_deadline_ends_one_command_and_not_its_sandbox() {
    let daemon = Daemon::start();
    let peer = Peer::new(&daemon);
    let parameters = json!({ "policy": "default", "environment": [{ "name": "WHERE", "value": "everywhere" }], "path": "/bin", "limits": { "timeout": "300ms" } });
    peer.send("Provision", &parameters, false, &[]);
    let handle = peer.reply().1.remove(0);
    let (reply, _) = peer.execute(&handle, "one", "trap '' TERM; sleep 60 & while :; do wait; done");
    assert_eq!(reply["outcome"]["kind"], "timed_out", "{reply}");
    assert_eq!(peer.execute(&handle, "two", "echo $WHERE").1, "everywhere\n");
}

#[test]
fn many_commands_run_side_by_side() {
    let daemon = Daemon::start();
    let peers: Vec<Peer> = (0..8).map(|_| Peer::new(&daemon)).collect();
    let (_, handle) = peers[0].provision(None);
    let outs: Vec<_> = (0..8)
        .map(|at| peers[at].ask(&handle, &format!("e{at}"), &format!("sleep 0.2; echo {at}; exit {at}")))
        .collect();
    for (at, mut out) in outs.into_iter().enumerate() {
        let reply = peers[at].reply().0;
        assert_eq!(reply["parameters"]["outcome"]["code"], at, "{reply}");
        let mut said = String::new();
        out.read_to_string(&mut said).expect("its output");
        assert_eq!(said, format!("{at}\n"));
    }
}

/// Killing it ends the waiting too.
#[test]
fn whoever_waits_hears_of_the_end() {
    let daemon = Daemon::start();
    let peer = Peer::new(&daemon);
    let (id, handle) = peer.provision(None);
    let _out = peer.ask(&handle, "one", "sleep 600");
    assert!(within(Duration::from_secs(2), || daemon
        .records()
        .iter()
        .any(|record| record["event"]["kind"] == "execute")));
    assert!(daemon.broker(0, &["kill", &id]).status().expect("it runs").success());
    let reply = peer.reply().0;
    assert_eq!(reply["error"], "io.broker.Control.NotStarted", "{reply}");
    assert_eq!(peer.execute(&handle, "two", "true").0["error"], "io.broker.Control.NoSuchHandle");
}

/// What is too long to be begun has ended, and does not run for ever in the record.
#[test]
fn a_command_that_cannot_be_begun_is_finished() {
    let daemon = Daemon::start();
    let peer = Peer::new(&daemon);
    let (_, handle) = peer.provision(None);
    for turn in 0..2 {
        let (reply, _) = peer.execute(&handle, "long", &"x".repeat(200_000));
        assert_eq!(reply["state"], "finished", "turn {turn}: {reply}");
        assert_eq!(reply["outcome"]["kind"], "setup_failed", "turn {turn}: {reply}");
    }
    assert_eq!(peer.execute(&handle, "short", "echo here").1, "here\n");
    let ended = || daemon.records().iter().filter(|record| record["event"]["kind"] == "executed").count();
    assert!(within(Duration::from_secs(2), || ended() == 2), "{}", ended());
}

/// A core that is killed between an outcome and its record loses neither: whoever asks the next one is told.
#[test]
fn an_outcome_outlives_the_core_that_heard_of_it() {
    let daemon = Daemon::start();
    let own = folder_of(0);
    let peer = Peer::new(&daemon);
    let (_, handle) = peer.provision(Some(own.path()));
    let _out = peer.ask(&handle, "once", "echo x > begun; until [ -e go ]; do sleep 0.01; done; exit 4");
    assert!(within(Duration::from_secs(5), || own.path().join("begun").exists()));
    // Stopped, it hears nothing; the command ends meanwhile.
    let core = nix::unistd::Pid::from_raw(daemon.role("core").expect("there is a core"));
    nix::sys::signal::kill(core, nix::sys::signal::Signal::SIGSTOP).expect("it lives");
    fs::write(own.path().join("go"), "now").expect("it is written");
    std::thread::sleep(Duration::from_millis(300));
    daemon.kill_core();
    let later = Peer::new(&daemon);
    let known = || later.execute(&handle, "once", "exit 5").0["outcome"]["code"].clone();
    assert!(within(Duration::from_secs(2), || known() == 4), "{}", known());
    let ended = || daemon.records().iter().filter(|record| record["event"]["kind"] == "executed").count();
    assert!(within(Duration::from_secs(2), || ended() == 1), "{}", ended());
}
