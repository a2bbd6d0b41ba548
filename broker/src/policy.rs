//! `broker policy`: what policies there are, and what they come to.

use std::ffi::OsString;
use std::process::ExitCode;

use sandbox::{Caller, Host, Job, Library, Plan, PlanError, Policy, Stream, Wishes};

use crate::cli::{PolicyCommand, WorkspaceArgument};
use crate::library::Policies;
use crate::say::{self, complain};

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
            complain!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn load(policies: &Policies, name: &str) -> Result<Policy, String> {
    policies.load(name).map_err(|error| error.to_string())
}

fn print(value: &impl serde::Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    say::print(&format!("{text}\n"))
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
    let line = |(origin, name, description): (String, String, String)| {
        say::one_line(&format!("{name:<12} {origin:<10} {description}")) + "\n"
    };
    say::print(&rows.into_iter().map(line).collect::<String>())
}

fn check(policies: &Policies, names: &[String]) -> Result<(), String> {
    let failed: Vec<String> = names.iter().filter_map(|name| check_one(policies, name).err()).collect();
    let Some((last, others)) = failed.split_last() else { return Ok(()) };
    others.iter().for_each(|error| complain!("{error}"));
    Err(last.clone())
}

/// What no host could do is an error of the policy; what this host cannot do is not.
fn check_one(policies: &Policies, name: &str) -> Result<(), String> {
    let policy = load(policies, name)?;
    let wishes = Wishes { command: vec![OsString::from("COMMAND")], ..Wishes::default() };
    let job = Job::narrow(&policy, wishes).map_err(|error| error.to_string())?;
    let caller = Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH"));
    let host = Host::probe(&policy, Caller { uid: 0, ..caller });
    match Plan::make(&policy, &job, &host) {
        Err(error @ PlanError::Reserved { .. }) => Err(format!("policy {name}: {error}")),
        _ => Ok(()),
    }
}

/// The plan of a run with this policy and pipes.
fn explain(policy: &Policy, workspace: Option<WorkspaceArgument>, json: bool) -> Result<(), String> {
    let command = vec![OsString::from("COMMAND")];
    let workspace = workspace.map(found).transpose()?;
    let wishes = Wishes { command, workspace, streams: [Stream::Pipe; 3], ..Wishes::default() };
    let job = Job::narrow(policy, wishes).map_err(|error| error.to_string())?;
    let host = Host::probe(policy, Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH")));
    let plan = Plan::make(policy, &job, &host).map_err(|error| error.to_string())?;
    if json {
        return print(&plan);
    }
    say::print(&plan.to_string())
}

/// Where the workspace really is, as the run would have to be told.
fn found(wish: WorkspaceArgument) -> Result<WorkspaceArgument, String> {
    let failed = |why: String| format!("the workspace {}: {why}", wish.directory.display());
    let directory = wish.directory.canonicalize().map_err(|error| failed(error.to_string()))?;
    if !directory.is_dir() {
        return Err(failed("not a directory".to_owned()));
    }
    Ok(WorkspaceArgument { directory, ..wish })
}
