//! `broker exec`: one confined run.

use std::path::Path;
use std::process::ExitCode;

use sandbox::{Caller, Host, Job, LaunchError, Plan, Policy, Report, Terminal, Wishes};

use crate::cli::{EnvArgument, ExecArguments};
use crate::library::Policies;
use crate::report_file::ReportFile;

/// What `broker exec` exits with when it could not do what was asked.
const CANNOT: u8 = 125;

/// Runs the command; the exit status is as `INTERFACES` says.
pub fn run(arguments: ExecArguments) -> ExitCode {
    let report_to = arguments.report.clone();
    let report_file = match report_to.as_deref().map(ReportFile::open).transpose() {
        Ok(file) => file,
        Err(error) => return cannot_report(report_to.as_deref(), &error),
    };
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
            explain(report, &plan);
            // Output that got lost is no success, whatever the command made of it.
            if report.denials.output_errno.is_some() { CANNOT } else { report.outcome.exit_status() }
        }
        Err(error) => {
            eprintln!("broker: {error}");
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

/// From arguments to a plan: parse, look up, narrow, plan.
fn prepare(arguments: ExecArguments) -> Result<(Policy, Plan), String> {
    let policy = Policies::of_caller().load(&arguments.policy).map_err(|error| error.to_string())?;
    let wishes = wishes(arguments, &policy)?;
    let job = Job::narrow(&policy, wishes).map_err(|error| error.to_string())?;
    let host = Host::probe(&policy, Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH")));
    let plan = Plan::make(&policy, &job, &host).map_err(|error| error.to_string())?;
    Ok((policy, plan))
}

fn wishes(arguments: ExecArguments, policy: &Policy) -> Result<Wishes, String> {
    let passed = policy
        .file()
        .env
        .pass
        .iter()
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
    })
}

/// What an exit status alone does not say.
fn explain(report: &Report, plan: &Plan) {
    use sandbox::Outcome;
    match &report.outcome {
        Outcome::TimedOut => eprintln!("broker: the time limit was reached"),
        Outcome::Oom => eprintln!("broker: the memory limit was reached"),
        Outcome::NotFound => {
            let command =
                plan.command.arguments.first().map(|name| name.to_string_lossy()).unwrap_or_default();
            eprintln!(
                "broker: {command}: command not found; `broker policy explain` shows what can be seen inside"
            );
        }
        Outcome::NotExecutable { errno } => {
            eprintln!(
                "broker: the command cannot be executed: {}",
                std::io::Error::from_raw_os_error(*errno)
            );
        }
        _ => {}
    }
    if let Some(errno) = report.denials.output_errno {
        eprintln!("broker: output was lost: {}", std::io::Error::from_raw_os_error(errno));
    }
    if report.denials.output_bytes > 0 {
        eprintln!(
            "broker: output was cut; {} bytes over the policy's limit are lost",
            report.denials.output_bytes
        );
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
    refuse(&format!("cannot write the report {}: {error}", path.unwrap_or(Path::new("-")).display()))
}

fn refuse(message: &str) -> ExitCode {
    eprintln!("broker: {message}");
    ExitCode::from(CANNOT)
}
