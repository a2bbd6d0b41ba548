//! Peers that break the protocol, or try to take more than is theirs.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

fn connect(daemon: &Daemon) -> UnixStream {
    let stream = UnixStream::connect(daemon.socket()).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
    stream
}

/// What the daemon answers to raw bytes until it closes; the bytes may not all be taken.
fn answer(daemon: &Daemon, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(daemon);
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    said
}

pub fn descriptors(daemon: &Daemon) -> usize {
    let core = daemon.role("core").expect("there is a core");
    fs::read_dir(format!("/proc/{core}/fd")).expect("root may look").count()
}

/// CB-14. Each is dropped without an answer, and costs nobody else anything.
#[test]
fn what_is_no_message_ends_its_connection_alone() {
    let daemon = Daemon::start();
    let before = (daemon.role("core"), descriptors(&daemon));
    let deep =
        [b"{\"method\":\"io.broker.Control.Run\",\"parameters\":".as_slice(), &b"[".repeat(100_000), b"\0"]
            .concat();
    let long = b"x".repeat(3 << 20);
    let texts: Vec<Vec<u8>> = vec![
        b"\0".to_vec(),
        b"nonsense\0".to_vec(),
        b"{\"method\":\"io.broker.Control.List\",\"method\":\"io.broker.Control.Kill\"}\0".to_vec(),
        b"{\"method\":\"io.broker.Control.Kill\",\"parameters\":{\"sandbox\":\"a\",\"sandbox\":\"b\"}}\0"
            .to_vec(),
        b"{\"method\":\"io.broker.Control.Kill\",\"parameters\":{\"sandbox\":\"a\",\"extra\":1}}\0".to_vec(),
        b"{\"method\":\"io.broker.Control.Kill\",\"parameters\":{\"sandbox\":\"\xff\"}}\0".to_vec(),
        b"{\"method\":\"io.broker.Control.Kill\",\"parameters\":{\"sandbox\":1e400}}\0".to_vec(),
        b"{\"method\":\"io.broker.Control.List\"".to_vec(),
        deep,
        long,
    ];
    for bytes in &texts {
        let said = answer(&daemon, bytes);
        assert!(said.is_empty(), "{:?} got {:?}", text(&bytes[..bytes.len().min(60)]), text(&said));
    }
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..300 {
        let random: Vec<u8> = (0..200)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        answer(&daemon, &random);
    }
    // The control: a message is answered, also when it comes byte by byte.
    let mut stream = connect(&daemon);
    for byte in b"{\"method\":\"org.varlink.service.GetInfo\"}\0" {
        stream.write_all(&[*byte]).expect("it listens");
    }
    let mut said = [0; 400];
    let length = stream.read(&mut said).expect("an answer");
    assert!(text(&said[..length]).contains("io.broker.Control"), "{}", text(&said[..length]));
    drop(stream);
    assert!(
        within(Duration::from_secs(5), || daemon.role("core") == before.0
            && descriptors(&daemon) <= before.1),
        "the core is another, or holds what is not its own"
    );
    let breaches = daemon.records().iter().filter(|record| record["event"]["kind"] == "breach").count();
    assert!(breaches >= texts.len(), "{breaches} breaches recorded");
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = vec![MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// `BROKER-THREATS.md`, descriptors: too many on a message, one that no field names, one named twice, one that is no pipe.
#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let daemon = Daemon::start();
    let before = descriptors(&daemon);
    let null = fs::File::open("/dev/null").expect("it is there");
    let host = fs::File::open("/etc").expect("it is there");
    for _ in 0..20 {
        let stream = connect(&daemon);
        // Until the daemon has closed the connection.
        while send(&stream, b"{", &[null.as_fd(); 200]).is_ok() {}
    }
    let run = |streams: &str| {
        format!(
            "{{\"method\":\"io.broker.Control.Run\",\"parameters\":{{\"policy\":\"default\",\"command\":[\"true\"],\
             \"environment\":[],\"path\":\"/bin\",\"streams\":{streams}}}}}\0"
        )
    };
    for (streams, given) in [
        ("[null,null,null]", vec![null.as_fd()]),
        ("[0,null,null]", vec![]),
        ("[0,0,null]", vec![null.as_fd()]),
        ("[0,null,null]", vec![null.as_fd()]),
        ("[0,null,null]", vec![host.as_fd()]),
        ("[7,null,null]", vec![null.as_fd()]),
    ] {
        let mut stream = connect(&daemon);
        let message = run(streams);
        if given.is_empty() {
            stream.write_all(message.as_bytes()).expect("it listens");
        } else {
            send(&stream, message.as_bytes(), &given).expect("it listens");
        }
        let mut said = [0; 400];
        let length = stream.read(&mut said).expect("an answer");
        assert!(
            text(&said[..length]).contains("\"code\":\"descriptor\""),
            "{streams}: {}",
            text(&said[..length])
        );
    }
    assert!(
        within(Duration::from_secs(5), || descriptors(&daemon) <= before),
        "{} where there were {before}",
        descriptors(&daemon)
    );
    assert!(daemon.exec(ADA, &[], &["true"]).status.success(), "others are served");
}

/// CB-15. Two hundred who never finish their message, and who never read: one uid's share is 64, and others are served.
#[test]
fn the_slow_cost_only_themselves() {
    let daemon = Daemon::start();
    // As Eve, from a process of hers.
    let mut slow = Command::new("python3");
    slow.args(["-c", SLOW]).arg(daemon.socket()).uid(EVE).gid(EVE).stdout(Stdio::piped());
    let mut slow = slow.spawn().expect("python3 runs");
    let mut line = [0; 6];
    slow.stdout.take().expect("a pipe").read_exact(&mut line).expect("it is ready");
    for _ in 0..3 {
        assert!(daemon.exec(ADA, &[], &["true"]).status.success(), "{}", daemon.log());
    }
    let held = descriptors(&daemon);
    assert!(held < 64 + 20, "{held} descriptors");
    slow.kill().expect("it lives");
    slow.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(5), || descriptors(&daemon) < 20));
}

