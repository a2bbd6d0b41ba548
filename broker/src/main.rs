//! `broker`: runs tools confined.

mod cli;
mod doctor;
mod exec;
mod library;
mod policy;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The dear part of a run needs nothing from the command line, and goes on beside reading it.
    let nest = std::env::args_os().nth(1).filter(|command| command == "exec").map(|_| sandbox::Nest::begin());
    match cli::parse() {
        cli::Command::Exec(arguments) => exec::run(arguments, nest.unwrap_or_else(sandbox::Nest::begin)),
        cli::Command::Policy(command) => policy::run(command),
        cli::Command::Doctor { json } => doctor::run(json),
        cli::Command::Completions { shell } => {
            cli::completions(shell);
            ExitCode::SUCCESS
        }
        cli::Command::Man { directory } => match cli::man_pages(&directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("broker: cannot write man pages into {}: {error}", directory.display());
                ExitCode::FAILURE
            }
        },
    }
}
