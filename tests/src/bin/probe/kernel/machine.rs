//! Other ways into the kernel than the one a filter looks at, and whether the filter is on everybody.

use std::arch::asm;
use std::os::fd::AsRawFd;

use crate::case::Reporter;
use crate::kernel::raw::{self, call};

/// What the children here exit with when their attempt worked.
const WORKED: i32 = 42;

/// `mov ebx, 42; mov eax, 1; int 0x80`: exit(42) as a 32-bit call.
const EXIT_32: [u8; 12] = [0xbb, 42, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0xcd, 0x80];

/// KS-07.
pub fn foreign_architecture(reporter: &Reporter, _: &[String]) {
    raw::survives(reporter, "int80 getpid", || {
        if int80(20, 0, 0) == i64::from(std::process::id()) { WORKED } else { 1 }
    });
    raw::survives(reporter, "int80 socketcall", || {
        // socketcall(SYS_SOCKET, [AF_ALG, SOCK_SEQPACKET, 0]); any answer of the kernel's own means reached.
        let arguments = low_memory(&[38, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        let result = int80(102, 1, arguments);
        if [-i64::from(libc::EPERM), -i64::from(libc::ENOSYS)].contains(&result) { 1 } else { WORKED }
    });
    raw::survives(reporter, "32-bit program", || {
        let file = call(libc::SYS_memfd_create, &[c"x".as_ptr() as i64, 0]);
        let file = i32::try_from(file).unwrap_or(-1);
        let program = program_32();
        call(libc::SYS_write, &[i64::from(file), raw::address(program.as_slice()), program.len() as i64]);
        let nothing = [0_usize];
        let list = raw::address(&nothing);
        let empty = c"".as_ptr() as i64;
        call(libc::SYS_execveat, &[i64::from(file), empty, list, list, i64::from(libc::AT_EMPTY_PATH)]);
        1
    });
    raw::survives(reporter, "far jump to 32-bit code", || {
        let code = low_memory(&EXIT_32);
        let (length, access) = (4096, i64::from(libc::PROT_READ | libc::PROT_EXEC));
        if code == 0 || call(libc::SYS_mprotect, &[code, length, access]) < 0 {
            return 1;
        }
        // SAFETY: 0x23 is the kernel's 32-bit code segment, and the code there ends the process: no return, no stack.
        unsafe {
            asm!("push 0x23", "push {code}", "retfq", code = in(reg) code, options(noreturn));
        }
    });
}

fn int80(number: i64, first: i64, second: i64) -> i64 {
    let result: i64;
    // SAFETY: the calls made here (getpid, socketcall) write no memory. rbx is the compiler's own: it is put back.
    unsafe {
        asm!(
            "xchg rbx, {first}", "int 0x80", "xchg rbx, {first}",
            first = inout(reg) first => _, inlateout("rax") number => result, in("rcx") second,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    // Only the lower half is the answer.
    i64::from(result as i32)
}

/// A page below 4 GiB that holds `bytes`; 0 when there is none.
fn low_memory(bytes: &[u8]) -> i64 {
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, which replaces none.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
    if page == libc::MAP_FAILED {
        return 0;
    }
    // SAFETY: the page is ours, writable, and longer than `bytes`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.cast(), bytes.len()) };
    page as i64
}

/// A 32-bit ELF file that exits with 42.
fn program_32() -> Vec<u8> {
    let base = 0x0804_8000_u32;
    let headers = 52 + 32;
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    half(&mut file, 2); // executable
    half(&mut file, 3); // i386
    for value in [1, base + headers, 52, 0, 0] {
        word(&mut file, value); // version, entry, program headers, sections, flags
    }
    for value in [52, 32, 1, 40, 0, 0] {
        half(&mut file, value); // sizes and counts of headers
    }
    let length = headers + EXIT_32.len() as u32;
    for value in [1, 0, base, base, length, length, 5, 4096] {
        word(&mut file, value); // one segment, readable and executable
    }
    file.extend(EXIT_32);
    file
}

/// KS-08: x32 numbers, which share the 64-bit architecture's name in a filter.
pub fn x32(reporter: &Reporter, _: &[String]) {
    const X32: i64 = 0x4000_0000;
    let own = [("getpid", libc::SYS_getpid), ("ptrace", 521), ("execve", 520), ("socket", libc::SYS_socket)];
    for (name, number) in own {
        let case = format!("x32 {name}");
        reporter.in_child(&case, |reporter| reporter.syscall(&case, call(number | X32, &[0, 0, 0])));
    }
    for number in 512..548 {
        let case = format!("x32 {number}");
        reporter.in_child(&case, |reporter| reporter.syscall(&case, call(number | X32, &[0, 0, 0])));
    }
}

/// KS-15: more threads and a child; then every task that is visible has to be under the same filter.
pub fn coverage(reporter: &Reporter, _: &[String]) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    for _ in 0..4 {
        let reader = reader.as_raw_fd();
        // Blocks until the pipe closes, which is when the process ends.
        std::thread::spawn(move || {
            let mut byte = [0_u8];
            call(libc::SYS_read, &[i64::from(reader), raw::address_mut(&mut byte), 1]);
        });
    }
    let child = raw::sleeper();
    let tasks = crate::process::statuses();
    raw::kill(child);
    drop(writer);
    // Five of our own and the child: fewer, and what follows says nothing.
    assert!(tasks.len() >= 6, "only {} tasks are visible", tasks.len());
    let own = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let count = raw::field(&own, "Seccomp_filters").filter(|count| count != "0");
    let count = count.unwrap_or_else(|| "at least 1".to_owned());
    for (name, wanted) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("Seccomp_filters", count.as_str())] {
        let other = tasks.iter().find(|(_, status)| raw::field(status, name).as_deref() != Some(wanted));
        raw::found(
            reporter,
            name,
            other.map(|(task, status)| format!("{task}: {:?}", raw::field(status, name))),
        );
    }
}
