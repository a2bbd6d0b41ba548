//! How a sandbox is brought to a stage of its life and kept there: by ptrace(2) and SIGSTOP, from outside.

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::{FlockOperation, flock};

use super::super::rows::python;
use super::*;

/// What keeps a stage from going by.
pub enum Hold {
    Nothing,
    /// Threads that this one traces.
    Traced(Vec<Pid>),
    /// By SIGSTOP.
    Stopped(Pid),
}

impl Hold {
    pub fn release(&self) {
        match self {
            Hold::Nothing => {}
            Hold::Stopped(process) => drop(kill(*process, Signal::SIGCONT)),
            // Of what was killed meanwhile the tracer hears the end, and only then its parent.
            Hold::Traced(threads) => {
                for thread in threads {
                    if ptrace::detach(*thread, None).is_err() {
                        let _ = waitpid(*thread, Some(WaitPidFlag::__WALL));
                    }
                }
            }
        }
    }
}

/// The next stop of a traced thread.
fn stop_of(thread: Pid) {
    let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
    let stopped = || !matches!(waitpid(thread, Some(flags)).expect("it is traced"), WaitStatus::StillAlive);
    assert!(within(Duration::from_secs(10), stopped), "{thread} does not stop");
}

/// Stops every thread of the core but the first: the record is not written then, and peers are heard.
fn hold_the_record(core: i32) -> Hold {
    let tasks = fs::read_dir(format!("/proc/{core}/task")).expect("it lives").flatten();
    let threads =
        tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).filter(|thread| *thread != core);
    let threads: Vec<Pid> = threads.map(Pid::from_raw).collect();
    for thread in &threads {
        ptrace::seize(*thread, Options::empty()).and_then(|()| ptrace::interrupt(*thread)).expect("root may");
        stop_of(*thread);
    }
    Hold::Traced(threads)
}

/// Stops the next init at its birth: the launcher's next child is followed to its own.
fn hold_the_next_init(launcher: Pid, start: impl FnOnce() -> Process) -> (Process, Hold) {
    let births = Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACEVFORK;
    let child_of = |parent: Pid| {
        stop_of(parent);
        let child = ptrace::getevent(parent).expect("a birth");
        ptrace::detach(parent, None).expect("it has stopped");
        let child = Pid::from_raw(i32::try_from(child).expect("a number"));
        stop_of(child);
        child
    };
    ptrace::seize(launcher, births).expect("root may");
    let caller = start();
    let supervisor = child_of(launcher);
    ptrace::cont(supervisor, None).expect("it has stopped");
    let init = child_of(supervisor);
    (caller, Hold::Traced(vec![init]))
}

/// A sandbox of Ada's at one stage of its life.
pub struct Scene {
    pub caller: Process,
    pub token: String,
    pub core: i32,
    supervisor: Option<i32>,
    init: Option<i32>,
    /// The network namespace of init, and the slot that its supervisor has locked.
    namespace: Option<PathBuf>,
    slot: Option<String>,
    pub hold: Hold,
}

impl Scene {
    pub fn reach(daemon: &Daemon, stage: Stage) -> Scene {
        let (token, core) = (canary(), daemon.role("core").expect("there is a core"));
        let others: BTreeSet<i32> = children(daemon.process.id()).into_iter().collect();
        let (known, recorded) = (ids(daemon), daemon.records().len());
        let run = || {
            let mut command = daemon.broker(ADA, &["exec"]);
            command.args(["--", "sh", "-c", "sleep 600; :", &token]).stderr(Stdio::null());
            Process(command.spawn().expect("it starts"))
        };
        let (caller, hold) = match stage {
            Stage::Asked => {
                let hold = hold_the_record(core);
                (run(), hold)
            }
            Stage::Starting => hold_the_next_init(Pid::from_raw(daemon.process.id().cast_signed()), run),
            Stage::Running | Stage::Ending => (run(), Hold::Nothing),
            Stage::Idle => (live(daemon, ""), Hold::Nothing),
            Stage::Executing => (live(daemon, &token), Hold::Nothing),
        };
        let is_known = || ids(daemon).len() > known.len();
        assert!(within(Duration::from_secs(5), is_known), "{stage:?} is not reached: {}", daemon.log());
        let runs = matches!(stage, Stage::Running | Stage::Executing | Stage::Ending);
        assert!(!runs || within(Duration::from_secs(5), || inside(&token) > 0), "{stage:?} is not reached");
        assert_eq!(daemon.records().len() == recorded, stage == Stage::Asked, "{stage:?}: what is recorded");
        let supervisor = children(daemon.process.id()).into_iter().find(|pid| !others.contains(pid));
        let init = supervisor.and_then(|pid| children(pid.cast_unsigned()).first().copied());
        let mut scene = Scene {
            caller,
            token,
            core,
            supervisor,
            init,
            namespace: init.and_then(|pid| fs::read_link(format!("/proc/{pid}/ns/net")).ok()),
            slot: supervisor.and_then(slot_of),
            hold,
        };
        assert_eq!(inside(&scene.token) > 0, runs, "{stage:?}: whether it runs");
        if stage == Stage::Ending {
            let id = ids(daemon).into_iter().find(|id| !known.contains(id)).expect("its name");
            scene.tell_to_end(daemon, &id);
        }
        scene
    }

