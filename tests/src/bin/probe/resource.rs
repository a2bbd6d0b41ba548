//! The resource rows: taking more than was given, staying longer than was allowed.

mod crash;
mod descriptors;
mod files;
mod memory;
mod processes;
mod staying;

use crate::case::Row;

pub const ROWS: &[Row] = &[
    Row { id: "RS-01", attempt: processes::bomb },
    Row { id: "RS-02", attempt: memory::take },
    Row { id: "RS-03", attempt: files::fill },
    Row { id: "RS-04", attempt: files::flood },
    Row { id: "RS-05", attempt: descriptors::take },
    Row { id: "RS-06", attempt: processes::spin },
    Row { id: "RS-07", attempt: staying::output },
    Row { id: "RS-08", attempt: staying::stay },
    Row { id: "RS-11", attempt: crash::crash },
    Row { id: "RS-12", attempt: crash::flood },
];

/// Forks; the child runs `body` and exits without returning. Gives the child's number, or -1.
fn spawn(body: impl FnOnce()) -> i32 {
    // SAFETY: the probe forks from its only thread; the child leaves by `_exit`.
    match unsafe { libc::fork() } {
        0 => {
            body();
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        child => child,
    }
}

/// Waits for `child` and gives its wait status.
fn wait_for(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    unsafe { libc::waitpid(child, &mut status, 0) };
    status
}

fn kill(child: i32) {
    // SAFETY: a plain system call on integers; `child` is one of ours, never 0 or -1.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait_for(child);
}
