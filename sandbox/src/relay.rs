//! Copies the standard streams that may not go in as they are. A process of its own: it reads what a workload wrote, so it
//! has no capability, a uid of its own, nothing open but its streams, and may make a handful of system calls.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use seccompiler::BpfProgram;

use crate::seccomp;
use crate::sys::{self, Side};

/// A copy from one descriptor to another.
#[derive(Debug)]
pub(crate) struct Flow {
    pub from: OwnedFd,
    pub to: OwnedFd,
    pub direction: Direction,
}

/// Which way a flow goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Into a pipe: closed at its end.
    In,
    /// Into a terminal, which is told of the end by `VEOF` (termios(3)).
    InTerminal,
    /// Out; counts under the output cap.
    Out,
}

/// The relay of a run.
#[derive(Debug)]
pub(crate) struct Relay {
    pidfd: OwnedFd,
    counts: OwnedFd,
}

/// What went through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Bytes passed on.
    pub output_bytes: u64,
    /// Bytes dropped because of the cap.
    pub dropped_bytes: u64,
    /// Why the caller's stream took no more, where that is not just that nobody reads it.
    pub error: Option<i32>,
}

/// Two counts and an errno.
const COUNTS_BYTES: usize = 20;

/// The relay's buffer for each flow, and the most that is read or written at once.
const BUFFER_BYTES: usize = 64 << 10;
/// What a pipe that is ready takes without blocking (`PIPE_BUF`, pipe(7)).
const SAFE_WRITE_BYTES: usize = 4096;
/// `VEOF` of a fresh terminal.
const END_OF_FILE: u8 = 4;

impl Relay {
    /// Starts a relay as host user `uid`.
    ///
    /// # Errors
    /// When the process cannot be made. What fails inside it ends it, and so the streams.
    pub(crate) fn start(flows: Vec<Flow>, cap: Option<u64>, uid: u32) -> io::Result<Relay> {
        let filter = seccomp::nothing_but(&CALLS, &[])?;
        let (counts, report) = pipe_with(PipeFlags::CLOEXEC)?;
        match sys::clone3(0, None)? {
            Side::Parent { pidfd, .. } => Ok(Relay { pidfd, counts }),
            Side::Child => {
                let code = match drop_everything(&flows, &report, uid, &filter) {
                    Ok(()) => copy_all(flows, cap, &report),
                    Err(_) => 1,
                };
                sys::exit_now(code)
            }
        }
    }

    /// Waits until everything has gone through: all writers are gone then.
    pub(crate) fn finish(self) -> io::Result<Copied> {
        let id = rustix::process::WaitId::PidFd(self.pidfd.as_fd());
        rustix::io::retry_on_intr(|| {
            rustix::process::waitid(id.clone(), rustix::process::WaitIdOptions::EXITED)
        })?;
        let mut bytes = [0_u8; COUNTS_BYTES];
        let length = rustix::io::read(&self.counts, &mut bytes)?;
        Copied::decode(&bytes[..length]).ok_or_else(|| io::Error::from_raw_os_error(libc::EPIPE))
    }
}

