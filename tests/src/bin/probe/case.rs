//! How a row says what came of its cases.

use std::io::Write;

/// One row of the catalogue: its id and the attempt.
pub struct Row {
    /// As in the catalogue, `FS-01`.
    pub id: &'static str,
    /// Makes every attempt of the row and reports each case.
    pub attempt: fn(&Reporter, &[String]),
}

/// Prints one JSON line a case.
pub struct Reporter {
    id: &'static str,
}

impl Reporter {
    /// For the row `id`.
    pub fn new(id: &'static str) -> Self {
        Reporter { id }
    }

    /// The attack worked.
    pub fn open(&self, case: &str, detail: &str) {
        self.line(case, "open", 0, detail);
    }

    /// The attack was refused with `errno` (0 where no system call said so).
    pub fn denied(&self, case: &str, errno: i32, detail: &str) {
        self.line(case, "denied", errno, detail);
    }

    /// A signal ended the process that tried.
    pub fn killed(&self, case: &str, signal: i32) {
        self.line(case, "killed", 0, &format!("signal {signal}"));
    }

    /// This kernel does not have the thing attacked.
    pub fn not_applicable(&self, case: &str, errno: i32, detail: &str) {
        self.line(case, "n/a", errno, detail);
    }

    /// `result` is what a raw system call returned (-1: look at errno). Negative with `EPERM`, `ENOSYS`, `EACCES`,
    /// `ENOENT` or `EROFS` is a denial, anything else reached the kernel.
    pub fn syscall(&self, case: &str, result: i64) {
        let errno = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
        match errno {
            libc::EPERM | libc::ENOSYS | libc::EACCES | libc::ENOENT | libc::EROFS => {
                self.denied(case, errno, "")
            }
            _ => self.line(case, "open", errno, &format!("returned {result}")),
        }
    }

    /// Runs `attempt` in a forked child, so that a filter that kills is seen as `killed`.
    pub fn in_child(&self, case: &str, attempt: impl FnOnce(&Reporter)) {
        std::io::stdout().flush().ok();
        // SAFETY: the probe is single-threaded here; the child runs the attempt and exits without returning.
        match unsafe { libc::fork() } {
            0 => {
                attempt(self);
                std::io::stdout().flush().ok();
                // SAFETY: ends the child at once, without the parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
            child => {
                let mut status = 0;
                // SAFETY: `status` outlives the call.
                unsafe { libc::waitpid(child, &mut status, 0) };
                if libc::WIFSIGNALED(status) {
                    self.killed(case, libc::WTERMSIG(status));
                }
            }
        }
    }

    fn line(&self, case: &str, outcome: &str, errno: i32, detail: &str) {
        let line = serde_json::json!({"id": self.id, "case": case, "outcome": outcome, "errno": errno, "detail": detail});
        println!("{line}");
    }
}
