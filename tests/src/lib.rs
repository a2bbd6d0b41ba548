//! What the attack tests share: the built programs, runs of the probe with and without the sandbox, canaries.
//!
//! Every row runs twice. The *control* runs on the host, without us, and must be `open`: else the row proves
//! nothing on this kernel, and has to be listed as vacuous there. Then the same attempt runs inside a sandbox.

pub mod inject;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What one case of a row came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The case within its row.
    pub name: String,
    /// `open`, `denied`, `killed` or `n/a`.
    pub outcome: String,
    /// The errno that came with it; 0 where none did.
    pub errno: i32,
    /// Free text for the failure message.
    pub detail: String,
}

/// A program that the workspace builds, beside the running test.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its own path");
    let folder = test.parent().and_then(Path::parent).expect("tests run from target/.../deps");
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built: run scripts/test", path.display());
    path
}

/// `broker exec` with a policy that is `default` plus `extra` TOML, and that shows the probe's own folder.
pub struct Sandbox {
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Sandbox {
    /// The default policy and the probe's folder.
    pub fn new() -> Self {
        Self::with("")
    }

    /// The default policy, the probe's folder and `extra` sections.
    pub fn with(extra: &str) -> Self {
        let folder =
            tempfile::Builder::new().prefix("broker-test-").tempdir().expect("a temporary directory");
        let probe = folder.path().join("probe");
        std::fs::create_dir(&probe).expect("a directory for the probe");
        // By a program of its own: a descriptor open for writing here would be inherited by whatever another test
        // starts at this moment, and the probe would be ETXTBSY.
        let copied = Command::new("cp").arg(program("probe")).arg(&probe).status().expect("cp runs");
        assert!(copied.success(), "the probe is not copied");
        let policy = format!("extends = \"default\"\n[files]\nread = [\"{}\"]\n{extra}\n", probe.display());
        std::fs::write(folder.path().join("policy.toml"), policy).expect("the policy is written");
        Sandbox { folder, arguments: Vec::new() }
    }

    /// Adds an option of `broker exec`.
    pub fn option(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Where the probe lies, on the host and inside.
    pub fn probe_path(&self) -> PathBuf {
        self.folder.path().join("probe/probe")
    }

    /// `broker exec ... --` ready for the command.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program("broker"));
        command.arg("exec").arg("--embedded").arg("--policy").arg(self.folder.path().join("policy.toml"));
        command.args(&self.arguments).arg("--").stdin(Stdio::null());
        command
    }

    /// Runs a shell line inside.
    pub fn shell(&self, script: &str) -> Output {
        self.command().args(["sh", "-c", script]).output().expect("broker runs")
    }

    /// Runs a row of the catalogue inside.
    pub fn probe<S: AsRef<OsStr>>(&self, row: &str, arguments: &[S]) -> Vec<Case> {
        cases(self.command().arg(self.probe_path()).arg(row).args(arguments))
    }

    /// Runs the same row on the host.
    pub fn control<S: AsRef<OsStr>>(&self, row: &str, arguments: &[S]) -> Vec<Case> {
        cases(Command::new(self.probe_path()).arg(row).args(arguments).stdin(Stdio::null()))
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `command` and parses the probe's lines.
pub fn cases(command: &mut Command) -> Vec<Case> {
    let output = command.output().expect("the command starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let cases: Vec<Case> = text.lines().filter_map(case).collect();
    assert!(
        !cases.is_empty(),
        "no case came back: {:?}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    cases
}

fn case(line: &str) -> Option<Case> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some(Case {
        name: value["case"].as_str()?.to_owned(),
        outcome: value["outcome"].as_str()?.to_owned(),
        errno: i32::try_from(value["errno"].as_i64()?).ok()?,
        detail: value["detail"].as_str().unwrap_or_default().to_owned(),
    })
}

/// Every case of `inside` is refused; every case of `control` was open unless `vacuous` names it for this kernel.
pub fn assert_refused(row: &str, control: &[Case], inside: &[Case], vacuous: &[&str]) {
    for case in control {
        let listed = vacuous.contains(&case.name.as_str());
        assert!(
            case.outcome == "open" || listed,
            "{row}: the control is not open, so it proves nothing: {case:?}"
        );
    }
    for case in inside {
        assert!(case.outcome == "denied" || case.outcome == "killed", "{row}: not refused inside: {case:?}");
    }
    let names = |cases: &[Case]| cases.iter().map(|case| case.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(control), names(inside), "{row}: control and sandbox tried different things");
}

/// A token that occurs nowhere else.
pub fn canary() -> String {
    let mut bytes = [0_u8; 12];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).expect("randomness");
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("CANARY-{hex}")
}

/// What `broker exec --report` wrote.
pub fn report(path: &Path) -> Value {
    let text = std::fs::read(path).expect("the report was written");
    serde_json::from_slice(&text).expect("the report is JSON")
}

/// Processes whose command line has `token`; the dead have none.
pub fn alive(token: &str) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let bears = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(token.len()).any(|window| window == token.as_bytes())
    };
    numbers.filter(bears).collect()
}

/// Whether `check` becomes true before `limit` is over.
pub fn within(limit: std::time::Duration, mut check: impl FnMut() -> bool) -> bool {
    let end = std::time::Instant::now() + limit;
    loop {
        if check() {
            return true;
        }
        if std::time::Instant::now() > end {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Starts `command` with pipes and waits for its line that begins with `READY`; gives the lines up to it as well.
pub fn until_ready(
    command: &mut Command,
) -> (std::process::Child, std::io::BufReader<std::process::ChildStdout>, String) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the command starts");
    let mut out = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
    let mut text = String::new();
    while !text.lines().last().unwrap_or_default().starts_with("READY") {
        let count = std::io::BufRead::read_line(&mut out, &mut text).expect("lines come");
        assert!(count > 0, "it ended before it was ready: {text}");
    }
    (child, out, text)
}

/// The probe's lines in `text`.
pub fn cases_in(text: &str) -> Vec<Case> {
    text.lines().filter_map(case).collect()
}

/// Like [`assert_refused`], and each refusal is one of those that `refusals` names for its case (0: a case that looks
/// rather than calls). A signal counts only if it is the filter's own, not a crash of the probe. Where a single errno
/// is named and the control was not open, the two must differ: else nobody could tell our refusal from the kernel's.
pub fn assert_refused_with<'a>(
    row: &str,
    control: &[Case],
    inside: &[Case],
    vacuous: &[&str],
    refusals: impl Fn(&str) -> &'a [i32],
) {
    assert_refused(row, control, inside, vacuous);
    for (outside, inside) in control.iter().zip(inside) {
        let wanted = refusals(&inside.name);
        let told = outside.outcome == "open" || wanted.len() > 1 || !wanted.contains(&outside.errno);
        assert!(told, "{row}: the kernel says the same by itself: {outside:?}");
        let killed = inside.outcome == "killed";
        assert!(!killed || inside.detail == format!("signal {}", libc::SIGSYS), "{row}: crashed: {inside:?}");
        assert!(killed || wanted.contains(&inside.errno), "{row}: {inside:?}, where {wanted:?} is promised");
    }
}

/// Runs `command` below a wrapper that executes its arguments: `unshare`, `setpriv`, `setsid`.
pub fn below(wrapper: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    wrapped
}

/// The wrapper that gives a control a pid namespace of its own, with a shell as the init that it may attack.
pub const OWN_PIDS: &[&str] =
    &["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", "\"$@\"; exit $?", "sh"];

/// Polls until `holds`, or gives up after `limit_ms`.
pub fn eventually(limit_ms: u64, holds: impl Fn() -> bool) -> bool {
    let deadline = std::time::Instant::now() + std::time::Duration::from_millis(limit_ms);
    while !holds() {
        if std::time::Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    true
}

/// The host's processes whose command line holds `token`.
pub fn carriers(token: &str) -> Vec<u32> {
    let holds = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(token.len()).any(|window| window == token.as_bytes())
    };
    processes().into_iter().filter(holds).collect()
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc is there");
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A command that runs until it is dropped or finished, and has said its first line.
pub struct Running {
    /// The program that the test started: `broker exec`, or the control.
    pub child: std::process::Child,
    /// The first line it wrote.
    pub first_line: String,
}

impl Running {
    /// Starts `command`, with a pipe as its standard input, and waits for its first line.
    pub fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the command starts");
        let mut first_line = String::new();
        let output = std::io::BufReader::new(child.stdout.as_mut().expect("a pipe"));
        std::io::BufRead::read_line(&mut { output }, &mut first_line).expect("a first line");
        Running { child, first_line }
    }

    /// Every descendant that is in another pid namespace than we are: init and the workload, as the host sees them.
    pub fn confined(&self) -> Vec<u32> {
        let own = std::fs::read_link("/proc/self/ns/pid").expect("our pid namespace");
        let parent = |pid: u32| -> Option<u32> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let ours = |pid: &u32| {
            let line = std::iter::successors(Some(*pid), |pid| parent(*pid));
            line.take(64).any(|ancestor| ancestor == self.child.id())
        };
        let elsewhere =
            |pid: &u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|there| there != own);
        processes().into_iter().filter(|pid| ours(pid) && elsewhere(pid)).collect()
    }

    /// The status of every task of [`Running::confined`], with its path.
    pub fn statuses(&self) -> Vec<(PathBuf, String)> {
        let tasks = self
            .confined()
            .into_iter()
            .flat_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten());
        let status = |task: std::fs::DirEntry| {
            let path = task.path().join("status");
            std::fs::read_to_string(&path).ok().map(|text| (path, text))
        };
        tasks.filter_map(status).collect()
    }

