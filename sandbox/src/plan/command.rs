//! What is run, with which environment, where.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::files::{AUTHORITY, HOME, Step, WORKSPACE};
use crate::host::{Host, PathKind};
use crate::job::{Job, Terminal};
use crate::policy::{HostPath, Policy};

/// Where programs are looked for after the caller's own directories that can be seen inside.
const STANDARD_PATH: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What says to programs which authorities to trust: OpenSSL, Go and curl; Python's requests; Node; git.
const AUTHORITY_VARIABLES: [&str; 5] =
    ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"];

/// What is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CommandPlan {
    /// The command and its arguments.
    #[serde(serialize_with = "lossy")]
    pub arguments: Vec<OsString>,
    /// Where the command is looked for, in order: itself if it holds a `/`, else once for each directory of `PATH`.
    pub candidates: Vec<PathBuf>,
    /// `NAME=VALUE`; all of it. Values are left out of what is printed.
    #[serde(serialize_with = "names_only")]
    pub environment: Vec<(String, OsString)>,
    /// The working directory.
    pub directory: PathBuf,
}

impl CommandPlan {
    pub(super) fn make(policy: &Policy, job: &Job, host: &Host, files: &[Step]) -> CommandPlan {
        let path = search_path(host, files);
        let arguments = job.wishes.command.clone();
        let name = arguments.first().map(OsString::as_os_str).unwrap_or_default();
        let environment = environment(policy, job, host, &path);
        // Whoever sets PATH means it for the command itself too.
        let set = environment.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.clone());
        let set = set.as_ref().map(|path| path.as_bytes()).unwrap_or_default();
        let directories = set.split(|byte| *byte == b':').map(|part| PathBuf::from(OsStr::from_bytes(part)));
        let path: Vec<PathBuf> = directories.filter(|path| path.is_absolute()).collect();
        CommandPlan {
            candidates: candidates(name, &path),
            environment,
            directory: if job.wishes.workspace.is_some() { WORKSPACE } else { HOME }.into(),
            arguments,
        }
    }
}

fn search_path(host: &Host, files: &[Step]) -> Vec<PathBuf> {
    let shown = |directory: &PathBuf| {
        files.iter().any(|step| match step {
            Step::Tree { path, directory: true, .. } => directory.starts_with(path),
            Step::Symlink { path, .. } => directory.starts_with(path),
            _ => false,
        })
    };
    let mut list: Vec<PathBuf> = Vec::new();
    for directory in
        host.caller.path.iter().filter(|path| shown(path)).cloned().chain(STANDARD_PATH.map(PathBuf::from))
    {
        if !list.contains(&directory) {
            list.push(directory);
        }
    }
    list
}

fn candidates(name: &OsStr, path: &[PathBuf]) -> Vec<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return vec![name.into()];
    }
    // An empty name would name the directories themselves.
    path.iter().filter(|_| !name.is_empty()).map(|directory| directory.join(name)).collect()
}

fn environment(policy: &Policy, job: &Job, host: &Host, path: &[PathBuf]) -> Vec<(String, OsString)> {
    let mut table: BTreeMap<String, OsString> = BTreeMap::new();
    let joined = path.iter().map(|directory| directory.as_os_str()).collect::<Vec<_>>().join(OsStr::new(":"));
    table.insert("PATH".into(), joined);
    table.insert("HOME".into(), HOME.into());
    for name in ["USER", "LOGNAME"] {
        table.insert(name.into(), "agent".into());
    }
    if job.wishes.terminal == Terminal::Fresh {
        table.insert("TERM".into(), "xterm-256color".into());
    }
    if job.wishes.network.as_ref().is_some_and(|network| network.authority.is_some()) {
        for name in AUTHORITY_VARIABLES {
            table.insert(name.into(), AUTHORITY.into());
        }
    }
    if let Some(network) = &job.wishes.network {
        let each: Vec<String> = network.grants.iter().map(|grant| format!("3:{grant}")).collect();
        table.insert("GRANT_FDS".into(), each.join(",").into());
    }
    for (name, value) in &policy.file().env.set {
        if let Some(value) = expand(value, host) {
            table.insert(name.to_string(), value);
        }
    }
    for (name, value) in &job.wishes.env {
        table.insert(name.to_string(), value.clone());
    }
    table.into_iter().collect()
}

/// `~/...` is a place below the caller's home, and means nothing where that does not exist.
fn expand(value: &str, host: &Host) -> Option<OsString> {
    match value.parse::<HostPath>() {
        Ok(path) if value.starts_with("~/") => {
            let path = host.caller.expand(&path)?;
            if *host.kind(&path) == PathKind::Absent { None } else { Some(path.into_os_string()) }
        }
        _ => Some(value.into()),
    }
}

fn lossy<S: Serializer>(arguments: &[OsString], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(arguments.iter().map(|argument| argument.to_string_lossy()))
}

fn names_only<S: Serializer>(environment: &[(String, OsString)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(environment.iter().map(|(name, _)| name))
}