    fn tell_to_end(&mut self, daemon: &Daemon, id: &str) {
        let supervisor = self.supervisor.expect("it has one");
        kill(Pid::from_raw(supervisor), Signal::SIGSTOP).expect("it lives");
        assert!(daemon.broker(ADA, &["kill", id]).status().expect("it runs").success());
        let is_told = || {
            let status = fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap_or_default();
            let pending = u64::from_str_radix(broker_tests::field(&status, "ShdPnd"), 16).expect("a set");
            pending & (1 << (libc::SIGALRM - 1)) != 0
                && broker_tests::field(&status, "State").starts_with('T')
        };
        assert!(within(Duration::from_secs(5), is_told), "it is not told to end");
        self.hold = Hold::Stopped(Pid::from_raw(supervisor));
    }

    pub fn kill(&mut self, daemon: &mut Daemon, victim: Victim) {
        let pid = match victim {
            Victim::Core => Some(self.core),
            Victim::Launcher => Some(daemon.process.id().cast_signed()),
            Victim::Supervisor => self.supervisor,
            Victim::Init => self.init,
            Victim::Caller => Some(self.caller.0.id().cast_signed()),
        };
        let pid = pid.expect("it is there at this stage");
        assert!(is_alive(pid), "{victim:?} has gone before");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
        match victim {
            Victim::Launcher => drop(daemon.process.wait().expect("it is reaped")),
            Victim::Caller => self.caller.end(),
            _ => {}
        }
    }

    /// No process of it is left, nobody is in its namespaces, and the daemon, where there is one, knows it no more.
    pub fn is_over(&self, daemon: &Daemon) -> bool {
        let processes = [self.supervisor, self.init].into_iter().flatten().any(is_alive);
        let namespace = self.namespace.as_ref().is_some_and(|own| {
            let all = fs::read_dir("/proc").expect("it is there").flatten();
            all.map(|entry| entry.path().join("ns/net"))
                .any(|one| fs::read_link(one).is_ok_and(|one| one == *own))
        });
        // Where no daemon answers nobody knows of anything.
        let listed = daemon.broker(ADA, &["ps", "--json"]).output().expect("it runs").stdout;
        let known = !listed.is_empty() && listed != b"[]\n";
        !processes && !namespace && !known && inside(&self.token) == 0
    }

    /// Whether there is a control group of a slot that nobody has.
    pub fn has_group(&self) -> bool {
        let Some(slot) = &self.slot else { return false };
        let lock = fs::File::open(Path::new("/run/broker/slots").join(slot)).expect("it was locked");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            && ["memory", "pids", "cpu", ""].iter().any(|controller| {
                Path::new("/sys/fs/cgroup").join(controller).join("broker").join(slot).exists()
            })
    }
}

fn is_alive(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !broker_tests::field(&status, "State").starts_with('Z')
}

/// The number of the slot that a supervisor holds.
fn slot_of(supervisor: i32) -> Option<String> {
    let open = fs::read_dir(format!("/proc/{supervisor}/fd")).ok()?.flatten();
    let paths = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let slot = paths
        .filter(|path| path.starts_with("/run/broker/slots"))
        .find_map(|path| Some(path.file_name()?.to_owned()));
    slot.and_then(|name| name.into_string().ok())
}

/// A process of Ada's that holds the handle of a sandbox and, with a token, waits for a command in it.
fn live(daemon: &Daemon, token: &str) -> Process {
    let words = [daemon.socket().display().to_string(), token.to_owned()];
    let mut command = python(ADA, LIVE, &words);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("python3 runs");
    let out = child.stdout.take().expect("a pipe");
    std::io::Read::read_exact(&mut { out }, &mut [0; 6]).expect("it is ready");
    Process(child)
}

const LIVE: &str = "
import array, json, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
common = {'environment': [], 'path': '/bin'}
def call(method, parameters, given):
    message = json.dumps({'method': 'io.broker.Control.' + method, 'parameters': common | parameters}).encode() + b'\\0'
    s.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', given))] if given else [])
call('Provision', {'policy': 'default'}, [])
handle = array.array('i', s.recvmsg(4000, 100)[1][0][2])[0]
if sys.argv[2]:
    words = ['sh', '-c', 'sleep 600; :', sys.argv[2]]
    call('Execute', {'handle': 0, 'effect': 'e', 'command': words, 'streams': {}}, [handle])
print('ready', flush=True)
time.sleep(600)
";
