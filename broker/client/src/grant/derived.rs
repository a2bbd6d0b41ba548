//! A grant that was made narrower: which it is of, and what is left of it. It never allows what the one above it does not, since
//! that one is asked too.

use std::fmt;

use sandbox::{ByteSize, Span};
use serde::{Deserialize, Serialize};

use super::{Grant, Kind, Name, Rule};

/// How often one may be derived from another.
const DEPTH_MAX: usize = 8;
/// The most rules that one derivation adds.
const RULES_MAX: usize = 64;

/// A grant of a sandbox: `NAME`, as the configuration has it, or one that was derived, `NAME/1/2`. What is below a name was derived
/// from it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GrantId(String);

impl GrantId {
    /// The first one derived from it is number 1.
    pub fn child(&self, number: usize) -> GrantId {
        GrantId(format!("{}/{number}", self.0))
    }

    /// The grant of the configuration that it was derived from.
    pub fn root(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }

    /// Whether it is of the configuration itself.
    pub fn is_root(&self) -> bool {
        !self.0.contains('/')
    }

    /// Whether it is `other`, or was derived from it.
    pub fn is_within(&self, other: &GrantId) -> bool {
        self.0.strip_prefix(&other.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    fn depth(&self) -> usize {
        self.0.split('/').count() - 1
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<&Name> for GrantId {
    fn from(name: &Name) -> GrantId {
        GrantId(name.to_string())
    }
}

impl From<GrantId> for String {
    fn from(id: GrantId) -> String {
        id.0
    }
}

impl TryFrom<String> for GrantId {
    type Error = String;

    fn try_from(text: String) -> Result<GrantId, String> {
        let mut parts = text.split('/');
        let name = parts.next().unwrap_or_default().parse::<Name>();
        let number =
            |part: &str| !part.starts_with('0') && part.parse::<u32>().is_ok_and(|number| number > 0);
        if name.is_ok() && parts.all(number) {
            return Ok(GrantId(text));
        }
        Err(format!("{text:?} is no grant: a name, or a name and numbers as `github/1`"))
    }
}

impl std::str::FromStr for GrantId {
    type Err = String;

    fn from_str(text: &str) -> Result<GrantId, String> {
        text.to_owned().try_into()
    }
}

/// By how much a grant is made narrower. What is not said stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Narrowing {
    /// Of what may be asked for, only this.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Rule>,
    /// How many connections may be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uses: Option<u64>,
    /// How much may go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ByteSize>,
    /// How long from now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Span>,
}

impl Grant {
    /// What is left of it, for one that is derived from `id`. Uses, bytes and time of those above are counted there too.
    ///
    /// # Errors
    /// What cannot be asked of it, in words.
    pub fn narrowed(&self, id: &GrantId, by: &Narrowing) -> Result<Grant, String> {
        if id.depth() >= DEPTH_MAX {
            return Err(format!("it was derived {DEPTH_MAX} times already"));
        }
        if self.kind != Kind::Http && !by.allow.is_empty() {
            return Err("its kind looks at nothing, so `allow` means nothing".to_owned());
        }
        if by.allow.len() > RULES_MAX {
            return Err(format!("more than {RULES_MAX} rules"));
        }
        if let Some(fault) = by.allow.iter().find_map(Rule::fault) {
            return Err(fault);
        }
        let mut left = self.clone();
        left.also.extend((!by.allow.is_empty()).then(|| by.allow.clone()));
        left.uses = least(self.uses, by.uses);
        left.bytes = least(self.bytes, by.bytes);
        left.expires = by.expires;
        Ok(left)
    }
}

fn least<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Refusal;
    use super::*;

    fn id(text: &str) -> GrantId {
        text.parse().expect("a grant")
    }

    #[test]
    fn what_is_below_a_name_is_within_it_and_nothing_else() {
        let github = GrantId::from(&"github".parse::<Name>().expect("a name"));
        let first = github.child(1);
        assert_eq!(
            (github.is_root(), first.is_root(), first.to_string()),
            (true, false, "github/1".to_owned())
        );
        assert!(first.is_within(&github) && first.is_within(&first) && first.child(2).is_within(&github));
        for other in ["github/10", "github/2", "git", "github-x"] {
            assert!(!id(other).is_within(&first) && !first.is_within(&id(other)), "{other}");
        }
        for wrong in [
            "",
            "/",
            "github/",
            "github/0",
            "github/01",
            "github/x",
            "github//1",
            "../1",
            "github/1/",
            "github/-1",
            "github/99999999999",
        ] {
            assert!(wrong.parse::<GrantId>().is_err(), "{wrong}");
        }
    }

    fn rules() -> impl Strategy<Value = Vec<Rule>> {
        let rule = (prop::collection::vec("GET|PUT|POST", 1..3), "(/(a|b|ab|\\*)){0,3}(/|/a|/\\*\\*)")
            .prop_map(|(methods, path)| Rule { methods, path });
        prop::collection::vec(rule, 0..4)
    }

    fn narrowing() -> impl Strategy<Value = Narrowing> {
        let uses = prop::option::of(0..100_u64);
        let bytes = prop::option::of(1..1000_u64);
        (rules(), uses, bytes).prop_map(|(allow, uses, bytes)| Narrowing {
            allow,
            uses,
            bytes: bytes.map(|bytes| format!("{bytes}B").parse().expect("a size")),
            expires: None,
        })
    }

    /// None is no limit at all.
    fn most<T: Ord>(child: Option<T>, parent: Option<T>) -> bool {
        parent.is_none_or(|parent| child.is_some_and(|child| child <= parent))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever is asked of it, by whomever it was derived, however often.
        #[test]
        fn no_derived_grant_allows_what_its_parent_does_not(
            first in rules(),
            chain in prop::collection::vec(narrowing(), 1..4),
            requests in prop::collection::vec(("GET|PUT|POST|DELETE", "(/(a|b|ab|\\.\\.|%2e|c)){0,4}/?"), 1..30),
        ) {
            let text = "kind = \"http\"\nhost = \"api.test\"\n";
            let mut parent = Grant { allow: first, ..toml::from_str(text).expect("a grant") };
            let mut id = id("api");
            for by in chain {
                let child = parent.narrowed(&id, &by).map_err(TestCaseError::fail)?;
                for (method, path) in &requests {
                    let (above, below) = (parent.allows(method, path), child.allows(method, path));
                    prop_assert!(above.is_ok() || below.is_err(), "{method} {path}: {parent:?} {child:?}");
                    let own = Grant { allow: by.allow.clone(), also: Vec::new(), ..parent.clone() };
                    let expected = by.allow.is_empty() || own.allows(method, path).is_ok();
                    prop_assert_eq!(below.is_ok(), above.is_ok() && expected);
                    prop_assert!(below != Err(Refusal::Ambiguous) || above == Err(Refusal::Ambiguous));
                }
                prop_assert!(most(child.uses, parent.uses) && most(child.bytes, parent.bytes));
                prop_assert!(most(child.uses, by.uses) && most(child.bytes, by.bytes));
                // Where it goes, and as whom, is what it was.
                prop_assert_eq!((&child.host, child.upstream, &child.credential, &child.inject, child.ports()),
                    (&parent.host, parent.upstream, &parent.credential, &parent.inject, parent.ports()));
                id = id.child(1);
                parent = child;
            }
        }
    }

    #[test]
    fn what_means_nothing_or_goes_too_deep_is_refused() {
        let tcp: Grant = toml::from_str("kind = \"tcp\"\nhost = \"a.test\"\nport = 1\n").expect("a grant");
        let rule = Rule { methods: vec!["GET".into()], path: "/".into() };
        let by = Narrowing { allow: vec![rule.clone()], ..Narrowing::default() };
        assert!(tcp.narrowed(&id("a"), &by).is_err_and(|why| why.contains("looks at nothing")));
        let http = Grant { kind: Kind::Http, allow: vec![rule.clone()], ..tcp };
        assert!(http.narrowed(&id("a/1/1/1/1/1/1/1"), &by).is_ok());
        assert!(http.narrowed(&id("a/1/1/1/1/1/1/1/1"), &by).is_err_and(|why| why.contains("8 times")));
        let many = Narrowing { allow: vec![rule.clone(); 65], ..Narrowing::default() };
        assert!(http.narrowed(&id("a"), &many).is_err_and(|why| why.contains("rules")));
        let wrong = Narrowing {
            allow: vec![Rule { methods: vec!["CONNECT".into()], ..rule }],
            ..Narrowing::default()
        };
        assert!(http.narrowed(&id("a"), &wrong).is_err_and(|why| why.contains("allow")));
    }
}