const SLOW: &str = "
import socket, sys, time
held = []
for number in range(200):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    try: s.send(b'{')
    except OSError: pass
    held.append(s)
print('ready', flush=True)
time.sleep(60)
";

/// CB-11. What a peer says of itself counts for nothing: the kernel's word at connect(2) does.
#[test]
fn credentials_that_a_peer_sends_are_not_looked_at() {
    let daemon = Daemon::start();
    let spoof = "
import socket, struct, sys, json
s = socket.socket(socket.AF_UNIX)
s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
s.connect(sys.argv[1])
call = json.dumps({'method': 'io.broker.Control.Run', 'parameters': {'policy': 'build', 'command': ['true'],
    'environment': [], 'path': '/bin', 'streams': [None, None, None]}}).encode() + b'\\0'
try:
    s.sendmsg([call], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack('iII', 1, 0, 0))])
    print('sent')
except PermissionError:
    print('EPERM')
    s.sendall(call)
print(s.recv(1000).decode())
";
    let mut command = Command::new("python3");
    let output =
        command.args(["-c", spoof]).arg(daemon.socket()).uid(EVE).gid(EVE).output().expect("python3 runs");
    let said = text(&output.stdout);
    assert!(
        said.starts_with("EPERM\n") && said.contains("policy-not-granted"),
        "{said} {}",
        text(&output.stderr)
    );
}

/// What speaks with peers has nothing that they could want.
#[test]
fn the_core_has_no_right_of_its_own() {
    let daemon = Daemon::start();
    let core = daemon.role("core").expect("it lives");
    let status = fs::read_to_string(format!("/proc/{core}/status")).expect("its status");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(broker_tests::field(&status, set).trim(), "0000000000000000", "{set}");
    }
    assert_eq!(broker_tests::field(&status, "NoNewPrivs").trim(), "1");
    assert!(!broker_tests::field(&status, "Uid").split_whitespace().any(|uid| uid == "0"));
}

/// close(2) of a socket that lingers takes as long as its sender says: it is waited for where nobody else waits.
#[test]
fn a_descriptor_that_is_slow_to_close_holds_nobody_up() {
    let daemon = Daemon::start();
    let linger = "
import array, json, socket, struct, sys, time
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()
c = socket.socket(); c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 6)); c.connect(l.getsockname())
c.setblocking(False)
try:
    while True: c.send(b'x' * 65536)
except BlockingIOError: pass
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendmsg([json.dumps({'method': 'org.varlink.service.GetInfo'}).encode() + b'\\0'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [c.fileno()]))])
# What SO_LINGER means only counts for the last copy, and only where close may block.
import os; os.close(c.fileno())
s.recv(1000); print('sent', flush=True); time.sleep(20)
";
    let mut command = Command::new("python3");
    let mut slow = command
        .args(["-c", linger])
        .arg(daemon.socket())
        .uid(EVE)
        .gid(EVE)
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    let mut line = [0; 4];
    slow.stdout.take().expect("a pipe").read_exact(&mut line).expect("it has sent");
    let start = std::time::Instant::now();
    assert!(daemon.list(ADA).is_empty());
    assert!(start.elapsed() < Duration::from_secs(3), "another caller waited {:?}", start.elapsed());
    slow.kill().expect("it lives");
    slow.wait().expect("it is reaped");
}
