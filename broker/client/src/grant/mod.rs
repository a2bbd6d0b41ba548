//! Grants and credentials as the configuration writes them, and what a grant allows. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use sandbox::{ByteSize, Span};
use serde::{Deserialize, Serialize};

pub use derived::{GrantId, Narrowing};
pub use rules::{Refusal, Rule};

mod derived;
mod rules;

/// The longest name of a host (RFC 1035, 2.3.4), and of one of its parts.
const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// Where a template takes the secret.
const SECRET: &str = "{secret}";

/// The name of a grant or a credential: one word.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> Result<Name, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        if (1..=64).contains(&text.len()) && text.bytes().all(plain) {
            return Ok(Name(text));
        }
        Err(format!("{text:?} is no name: 1 to 64 letters, digits, `_` and `-`"))
    }
}

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Name, String> {
        text.to_owned().try_into()
    }
}

/// A host by name, in lower case: letters, digits and hyphens (RFC 952, RFC 1123). Never an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Host(String);

impl Host {
    /// Without a dot at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Host {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<Host> for String {
    fn from(host: Host) -> String {
        host.0
    }
}

impl TryFrom<String> for Host {
    type Error = String;

    fn try_from(text: String) -> Result<Host, String> {
        let label = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let last = text.rsplit('.').next().unwrap_or_default();
        // What ends in a number is read as an address by some (RFC 3696, 2).
        let is_address = last.bytes().all(|byte| byte.is_ascii_digit());
        if text.len() <= HOST_BYTES_MAX && text.split('.').all(label) && !is_address {
            return Ok(Host(text));
        }
        Err(format!("{text:?} is no host's name: lower-case letters, digits, `-` and `.`, and no address"))
    }
}

/// Where a credential comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    /// The vault's own store, where `broker credential add` puts it.
    Store(Name),
    /// A file of root's.
    File(PathBuf),
    /// A credential of the service (`LoadCredential=`, systemd.exec(5)).
    Systemd(Name),
}

impl From<Source> for String {
    fn from(source: Source) -> String {
        match source {
            Source::Store(name) => format!("store:{name}"),
            Source::File(path) => format!("file:{}", path.display()),
            Source::Systemd(name) => format!("systemd:{name}"),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = String;

    fn try_from(text: String) -> Result<Source, String> {
        match text.split_once(':') {
            Some(("store", name)) => Ok(Source::Store(name.parse()?)),
            Some(("systemd", name)) => Ok(Source::Systemd(name.parse()?)),
            Some(("file", path)) if path.starts_with('/') => Ok(Source::File(path.into())),
            _ => Err(format!("{text:?} is no source: `store:NAME`, `file:/PATH` or `systemd:NAME`")),
        }
    }
}

/// `[credential.NAME]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    /// Where it comes from.
    pub source: Source,
}

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Bytes, as they are.
    Tcp,
    /// HTTP/1.1.
    Http,
}

/// Whether the upstream is spoken to over TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamTls {
    /// Its certificate has to be the host's.
    #[default]
    Verify,
    /// In the clear.
    Off,
}

/// The header that carries the credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inject {
    /// Its name.
    pub header: String,
    /// Its value, with `{secret}` in it.
    pub value: String,
}

impl Inject {
    /// The value with the secret in it.
    pub fn rendered(&self, secret: &str) -> String {
        self.value.replace(SECRET, secret)
    }
}

/// `[grant.NAME]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// What is spoken.
    pub kind: Kind,
    /// The name that the workload uses.
    pub host: Host,
    /// Its port; 443 for `http`.
    #[serde(default)]
    pub port: Option<u16>,
    /// Which credential goes in.
    #[serde(default)]
    pub credential: Option<Name>,
    /// How it goes in.
    #[serde(default)]
    pub inject: Option<Inject>,
    /// What may be asked for; nothing else is.
    #[serde(default)]
    pub allow: Vec<Rule>,
    /// What each of those who derived it allows too. No configuration says this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Vec<Rule>>,
    /// Where it is. Only the operator can say so; without it, the name is looked up.
    #[serde(default)]
    pub upstream: Option<SocketAddr>,
    /// Whether that is spoken to over TLS.
    #[serde(default)]
    pub upstream_tls: UpstreamTls,
    /// `file:/PATH`: the authority that its certificate has to be of; the host's own where there is none.
    #[serde(default)]
    pub upstream_ca: Option<String>,
    /// What stands there. Read when the service starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Also answer in the clear inside, on port 80.
    #[serde(default)]
    pub plain: bool,
    /// How many connections may be made by one sandbox.
    #[serde(default)]
    pub uses: Option<u64>,
    /// How much may go through, both ways together, before it is cut.
    #[serde(default)]
    pub bytes: Option<ByteSize>,
    /// How long after the sandbox was started.
    #[serde(default)]
    pub expires: Option<Span>,
}

impl Grant {
    /// Ports that are listened at, and whether TLS is spoken there.
    pub fn ports(&self) -> Vec<(u16, bool)> {
        match self.kind {
            Kind::Tcp => self.port.map(|port| (port, false)).into_iter().collect(),
            Kind::Http => {
                let plain = self.plain.then_some((80, false));
                std::iter::once((self.port.unwrap_or(443), true)).chain(plain).collect()
            }
        }
    }

    /// Where it is looked for at its upstream, where no address is pinned.
    pub fn upstream_port(&self) -> u16 {
        self.port.unwrap_or(if self.upstream_tls == UpstreamTls::Off { 80 } else { 443 })
    }

