//! `broker`: runs tools confined.

mod changes;
mod cli;
mod connection;
mod doctor;
mod exec;
mod grants;
mod library;
mod operate;
mod policy;
mod report_file;
mod say;
mod serve;
mod through_daemon;

use std::process::ExitCode;

use broker_client::{Client, ClientError, grant, protocol, rights, wire};

use crate::say::complain;

fn main() -> ExitCode {
    match cli::parse() {
        cli::Command::Exec(arguments) => exec::run(*arguments),
        cli::Command::Policy(command) => policy::run(command),
        cli::Command::Serve { config } => serve::serve(config.as_deref()),
        cli::Command::Role { role: cli::Role::Core, .. } => serve::role_core(),
        cli::Command::Role { role: cli::Role::Vault, number } => serve::role(serve::Role::Vault, number),
        cli::Command::Role { role: cli::Role::Resolver, number } => {
            serve::role(serve::Role::Resolver, number)
        }
        cli::Command::Role { role: cli::Role::Gateway, number } => serve::role(serve::Role::Gateway, number),
        cli::Command::Ps { connect, json } => operate::list(&connect.socket(), json),
        cli::Command::Inspect { sandbox, connect } => operate::inspect(&connect.socket(), &sandbox),
        cli::Command::Kill { sandbox, connect } => operate::kill(&connect.socket(), &sandbox),
        cli::Command::Grant(command) => grants::grant(command),
        cli::Command::Credential(command) => grants::credential(command),
        cli::Command::Diff { sandbox, workspace, connect, json } => {
            changes::diff(&connect.socket(), sandbox.as_deref(), workspace, json)
        }
        cli::Command::Commit { sandbox, workspace, force, connect } => {
            let conflicts = if force { changes::Conflicts::Overwrite } else { changes::Conflicts::Keep };
            changes::commit(&connect.socket(), &sandbox, workspace, conflicts)
        }
        cli::Command::Discard { sandbox, connect } => changes::discard(&connect.socket(), &sandbox),
        cli::Command::Audit(cli::AuditCommand::Show { state }) => serve::audit_show(&state),
        cli::Command::Audit(cli::AuditCommand::Verify { state }) => serve::audit_verify(&state),
        cli::Command::Doctor { json } => doctor::run(json),
        cli::Command::Completions { shell } => match cli::completions(shell) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain!("{error}");
                ExitCode::FAILURE
            }
        },
        cli::Command::Man { directory } => match cli::man_pages(&directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain!("cannot write man pages into {}: {error}", directory.display());
                ExitCode::FAILURE
            }
        },
    }
}
