//! Terminals: typing into the caller's, and what else an ioctl can do to one.

use crate::case::Reporter;
use crate::kernel::raw::{self, NOWHERE, address, address_mut, call, judge};

const TIOCSTI: i64 = 0x5412;
/// A filter that compares 64 bits would take this for another command; the kernel does not.
const HIGH_BITS: i64 = 0x7fff_ffff_0000_0000;

/// KS-09 `TOKEN`: types the token into every terminal that can be had. The standard output is not one: it takes
/// our report. Commands that would change a terminal are tried on a bad descriptor: `EBADF` means reached.
pub fn inject(reporter: &Reporter, arguments: &[String]) {
    let token = arguments[0].as_bytes();
    type_into(reporter, "stdin", 0, token);
    type_into(reporter, "stderr", 2, token);
    let terminal = raw::open(c"/dev/tty", libc::O_RDWR | libc::O_NOCTTY);
    if terminal < 0 {
        judge(reporter, "TIOCSTI /dev/tty", terminal, &[libc::ENXIO, libc::ENOENT]);
    } else {
        type_into(reporter, "/dev/tty", terminal, token);
    }
    let master = raw::open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY);
    let unlocked = 0_i32;
    call(libc::SYS_ioctl, &[master, 0x4004_5431, address(&unlocked)]); // TIOCSPTLCK
    type_into(reporter, "own pty", master, token);

    for (case, command) in [
        ("TIOCSTI", TIOCSTI),
        ("TIOCSTI high bits", TIOCSTI | HIGH_BITS),
        ("TIOCLINUX", 0x541c),
        ("TIOCLINUX high bits", 0x541c | HIGH_BITS),
        ("TIOCSETD", 0x5423),
        ("TIOCCONS", 0x541d),
        ("TIOCVHANGUP", 0x5437),
        ("KDSETLED", 0x4b32),
        ("KDSKBENT", 0x4b47),
        ("KDSETMODE", 0x4b3a),
        ("VT_ACTIVATE", 0x5606),
    ] {
        reporter.syscall(case, call(libc::SYS_ioctl, &[-1, command, NOWHERE]));
    }
    // With 1 a terminal is taken from the session that has it.
    reporter.syscall("TIOCSCTTY force", call(libc::SYS_ioctl, &[-1, 0x540e, 1]));
}

fn type_into(reporter: &Reporter, name: &str, descriptor: i64, token: &[u8]) {
    let mut result = 0;
    for mut byte in token.iter().copied() {
        result = call(libc::SYS_ioctl, &[descriptor, TIOCSTI, address_mut(&mut byte)]);
        if result < 0 {
            break;
        }
    }
    reporter.syscall(&format!("TIOCSTI {name}"), result);
}
