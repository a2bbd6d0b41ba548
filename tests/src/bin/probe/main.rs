//! The attacker's side of the catalogue: `probe ROW [ARGUMENT...]` tries what a row of the catalogue tries and
//! prints one JSON line for each case. The same binary runs on the host (control) and inside a sandbox.
//!
//! Where the real call would have an effect, it is made with a bad pointer or descriptor: `EFAULT`, `EBADF` and
//! `EINVAL` mean that the kernel's own code was *reached* (`open`), `EPERM` and `ENOSYS` that it was not.
#![allow(unsafe_code, reason = "attacks are raw system calls")]

mod case;
mod fs;
mod kernel;
mod network;
mod process;
mod resource;
mod setup;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(id) = arguments.next() else {
        eprintln!("usage: probe ROW [ARGUMENT...]");
        return ExitCode::from(64);
    };
    let arguments: Vec<String> = arguments.collect();
    let tables = [fs::ROWS, setup::ROWS, process::ROWS, kernel::ROWS, network::ROWS, resource::ROWS];
    let Some(row) = tables.iter().flat_map(|rows| rows.iter()).find(|row| row.id == id) else {
        eprintln!("probe: no row {id}");
        return ExitCode::from(64);
    };
    (row.attempt)(&case::Reporter::new(row.id), &arguments);
    ExitCode::SUCCESS
}
