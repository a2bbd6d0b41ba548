//! Policies by name: the caller's and the system's files before the presets.

use std::path::{Path, PathBuf};

use sandbox::{Library, POLICY_BYTES_MAX, Policy, PolicyError, Presets};

/// The policies of this host and this caller.
pub struct Policies {
    directories: Vec<PathBuf>,
}

impl Policies {
    /// `/etc/broker/policies` and `~/.config/broker/policies`.
    pub fn of_caller() -> Policies {
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let directories = home.map(|home| home.join(".config/broker/policies"));
        Policies {
            directories: directories.into_iter().chain([PathBuf::from("/etc/broker/policies")]).collect(),
        }
    }

    /// `/etc/broker/policies` alone: those of the administrator, for whoever asks.
    pub fn of_host() -> Policies {
        Policies { directories: vec![PathBuf::from("/etc/broker/policies")] }
    }

    /// The policy that `wanted` names: a file, if it holds a `/` or ends in `.toml`, else a name.
    pub fn load(&self, wanted: &str) -> Result<Policy, LoadError> {
        if wanted.contains('/') || wanted.ends_with(".toml") {
            let text =
                read(Path::new(wanted)).map_err(|source| LoadError::Read { path: wanted.into(), source })?;
            Ok(Policy::parse(wanted, &text, self)?)
        } else {
            Ok(Policy::named(wanted, self)?)
        }
    }

    /// Where a policy of this name comes from.
    pub fn origin(&self, name: &str) -> String {
        self.file(name).map_or_else(|| "built in".to_owned(), |path| path.display().to_string())
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        // A name is no path: what would leave the directory is no policy of it.
        if name.contains('/') || name.starts_with('.') {
            return None;
        }
        self.directories
            .iter()
            .map(|directory| directory.join(format!("{name}.toml")))
            .find(|path| path.is_file())
    }
}

impl Library for Policies {
    fn find(&self, name: &str) -> Option<String> {
        match self.file(name) {
            Some(path) => read(&path).ok(),
            None => Presets.find(name),
        }
    }

    fn names(&self) -> Vec<String> {
        let mut names = Presets.names();
        let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
        let listed = self
            .directories
            .iter()
            .filter_map(|directory| std::fs::read_dir(directory).ok())
            .flatten()
            .flatten();
        let is_policy = |path: &PathBuf| path.extension() == Some(Path::new("toml").as_os_str());
        for name in listed.map(|entry| entry.path()).filter(is_policy).filter_map(stem) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.sort();
        names
    }
}

/// A regular file, no further than a policy can go; a FIFO or a device would never end.
fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    file.take(POLICY_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Why a policy could not be loaded.
#[derive(Debug)]
pub enum LoadError {
    /// The file cannot be read.
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is none.
    Policy(PolicyError),
}

impl From<PolicyError> for LoadError {
    fn from(error: PolicyError) -> Self {
        LoadError::Policy(error)
    }
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LoadError::Read { path, source } => {
                write!(
                    out,
                    "cannot read the policy file {}: {source}; `broker policy list` shows those with a name",
                    path.display()
                )
            }
            LoadError::Policy(error) => error.fmt(out),
        }
    }
}
