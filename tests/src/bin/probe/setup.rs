//! The set-up rows: what reaches a program through the way it was started. Most of them are the host's side
//! alone and live with their tests.

use crate::case::{Reporter, Row};

pub const ROWS: &[Row] = &[Row { id: "SU-07", attempt: environment }];

/// SU-07 `TOKEN NAME...`: variables of the caller, each by name and then anything that carries their value.
fn environment(report: &Reporter, arguments: &[String]) {
    let token = arguments[0].as_bytes();
    for name in &arguments[1..] {
        match std::env::var_os(name) {
            Some(value) => report.open(name, &value.to_string_lossy()),
            None => report.denied(name, 0, ""),
        }
    }
    // Every process that can be looked at: a helper that still has the caller's environment gives it away as
    // well.
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let found: Vec<String> = processes
        .filter_map(|process| {
            let path = process.path().join("environ");
            let bytes = std::fs::read(&path).ok()?;
            bytes.windows(token.len()).any(|window| window == token).then(|| path.display().to_string())
        })
        .collect();
    match found.is_empty() {
        true => report.denied("any environment", 0, ""),
        false => report.open("any environment", &found.join(" ")),
    }
}
