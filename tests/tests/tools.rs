//! Programs that people run, unmodified, from wherever the caller's `PATH` finds them.
//!
//! Method: each does its own kind of work inside, under the built-in policy that is meant for it. Oracles: what lies in
//! the workspace afterwards as the host sees it, and the same tools on the host. A missing tool is a failure.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use broker_tests::{program, report};
use tempfile::TempDir;

/// The owner of the workspaces, where the tests may choose one: neither root nor any uid of a sandbox.
const OWNER: u32 = 54_321;

/// Fails with the Debian package to install where `tool` is not in the `PATH`.
fn need(tool: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let executable = |file: fs::Metadata| file.is_file() && file.permissions().mode() & 0o111 != 0;
    let found =
        std::env::split_paths(&path).any(|folder| fs::metadata(folder.join(tool)).is_ok_and(executable));
    assert!(found, "{tool} is missing: apt-get install {package}, or run scripts/test");
}

/// A workspace with `files`, all of one owner who is not the one that runs the tests, if that is possible.
fn workspace(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::Builder::new().prefix("broker-tools-").tempdir().expect("a temporary directory");
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("it is below the workspace")).expect("a directory");
        fs::write(path, content).expect("a file");
    }
    if rustix::process::geteuid().is_root() {
        give(folder.path());
    }
    folder
}

fn give(path: &Path) {
    chown(path, Some(OWNER), Some(OWNER)).expect("root gives it away");
    if path.is_dir() {
        fs::read_dir(path).expect("it can be read").flatten().for_each(|entry| give(&entry.path()));
    }
}

/// `broker exec` with `policy`; options and the command follow.
fn broker(policy: &str) -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded", "--policy", policy]).stdin(Stdio::null());
    command
}

/// Runs `command` under `policy` in `workspace`; it must succeed. What it printed.
fn run(policy: &str, workspace: &Path, command: &[&str]) -> String {
    let output = broker(policy).arg("--workspace").arg(workspace).arg("--").args(command).output();
    succeeded(&output.expect("broker runs"))
}

/// A shell line, likewise. The shell is under the same policy as its tools.
fn shell(policy: &str, workspace: &Path, script: &str) -> String {
    run(policy, workspace, &["bash", "-euc", script])
}

fn succeeded(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{:?}\n{stdout}\n{stderr}", output.status);
    // java -version and others say it there.
    format!("{stdout}{stderr}")
}

/// What the host says to the same command.
fn host(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    succeeded(&output.expect("it runs on the host"))
}

/// A result belongs to the workspace's owner, with no special bits.
fn owned(workspace: &Path, name: &str) {
    let file = fs::metadata(workspace.join(name)).unwrap_or_else(|error| panic!("no {name}: {error}"));
    let folder = fs::metadata(workspace).expect("the workspace");
    assert_eq!((file.uid(), file.gid()), (folder.uid(), folder.gid()), "the owner of {name} on the host");
    assert_eq!(file.mode() & 0o6000, 0, "special bits of {name}");
}

fn content(workspace: &Path, name: &str) -> String {
    fs::read_to_string(workspace.join(name)).unwrap_or_else(|error| panic!("no {name}: {error}"))
}