    /// Ends its standard input, and with it a well-behaved command.
    pub fn finish(mut self) -> std::process::ExitStatus {
        drop(self.child.stdin.take());
        self.child.wait().expect("the command ends")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// One field of a `/proc/.../status` file.
pub fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':').map(str::trim);
    status.lines().find_map(value).unwrap_or_else(|| panic!("no {name} in {status}"))
}

/// What a run could leave on the host: mounts, control groups, processes of a sandbox's uid, network namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers {
    mounts: Vec<String>,
    groups: Vec<PathBuf>,
    processes: Vec<String>,
}

/// The first uid of the slots; relays have the 16 million after.
const SLOT_UIDS: std::ops::Range<u32> = 0x7000_0000..0x7200_0000;

/// What is there now.
pub fn leftovers() -> Leftovers {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo can be read");
    let controllers = ["", "memory", "pids", "cpu", "unified"];
    let groups = controllers.map(|controller| Path::new("/sys/fs/cgroup").join(controller).join("broker"));
    Leftovers {
        // Without the number of each, which is new whenever another mount comes and goes.
        mounts: mountinfo.lines().map(|line| line.split(' ').skip(2).collect::<Vec<_>>().join(" ")).collect(),
        groups: groups.into_iter().filter(|group| group.exists()).collect(),
        processes: slot_processes(),
    }
}

