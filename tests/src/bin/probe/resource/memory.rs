//! Memory in every form that the kernel keeps for a process.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::case::Reporter;
use crate::fs::{call, errno};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// RS-02 `KIND MIB DIRECTORY`: takes up to `MIB` of that kind, and says `progress N` after each: whoever is
/// killed, the last line tells how far it came.
pub fn take(report: &Reporter, arguments: &[String]) {
    let (kind, goal) = (arguments[0].as_str(), arguments[1].parse().expect("a number"));
    let result = match kind {
        "anonymous" => mapped(goal, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        "shared" => mapped(goal, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
        "memfd" => memfd(goal),
        "system-v" => system_v(goal),
        "page-tables" => page_tables(goal),
        "file" => file(goal, &arguments[2]),
        "directories" => directories(goal, &arguments[2]),
        "pipes" => buffers(goal, pipe),
        "unix-sockets" => buffers(goal, pair),
        "tcp" => tcp(goal),
        other => panic!("no kind {other}"),
    };
    match result {
        Ok(()) => report.open(kind, &format!("at {goal}")),
        Err(errno) => report.denied(kind, errno, ""),
    }
}

fn progress(mebibytes: usize) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "progress {mebibytes}").and_then(|()| out.flush()).ok();
}

fn map(bytes: usize, flags: i32, fd: i32) -> Result<*mut u8, i32> {
    // SAFETY: a new mapping where the kernel likes; nothing of ours is replaced without MAP_FIXED.
    let place =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if place == libc::MAP_FAILED { Err(errno()) } else { Ok(place.cast()) }
}

fn touch(place: *mut u8, bytes: usize) {
    for offset in (0..bytes).step_by(PAGE) {
        // SAFETY: `offset` is inside the mapping of `bytes` that the caller just made.
        unsafe { place.add(offset).write_volatile(1) };
    }
}

fn mapped(goal: usize, flags: i32, fd: i32) -> Result<(), i32> {
    for done in 0..goal {
        touch(map(MIB, flags, fd)?, MIB);
        progress(done + 1);
    }
    Ok(())
}

fn memfd(goal: usize) -> Result<(), i32> {
    let fd = call(libc::SYS_memfd_create, &[c"memory".as_ptr() as usize, 0]);
    if fd < 0 {
        return Err(errno());
    }
    // SAFETY: the descriptor is new and nobody else's.
    grow(unsafe { File::from_raw_fd(fd as i32) }, goal)
}

fn file(goal: usize, directory: &str) -> Result<(), i32> {
    let path = format!("{directory}/memory");
    let file = File::create(&path).map_err(|error| crate::fs::code(&error))?;
    let result = grow(file, goal);
    std::fs::remove_file(path).ok();
    result
}

fn grow(mut file: File, goal: usize) -> Result<(), i32> {
    let block = vec![1_u8; MIB];
    for done in 0..goal {
        file.write_all(&block).map_err(|error| crate::fs::code(&error))?;
        progress(done + 1);
    }
    Ok(())
}

fn system_v(goal: usize) -> Result<(), i32> {
    for done in 0..goal {
        let id = call(libc::SYS_shmget, &[libc::IPC_PRIVATE as usize, MIB, 0o600]);
        if id < 0 {
            return Err(errno());
        }
        let place = call(libc::SYS_shmat, &[id as usize, 0, 0]);
        let attached = if place < 0 { Err(errno()) } else { Ok(place as usize as *mut u8) };
        // Marked for removal at once: it lives as long as this process has it.
        call(libc::SYS_shmctl, &[id as usize, libc::IPC_RMID as usize, 0]);
        touch(attached?, MIB);
        progress(done + 1);
    }
    Ok(())
}

// Reading maps the one zero page everywhere: only the tables cost, a page for every two mebibytes looked at.
fn page_tables(goal: usize) -> Result<(), i32> {
    let reach = 2 * MIB;
    for done in 0..goal {
        let bytes = reach * (MIB / PAGE);
        let place = map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?;
        // SAFETY: the mapping just made; a huge zero page would need no table.
        unsafe { libc::madvise(place.cast(), bytes, libc::MADV_NOHUGEPAGE) };
        for offset in (0..bytes).step_by(reach) {
            // SAFETY: `offset` is inside the mapping.
            unsafe { place.add(offset).read_volatile() };
        }
        progress(done + 1);
    }
    Ok(())
}

