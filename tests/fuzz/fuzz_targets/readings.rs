//! A grant, and how servers may read a path.

use crate::grant::Grant;

/// What the operator allowed.
pub fn grant() -> Grant {
    let text = "kind = \"http\"\nhost = \"api.test\"\nallow = [{ methods = [\"GET\", \"POST\"], path = \"/a/**\" }]\n";
    toml::from_str(text).expect("a grant")
}

/// Where any of the servers may end that decode a path once more, take a backslash for a slash, cut at a semicolon, or go up.
pub fn readings(path: &str) -> Vec<String> {
    let mut all = vec![path.to_owned()];
    for _ in 0..3 {
        let last = all.last().expect("one").clone();
        all.push(decoded(&last));
    }
    let cut = |path: &String| {
        path.split('/').map(|part| part.split(';').next().unwrap_or("")).collect::<Vec<_>>().join("/")
    };
    let slashes = |path: &String| path.replace('\\', "/");
    let more: Vec<String> =
        all.iter().flat_map(|path| [cut(path), slashes(path), cut(&slashes(path))]).collect();
    all.extend(more);
    all.iter().map(|path| climbed(path)).collect()
}

fn decoded(path: &str) -> String {
    let bytes = path.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match hex.filter(|_| bytes[at] == b'%') {
            Some(byte) => (out.push(byte), at += 3).0,
            None => (out.push(bytes[at]), at += 1).0,
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn climbed(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}
