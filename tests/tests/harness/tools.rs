//! `harness-tools`, run in a sandbox by the broker itself, over what a workload could have planted there.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use broker_tests::program;
use serde_json::{Value, json};

/// One sandbox of `broker exec`, in which a script has run first; then calls, one after the other.
fn calls(plant: &str, requests: &[Value]) -> Vec<(String, bool)> {
    let folder = tempfile::Builder::new().prefix("broker-tools-").tempdir().expect("a directory");
    let (bin, workspace) = (folder.path().join("bin"), folder.path().join("workspace"));
    for path in [&bin, &workspace] {
        std::fs::create_dir(path).expect("a directory");
    }
    assert!(Command::new("cp").arg(program("harness-tools")).arg(&bin).status().expect("cp runs").success());
    let policy = folder.path().join("policy.toml");
    std::fs::write(&policy, format!("extends = \"default\"\n[files]\nread = [\"{}\"]\n", bin.display()))
        .expect("it is ours");
    let tools = bin.join("harness-tools");
    let mut script = format!("{plant}\n");
    for (number, request) in requests.iter().enumerate() {
        let text = request.to_string().replace('\'', "'\\''");
        script += &format!("printf '%s' '{text}' | timeout 30 {} call e{number}; echo\n", tools.display());
    }
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded", "--policy"]).arg(&policy).arg("--workspace").arg(&workspace);
    let mut child = command
        .args(["--timeout", "60s", "--", "bash"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("it reads");
    let output: Output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<(String, bool)> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|said| (said["content"].as_str().unwrap_or_default().to_owned(), said["is_error"] == true))
        .collect();
    assert_eq!(answers.len(), requests.len(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    answers
}

fn bash(command: &str) -> Value {
    json!({ "name": "bash", "input": { "command": command } })
}

#[test]
fn the_shell_stays_between_calls_and_its_end_is_told() {
    let said = calls(
        "",
        &[
            bash("cd /tmp; NAME=kept; f() { echo \"function $1\"; }; echo one"),
            bash("pwd; echo $NAME; f two; false"),
            json!({ "name": "bash", "input": { "command": "echo begun; sleep 60", "timeout_ms": 300 } }),
            bash("echo \"[$NAME]\"; pwd"),
            bash("echo last; exit 3"),
            bash("echo again"),
            json!({ "name": "bash", "input": { "command": "for n in 1 2 3; do echo $n; sleep 0.1; done", "background": true } }),
            bash("sleep 0.6"),
            json!({ "name": "bash", "input": { "output_of": "e6" } }),
            json!({ "name": "bash", "input": { "output_of": "../../etc/passwd" } }),
            bash("seq 100000"),
        ],
    );
    assert_eq!(said[0], ("one\n".into(), false));
    assert_eq!(said[1], ("/tmp\nkept\nfunction two\n[it ended with status 1]\n".into(), true));
    assert!(said[2].1 && said[2].0.starts_with("begun\n[it was ended after 300 ms"), "{:?}", said[2]);
    assert_eq!(said[3], ("[]\n/workspace\n".into(), false), "a new shell");
    assert!(said[4].1 && said[4].0.starts_with("last\n[the shell ended"), "{:?}", said[4]);
    assert_eq!(said[5], ("again\n".into(), false));
    assert!(said[6].0.contains("in the background"));
    assert_eq!(said[8], ("1\n2\n3\n[it has ended]".into(), false));
    assert!(said[9].1, "{:?}", said[9]);
    assert!(
        said[10].0.len() < 110_000 && said[10].0.ends_with("100000\n") && said[10].0.contains("left out")
    );
}

#[test]
fn files_are_read_written_and_edited_whole() {
    let tool = |name: &str, input: Value| json!({ "name": name, "input": input });
    let said = calls(
        "",
        &[
            tool("write", json!({ "path": "a/b/c.txt", "content": "one\ntwo\nthree\n" })),
            tool("read", json!({ "path": "/workspace/a/b/c.txt", "offset": 2, "limit": 1 })),
            tool("edit", json!({ "path": "a/b/c.txt", "old_string": "o", "new_string": "0" })),
            tool("edit", json!({ "path": "a/b/c.txt", "old_string": "two", "new_string": "zwei" })),
            tool("edit", json!({ "path": "a/b/c.txt", "old_string": "two", "new_string": "zwei" })),
            tool("glob", json!({ "pattern": "**/*.txt" })),
            tool("grep", json!({ "pattern": "^z.*i$" })),
            tool("grep", json!({ "pattern": "(" })),
            tool("read", json!({ "path": "no" })),
            tool("nonsense", json!({})),
        ],
    );
    assert_eq!(said[1], ("     2\ttwo\n".into(), false));
    assert!(said[2].1 && said[2].0.contains("2 times"), "{:?}", said[2]);
    assert_eq!(said[3], ("1 replaced in /workspace/a/b/c.txt".into(), false));
    assert!(said[4].1 && said[4].0.contains("is not in"));
    assert_eq!(said[5].0, "/workspace/a/b/c.txt\n");
    assert_eq!(said[6].0, "/workspace/a/b/c.txt:2:zwei\n");
    assert!(said[7].1 && said[8].1 && said[9].1);
}

/// FIFOs, devices, loops, links to what never ends: each would hold up a plain `cat` or `find` for ever.
#[test]
fn what_was_planted_does_not_hold_anybody_up() {
    let plant = "mkfifo fifo; ln -s /dev/zero endless; ln -s loop loop; ln -s /proc/self/fd/0 input; mkdir -p deep; cd deep; \
        for n in $(seq 80); do mkdir d; cd d; done; cd /workspace; ln -s / root; head -c 40000000 /dev/zero > zeros; \
        mkdir -p /tmp/.harness/calls /tmp/.harness/kept; mkfifo /tmp/.harness/shell.pid /tmp/.harness/kept/e0 /tmp/.harness/calls/e9.out; \
        printf 'x\\e[31m\\nb' > \"$(printf 'na\\nme')\"";
    let tool = |name: &str, input: Value| json!({ "name": name, "input": input });
    let began = std::time::Instant::now();
    let said = calls(
        plant,
        &[
            tool("read", json!({ "path": "fifo" })),
            tool("read", json!({ "path": "endless" })),
            tool("read", json!({ "path": "loop" })),
            tool("read", json!({ "path": "zeros" })),
            tool("write", json!({ "path": "fifo", "content": "x" })),
            tool("write", json!({ "path": "endless", "content": "x" })),
            tool("edit", json!({ "path": "fifo", "old_string": "a", "new_string": "b" })),
            tool("grep", json!({ "pattern": "x" })),
            tool("glob", json!({ "pattern": "**" })),
            bash("echo works"),
        ],
    );
    for number in [0, 1, 2, 3, 4, 5, 6] {
        assert!(said[number].1, "{number}: {:?}", said[number]);
    }
    assert!(said[7].0.contains("na\nme:1:x"), "{:?}", said[7]);
    assert!(!said[8].1);
    assert_eq!(
        said[9],
        ("works\n".into(), false),
        "a pid file that is none is no shell; a FIFO in the output's place is put away"
    );
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
}
