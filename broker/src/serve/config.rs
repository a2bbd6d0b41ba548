//! The daemon's configuration, and what it gives to whom. Absent means nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sandbox::{ByteSize, PolicyName};
use serde::{Deserialize, Serialize};

use crate::grant::{self, Credential, Grant, Name};

/// Where the daemon's configuration stands.
pub const PATH: &str = "/etc/broker/config.toml";
/// Where it listens.
pub const SOCKET: &str = "/run/broker/broker.sock";
/// Where its record stands.
pub const STATE: &str = "/var/lib/broker";

/// The longest authority that a grant may name, in bytes.
const AUTHORITY_BYTES_MAX: usize = 16 << 10;

/// `config.toml`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[[access]]`
    pub access: Vec<Access>,
    /// `[pool]`
    pub pool: Pool,
    /// `[credential.NAME]`
    pub credential: BTreeMap<Name, Credential>,
    /// `[grant.NAME]`
    pub grant: BTreeMap<Name, Grant>,
}

/// `[pool]`: what is made before anybody asks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pool {
    /// Network namespaces. Each is used once.
    pub networks: u8,
    /// Sandboxes, by policy, for who brings no workspace and asks for no tighter limits. Each is used once.
    pub warm: BTreeMap<PolicyName, u8>,
}

/// `[server]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Where it listens.
    pub socket: PathBuf,
    /// Where the audit record stands, and what is held of workspaces.
    pub state: PathBuf,
    /// Where Prometheus may scrape, over HTTP on a Unix socket.
    pub metrics: Option<PathBuf>,
    /// How long the record may become before a new file of it is begun.
    pub audit_bytes: ByteSize,
}

impl Default for Server {
    fn default() -> Server {
        Server {
            socket: SOCKET.into(),
            state: STATE.into(),
            metrics: None,
            audit_bytes: ByteSize::mebibytes(64),
        }
    }
}

impl Server {
    /// Where the core writes its record.
    pub fn record(&self) -> PathBuf {
        record(&self.state)
    }
}

/// Where the record is below a state directory.
pub fn record(state: &Path) -> PathBuf {
    state.join("record")
}

/// What a user, or everybody of a group, may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// A name of /etc/passwd, or a number.
    pub user: Option<String>,
    /// A name of /etc/group, or a number.
    pub group: Option<String>,
    /// Policies by name.
    #[serde(default)]
    pub policies: BTreeSet<PolicyName>,
    /// Grants by name.
    #[serde(default)]
    pub grants: BTreeSet<Name>,
    /// What it may do with sandboxes that are not its own.
    #[serde(default)]
    pub operate: BTreeSet<Verb>,
}

/// What an operator may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// See all sandboxes.
    List,
    /// End any sandbox.
    Kill,
    /// Read what is counted.
    Metrics,
    /// Read the record.
    Audit,
    /// Put credentials into the store, and take them out of use.
    Credential,
    /// End any grant.
    Revoke,
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// As the kernel says (`SO_PEERCRED`, unix(7)).
    pub uid: u32,
    /// Its primary group then.
    pub gid: u32,
}

/// What a peer may ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    everything: bool,
    policies: BTreeSet<PolicyName>,
    grants: BTreeSet<Name>,
    operate: BTreeSet<Verb>,
}

impl Rights {
    /// Whether a run under `policy` may be asked for.
    pub fn may_use(&self, policy: &PolicyName) -> bool {
        self.everything || self.policies.contains(policy)
    }

    /// Whether nothing is withheld.
    pub fn may_all(&self) -> bool {
        self.everything
    }

    /// Whether a sandbox with this grant may be asked for.
    pub fn may_grant(&self, grant: &Name) -> bool {
        self.everything || self.grants.contains(grant)
    }

    /// No more than these, and nothing of others.
    pub fn narrowed(&self, policies: &[PolicyName], grants: &[Name]) -> Rights {
        let policies = policies.iter().filter(|policy| self.may_use(policy)).cloned().collect();
        let grants = grants.iter().filter(|grant| self.may_grant(grant)).cloned().collect();
        Rights { policies, grants, ..Rights::default() }
    }

