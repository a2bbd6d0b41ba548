//! `broker`: runs tools confined.

mod cli;
mod doctor;
mod exec;
mod library;
mod policy;
mod report_file;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::parse() {
        cli::Command::Exec(arguments) => exec::run(*arguments),
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
