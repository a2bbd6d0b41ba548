//! `broker doctor`: what this host can enforce. It tries, by the same way that a run takes.

use std::process::{Command, ExitCode, Stdio};

use sandbox::{Caller, Cgroups, Controller, Host, LANDLOCK_ABI_TESTED, Policy, Presets};
use serde::Serialize;

use crate::say::{self, complain};

/// One finding.
#[derive(Serialize)]
struct Finding {
    /// What was looked at.
    what: &'static str,
    /// Whether the presets can be enforced as far as this goes.
    good: bool,
    /// What was found.
    found: String,
    /// How to mend it, where something is missing.
    mend: Option<&'static str>,
}

/// Prints what was found; fails when a preset could not run here.
pub fn run(json: bool) -> ExitCode {
    let findings = match Policy::named("default", &Presets) {
        Ok(policy) => examine(&policy),
        Err(error) => {
            complain!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let text = if json {
        serde_json::to_string_pretty(&findings).unwrap_or_default() + "\n"
    } else {
        let line = |Finding { what, good, found, mend }: &Finding| {
            let mend = mend.map(|mend| format!("        {mend}\n")).unwrap_or_default();
            format!("{} {what}: {found}\n{mend}", if *good { "ok     " } else { "missing" })
        };
        findings.iter().map(line).collect()
    };
    if let Err(error) = say::print(&text) {
        complain!("{error}");
        return ExitCode::FAILURE;
    }
    if findings.iter().all(|finding| finding.good) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn examine(policy: &Policy) -> Vec<Finding> {
    let host = Host::probe(policy, Caller::current(std::env::var_os("HOME"), std::env::var_os("PATH")));
    let mut findings = vec![root(&host), landlock(&host)];
    findings.extend(Controller::ALL.map(|controller| limit(&host, controller)));
    findings.push(attempt());
    findings
}

fn root(host: &Host) -> Finding {
    let good = host.caller.uid == 0;
    Finding {
        what: "caller",
        good,
        found: format!("uid {}", host.caller.uid),
        mend: (!good).then_some("run as root; a way for other users is not there yet"),
    }
}

fn landlock(host: &Host) -> Finding {
    let (abi, used) = (host.landlock_abi, host.landlock_abi.min(LANDLOCK_ABI_TESTED));
    Finding {
        what: "Landlock",
        good: abi >= 2,
        found: format!("ABI {abi}, used at {used}; the presets demand 2"),
        mend: (abi < 2).then_some("use Linux 5.19 or newer with `landlock` in the boot parameter `lsm=`"),
    }
}

fn limit(host: &Host, controller: Controller) -> Finding {
    let (version, offered) = match &host.cgroups {
        Cgroups::V2 { controllers } => ("v2", controllers.as_slice()),
        Cgroups::V1 { controllers } => ("v1", controllers.as_slice()),
        Cgroups::None => ("none", [].as_slice()),
    };
    let offered = offered.contains(&controller);
    let (what, in_presets) = match controller {
        Controller::Memory => ("memory limit", true),
        Controller::Pids => ("process limit", true),
        Controller::Cpu => ("processor limit", true),
        Controller::Io => ("disk traffic limit", false),
    };
    let good = offered || !in_presets;
    let found = match (offered, in_presets) {
        (true, _) => format!("cgroup {version}"),
        (false, true) => "no controller".to_owned(),
        (false, false) => "no controller; no preset asks for it".to_owned(),
    };
    Finding {
        what,
        good,
        found,
        mend: (!good).then_some(
            "mount cgroup2 at /sys/fs/cgroup, or accept it in a policy: allow_gaps = [\"no-cgroup\"]",
        ),
    }
}

/// The only proof that a sandbox starts here is one that did.
fn attempt() -> Finding {
    let mend = Some("the message names the step; in a container, it has to be a privileged one");
    let finding =
        |good: bool, found: String| Finding { what: "a sandbox", good, found, mend: mend.filter(|_| !good) };
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return finding(false, format!("cannot find this program: {error}")),
    };
    let mut command = Command::new(program);
    command.args(["exec", "--embedded", "--", "true"]).stdin(Stdio::null()).stdout(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => finding(true, "started and ended".to_owned()),
        Ok(output) => finding(false, String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => finding(false, error.to_string()),
    }
}