    /// Whether sandboxes of others may be operated on.
    pub fn may(&self, verb: Verb) -> bool {
        self.everything || self.operate.contains(&verb)
    }
}

impl Config {
    /// Reads `path`; without a file there are the defaults, and rights for root alone.
    ///
    /// # Errors
    /// One line that says what is wrong, and where.
    pub fn load(path: &Path, required: bool) -> Result<Config, String> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let parsed = Config::parse(&text).and_then(Config::with_authorities);
                parsed.map_err(|error| format!("{}: {error}", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => Ok(Config::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Reads the authorities that grants name.
    fn with_authorities(mut self) -> Result<Config, String> {
        for (name, grant) in &mut self.grant {
            let Some(source) = &grant.upstream_ca else { continue };
            let path = source.strip_prefix("file:").filter(|path| path.starts_with('/'));
            let path = path.ok_or_else(|| format!("[grant.{name}]: upstream_ca is `file:/PATH`"))?;
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|error| format!("[grant.{name}]: upstream_ca: {path}: {error}"))?;
            if text.len() > AUTHORITY_BYTES_MAX {
                return Err(format!(
                    "[grant.{name}]: upstream_ca: {path} is longer than {AUTHORITY_BYTES_MAX} bytes; give the authority alone, or leave it out for the host's own"
                ));
            }
            if !text.contains("-----BEGIN CERTIFICATE-----") {
                return Err(format!("[grant.{name}]: upstream_ca: {path} is no certificate in PEM"));
            }
            grant.authority = Some(text);
        }
        Ok(self)
    }

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
            format!("line {}: {message}", before.matches('\n').count() + 1)
        })?;
        let paths = [Some(&config.server.socket), Some(&config.server.state), config.server.metrics.as_ref()];
        if let Some(path) = paths.into_iter().flatten().find(|path| !path.is_absolute()) {
            return Err(format!("[server]: {} is no absolute path", path.display()));
        }
        grant::check(&config.grant, &config.credential)?;
        match config.access.iter().position(|access| access.user.is_some() == access.group.is_some()) {
            Some(at) => Err(format!("[[access]] number {}: it needs either `user` or `group`", at + 1)),
            None => Ok(config),
        }
    }

    /// What is written there and gives nobody anything as things stand, by the accounts and policies that there are.
    pub fn doubts(&self, accounts: &Accounts, is_policy: impl Fn(&str) -> bool) -> Vec<String> {
        let mut doubts = Vec::new();
        for access in &self.access {
            let unknown = |kind: &str, file: &str, name: &Option<String>, table: &str| {
                let name = name.as_ref().filter(|name| accounts.number(table, name).is_none())?;
                Some(format!(
                    "[[access]] {kind} = {name:?}: {file} has none of that name; write its number, in quotes"
                ))
            };
            doubts.extend(unknown("user", "/etc/passwd", &access.user, &accounts.passwd));
            doubts.extend(unknown("group", "/etc/group", &access.group, &accounts.group));
        }
        let grants = self.access.iter().flat_map(|access| &access.grants);
        let unknown: BTreeSet<&Name> = grants.filter(|name| !self.grant.contains_key(*name)).collect();
        doubts.extend(unknown.iter().map(|name| format!("[[access]] grants: there is no [grant.{name}]")));
        let named = self.access.iter().flat_map(|access| &access.policies).chain(self.pool.warm.keys());
        let unknown: BTreeSet<&str> = named.map(PolicyName::as_str).filter(|name| !is_policy(name)).collect();
        doubts.extend(unknown.iter().map(|name| {
            format!("policy {name:?}: there is none, or it is wrong; `broker policy check {name}`")
        }));
        doubts
    }

    /// What `peer` may ask for, by the accounts of /etc/passwd and /etc/group as given.
    pub fn rights(&self, peer: Peer, accounts: &Accounts) -> Rights {
        let mut rights = Rights { everything: peer.uid == 0, ..Rights::default() };
        for access in self.access.iter().filter(|access| accounts.match_(access, peer)) {
            rights.policies.extend(access.policies.iter().cloned());
            rights.grants.extend(access.grants.iter().cloned());
            rights.operate.extend(&access.operate);
        }
        rights
    }
}

