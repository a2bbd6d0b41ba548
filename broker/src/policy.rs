//! `broker policy`: what policies there are, and what they come to.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use sandbox::{Caller, Host, Job, Library, Plan, Policy, Stream, Wishes};

use crate::cli::{PolicyCommand, WorkspaceArgument};
use crate::library::Policies;

/// Runs the sub-command.
pub fn run(command: PolicyCommand) -> ExitCode {
    let policies = Policies::of_caller();
    let done = match command {
        PolicyCommand::List { json } => list(&policies, json),
        PolicyCommand::Show { policy } => load(&policies, &policy).and_then(|policy| print(&policy)),
        PolicyCommand::Check { policies: names } => check(&policies, &names),
        PolicyCommand::Explain { policy, workspace, json } => {
            load(&policies, &policy).and_then(|policy| explain(&policy, workspace, json))
        }
        PolicyCommand::Schema => print(&sandbox::policy_schema()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("broker: {message}");
            ExitCode::FAILURE
        }
    }
}

fn load(policies: &Policies, name: &str) -> Result<Policy, String> {
    policies.load(name).map_err(|error| error.to_string())
}

fn print(value: &impl serde::Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    say(&format!("{text}\n"));
    Ok(())
}

/// A reader that has seen enough is no error.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn list(policies: &Policies, json: bool) -> Result<(), String> {
    let mut rows = Vec::new();
    for name in policies.names() {
        let description = match load(policies, &name) {
            Ok(policy) => policy.file().description.clone().unwrap_or_default(),
            Err(error) => format!("unusable: {error}"),
        };
        rows.push((policies.origin(&name), name, description));
    }
    if json {
        let row = |(origin, name, description): &(String, String, String)| serde_json::json!({"name": name, "origin": origin, "description": description});
        return print(&rows.iter().map(row).collect::<Vec<_>>());
    }
    for (origin, name, description) in rows {
        say(&format!("{name:<12} {origin:<10} {description}\n"));
    }
    Ok(())
}

fn check(policies: &Policies, names: &[String]) -> Result<(), String> {
    let failed: Vec<String> = names.iter().filter_map(|name| load(policies, name).err()).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\nbroker: ")) }
}

/// The plan of a run with this policy and pipes.
fn explain(policy: &Policy, workspace: Option<WorkspaceArgument>, json: bool) -> Result<(), String> {
    let command = vec![OsString::from("COMMAND")];
    let wishes = Wishes { command, workspace, streams: [Stream::Pipe; 3], ..Wishes::default() };
    let job = Job::narrow(policy, wishes).map_err(|error| error.to_string())?;
    let host = Host::probe(policy, Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH")));
    let plan = Plan::make(policy, &job, &host).map_err(|error| error.to_string())?;
    if json {
        return print(&plan);
    }
    say(&plan.to_string());
    Ok(())
}
