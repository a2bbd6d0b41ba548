//! A gateway that is not its own master any more: whoever has it makes any call (the test makes it, in the gateway, by ptrace(2)), and
//! it is ended by the first that could lead out.

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::servers::Echo;
use super::*;

/// A sandbox with a grant, whose command waits, and its gateway.
struct Scene {
    caller: Child,
    gateway: Pid,
}

impl Scene {
    fn begin(daemon: &Daemon) -> Scene {
        let mut command = daemon.broker(ADA, &["exec", "--grant", "echo"]);
        let caller = command.args(["--", "sleep", "60"]).spawn().expect("it starts");
        let gateway = || daemon.role("gateway");
        assert!(within(Duration::from_secs(5), || gateway().is_some() && !daemon.list(ADA).is_empty()));
        let gateway = Pid::from_raw(gateway().expect("it is there"));
        // Until it serves, and has no more to set up.
        let serves = || {
            fs::read_to_string(format!("/proc/{gateway}/syscall")).is_ok_and(|call| {
                [libc::SYS_epoll_wait, libc::SYS_epoll_pwait]
                    .iter()
                    .any(|wait| call.starts_with(&format!("{wait} ")))
            })
        };
        assert!(within(Duration::from_secs(5), serves), "{}", daemon.log());
        Scene { caller, gateway }
    }

    /// What becomes of the gateway when it makes this call: the result, or the signal that ended it.
    fn calls(&self, number: i64, arguments: [u64; 4]) -> Result<i64, Signal> {
        let flags = WaitPidFlag::__WALL;
        ptrace::seize(self.gateway, ptrace::Options::empty())
            .and_then(|()| ptrace::interrupt(self.gateway))
            .expect("root may");
        waitpid(self.gateway, Some(flags)).expect("it stops");
        let before = ptrace::getregs(self.gateway).expect("it has stopped");
        // The instruction that it waits in is a system call's, and is made again with other words.
        let mut registers = before;
        registers.rip -= 2;
        registers.rax = number.cast_unsigned();
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10] = arguments;
        ptrace::setregs(self.gateway, registers).expect("it has stopped");
        ptrace::step(self.gateway, None).expect("it has stopped");
        match waitpid(self.gateway, Some(flags)).expect("it stops or ends") {
            WaitStatus::Signaled(_, signal, _) => Err(signal),
            _ => {
                let result = ptrace::getregs(self.gateway).expect("it has stopped").rax.cast_signed();
                ptrace::setregs(self.gateway, before)
                    .and_then(|()| ptrace::detach(self.gateway, None))
                    .expect("it goes on");
                Ok(result)
            }
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.caller.kill();
        let _ = self.caller.wait();
    }
}

/// Until the sandbox of a scene is gone, and its gateway.
fn is_over(daemon: &Daemon) {
    let over = || daemon.list(ADA).is_empty() && daemon.role("gateway").is_none();
    assert!(within(Duration::from_secs(5), over), "{}", daemon.log());
}

/// The control is a call that it may make, and the same descriptor's listening socket, which it has.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_gateway_that_is_taken_over_reaches_nothing() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let scene = Scene::begin(&daemon);
    assert_eq!(scene.calls(libc::SYS_gettid, [0; 4]), Ok(scene.gateway.as_raw().into()));
    drop(scene);
    is_over(&daemon);
    let inet = libc::AF_INET as u64;
    let number = |value: i32| value as u64;
    for (name, call, arguments) in [
        ("socket", libc::SYS_socket, [inet, number(libc::SOCK_STREAM), 0, 0]),
        ("connect", libc::SYS_connect, [0, 0, 0, 0]),
        ("bind", libc::SYS_bind, [0, 0, 0, 0]),
        ("listen", libc::SYS_listen, [0, 1, 0, 0]),
        ("socketpair", libc::SYS_socketpair, [1, 1, 0, 0]),
        ("open", libc::SYS_openat, [number(libc::AT_FDCWD), 0, 0, 0]),
        ("execve", libc::SYS_execve, [0; 4]),
        ("fork", libc::SYS_clone, [number(libc::SIGCHLD), 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0; 4]),
        ("io_uring", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0; 4]),
        ("another's memory", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("another's descriptor", libc::SYS_pidfd_getfd, [0; 4]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        ("setns", libc::SYS_setns, [0; 4]),
        (
            "a listener that is shared",
            libc::SYS_setsockopt,
            [0, number(libc::SOL_SOCKET), number(libc::SO_REUSEPORT), 0],
        ),
        (
            "a socket that is bound to a device",
            libc::SYS_setsockopt,
            [0, number(libc::SOL_SOCKET), number(libc::SO_BINDTODEVICE), 0],
        ),
        ("another network's socket", libc::SYS_ioctl, [0, 0x894c, 0, 0]),
    ] {
        let scene = Scene::begin(&daemon);
        assert_eq!(scene.calls(call, arguments), Err(Signal::SIGSYS), "{name}");
        drop(scene);
        is_over(&daemon);
    }
    // Nobody else has heard of it.
    assert!(daemon.exec(ADA, &["--grant", "echo"], &["true"]).status.success());
}

/// What a gateway that ends had is cut, and the sandbox goes on without.
#[test]
fn a_gateway_that_is_killed_takes_its_connections_along_and_nothing_else() {
    let echo = Echo::start();
    let daemon = daemon(&echo_grant(&echo, ""), "unused");
    let script = "import socket
s = socket.create_connection(('echo.test', 7)); s.sendall(b'x'); place = s.getpeername(); print(s.recv(1), flush=True)
try: print(s.recv(1), flush=True)
except OSError as e: print(b'', flush=True)
try: socket.create_connection(place, 5); print('open', flush=True)
except OSError as e: print(e.errno, flush=True)";
    let mut command = daemon.broker(ADA, &["exec", "--grant", "echo"]);
    let mut child =
        command.args(["--", "python3", "-c", script]).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut output = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).expect("text");
    assert_eq!(line, "b'x'\n");
    let gateway = Pid::from_raw(daemon.role("gateway").expect("it is there"));
    nix::sys::signal::kill(gateway, Signal::SIGKILL).expect("it lives");
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut output, &mut rest).expect("text");
    assert_eq!(rest, format!("b''\n{}\n", libc::ECONNREFUSED));
    assert!(child.wait().expect("it ends").success());
    let close = of_kind(&daemon, "close");
    assert_eq!((close.len(), &close[0]["sent_bytes"]), (1, &1.into()), "{close:?}");
    assert!(within(Duration::from_secs(5), || daemon.role("gateway").is_none()), "it is reaped");
}