/// Processes whose uid is a slot's, zombies left out: those wait for this machine's own init.
fn slot_processes() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("/proc can be read").flatten();
    let status = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("status")).ok();
    let field =
        |status: &str, name: &str| Some(status.lines().find(|line| line.starts_with(name))?.to_owned());
    let of_slot = |status: &String| {
        let uid = field(status, "Uid:").and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        let zombie = field(status, "State:").is_some_and(|line| line.contains('Z'));
        uid.is_some_and(|uid: u32| SLOT_UIDS.contains(&uid)) && !zombie
    };
    entries.filter_map(status).filter(of_slot).filter_map(|status| field(&status, "Name:")).collect()
}

/// How many network namespaces the kernel holds, from outside; they are taken down in its own time.
pub fn network_namespaces() -> usize {
    let slab = std::fs::read_to_string("/proc/slabinfo").expect("slabinfo can be read as root");
    let line = slab.lines().find(|line| line.starts_with("net_namespace ")).expect("the kernel counts them");
    line.split_whitespace().nth(1).and_then(|count| count.parse().ok()).expect("a number")
}

/// Waits until `done`, at most two seconds; then fails with `message`.
pub fn settle(done: impl Fn() -> bool, message: impl Fn() -> String) {
    for _ in 0..200 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{}", message());
}

impl Leftovers {
    /// What is here and was not there before, and the other way round.
    pub fn beyond(&self, before: &Leftovers) -> String {
        fn only<'a, T: PartialEq>(one: &'a [T], other: &[T]) -> Vec<&'a T> {
            one.iter().filter(|entry| !other.contains(entry)).collect()
        }
        format!(
            "new: {:?} {:?} {:?}; gone: {:?} {:?}",
            only(&self.mounts, &before.mounts),
            only(&self.groups, &before.groups),
            only(&self.processes, &before.processes),
            only(&before.mounts, &self.mounts),
            only(&before.groups, &self.groups),
        )
    }

    /// Whether no process of a slot is there.
    pub fn has_no_process(&self) -> bool {
        self.processes.is_empty()
    }
}