    /// What is wrong with it, in words.
    fn fault(&self, credentials: &BTreeMap<Name, Credential>) -> Option<String> {
        let unknown = self.credential.as_ref().filter(|name| !credentials.contains_key(name));
        if let Some(name) = unknown {
            return Some(format!("there is no [credential.{name}]"));
        }
        if self.authority.is_some() {
            return Some("unknown field `authority`; `upstream_ca` names a file".into());
        }
        if !self.also.is_empty() {
            return Some("unknown field `also`".into());
        }
        match self.kind {
            Kind::Tcp => self.fault_of_tcp(),
            Kind::Http => self.fault_of_http(),
        }
    }

    fn fault_of_tcp(&self) -> Option<String> {
        let inspects =
            self.credential.is_some() || self.inject.is_some() || !self.allow.is_empty() || self.plain;
        if self.port.is_none() {
            return Some("kind `tcp` needs `port`".into());
        }
        if inspects || self.upstream_ca.is_some() || self.upstream_tls != UpstreamTls::Verify {
            return Some(
                "kind `tcp` looks at nothing: it has no credential, inject, allow, plain or upstream_*"
                    .into(),
            );
        }
        None
    }

    fn fault_of_http(&self) -> Option<String> {
        if self.credential.is_some() != self.inject.is_some() {
            return Some("`credential` and `inject` go together".into());
        }
        if self.allow.is_empty() {
            return Some("kind `http` needs `allow`: what is not named there is refused".into());
        }
        if self.plain && self.port == Some(80) {
            return Some("`plain` answers at port 80 already".into());
        }
        if let Some(inject) = &self.inject {
            let ours =
                ["host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"];
            let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
            let header = inject.header.to_ascii_lowercase();
            if header.is_empty() || !header.bytes().all(is_token) || ours.contains(&header.as_str()) {
                return Some(format!("inject: {:?} is no header that can carry a credential", inject.header));
            }
            if inject.value.matches(SECRET).count() != 1
                || inject.value.bytes().any(|byte| !(32..127).contains(&byte))
            {
                return Some("inject: `value` is printable and holds `{secret}` once".into());
            }
        }
        self.allow.iter().find_map(Rule::fault)
    }
}

/// What is wrong with the grants of a configuration, with the name of the first that is.
///
/// # Errors
/// One line.
pub fn check(grants: &BTreeMap<Name, Grant>, credentials: &BTreeMap<Name, Credential>) -> Result<(), String> {
    grants.iter().try_for_each(|(name, grant)| match grant.fault(credentials) {
        Some(fault) => Err(format!("[grant.{name}]: {fault}")),
        None => Ok(()),
    })
}

/// Two of `names` that answer at one host and port: which is meant could not be told.
pub fn ambiguous<'a>(grants: &BTreeMap<Name, Grant>, names: &'a [Name]) -> Option<(&'a Name, &'a Name)> {
    let places = |name: &Name| {
        let grant = grants.get(name)?;
        Some((&grant.host, grant.ports().into_iter().map(|(port, _)| port).collect::<Vec<_>>()))
    };
    for (at, one) in names.iter().enumerate() {
        for other in &names[..at] {
            if let (Some(first), Some(second)) = (places(one), places(other))
                && first.0 == second.0
                && first.1.iter().any(|port| second.1.contains(port))
            {
                return Some((other, one));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_is_a_fault() {
        let base = "kind = \"http\"\nhost = \"api.test\"\nupstream = \"127.0.0.1:1\"\n";
        let allow = "allow = [ { methods = [\"GET\"], path = \"/**\" } ]\n";
        let inject =
            "credential = \"c\"\ninject = { header = \"Authorization\", value = \"Bearer {secret}\" }\n";
        let credentials =
            [("c".parse().expect("a name"), Credential { source: Source::File("/c".into()) })].into();
        let fault = |text: &str| {
            let grant: Grant = toml::from_str(text).expect(text);
            grant.fault(&credentials)
        };
        assert_eq!(fault(&format!("{base}{allow}{inject}")), None);
        for (text, said) in [
            (base.to_owned(), "allow"),
            (format!("{base}{allow}credential = \"c\"\n"), "go together"),
            (format!("{base}{allow}{}", inject.replace("\"c\"", "\"d\"")), "[credential.d]"),
            (format!("{base}{allow}{}", inject.replace("{secret}", "x")), "{secret}"),
            (format!("{base}{allow}{}", inject.replace("Authorization", "Host")), "header"),
            (format!("{base}{allow}{}", inject.replace("Authorization", "A b")), "header"),
            (format!("{base}{}", allow.replace("GET", "CONNECT")), "allow"),
            (format!("{base}{}", allow.replace("/**", "/**/a")), "allow"),
            (format!("{base}{}", allow.replace("/**", "/a/../b")), "allow"),
            (format!("{base}{allow}also = [[]]\n"), "also"),
            (base.replace("http", "tcp"), "port"),
            (format!("{}port = 1\n{allow}", base.replace("http", "tcp")), "looks at nothing"),
        ] {
            let found = fault(&text).unwrap_or_default();
            assert!(found.contains(said), "{text}: {found}");
        }
        for host in ["127.0.0.1", "a..b", "A.test", "a_b", "", "a.", "-a", "a.1", "[::1]", "a b"] {
            assert!(Host::try_from(host.to_owned()).is_err(), "{host}");
        }
    }
}
