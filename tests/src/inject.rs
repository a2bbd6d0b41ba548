//! Makes single system calls of a process tree fail, or pretend to have worked, from outside (ptrace(2)): faults and
//! missing layers without a line of the product that knows of tests.

use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// One system call about to be made.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Which process of the tree makes it: 0 is the first.
    pub process: usize,
    /// How many calls that process has made before.
    pub ordinal: usize,
    /// The number.
    pub number: i64,
    /// The arguments.
    pub arguments: [u64; 6],
    /// For clone3(2), the flags that its first argument points to.
    pub clone_flags: Option<u64>,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is made.
    Pass,
    /// It is not made, and seems to have returned this.
    Return(i64),
    /// It is made with another value in the argument of this index.
    Argument(usize, u64),
    /// clone3(2) is made with these flags.
    CloneFlags(u64),
}

/// What is known of a traced process.
struct Traced {
    process: usize,
    calls: usize,
    inside: bool,
    result: Option<i64>,
}

/// Runs `command` with `decide` asked before every system call of it and its descendants.
pub fn run(command: &mut Command, mut decide: impl FnMut(&Call) -> Verdict) -> ExitStatus {
    // The shell stops itself, so that nothing of the program runs untraced.
    let mut stopped = Command::new("sh");
    stopped.arg("-c").arg("kill -STOP $$; exec \"$@\"").arg("sh").arg(command.get_program());
    stopped.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    stopped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(directory) = command.get_current_dir() {
        stopped.current_dir(directory);
    }
    stopped.process_group(0);
    // Reaped below, by waitpid(2) of everything: the tests that call this are the only ones of their binary.
    #[expect(clippy::zombie_processes, reason = "the tracer waits for the whole tree itself")]
    let child = stopped.spawn().expect("the shell starts");
    let root = Pid::from_raw(child.id().cast_signed());
    waitpid(root, Some(WaitPidFlag::WUNTRACED)).expect("the shell stops itself");
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(root, options).expect("the shell is traced");
    kill(root, Signal::SIGCONT).expect("the shell goes on");
    let done = Arc::new(AtomicBool::new(false));
    let watchdog = watch(root, Arc::clone(&done));
    let status = Tracer { root, seen: HashMap::new(), order: 0, executed: false }.follow(&mut decide);
    done.store(true, Ordering::Relaxed);
    assert!(!watchdog.join().expect("the watchdog ends"), "the run did not end within {HANG_SECONDS} s");
    status
}

/// After this a run hangs.
const HANG_SECONDS: u64 = 20;

/// Kills the run when it hangs; says whether it had to.
fn watch(root: Pid, done: Arc<AtomicBool>) -> std::thread::JoinHandle<bool> {
    std::thread::spawn(move || {
        for _ in 0..HANG_SECONDS * 100 {
            if done.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        kill(root, Signal::SIGKILL).is_ok()
    })
}

struct Tracer {
    root: Pid,
    seen: HashMap<Pid, Traced>,
    order: usize,
    executed: bool,
}

impl Tracer {
    fn follow(mut self, decide: &mut impl FnMut(&Call) -> Verdict) -> ExitStatus {
        use std::os::unix::process::ExitStatusExt;
        loop {
            let status = waitpid(None, Some(WaitPidFlag::__WALL)).expect("something of the tree is left");
            match status {
                WaitStatus::Exited(pid, code) if pid == self.root => return ExitStatus::from_raw(code << 8),
                WaitStatus::Signaled(pid, signal, _) if pid == self.root => {
                    return ExitStatus::from_raw(signal as i32);
                }
                WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) => drop(self.seen.remove(&pid)),
                WaitStatus::PtraceSyscall(pid) => self.syscall(pid, decide),
                WaitStatus::PtraceEvent(pid, _, event) => {
                    if event == libc::PTRACE_EVENT_EXEC && pid == self.root {
                        // The shell has become the program: its calls count from here.
                        self.executed = true;
                        self.order = 0;
                        self.seen.insert(pid, Traced { process: 0, calls: 0, inside: true, result: None });
                    }
                    go_on(pid, None);
                }
                WaitStatus::Stopped(pid, Signal::SIGTRAP | Signal::SIGSTOP | Signal::SIGCONT) => {
                    go_on(pid, None)
                }
                WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal)),
                _ => {}
            }
        }
    }

    fn syscall(&mut self, pid: Pid, decide: &mut impl FnMut(&Call) -> Verdict) {
        // The process may have been killed since it stopped.
        let Ok(mut registers) = ptrace::getregs(pid) else { return };
        let order = &mut self.order;
        let traced = self.seen.entry(pid).or_insert_with(|| {
            *order += 1;
            Traced { process: *order, calls: 0, inside: false, result: None }
        });
        traced.inside = !traced.inside;
        if !traced.inside {
            if let Some(result) = traced.result.take() {
                registers.rax = result.cast_unsigned();
                let _ = ptrace::setregs(pid, registers);
            }
            return go_on(pid, None);
        }
        if !self.executed {
            return go_on(pid, None);
        }
        let arguments =
            [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9];
        let number = registers.orig_rax.cast_signed();
        let clone_flags = if number == libc::SYS_clone3 {
            ptrace::read(pid, registers.rdi as ptrace::AddressType).ok().map(i64::cast_unsigned)
        } else {
            None
        };
        let call = Call { process: traced.process, ordinal: traced.calls, number, arguments, clone_flags };
        traced.calls += 1;
        match decide(&call) {
            Verdict::Pass => {}
            Verdict::Return(result) => {
                traced.result = Some(result);
                registers.orig_rax = u64::MAX;
                let _ = ptrace::setregs(pid, registers);
            }
            Verdict::Argument(index, value) => {
                match index {
                    0 => registers.rdi = value,
                    1 => registers.rsi = value,
                    _ => registers.rdx = value,
                }
                let _ = ptrace::setregs(pid, registers);
            }
            Verdict::CloneFlags(flags) => {
                let _ = ptrace::write(pid, registers.rdi as ptrace::AddressType, flags.cast_signed());
            }
        }
        go_on(pid, None);
    }
}

fn go_on(pid: Pid, signal: Option<Signal>) {
    // ESRCH: it was killed meanwhile, and its end comes as the next event.
    let _ = ptrace::syscall(pid, signal);
}
