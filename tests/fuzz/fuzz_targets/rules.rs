//! Any bytes as a method and a path: what a rule lets through is below its path however a server reads it, and what is derived from a
//! grant never allows more.

#![no_main]

#[path = "../../../broker/client/src/grant/mod.rs"]
#[allow(dead_code, unused_imports)]
mod grant;
mod readings;

use grant::{GrantId, Narrowing, Rule};
use libfuzzer_sys::fuzz_target;
use readings::{grant, readings};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.splitn(3, '\n');
    let (path, method, pattern) = (lines.next().unwrap_or(""), lines.next().unwrap_or("GET"), lines.next());
    let parent = grant();
    let allowed = parent.allows(method, path);
    if allowed.is_ok() {
        for reading in readings(path) {
            assert!((reading.clone() + "/").starts_with("/a/"), "{path:?} can be read as {reading:?}");
        }
    }
    let rule = Rule { methods: vec![method.to_owned()], path: pattern.unwrap_or("/**").to_owned() };
    let id: GrantId = "api".parse().expect("a grant");
    let by = Narrowing { allow: vec![rule], ..Narrowing::default() };
    if let Ok(child) = parent.narrowed(&id, &by) {
        assert!(allowed.is_ok() || child.allows(method, path).is_err(), "{method:?} {path:?}");
    }
});
