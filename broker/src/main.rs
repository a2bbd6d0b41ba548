//! `broker`: runs tools confined.

mod cli;
mod exec;
mod library;
mod policy;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::parse() {
        cli::Command::Exec(arguments) => exec::run(arguments),
        cli::Command::Policy(command) => policy::run(command),
    }
}