// An empty directory of a tmpfs costs a good KiB: an inode and a name.
fn directories(goal: usize, directory: &str) -> Result<(), i32> {
    let top = format!("{directory}/many");
    let made = std::fs::create_dir(&top).and_then(|()| {
        for done in 0..goal {
            for index in 0..MIB / 1024 {
                std::fs::create_dir(format!("{top}/{done}-{index}"))?;
            }
            progress(done + 1);
        }
        Ok(())
    });
    std::fs::remove_dir_all(&top).ok();
    made.map_err(|error| crate::fs::code(&error))
}

type Ends = (File, File);

fn pipe() -> Result<Ends, i32> {
    let mut ends = [0_i32; 2];
    match call(libc::SYS_pipe2, &[ends.as_mut_ptr() as usize, libc::O_NONBLOCK as usize]) {
        // SAFETY: both descriptors are new and nobody else's.
        0 => Ok(unsafe { (File::from_raw_fd(ends[1]), File::from_raw_fd(ends[0])) }),
        _ => Err(errno()),
    }
}

fn pair() -> Result<Ends, i32> {
    let (one, other) = UnixStream::pair().map_err(|error| crate::fs::code(&error))?;
    one.set_nonblocking(true)
        .and_then(|()| other.set_nonblocking(true))
        .map_err(|error| crate::fs::code(&error))?;
    Ok((File::from(OwnedFd::from(one)), File::from(OwnedFd::from(other))))
}

fn buffers(goal: usize, make: fn() -> Result<Ends, i32>) -> Result<(), i32> {
    let (mut kept, mut bytes) = (Vec::new(), 0);
    while bytes < goal * MIB {
        let (one, other) = beyond_one_process(make)?;
        bytes += stuff(&one) + stuff(&other);
        kept.push((one, other));
        progress(bytes / MIB);
    }
    Ok(())
}

fn tcp(goal: usize) -> Result<(), i32> {
    let code = |error: std::io::Error| crate::fs::code(&error);
    let listener = TcpListener::bind("127.0.0.1:0").map_err(code)?;
    let address = listener.local_addr().map_err(code)?;
    let (mut kept, mut bytes) = (Vec::new(), 0);
    while bytes < goal * MIB {
        let connect = || {
            let one = TcpStream::connect(address).map_err(code)?;
            let (other, _) = listener.accept().map_err(code)?;
            one.set_nonblocking(true).and_then(|()| other.set_nonblocking(true)).map_err(code)?;
            Ok((File::from(OwnedFd::from(one)), File::from(OwnedFd::from(other))))
        };
        let (one, other) = beyond_one_process(connect)?;
        for end in [&one, &other] {
            let size = 4 * MIB as i32;
            let option = [libc::SOL_SOCKET as usize, libc::SO_SNDBUF as usize, (&raw const size) as usize, 4];
            call(libc::SYS_setsockopt, &[&[end.as_raw_fd() as usize], &option[..]].concat());
            bytes += stuff(end);
        }
        kept.push((one, other));
        progress(bytes / MIB);
    }
    Ok(())
}

/// Writes until that would block; gives how much went in.
fn stuff(mut end: &File) -> usize {
    let block = vec![1_u8; 64 << 10];
    let mut bytes = 0;
    while let Ok(count) = end.write(&block) {
        bytes += count;
    }
    bytes
}

/// `make`; where this process has no number left, its child closes the numbers and goes on, while this one
/// keeps what is in the buffers by still having them open.
fn beyond_one_process(mut make: impl FnMut() -> Result<Ends, i32>) -> Result<Ends, i32> {
    match make() {
        Err(libc::EMFILE) => (),
        other => return other,
    }
    // SAFETY: the probe has one thread; the parent only waits from here on, and ends as the child did.
    match unsafe { libc::fork() } {
        -1 => return Err(errno()),
        0 => (),
        child => {
            let status = super::wait_for(child);
            std::process::exit(if libc::WIFEXITED(status) { 0 } else { 128 + libc::WTERMSIG(status) })
        }
    }
    // The listener and its like have the lowest numbers. `kept` closes these again at the end, which then
    // fails unseen.
    call(libc::SYS_close_range, &[16, u32::MAX as usize, 0]);
    make()
}
