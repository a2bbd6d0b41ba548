//! What a grant of kind `http` allows: methods on paths.

use serde::{Deserialize, Serialize};

use super::Grant;

/// What one rule may hold.
const PATH_BYTES_MAX: usize = 1024;
const METHODS_MAX: usize = 16;
const METHOD_BYTES_MAX: usize = 32;

/// What may be asked for: one of the methods, on a path of this form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// In capitals.
    pub methods: Vec<String>,
    /// Segments; `*` stands for any one, `**` at the end for all that follow.
    pub path: String,
}

/// `GET,HEAD /repos/acme/**`
impl std::str::FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (methods, path) =
            text.split_once(' ').ok_or("methods, a blank and a path, as `GET,HEAD /repos/**`")?;
        let rule = Rule { methods: methods.split(',').map(str::to_owned).collect(), path: path.to_owned() };
        rule.fault().map_or(Ok(rule), Err)
    }
}

/// Why a request is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No rule allows it.
    NotAllowed,
    /// Its path can be read in two ways.
    Ambiguous,
}

impl Grant {
    /// Whether a request may be passed on. `path` is what is forwarded, byte for byte.
    ///
    /// # Errors
    /// Why not.
    pub fn allows(&self, method: &str, path: &str) -> Result<(), Refusal> {
        if !path.starts_with('/') || path.split('/').skip(1).any(is_ambiguous) {
            return Err(Refusal::Ambiguous);
        }
        let allowed = |rules: &Vec<Rule>| rules.iter().any(|rule| rule.allows(method, path));
        if std::iter::once(&self.allow).chain(&self.also).all(allowed) {
            Ok(())
        } else {
            Err(Refusal::NotAllowed)
        }
    }
}

impl Rule {
    /// What is wrong with it, in words.
    pub fn fault(&self) -> Option<String> {
        self.is_faulty().then(|| {
            format!(
                "allow: {:?}: methods in capitals, a path that begins with `/`, `**` at its end only",
                self.path.chars().take(80).collect::<String>()
            )
        })
    }

    fn allows(&self, method: &str, path: &str) -> bool {
        self.methods.iter().any(|allowed| allowed == method) && matches(&self.path, path)
    }

    fn is_faulty(&self) -> bool {
        let method =
            |method: &String| !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase());
        let mut segments: Vec<&str> = self.path.split('/').skip(1).collect();
        let last = segments.pop();
        !self.path.starts_with('/')
            || self.path.len() > PATH_BYTES_MAX
            || self.methods.len() > METHODS_MAX
            || self.methods.iter().any(|method| method.len() > METHOD_BYTES_MAX)
            || self.methods.is_empty()
            || !self.methods.iter().all(method)
            // Ends whatever may come after it, and would make us a proxy for anything.
            || self.methods.iter().any(|method| method == "CONNECT" || method == "TRACE")
            || segments.into_iter().chain(last.filter(|last| *last != "**")).any(|segment| segment.contains("**") || is_ambiguous(segment))
    }
}

/// A segment that some would read as another: `.` and `..`, also as `%2e`, a hidden `/` or `\`, an encoding of an encoding, what
/// is cut off at `;`, and what is no ASCII.
fn is_ambiguous(segment: &str) -> bool {
    let mut decoded = Vec::new();
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else { return true };
                let decoded = (high * 16 + low).to_le_bytes()[0];
                if decoded == b'/' || decoded == b'%' {
                    return true;
                }
                decoded
            }
            byte => byte,
        };
        decoded.push(byte);
    }
    let control = |byte: &u8| *byte < 32 || *byte == 127 || *byte == b'\\' || *byte == b';';
    decoded == b"." || decoded == b".." || decoded.iter().any(control) || !segment.is_ascii()
}

fn matches(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return true,
            (Some("**"), Some(_)) => return true,
            (Some("*"), Some(segment)) if !segment.is_empty() => {}
            (Some(wanted), Some(segment)) if wanted == segment => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(allow: &[(&str, &str)]) -> Grant {
        let allow =
            allow.iter().map(|(method, path)| Rule { methods: vec![(*method).into()], path: (*path).into() });
        let allow: Vec<Rule> = allow.collect();
        let text = "kind = \"http\"\nhost = \"api.test\"\nupstream = \"127.0.0.1:8443\"\n";
        Grant { allow, ..toml::from_str(text).expect("a grant") }
    }

    #[test]
    fn only_what_a_rule_names_is_allowed() {
        let grant = grant(&[("GET", "/repos/acme/**"), ("POST", "/repos/*/issues")]);
        for (method, path) in
            [("GET", "/repos/acme/x"), ("GET", "/repos/acme/x/y"), ("POST", "/repos/b/issues")]
        {
            assert_eq!(grant.allows(method, path), Ok(()), "{method} {path}");
        }
        for (method, path) in [
            ("GET", "/repos/acme"),
            ("GET", "/repos/acmee/x"),
            ("GET", "/Repos/acme/x"),
            ("POST", "/repos/acme/x"),
            ("get", "/repos/acme/x"),
            ("POST", "/repos//issues"),
            ("POST", "/repos/b/c/issues"),
            ("POST", "/repos/b/issues/"),
            ("GET", "/"),
        ] {
            assert_eq!(grant.allows(method, path), Err(Refusal::NotAllowed), "{method} {path}");
        }
    }

    /// Whatever reads these in another way than byte for byte is led elsewhere.
    #[test]
    fn a_path_that_can_be_read_in_two_ways_is_refused() {
        let grant = grant(&[("GET", "/**")]);
        for path in [
            "/a/../b",
            "/a/./b",
            "/a/%2e%2e/b",
            "/a/.%2E/b",
            "/a%2fb",
            "/a%5cb",
            "/a\\b",
            "/a%252e",
            "/a;b/c",
            "/a%00",
            "/a%",
            "/a%2",
            "/a%zz",
            "/\u{e4}",
            "a",
            "",
            "*",
            "http://x/",
        ] {
            assert_eq!(grant.allows("GET", path), Err(Refusal::Ambiguous), "{path}");
        }
        assert_eq!(grant.allows("GET", "/a%20b/.../..c"), Ok(()));
    }
}
