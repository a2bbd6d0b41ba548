//! `harness`: sessions on the command line.

mod cli;
mod launch;
mod operate;
mod show;

use std::process::ExitCode;

use cli::Command;

/// One line on standard error.
macro_rules! complain {
    ($($words:tt)*) => {
        eprintln!("harness: {}", crate::show::tame(&format!($($words)*)))
    };
}
pub(crate) use complain;

fn main() -> ExitCode {
    let done = match cli::parse() {
        Command::Run(run) => launch::run(*run),
        Command::Wake { session, drive } => launch::wake(&session, &drive),
        Command::Drive { sessions, drive } => launch::drive_all(sessions, &drive),
        Command::Completions { shell } => {
            cli::completions(shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => cli::man_pages(&directory)
            .map(|()| ExitCode::SUCCESS)
            .map_err(|error| format!("cannot write man pages into {}: {error}", directory.display())),
        other => operate::run(other),
    };
    done.unwrap_or_else(|error| {
        complain!("{error}");
        ExitCode::FAILURE
    })
}
