//! `broker exec`: one confined run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sandbox::{Caller, Host, Job, LaunchError, Outcome, Plan, Policy, Report, Terminal, Wishes};

use crate::cli::{EnvArgument, ExecArguments};
use crate::library::Policies;
use crate::report_file::ReportFile;
use crate::say::complain;
use crate::serve::SOCKET;
use crate::through_daemon;
use crate::{Client, ClientError};

/// What `broker exec` exits with when it could not do what was asked.
const CANNOT: u8 = 125;

/// Runs the command; the exit status is as `INTERFACES` says.
pub fn run(arguments: ExecArguments) -> ExitCode {
    let report_to = arguments.report.clone();
    let report_file = match report_to.as_deref().map(ReportFile::open).transpose() {
        Ok(file) => file,
        Err(error) => return cannot_report(report_to.as_deref(), &error),
    };
    match daemon(&arguments) {
        Ok(Some((socket, client))) => return through(arguments, client, &socket, report_file.as_ref()),
        Ok(None) => {}
        Err(error) => return refuse(&error),
    }
    if arguments.workspace.as_ref().is_some_and(|wish| wish.mode == sandbox::WorkspaceMode::CopyOnWrite) {
        return refuse(
            "--workspace: mode `cow` needs the daemon, which keeps the changes; start `broker serve`, or use `ro` or `rw`",
        );
    }
    if !arguments.grant.is_empty() {
        return refuse(
            "--grant needs the daemon, which holds the credentials; start `broker serve`, or use --connect",
        );
    }
    let (policy, plan) = match prepare(arguments) {
        Ok(prepared) => prepared,
        Err(error) => {
            let outcome = serde_json::json!({ "kind": "setup_failed", "step": "plan", "message": error });
            let text = format!("{:#}\n", serde_json::json!({ "outcome": outcome }));
            let _ = report_file.map(|file| file.write(&text));
            return refuse(&error);
        }
    };
    let ran = sandbox::run(&plan, &sandbox::shared_directory());
    let status = match &ran {
        Ok(report) => {
            let command =
                plan.command.arguments.first().map(|name| name.to_string_lossy()).unwrap_or_default();
            explain(&report.outcome, &command);
            explain_output(report);
            // Output that got lost is no success, whatever the command made of it.
            if report.denials.output_errno.is_some() { CANNOT } else { report.outcome.exit_status() }
        }
        Err(error) => {
            complain!("{error}");
            CANNOT
        }
    };
    if let Some(file) = report_file
        && let Err(error) = report_text(&ran, &policy, &plan).and_then(|text| file.write(&text))
    {
        return cannot_report(report_to.as_deref(), &error);
    }
    ExitCode::from(status)
}

/// The daemon, where one is asked for or answers. What it cannot do yet goes on embedded, where the caller may.
fn daemon(arguments: &ExecArguments) -> Result<Option<(PathBuf, Client)>, String> {
    let own = arguments.tty || arguments.policy.contains('/') || arguments.policy.ends_with(".toml");
    match &arguments.connect {
        Some(_) if own => Err("--tty and policy files need --embedded".to_owned()),
        Some(socket) => {
            Client::connect(socket).map(|client| Some((socket.clone(), client))).map_err(|error| {
                format!("no daemon answers at {}: {error}; start `broker serve`", socket.display())
            })
        }
        None if arguments.sandbox.is_some() => Client::connect(Path::new(SOCKET))
            .map(|client| Some((SOCKET.into(), client)))
            .map_err(|error| format!("no daemon answers at {SOCKET}: {error}; --in needs one")),
        None if own || arguments.embedded => Ok(None),
        None => Ok(Client::connect(Path::new(SOCKET)).ok().map(|client| (SOCKET.into(), client))),
    }
}

/// A run of the daemon's: in a sandbox of its own, or in one that lives.
fn through(
    arguments: ExecArguments,
    client: Client,
    socket: &Path,
    report_file: Option<&ReportFile>,
) -> ExitCode {
    let report_to = arguments.report.clone();
    let (name, living, grants) =
        (arguments.policy.clone(), arguments.sandbox.clone(), arguments.grant.clone());
    // Which variables are passed on is the policy's, where it can be read here; what it is, is the daemon's to say.
    let policy = if living.is_none() { Policies::of_host().load(&name).ok() } else { None };
    let wishes = match wishes(arguments, policy.as_ref()) {
        Ok(wishes) => wishes,
        Err(error) => return refuse(&error),
    };
    let command = wishes.command.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let ran = match living {
        Some(sandbox) => through_daemon::run_in(client, socket, &sandbox, &wishes),
        None => through_daemon::run(client, socket, &name, &wishes, grants),
    };
    say_what_came(ran, &command, socket, report_to.as_deref(), report_file)
}