/// Local accounts: the text of /etc/passwd and /etc/group. Names of other sources are not known; numbers always are.
#[derive(Debug, Clone, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads both files.
    pub fn read() -> Accounts {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Accounts { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    fn match_(&self, access: &Access, peer: Peer) -> bool {
        if let Some(user) = &access.user {
            return self.number(&self.passwd, user) == Some(peer.uid);
        }
        let Some(group) = &access.group else { return false };
        let Some(gid) = self.number(&self.group, group) else { return false };
        gid == peer.gid || self.is_member(peer.uid, gid)
    }

    /// The third field of the line that begins with `name`; a number stands for itself.
    fn number(&self, table: &str, name: &str) -> Option<u32> {
        let of_line = |line: &str| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
        };
        name.parse().ok().or_else(|| table.lines().find_map(of_line))
    }

    fn is_member(&self, uid: u32, gid: u32) -> bool {
        let field = |line: &str, at: usize| line.split(':').nth(at).map(str::to_owned);
        let names = self.passwd.lines().filter(|line| field(line, 2) == Some(uid.to_string()));
        let names: Vec<String> = names.filter_map(|line| field(line, 0)).collect();
        let line = self.group.lines().find(|line| field(line, 2) == Some(gid.to_string()));
        let members = line.and_then(|line| field(line, 3)).unwrap_or_default();
        members.split(',').any(|member| names.iter().any(|name| name == member))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "[[access]]\nuser = \"ada\"\npolicies = [\"default\", \"python\"]\n\
        [[access]]\ngroup = \"ops\"\noperate = [\"list\", \"kill\"]\n[[access]]\nuser = \"7\"\npolicies = [\"node\"]\n";

    fn rights(uid: u32, gid: u32) -> Rights {
        let accounts = Accounts {
            passwd: "root:x:0:0::/:/bin/sh\nada:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\n".into(),
            group: "ops:x:50:bob,eve\nada:x:1000:\n".into(),
        };
        Config::parse(CONFIG).expect("a configuration").rights(Peer { uid, gid }, &accounts)
    }

    fn policy(name: &str) -> PolicyName {
        name.parse().expect("a policy's name")
    }

    #[test]
    fn absent_means_nothing() {
        assert_eq!(rights(1002, 1002), Rights::default());
        assert!(!rights(1002, 1002).may_use(&policy("default")));
        assert!(!Rights::default().may(Verb::List));
    }

    #[test]
    fn a_user_a_group_and_a_number_get_what_is_written() {
        assert!(
            rights(1000, 1000).may_use(&policy("python")) && !rights(1000, 1000).may_use(&policy("build"))
        );
        assert!(!rights(1000, 1000).may(Verb::Kill));
        assert!(rights(1001, 1001).may(Verb::Kill), "by membership");
        assert!(rights(4000, 50).may(Verb::List), "by primary group");
        assert!(rights(7, 7).may_use(&policy("node")));
    }

    #[test]
    fn root_may_everything() {
        assert!(rights(0, 0).may_use(&policy("build")) && rights(0, 0).may(Verb::Kill));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, said) in [
            ("[[access]]\npolicies = []\n", "`user` or `group`"),
            ("[[access]]\nuser = \"a\"\ngroup = \"b\"\n", "`user` or `group`"),
            ("[server]\nsocked = \"/x\"\n", "line 2"),
            ("[[access]]\nuser = \"a\"\noperate = [\"fly\"]\n", "fly"),
            ("[[access]]\nuser = \"a\"\npolicies = [\"../x\"]\n", "../x"),
        ] {
            let error = Config::parse(text).expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
