//! A host uid for each sandbox, never shared by two that live at the same time, never 0.
//!
//! A slot is a locked file (flock(2)). Init inherits the open file, so that the lock outlives a launcher that was killed, until the
//! last of the sandbox's processes is gone.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The first uid of the range: far above what useradd(8) and systemd give out, below 2^31.
const UID_FIRST: u32 = 0x7000_0000;
/// The relay of a slot is not its workload.
const RELAY_UID_FIRST: u32 = 0x7100_0000;
/// How many sandboxes can live at the same time.
const SLOTS_MAX: u32 = 4096;

/// A uid that is this sandbox's own while the slot lives.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    lock: File,
}

/// Why there is no slot.
#[derive(Debug)]
pub enum SlotError {
    /// The directory or a lock file could not be opened.
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// All are taken.
    Full,
}

impl std::fmt::Display for SlotError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SlotError::Io { path, source } => {
                write!(out, "cannot take a uid slot: {}: {source}", path.display())
            }
            SlotError::Full => write!(out, "all {SLOTS_MAX} uid slots are taken; wait for a run to end"),
        }
    }
}

impl std::error::Error for SlotError {}

impl Slot {
    /// The first free slot of `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// When the directory cannot be written or every slot is taken.
    pub fn take(directory: &Path) -> Result<Slot, SlotError> {
        let mut made = false;
        for number in 0..SLOTS_MAX {
            let path = directory.join(number.to_string());
            let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let lock = match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !made => {
                    made = true;
                    make_private(directory).and_then(|()| open())
                }
                other => other,
            };
            let lock = lock.map_err(|source| SlotError::Io { path: path.clone(), source })?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Slot { number, lock }),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => {
                    return Err(SlotError::Io { path, source: error.into() });
                }
            }
        }
        Err(SlotError::Full)
    }

    /// The slot `number`, if nobody has it.
    pub fn take_free(directory: &Path, number: u32) -> Option<Slot> {
        let lock = OpenOptions::new().write(true).open(directory.join(number.to_string())).ok()?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(Slot { number, lock })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The host uid and gid of the workload.
    pub fn uid(&self) -> u32 {
        UID_FIRST + self.number
    }

    /// The host uid and gid of the relay.
    pub fn relay_uid(&self) -> u32 {
        RELAY_UID_FIRST + self.number
    }

    /// The locked file, for init to keep.
    pub fn lock(&self) -> &File {
        &self.lock
    }
}

/// Makes `directory` for root alone, in one that a daemon's socket may stand in too.
pub(crate) fn make_private(directory: &Path) -> io::Result<()> {
    if let Some(parent) = directory.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}