#[test]
fn python_reads_data_from_the_workspace_and_writes_a_result_that_belongs_to_its_owner() {
    need("python3", "python3");
    let script = "import csv, json, sqlite3, multiprocessing\n\
        rows = list(csv.DictReader(open('data.csv')))\n\
        base = sqlite3.connect('/tmp/base')\n\
        base.execute('create table t (name, amount int)')\n\
        base.executemany('insert into t values (:name, :amount)', rows)\n\
        total = base.execute('select sum(amount) from t').fetchone()[0]\n\
        if __name__ == '__main__':\n\
        \x20   with multiprocessing.Pool(2) as pool: squares = pool.map(abs, [-3, -4])\n\
        \x20   json.dump({'total': total, 'squares': squares}, open('out/result.json', 'w'))\n";
    let data = "name,amount\nanna,40\nbert,2\n";
    let workspace = workspace(&[("data.csv", data), ("sum.py", script), ("out/.keep", "")]);
    run("python", workspace.path(), &["python3", "sum.py"]);
    assert_eq!(content(workspace.path(), "out/result.json"), r#"{"total": 42, "squares": [3, 4]}"#);
    owned(workspace.path(), "out/result.json");
    assert_eq!(content(workspace.path(), "data.csv"), data);
}

/// A version manager's Python is the one that is run, not the system's.
#[test]
fn python_and_pip_are_those_of_the_callers_path() {
    need("python3", "python3");
    need("pip", "python3-pip");
    let workspace = workspace(&[]);
    for command in
        [&["pip", "--version"][..], &["python3", "--version"], &["python3", "-m", "pip", "--version"]]
    {
        let inside = run("python", workspace.path(), command);
        assert_eq!(inside, host(command), "{command:?}");
    }
}

#[test]
fn a_virtual_environment_can_be_made_and_used() {
    need("python3", "python3 python3-venv");
    let workspace = workspace(&[]);
    let script =
        "python3 -m venv --without-pip /tmp/venv && /tmp/venv/bin/python -c 'import sys; print(sys.prefix)'";
    assert_eq!(shell("python", workspace.path(), script).trim(), "/tmp/venv");
}

#[test]
fn node_runs_scripts_workers_and_child_processes() {
    need("node", "nodejs");
    let script = "const fs = require('fs'), {Worker} = require('worker_threads');\n\
        const child = require('child_process').execFileSync(process.execPath, ['-p', '6*7']).toString().trim();\n\
        const worker = new Worker(\"require('worker_threads').parentPort.postMessage(1)\", {eval: true});\n\
        worker.on('message', n => fs.writeFileSync('out.txt', [child, n, fs.readFileSync('in.txt')].join(' ')));\n";
    let workspace = workspace(&[("main.js", script), ("in.txt", "text")]);
    run("node", workspace.path(), &["node", "main.js"]);
    assert_eq!(content(workspace.path(), "out.txt"), "42 1 text");
    owned(workspace.path(), "out.txt");
}

#[test]
fn npm_says_its_version_and_runs_a_package_s_script() {
    need("npm", "npm");
    let package = r#"{"name": "p", "version": "1.0.0", "scripts": {"hello": "echo hello > said.txt"}}"#;
    let workspace = workspace(&[("package.json", package)]);
    assert_eq!(run("node", workspace.path(), &["npm", "--version"]), host(&["npm", "--version"]));
    run("node", workspace.path(), &["npm", "run", "--silent", "hello"]);
    assert_eq!(content(workspace.path(), "said.txt"), "hello\n");
}

#[test]
fn gcc_builds_a_program_that_runs_from_the_workspace_and_from_tmp() {
    need("gcc", "gcc libc6-dev");
    let source = "#include <pthread.h>\n#include <stdio.h>\n\
        static void *run(void *to) { *(int *)to = 42; return 0; }\n\
        int main(void) { pthread_t t; int n = 0; pthread_create(&t, 0, run, &n); pthread_join(t, 0);\n\
        return printf(\"answer %d\\n\", n) < 0; }\n";
    let workspace = workspace(&[("main.c", source)]);
    let script =
        "gcc -O2 -pthread -o main main.c; ./main; gcc -static -pthread -o /tmp/main main.c; /tmp/main";
    assert_eq!(shell("build", workspace.path(), script), "answer 42\nanswer 42\n");
    owned(workspace.path(), "main");
    let built = fs::read(workspace.path().join("main")).expect("the program");
    assert_eq!(built[..4], *b"\x7fELF", "gcc made a program");
}

/// git of the host, told to trust a repository of another owner and to use no configuration of this machine.
fn git(repository: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    git.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").arg("-C").arg(repository);
    git.args(["-c", "safe.directory=*", "-c", "user.name=Test", "-c", "user.email=test@example.org"]);
    succeeded(&git.args(arguments).stdin(Stdio::null()).output().expect("git runs on the host"))
}

const IDENTITY: &str = "export GIT_AUTHOR_NAME=A GIT_AUTHOR_EMAIL=a@example.org \
                        GIT_COMMITTER_NAME=A GIT_COMMITTER_EMAIL=a@example.org; ";

#[test]
fn git_makes_a_repository_and_commits_and_branches_offline() {
    need("git", "git");
    let workspace = workspace(&[]);
    let script = "cd /tmp; git init -q -b main r; cd r; echo one > file; git add file; git commit -qm first; \
                  git switch -qc side; echo two >> file; git commit -qam second; git switch -q main; \
                  git merge -q side; git gc -q; git log --format=%s; git status --porcelain; git clone -q . /tmp/copy; \
                  cat /tmp/copy/file";
    assert_eq!(
        shell("default", workspace.path(), &format!("{IDENTITY}{script}")),
        "second\nfirst\none\ntwo\n"
    );
}

#[test]
fn git_commits_in_a_repository_of_the_workspace_and_the_host_sees_it_and_its_configuration_untouched() {
    need("git", "git");
    let workspace = workspace(&[("file", "one\n")]);
    git(workspace.path(), &["init", "-q", "-b", "main"]);
    git(workspace.path(), &["add", "file"]);
    git(workspace.path(), &["commit", "-qm", "first"]);
    if rustix::process::geteuid().is_root() {
        give(workspace.path());
    }
    let configuration = content(workspace.path(), ".git/config");
    let script = "echo two >> file; git commit -qam second; git switch -qc side; git status --porcelain";
    assert_eq!(shell("default", workspace.path(), &format!("{IDENTITY}{script}")), "");
    owned(workspace.path(), ".git/index");
    assert_eq!(git(workspace.path(), &["log", "--format=%s %an", "side"]), "second A\nfirst Test\n");
    assert_eq!(git(workspace.path(), &["show", "side:file"]), "one\ntwo\n");
    git(workspace.path(), &["fsck", "--strict"]);
    assert_eq!(git(workspace.path(), &["status", "--porcelain"]), "", "placeholders are gone");
    assert_eq!(content(workspace.path(), ".git/config"), configuration);
}

#[test]
fn bash_has_job_control_and_its_usual_constructs() {
    let workspace = workspace(&[]);
    let script = "exec 2>/dev/null; set -m; sleep 1000 & kill -STOP %1; until jobs | grep -q Stopped; do sleep 0.01; done; \
                  bg %1 >&2; jobs | grep -c Running; kill %1; wait %1 || echo \"ended $?\"; \
                  cat <(echo substituted) <<< ignored; coproc cat; echo through >&${COPROC[1]}; \
                  read -r line <&${COPROC[0]}; echo \"$line\"; kill $COPROC_PID";
    let said = shell("shell", workspace.path(), script);
    assert_eq!(said.lines().collect::<Vec<_>>(), ["1", "ended 143", "substituted", "through"]);
}

#[test]
fn java_says_its_version_and_runs_a_source_file() {
    need("java", "default-jdk-headless");
    let source = "public class Sum { public static void main(String[] a) throws Exception {\n\
        var lines = java.nio.file.Files.readAllLines(java.nio.file.Path.of(\"numbers\"));\n\
        System.out.println(lines.parallelStream().mapToInt(Integer::parseInt).sum()); } }\n";
    let workspace = workspace(&[("Sum.java", source), ("numbers", "40\n2\n")]);
    assert_eq!(run("build", workspace.path(), &["java", "-version"]), host(&["java", "-version"]));
    assert_eq!(run("build", workspace.path(), &["java", "Sum.java"]), "42\n");
}

#[test]
fn cargo_builds_tests_and_runs_a_small_crate() {
    need("cargo", "cargo (or rustup)");
    need("cc", "gcc libc6-dev");
    let workspace = workspace(&[
        ("Cargo.toml", "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2021\"\n"),
        (
            "src/main.rs",
            "fn main() { println!(\"{}\", 6 * 7); }\n#[test]\nfn it_works() { assert_eq!(6 * 7, 42); }\n",
        ),
    ]);
    let script = "cargo build --offline --quiet; cargo test --offline --quiet >/dev/null; target/debug/small";
    assert_eq!(shell("build", workspace.path(), script), "42\n");
    owned(workspace.path(), "target/debug/small");
    owned(workspace.path(), "Cargo.lock");
}

/// Oracle: stress-ng's own verification, and that what the kernel counted is within what was given.
#[test]
fn stress_ng_works_to_its_end_within_limits() {
    need("stress-ng", "stress-ng");
    let workspace = workspace(&[]);
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("report.json");
    let mut command = broker("default");
    command.args(["--memory", "512MiB", "--pids", "64", "--cpus", "1.5", "--report"]).arg(&file);
    command.arg("--workspace").arg(workspace.path()).args([
        "--",
        "stress-ng",
        "--verify",
        "--temp-path",
        "/tmp",
    ]);
    command.args(["--cpu", "2", "--cpu-ops", "100", "--vm", "1", "--vm-bytes", "64M", "--vm-ops", "5000"]);
    command.args(["--fork", "1", "--fork-ops", "200", "--pipe", "1", "--pipe-ops", "2000"]);
    command.args(["--hdd", "1", "--hdd-bytes", "8M", "--hdd-ops", "200"]);
    let said = succeeded(&command.output().expect("broker runs"));
    assert!(said.contains("successful run completed") && !said.contains("fail:"), "{said}");
    let usage = &report(&file)["usage"];
    let number = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("no {name} in {usage}"));
    assert!((64 << 20..=512 << 20).contains(&number("memory_peak_bytes")), "{usage}");
    // The command's 64, and init.
    assert!((5..=65).contains(&number("pids_peak")), "{usage}");
    assert_eq!(report(&file)["denials"]["oom_kills"], 0);
}