impl Copied {
    fn encode(self) -> Vec<u8> {
        let [output, dropped] = [self.output_bytes, self.dropped_bytes].map(u64::to_ne_bytes);
        [output.as_slice(), &dropped, &self.error.unwrap_or(0).to_ne_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Copied> {
        let (output, rest) = bytes.split_first_chunk::<8>()?;
        let (dropped, rest) = rest.split_first_chunk::<8>()?;
        let error = i32::from_ne_bytes(rest.try_into().ok()?);
        Some(Copied {
            output_bytes: u64::from_ne_bytes(*output),
            dropped_bytes: u64::from_ne_bytes(*dropped),
            error: (error != 0).then_some(error),
        })
    }
}

fn drop_everything(flows: &[Flow], report: &OwnedFd, uid: u32, filter: &BpfProgram) -> io::Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let streams = flows.iter().flat_map(|flow| [flow.from.as_fd(), flow.to.as_fd()]);
    let kept: Vec<_> = streams.chain([report.as_fd()]).collect();
    sys::close_all_but(&kept)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    sys::drop_bounding_set()
        .or_else(|error| if error.raw_os_error() == Some(libc::EPERM) { Ok(()) } else { Err(error) })?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::prctl::set_no_new_privs()?;
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

/// Read, write, wait and end; anything else ends the relay.
const CALLS: [libc::c_long; 9] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    // The allocator, when the flows are dropped.
    libc::SYS_brk,
    libc::SYS_munmap,
];

/// One flow under way.
struct Copying {
    flow: Flow,
    buffer: Vec<u8>,
    filled: usize,
    written: usize,
    /// Whether the last byte that went through was not the end of a line.
    in_line: bool,
    ended: bool,
}

fn copy_all(flows: Vec<Flow>, cap: Option<u64>, report: &OwnedFd) -> i32 {
    let mut copied = Copied::default();
    let start = |flow| Copying {
        flow,
        buffer: vec![0; BUFFER_BYTES],
        filled: 0,
        written: 0,
        in_line: false,
        ended: false,
    };
    let mut under_way: Vec<Copying> = flows.into_iter().map(start).collect();
    // When all that comes out has come, nobody is there to read what goes in.
    while under_way.iter().any(|copying| copying.flow.direction == Direction::Out)
        || under_way.iter().all(|copying| copying.flow.direction != Direction::Out) && !under_way.is_empty()
    {
        let mut waits: Vec<PollFd<'_>> = under_way.iter().flat_map(Copying::waits).collect();
        match poll(&mut waits, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return 1,
        }
        let events: Vec<[PollFlags; 2]> =
            waits.chunks_exact(2).map(|pair| [pair[0].revents(), pair[1].revents()]).collect();
        for (copying, [main, reader]) in under_way.iter_mut().zip(events) {
            if !main.is_empty() {
                copying.advance(cap, &mut copied);
            } else if copying.flow.direction != Direction::Out && !reader.is_empty() {
                copying.ended = true;
            }
        }
        under_way.retain(|copying| !copying.ended);
    }
    let _ = rustix::io::write(report, &copied.encode());
    0
}

impl Copying {
    /// What the flow waits for; and, for one that goes in, the end of its reader.
    fn waits(&self) -> [PollFd<'_>; 2] {
        let main = if self.written < self.filled {
            PollFd::new(&self.flow.to, PollFlags::OUT)
        } else {
            PollFd::new(&self.flow.from, PollFlags::IN)
        };
        let reader = match self.flow.direction {
            Direction::Out => main.clone(),
            Direction::In | Direction::InTerminal => PollFd::new(&self.flow.to, PollFlags::empty()),
        };
        [main, reader]
    }

    fn advance(&mut self, cap: Option<u64>, copied: &mut Copied) {
        if self.written == self.filled {
            self.fill(cap, copied);
        } else {
            let end = self.filled.min(self.written + SAFE_WRITE_BYTES);
            match rustix::io::write(&self.flow.to, &self.buffer[self.written..end]) {
                Ok(count) => {
                    self.written += count;
                    self.in_line = self.buffer[self.written - 1] != b'\n';
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                // The workload's end closes with the flow, and it gets SIGPIPE, as if it had written there itself.
                Err(error) => {
                    self.ended = true;
                    if self.flow.direction == Direction::Out && error != Errno::PIPE {
                        copied.error = Some(error.raw_os_error());
                    }
                }
            }
        }
    }

    fn fill(&mut self, cap: Option<u64>, copied: &mut Copied) {
        self.written = 0;
        self.filled = match rustix::io::read(&self.flow.from, &mut self.buffer[..]) {
            Ok(0) => self.end(),
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            // A terminal whose last program has gone gives EIO.
            Err(_) => self.end(),
        };
        if self.flow.direction == Direction::Out {
            let room = cap.map_or(u64::MAX, |cap| cap.saturating_sub(copied.output_bytes));
            let taken = self.filled.min(usize::try_from(room).unwrap_or(usize::MAX));
            copied.output_bytes += taken as u64;
            copied.dropped_bytes += (self.filled - taken) as u64;
            self.filled = taken;
        }
    }

    fn end(&mut self) -> usize {
        if self.flow.direction == Direction::InTerminal {
            // After an unfinished line the first only hands that line over.
            let count = if self.in_line { 2 } else { 1 };
            let _ = rustix::io::write(&self.flow.to, &[END_OF_FILE; 2][..count]);
        }
        self.ended = true;
        0
    }
}
