//! Keeps the set-up, and init, on one processor. Each hand-over from one process to the next would otherwise wake another processor, which
//! in a virtual machine costs more than most steps of the set-up (measured: a tenth of the whole start).

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Pinned until dropped. Never an error: where it cannot be had, the start only takes longer.
#[derive(Debug)]
pub(crate) struct Pin {
    before: Option<CpuSet>,
}

impl Pin {
    /// To the processor that this thread is on.
    pub(crate) fn here() -> Pin {
        let before = sched_getaffinity(None).ok();
        let mut one = CpuSet::new();
        one.set(sched_getcpu());
        Pin { before: before.filter(|_| sched_setaffinity(None, &one).is_ok()) }
    }

    /// Where the caller may run, and so the command.
    pub(crate) fn processors(&self) -> Option<CpuSet> {
        self.before
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = sched_setaffinity(None, before);
        }
    }
}