fn say_what_came(
    ran: Result<serde_json::Value, ClientError>,
    command: &str,
    socket: &Path,
    report_to: Option<&Path>,
    report_file: Option<&ReportFile>,
) -> ExitCode {
    let (mut report, status) = match ran {
        Ok(report) => {
            let outcome = serde_json::from_value::<Outcome>(report["outcome"].clone());
            let status = match &outcome {
                Ok(outcome) => {
                    explain(outcome, command);
                    outcome.exit_status()
                }
                Err(_) => {
                    complain!("it could not be begun: {}", report["outcome"]["message"]);
                    CANNOT
                }
            };
            (report, status)
        }
        Err(error) => {
            complain!("{error}");
            let ClientError::Refused { parameters, .. } = error else { return ExitCode::from(CANNOT) };
            let outcome = serde_json::json!({ "kind": "setup_failed", "step": "daemon", "message": parameters["message"] });
            (serde_json::json!({ "outcome": outcome }), CANNOT)
        }
    };
    if report["changes"] == true {
        let id = report["sandbox"].as_str().unwrap_or_default();
        let own = socket != Path::new(SOCKET);
        let id = if own { format!("{id} --connect {}", socket.display()) } else { id.to_owned() };
        complain!(
            "the workspace is as it was; `broker diff {id}` shows what was changed, `broker commit {id}` makes it so, `broker discard {id}` throws it away"
        );
    }
    report["through"] = socket.display().to_string().into();
    let text = format!("{report:#}\n");
    if let Some(file) = report_file
        && let Err(error) = file.write(&text)
    {
        return cannot_report(report_to, &error);
    }
    ExitCode::from(status)
}

/// From arguments to a plan: parse, look up, narrow, plan.
fn prepare(arguments: ExecArguments) -> Result<(Policy, Plan), String> {
    let policy = Policies::of_caller().load(&arguments.policy).map_err(|error| error.to_string())?;
    let wishes = wishes(arguments, Some(&policy))?;
    let job = Job::narrow(&policy, wishes).map_err(|error| error.to_string())?;
    let host = Host::probe(&policy, Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH")));
    let plan = Plan::make(&policy, &job, &host).map_err(|error| error.to_string())?;
    Ok((policy, plan))
}

/// Without a policy nothing is passed on but what is named.
fn wishes(arguments: ExecArguments, policy: Option<&Policy>) -> Result<Wishes, String> {
    let passed = policy
        .into_iter()
        .flat_map(|policy| &policy.file().env.pass)
        .filter_map(|name| Some((name.clone(), std::env::var_os(name.as_str())?)));
    let mut env: Vec<_> = passed.collect();
    for EnvArgument { name, value } in arguments.env {
        match value.or_else(|| std::env::var_os(name.as_str())) {
            Some(value) => env.push((name, value)),
            None => {
                return Err(format!(
                    "--env {name}: the variable is not set; give a value: --env {name}=VALUE"
                ));
            }
        }
    }
    Ok(Wishes {
        command: arguments.command,
        workspace: arguments.workspace,
        env,
        timeout: arguments.timeout,
        memory: arguments.memory,
        pids: arguments.pids,
        cpus: arguments.cpus,
        streams: sandbox::classify_streams(),
        terminal: if arguments.tty { Terminal::Fresh } else { Terminal::None },
        network: None,
    })
}

/// What an exit status alone does not say.
fn explain(outcome: &Outcome, command: &str) {
    match outcome {
        Outcome::TimedOut => complain!("the time limit was reached (`--timeout`, or the policy's `timeout`)"),
        Outcome::Oom => complain!("the memory limit was reached (`--memory`, or the policy's `memory`)"),
        Outcome::NotFound => {
            complain!(
                "{command}: command not found, or the interpreter that its first line names; `broker policy explain` shows what can be seen inside"
            );
        }
        Outcome::NotExecutable { errno } => {
            let why = std::io::Error::from_raw_os_error(*errno);
            complain!(
                "{command}: cannot be executed: {why}; it has to be a program, or a script with `#!`, that the caller may execute"
            );
        }
        _ => {}
    }
}

/// What became of the output.
fn explain_output(report: &Report) {
    if let Some(errno) = report.denials.output_errno {
        complain!("output was lost: {}", std::io::Error::from_raw_os_error(errno));
    }
    if report.denials.output_bytes > 0 {
        complain!("output was cut; {} bytes over the policy's limit are lost", report.denials.output_bytes);
    }
}

fn report_text(ran: &Result<Report, LaunchError>, policy: &Policy, plan: &Plan) -> std::io::Result<String> {
    let value = match ran {
        Ok(report) => report.to_json(policy, plan),
        Err(error) => {
            serde_json::to_value(error.outcome()).map(|outcome| serde_json::json!({ "outcome": outcome }))
        }
    };
    let mut text = serde_json::to_string_pretty(&value?)?;
    text.push('\n');
    Ok(text)
}

fn cannot_report(path: Option<&Path>, error: &std::io::Error) -> ExitCode {
    refuse(&format!(
        "cannot write the report {}: {error}; name a file in a directory that is there and not reached by a symbolic link",
        path.unwrap_or(Path::new("-")).display()
    ))
}

fn refuse(message: &str) -> ExitCode {
    complain!("{message}");
    ExitCode::from(CANNOT)
}
