//! What the restated tests of other sandboxes share: one script, run inside, on the host and in bubblewrap.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};

use broker_tests::program;
use tempfile::TempDir;

/// A directory of the host, most often the workspace.
pub fn folder() -> TempDir {
    tempfile::Builder::new().prefix("peer-").tempdir().expect("a temporary directory")
}

/// `broker exec` with the default policy; options and `--` are still to come.
pub fn broker() -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded"]).stdin(Stdio::null());
    command
}

/// `broker exec` with a workspace, ready for the command.
pub fn sandbox(workspace: &Path) -> Command {
    let mut command = broker();
    command.arg("--workspace").arg(workspace).arg("--");
    command
}

/// The host's own directory as the working directory, without us: the control.
pub fn host(workspace: &Path) -> Command {
    // A session of its own, so that no control ever reaches the terminal of whoever runs the tests.
    let mut command = Command::new("setsid");
    command.arg("-w").current_dir(workspace).stdin(Stdio::null());
    command
}

/// bubblewrap with all namespaces and no capability: what its users write.
pub fn bubblewrap(workspace: &Path) -> Command {
    let found = Command::new("bwrap").arg("--version").stdout(Stdio::null()).status();
    assert!(found.is_ok_and(|status| status.success()), "bwrap is missing: apt-get install bubblewrap");
    let mut command = Command::new("bwrap");
    command.args([
        "--unshare-all",
        "--cap-drop",
        "ALL",
        "--ro-bind",
        "/",
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
    ]);
    command.args(["--tmpfs", "/tmp", "--bind"]).arg(workspace).arg("/tmp/workspace");
    command.args(["--chdir", "/tmp/workspace"]).stdin(Stdio::null());
    command
}

/// Runs `script` in a bash that `command` starts.
pub fn bash(mut command: Command, script: &str) -> Output {
    command.args(["bash", "-c", script]).output().expect("the command starts")
}

/// Runs `script` inside, with the default policy.
pub fn inside(workspace: &Path, script: &str) -> Output {
    bash(sandbox(workspace), script)
}

/// Runs `script` on the host.
pub fn outside(workspace: &Path, script: &str) -> Output {
    bash(host(workspace), script)
}

/// Runs the same command line below a bash that prepares what it will inherit.
pub fn after(preparation: &str, command: &Command) -> Command {
    let mut wrapped = Command::new("bash");
    wrapped.arg("-c").arg(format!("{preparation}; exec \"$@\"")).arg("bash");
    wrapped.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    wrapped
}

/// The status as a shell tells it.
pub fn status(status: ExitStatus) -> i32 {
    status.code().or_else(|| Some(128 + status.signal()?)).expect("a code or a signal")
}

/// What it wrote to both streams.
pub fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}")
}

/// What it wrote to standard output, without the last line feed.
pub fn answer(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// All that a change of `place` would show in: kinds, inodes, modes, owners, times, links, contents. The time of a
/// directory is left out: the places held for protected names come and go in it.
pub fn image(place: &Path) -> String {
    let script = "find . -type d -printf '%P %y %i %m %U\n' -o -printf '%P %y %i %m %U %s %T@ %l\n' | sort; \
                  find . -type f -exec sha256sum {} + | sort";
    let output = outside(place, script);
    assert!(output.status.success(), "no image of {}: {}", place.display(), said(&output));
    answer(&output)
}

/// The names in `place`, sorted.
pub fn names(place: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(place).expect("a directory").flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Writes a file, with the directories on its way.
pub fn plant(place: &Path, name: &str, content: &str) {
    let file = place.join(name);
    std::fs::create_dir_all(file.parent().expect("a folder")).expect("directories");
    std::fs::write(file, content).expect("a file");
}

/// What a file of the host holds.
pub fn content(place: &Path, name: &str) -> String {
    std::fs::read_to_string(place.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Perl that makes system calls and prints a line `result errno` for each.
pub fn calls(calls: &[&[i64]]) -> String {
    let lines = calls.iter().map(|call| {
        let words: Vec<String> = call.iter().map(i64::to_string).collect();
        format!("$! = 0; $r = syscall({}); print \"$r \", $! + 0, \"\\n\";", words.join(", "))
    });
    format!("perl -e '{}'", lines.collect::<String>())
}

/// The second column of what [`calls`] prints.
pub fn errnos(output: &Output) -> Vec<i32> {
    let text = answer(output);
    let errno = |line: &str| line.split(' ').nth(1)?.parse().ok();
    text.lines().map(|line| errno(line).unwrap_or_else(|| panic!("no errno in {line}"))).collect()
}
