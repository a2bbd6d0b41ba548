//! Peers that take as much as they can get: it is their own share, and others are served.

use std::io::{Read, Write};

use super::hostile::{descriptors, resident};
use super::*;

/// CB-15. Whoever is slow, deaf, half gone or restless costs only themselves: one uid's share is 64, and others are served.
#[test]
fn cb_15_the_slow_cost_only_themselves() {
    let daemon = Daemon::start();
    let before = (descriptors(&daemon), resident(&daemon));
    for way in ["slow", "deaf", "half", "flood"] {
        // As Eve, from a process of hers.
        let slow = nuisance(&daemon.socket(), way);
        for _ in 0..3 {
            assert!(daemon.exec(ADA, &[], &["true"]).status.success(), "{way}: {}", daemon.log());
        }
        assert!(daemon.list(ADA).is_empty());
        let (held, grown) = (descriptors(&daemon), resident(&daemon).saturating_sub(before.1));
        assert!(held < before.0 + 64 + 10, "{way}: {held} descriptors");
        assert!(grown < 8192, "{way}: {grown} pages more");
        drop(slow);
        assert!(within(Duration::from_secs(10), || descriptors(&daemon) <= before.0), "{way}");
    }
    // The control: where one is served after the other, the first slow one is in everybody's way.
    let own = folder_of(EVE);
    let naive = own.path().join("naive.sock");
    let listener = std::os::unix::net::UnixListener::bind(&naive).expect("a socket");
    set_mode(&naive, 0o666);
    std::thread::spawn(move || {
        for caller in listener.incoming().flatten() {
            let mut message = std::io::BufReader::new(&caller);
            let _ = std::io::BufRead::read_until(&mut message, 0, &mut Vec::new());
            let _ = (&caller).write_all(b"served");
        }
    });
    let served = || {
        let mut stream = UnixStream::connect(&naive).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_millis(500))).expect("a limit");
        stream.write_all(b"\0").is_ok() && stream.read(&mut [0; 6]).is_ok_and(|length| length == 6)
    };
    assert!(served());
    let _slow = nuisance(&naive, "slow");
    assert!(!served(), "the control");
}

/// Ended when it is dropped.
struct Nuisance(Child);

impl Drop for Nuisance {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nuisance(socket: &Path, way: &str) -> Nuisance {
    let mut slow = Command::new("python3");
    slow.args(["-c", NUISANCE]).arg(socket).arg(way).uid(EVE).gid(EVE).stdout(Stdio::piped());
    let mut slow = slow.spawn().expect("python3 runs");
    let mut line = [0; 6];
    slow.stdout.take().expect("a pipe").read_exact(&mut line).expect("it is ready");
    Nuisance(slow)
}

const NUISANCE: &str = "
import socket, sys, time
way = sys.argv[2]
describe = b'{\"method\":\"org.varlink.service.GetInterfaceDescription\",\"parameters\":{\"interface\":\"io.broker.Control\"}}\\0'
def one():
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(1)
    try:
        s.connect(sys.argv[1])
        s.setblocking(False)
        if way in ('slow', 'half'): s.send(b'{')
        if way == 'half': s.shutdown(socket.SHUT_WR)
        while way == 'deaf': s.send(describe)
    except OSError: pass
    return s
held = [one() for number in range(100 if sys.argv[1].endswith('naive.sock') else 200)]
print('ready', flush=True)
while True:
    if way == 'flood':
        for number in range(100): one().close()
        continue
    time.sleep(1)
    for s in held:
        try: s.send(b' ')
        except OSError: pass
";

/// Those whom the configuration gives nothing, however many they are, leave room for those whom it names.
#[test]
fn strangers_shut_nobody_out() {
    let daemon = Daemon::start();
    let script = "
import os, socket, sys, time
held = []
for uid in range(54400, 54432):
    os.setresuid(uid, uid, 0)
    for _ in range(64):
        s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); held.append(s)
    os.setresuid(0, 0, 0)
print('held', flush=True); time.sleep(60)";
    let mut python = Command::new("python3");
    python.args(["-c", script]).arg(daemon.socket()).stdout(Stdio::piped());
    let mut strangers = python.spawn().expect("python3 runs");
    let mut begun = [0; 5];
    strangers.stdout.take().expect("a pipe").read_exact(&mut begun).expect("they connect");
    let output = daemon.exec(ADA, &[], &["true"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    strangers.kill().expect("it lives");
    strangers.wait().expect("it ends");
}
