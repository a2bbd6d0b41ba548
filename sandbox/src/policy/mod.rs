//! Policies: what a kind of run may do. Parsed from TOML, put together along `extends`, and from then on a value.

mod file;
mod words;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use sha2::{Digest, Sha256};

pub use file::{Env, Files, Gap, Landlock, Limits, PolicyFile, Syscalls, Workspace};
pub use words::{ByteSize, Count, Cpus, EnvName, HostPath, InnerPath, PolicyName, Span, WordError};

/// The presets that come with the program: name and TOML text.
pub const PRESETS: [(&str, &str); 5] = [
    ("default", include_str!("../../../policies/default.toml")),
    ("python", include_str!("../../../policies/python.toml")),
    ("node", include_str!("../../../policies/node.toml")),
    ("shell", include_str!("../../../policies/shell.toml")),
    ("build", include_str!("../../../policies/build.toml")),
];

/// The largest policy file that is read, in bytes.
pub const POLICY_BYTES_MAX: usize = 1 << 20;

/// How long a chain of `extends` may be.
const EXTENDS_MAX: usize = 8;

/// A policy with everything that it extends folded in.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    name: String,
    file: PolicyFile,
}

/// Why there is no policy.
#[derive(Debug)]
pub enum PolicyError {
    /// The text is not a policy. The message points at line and column.
    Parse {
        /// The policy's name or file.
        name: String,
        /// What the parser said.
        message: String,
    },
    /// Nothing of this name exists.
    Unknown {
        /// The policy that extends it, if it was not asked for itself.
        by: Option<String>,
        /// The name.
        name: String,
        /// What does exist.
        known: Vec<String>,
    },
    /// The chain of `extends` comes back to itself or is too long.
    ExtendsLoop {
        /// Where the chain began.
        name: String,
    },
    /// The file is larger than [`POLICY_BYTES_MAX`].
    TooLarge {
        /// The policy's name or file.
        name: String,
    },
}

impl fmt::Display for PolicyError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PolicyError::Parse { name, message } => write!(out, "policy {name}: {message}"),
            PolicyError::Unknown { by, name, known } => {
                if let Some(by) = by {
                    write!(out, "policy {by}: `extends`: ")?;
                }
                write!(
                    out,
                    "no policy is named {name:?}; known: {} (or give a file's path, with a `/`)",
                    known.join(", ")
                )
            }
            PolicyError::ExtendsLoop { name } => {
                write!(out, "policy {name}: `extends` comes back to itself, or is longer than {EXTENDS_MAX}")
            }
            PolicyError::TooLarge { name } => {
                write!(out, "policy {name}: larger than {POLICY_BYTES_MAX} bytes")
            }
        }
    }
}

impl std::error::Error for PolicyError {}

/// Where policies are found by name: the caller's files first, then the presets.
pub trait Library {
    /// The TOML text of the policy `name`, if there is one.
    fn find(&self, name: &str) -> Option<String>;
    /// The names that can be found.
    fn names(&self) -> Vec<String>;
}

/// Only what comes with the program.
pub struct Presets;

impl Library for Presets {
    fn find(&self, name: &str) -> Option<String> {
        PRESETS.iter().find(|(preset, _)| *preset == name).map(|(_, text)| (*text).to_owned())
    }

    fn names(&self) -> Vec<String> {
        PRESETS.iter().map(|(name, _)| (*name).to_owned()).collect()
    }
}

impl Policy {
    /// The policy `name` of `library`.
    ///
    /// # Errors
    /// When it, or one it extends, does not exist or does not parse.
    pub fn named(name: &str, library: &dyn Library) -> Result<Policy, PolicyError> {
        let text = library.find(name).ok_or_else(|| PolicyError::Unknown {
            by: None,
            name: name.to_owned(),
            known: library.names(),
        })?;
        Policy::parse(name, &text, library)
    }

    /// The policy written in `text`, called `name` in messages.
    ///
    /// # Errors
    /// When it, or one it extends, does not exist or does not parse.
    pub fn parse(name: &str, text: &str, library: &dyn Library) -> Result<Policy, PolicyError> {
        let mut file = parse_file(name, text)?;
        let mut links = 0;
        while let Some(base) = file.extends.take() {
            links += 1;
            if links > EXTENDS_MAX {
                return Err(PolicyError::ExtendsLoop { name: name.to_owned() });
            }
            let text = library.find(base.as_str()).ok_or_else(|| PolicyError::Unknown {
                by: Some(name.to_owned()),
                name: base.to_string(),
                known: library.names(),
            })?;
            file = merge(parse_file(base.as_str(), &text)?, file);
        }
        Ok(Policy { name: name.to_owned(), file })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it says.
    pub fn file(&self) -> &PolicyFile {
        &self.file
    }

    /// SHA-256 of what it says, whatever it is called, in hexadecimal.
    pub fn hash(&self) -> String {
        hex_hash(&serde_json::to_vec(&self.file).unwrap_or_default())
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn hex_hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The JSON schema of a policy file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(PolicyFile).to_value()
}

fn parse_file(name: &str, text: &str) -> Result<PolicyFile, PolicyError> {
    if text.len() > POLICY_BYTES_MAX {
        return Err(PolicyError::TooLarge { name: name.to_owned() });
    }
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
        // One error is one line, wherever it is printed.
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        PolicyError::Parse {
            name: name.to_owned(),
            message: format!("line {line}, column {column}: {message}"),
        }
    })
}

/// `over` added to `base`: lists and tables grow, single values are replaced.
fn merge(base: PolicyFile, over: PolicyFile) -> PolicyFile {
    PolicyFile {
        description: over.description.or(base.description),
        extends: base.extends,
        files: Files {
            read: join(base.files.read, over.files.read),
            tmp: over.files.tmp.or(base.files.tmp),
            run: over.files.run.or(base.files.run),
            shm: over.files.shm.or(base.files.shm),
            home: over.files.home.or(base.files.home),
            inodes: over.files.inodes.or(base.files.inodes),
        },
        workspace: Workspace {
            protect: join(base.workspace.protect, over.workspace.protect),
            hold: join_tables(base.workspace.hold, over.workspace.hold),
        },
        env: Env { set: join_tables(base.env.set, over.env.set), pass: join(base.env.pass, over.env.pass) },
        limits: Limits {
            memory: over.limits.memory.or(base.limits.memory),
            pids: over.limits.pids.or(base.limits.pids),
            cpus: over.limits.cpus.or(base.limits.cpus),
            io: over.limits.io.or(base.limits.io),
            timeout: over.limits.timeout.or(base.limits.timeout),
            grace: over.limits.grace.or(base.limits.grace),
            output: over.limits.output.or(base.limits.output),
            open_files: over.limits.open_files.or(base.limits.open_files),
            file_size: over.limits.file_size.or(base.limits.file_size),
        },
        landlock: Landlock { floor: over.landlock.floor.or(base.landlock.floor) },
        syscalls: Syscalls { unix_sockets: over.syscalls.unix_sockets.or(base.syscalls.unix_sockets) },
        allow_gaps: join(base.allow_gaps, over.allow_gaps),
    }
}

fn join<T: PartialEq>(mut base: Vec<T>, over: Vec<T>) -> Vec<T> {
    for entry in over {
        if !base.contains(&entry) {
            base.push(entry);
        }
    }
    base
}

fn join_tables<K: Ord, V>(mut base: BTreeMap<K, V>, over: BTreeMap<K, V>) -> BTreeMap<K, V> {
    base.extend(over);
    base
}
