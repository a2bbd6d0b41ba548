//! A policy as it is written: one TOML file. Unknown keys, duplicate keys and duplicate list entries are errors.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::words::{ByteSize, Count, Cpus, EnvName, HostPath, InnerPath, PolicyName, Span};

/// One policy file. Every section may be left out; what is left out allows nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyFile {
    /// One line for people.
    pub description: Option<String>,
    /// The policy this one adds to: lists and tables are added to the base's, single values replace the base's.
    pub extends: Option<PolicyName>,
    /// What of the host's files can be seen, and the sizes of the private ones.
    #[serde(deserialize_with = "table")]
    pub files: Files,
    /// What holds inside a `--workspace`.
    #[serde(deserialize_with = "table")]
    pub workspace: Workspace,
    /// The environment; nothing else is inherited.
    #[serde(deserialize_with = "table")]
    pub env: Env,
    /// What the run may use up.
    #[serde(deserialize_with = "table")]
    pub limits: Limits,
    /// The second fence under the mounts.
    #[serde(deserialize_with = "table")]
    pub landlock: Landlock,
    /// Loosenings of the system-call filter, by name.
    #[serde(deserialize_with = "table")]
    pub syscalls: Syscalls,
    /// Protections that may be missing on a host that cannot give them. Nothing is missing silently.
    #[serde(deserialize_with = "distinct")]
    pub allow_gaps: Vec<Gap>,
}

/// `[files]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Files {
    /// Trees and files shown read-only at their own place, where they exist.
    #[serde(deserialize_with = "distinct")]
    pub read: Vec<HostPath>,
    /// Size of the private `/tmp`.
    pub tmp: Option<ByteSize>,
    /// Size of the private `/run`.
    pub run: Option<ByteSize>,
    /// Size of the private `/dev/shm`.
    pub shm: Option<ByteSize>,
    /// Size of the private home.
    pub home: Option<ByteSize>,
    /// Files and directories that each of the private places can hold.
    pub inodes: Option<Count>,
}

/// `[workspace]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workspace {
    /// Paths in the workspace that cannot be created, changed, moved or replaced from inside, because the host runs
    /// them later.
    #[serde(deserialize_with = "distinct")]
    pub protect: Vec<InnerPath>,
    /// Files that hold their place with harmless content where they are absent and an empty directory in their
    /// place would break a tool.
    pub hold: BTreeMap<InnerPath, String>,
}

/// `[env]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Env {
    /// Variables to set; a value that begins with `~/` means the caller's home, and is set only where that exists.
    pub set: BTreeMap<EnvName, String>,
    /// Variables taken from the caller, where set.
    #[serde(deserialize_with = "distinct")]
    pub pass: Vec<EnvName>,
}

/// `[limits]`; what is left out is not limited.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory of the whole sandbox, private files included. Swap is not given on top.
    pub memory: Option<ByteSize>,
    /// Processes and threads.
    pub pids: Option<Count>,
    /// Processor time.
    pub cpus: Option<Cpus>,
    /// Bytes read, and as many written, in a second, of each disk.
    pub io: Option<ByteSize>,
    /// Wall-clock time until `SIGTERM`.
    pub timeout: Option<Span>,
    /// From `SIGTERM` to `SIGKILL`; 2 s where left out.
    pub grace: Option<Span>,
    /// Bytes of standard output and standard error together; what is over is dropped, and the report says so.
    pub output: Option<ByteSize>,
    /// Open descriptors of one process.
    pub open_files: Option<Count>,
    /// Size of one file.
    pub file_size: Option<ByteSize>,
}

/// `[landlock]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Landlock {
    /// The lowest Landlock ABI that will do; 2 where left out. More is used where the kernel has it.
    pub floor: Option<LandlockFloor>,
}

/// A Landlock ABI that can be demanded: 1 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u8", into = "u8")]
pub struct LandlockFloor(u8);

impl LandlockFloor {
    /// The ABI's number.
    pub fn abi(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for LandlockFloor {
    type Error = String;
    fn try_from(abi: u8) -> Result<Self, String> {
        if (1..=7).contains(&abi) {
            Ok(LandlockFloor(abi))
        } else {
            Err(format!("Landlock ABI {abi} is not one of 1 to 7"))
        }
    }
}

impl From<LandlockFloor> for u8 {
    fn from(floor: LandlockFloor) -> u8 {
        floor.0
    }
}

/// `[syscalls]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Syscalls {
    /// `AF_UNIX` sockets (`socketpair` is always there). Pathname sockets in a shared workspace can then be reached.
    pub unix_sockets: Option<bool>,
}

/// A protection that a policy can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Gap {
    /// `AF_UNIX` sockets together with a workspace: before Landlock ABI 9 a socket there reaches its host process.
    UnixSocketsInWorkspace,
    /// Limits on memory, processes or processor time where no control group can be had.
    NoCgroup,
}

impl fmt::Display for Gap {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Gap::UnixSocketsInWorkspace => "unix-sockets-in-workspace",
            Gap::NoCgroup => "no-cgroup",
        })
    }
}

/// A section is a table. serde would take a list for one too, value by value.
fn table<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Table<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
        type Value = T;
        fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            out.write_str("a table")
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(Table(PhantomData))
}

fn distinct<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + PartialEq + Serialize,
{
    let list = Vec::<T>::deserialize(deserializer)?;
    for (index, entry) in list.iter().enumerate() {
        if list[..index].contains(entry) {
            return Err(D::Error::custom(format!("entry {} of this list stands in it twice", index + 1)));
        }
    }
    Ok(list)
}
