//! Who may ask for what, and what the record says of it.

use std::io::{Read, Write};

use serde_json::json;

use super::*;

#[test]
fn absent_means_nothing() {
    let daemon = Daemon::start();
    for (uid, policy) in [(EVE, "default"), (ADA, "build"), (ADA, "nope")] {
        let output = daemon.exec(uid, &["--policy", policy], &["true"]);
        assert_eq!(output.status.code(), Some(125));
        assert!(text(&output.stderr).contains("denied (policy-not-granted)"), "{}", text(&output.stderr));
    }
    assert!(daemon.exec(0, &["--policy", "build"], &["true"]).status.success(), "root may");
    let denials: Vec<_> =
        daemon.records().into_iter().filter(|record| record["event"]["kind"] == "deny").collect();
    assert_eq!(denials.len(), 3, "{denials:?}");
    assert!(denials.iter().all(|denial| denial["event"]["code"] == "policy-not-granted"));
    assert_eq!(denials[0]["event"]["uid"], EVE);
}

/// Line ends, escapes, quotes, a text that reads like a record, letters that run the other way.
const NASTY: &str = "x\n{\"kind\":\"end\"}\r\u{1b}[2J\u{8}\u{7}\u{202e}\"\u{7f}\u{9b}31m";

/// Nothing in `bytes` would begin a line of its own or tell a terminal something.
fn assert_tame(what: &str, bytes: &[u8], lines: usize) {
    let text_of = text(bytes);
    // DEL, the C1 controls (U+009B is CSI) and what turns the direction of a line are a terminal's too.
    let tells = |letter: &char| {
        (letter.is_control() && *letter != '\n')
            || matches!(letter, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let raw = text_of.chars().find(tells);
    assert!(raw.is_none(), "{what}: {raw:?} stands raw");
    assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), lines, "{what}: {}", text(bytes));
}

/// CB-22. Whatever a caller or a workload puts into a name, it is one record each, and no terminal sees it raw. The control is
/// the same text as `echo` shows it.
#[test]
fn cb_22_every_act_is_one_record_and_what_it_says_is_escaped() {
    let daemon = Daemon::start();
    let echoed = Command::new("echo").arg(NASTY).output().expect("echo runs").stdout;
    assert!(
        echoed.contains(&0x1b) && echoed.iter().filter(|byte| **byte == b'\n').count() == 2,
        "the control"
    );
    // As a word; as the workload's own name (PR_SET_NAME); while it runs, as others list it.
    let rename = "printf 'a\\nb\\033[2J' > /proc/self/comm; exit 3";
    assert_eq!(daemon.exec(ADA, &[], &["sh", "-c", rename, NASTY]).status.code(), Some(3));
    let mut run = daemon
        .broker(ADA, &["exec"])
        .args(["--", "sh", "-c", "sleep 60; :", NASTY])
        .spawn()
        .expect("it starts");
    assert!(within(Duration::from_secs(5), || daemon.list(ADA).len() == 1));
    for words in
        [&["ps"][..], &["ps", "--json"], &["inspect", daemon.list(ADA)[0]["id"].as_str().expect("a name")]]
    {
        let output = daemon.broker(0, words).output().expect("it runs");
        let lines = if words == ["ps"] { 2 } else { text(&output.stdout).lines().count() };
        assert_tame("a list", &output.stdout, lines);
        assert!(text(&output.stdout).contains("\\u001b[2J"), "{}", text(&output.stdout));
    }
    run.kill().expect("it lives");
    run.wait().expect("it is reaped");
    let ended = || daemon.records().len() == 4;
    assert!(within(Duration::from_secs(5), ended), "start, end, start, end: {:?}", daemon.records());

    send_strange_names(&daemon);
    let records = daemon.records();
    assert_eq!(records[0]["event"]["command"][3], NASTY);
    assert_eq!(records[0]["event"]["uid"], ADA);
    assert_eq!(records[1]["event"]["outcome"], json!({ "kind": "exited", "code": 3 }));
    let raw = fs::read(daemon.state().join("record/audit.jsonl")).expect("the record");
    assert!(!raw.contains(&0x1b), "an escape stands raw in the record");
    assert_eq!(raw.iter().filter(|byte| **byte == b'\n').count(), records.len());
    assert!(raw.split(|byte| *byte == b'\n').all(|line| line.len() < 64 << 10), "a record has no bound");
    assert_tame("what is shown", &daemon.audit("show").stdout, records.len());
    assert!(daemon.audit("verify").status.success());
}

/// Whatever else the interface takes: one record each, or two where something was begun, three where it was denied then.
fn send_strange_names(daemon: &Daemon) {
    let long = "y".repeat(900_000);
    let run = |key: &str, value: Value| {
        let mut run = json!({ "policy": "default", "command": ["true"], "environment": [], "path": "/bin", "streams": {} });
        run[key] = value;
        run
    };
    let variable = |name: &str, value: &str| json!([{ "name": name, "value": value }]);
    let workspace = |name: &str| json!({ "descriptor": 0, "name": name, "mode": "ro" });
    let cases = [
        ("Run", run("command", json!(["true", long])), 2),
        ("Run", run("command", json!(["true", "nul\0"])), 3),
        ("Run", run("policy", json!(NASTY)), 1),
        ("Run", run("policy", json!(long)), 1),
        ("Run", run("environment", variable("NAME", NASTY)), 2),
        ("Run", run("environment", variable(NASTY, "value")), 1),
        ("Run", run("path", json!(NASTY)), 2),
        ("Run", run("workspace", workspace(NASTY)), 1),
        ("Run", run("workspace", workspace(&long)), 1),
        ("Run", run(NASTY, json!(1)), 1),
        ("Kill", json!({ "sandbox": NASTY }), 0),
        ("Kill", json!({ "sandbox": "z".repeat(1 << 20) }), 1),
        (NASTY, json!({}), 0),
    ];
    for (method, parameters, more) in cases {
        let (before, what) = (daemon.records().len(), bounded(&format!("{method} {parameters}")));
        let mut stream = UnixStream::connect(daemon.socket()).expect("it listens");
        let call = json!({ "method": format!("io.broker.Control.{method}"), "parameters": parameters });
        let _ = stream.write_all(format!("{call}\0").as_bytes());
        let mut said = [0; 1];
        let _ = stream.read(&mut said);
        let counted = within(Duration::from_secs(5), || daemon.records().len() >= before + more);
        assert!(counted && daemon.records().len() == before + more, "{what}: {:?}", daemon.records().last());
    }
}

fn bounded(text: &str) -> String {
    text.chars().take(120).collect()
}

#[test]
fn an_edited_removed_reordered_or_cut_record_is_found() {
    let mut daemon = Daemon::start();
    for code in 0..4 {
        daemon.exec(ADA, &[], &["sh", "-c", &format!("exit {code}")]);
    }
    daemon.stop();
    assert!(daemon.audit("verify").status.success(), "the control");
    let path = daemon.state().join("record/audit.jsonl");
    let good = fs::read_to_string(&path).expect("the record");
    let lines: Vec<&str> = good.lines().collect();
    assert_eq!(lines.len(), 8);
    let joined = |lines: &[&str]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let mut reordered = lines.clone();
    reordered.swap(2, 3);
    for (how, text) in [
        ("edited", good.replacen("\"code\":2", "\"code\":0", 1)),
        ("removed", joined(&[&lines[..3], &lines[4..]].concat())),
        ("reordered", joined(&reordered)),
        ("cut at a line", joined(&lines[..6])),
        ("cut in a line", good[..good.len() - 9].to_owned()),
        ("emptied", String::new()),
    ] {
        assert_ne!(text, good, "{how}");
        fs::write(&path, text).expect("it can be written");
        let found = daemon.audit("verify");
        assert_eq!(found.status.code(), Some(1), "{how}: {}", text_of(&found));
    }
    fs::write(&path, good).expect("it can be written");
    assert!(daemon.audit("verify").status.success(), "whole again");
}

fn text_of(output: &Output) -> String {
    text(&output.stdout) + &text(&output.stderr)
}

/// The record goes on where it ended, through restarts of the service.
#[test]
fn the_chain_goes_on_after_a_restart() {
    let mut daemon = Daemon::start();
    assert!(daemon.exec(ADA, &[], &["true"]).status.success());
    daemon.stop();
    let again = Command::new(program("broker"))
        .args(["serve", "--config"])
        .arg(daemon.folder.path().join("config.toml"))
        .stderr(Stdio::null())
        .spawn();
    daemon.process = again.expect("it starts");
    assert!(within(Duration::from_secs(5), || UnixStream::connect(daemon.socket()).is_ok()));
    assert!(daemon.exec(ADA, &[], &["true"]).status.success());
    let verified = daemon.audit("verify");
    assert!(verified.status.success(), "{}", text_of(&verified));
    assert!(text(&verified.stdout).starts_with("4 records"), "{}", text_of(&verified));
}

/// A record that cannot be written denies the act: here a file system that is full. What was recorded stays whole.
#[test]
fn what_cannot_be_recorded_is_not_done() {
    let daemon = Daemon::start_after("mount -t tmpfs -o size=16k none \"$STATE\"");
    assert!(daemon.exec(ADA, &[], &["true"]).status.success(), "the control");
    let workspace = folder_of(ADA);
    let path = workspace.path().display().to_string();
    let denied = (0..60).find_map(|number| {
        let name = format!("ran-{number}");
        let output = daemon.exec(ADA, &["--workspace", &path], &["touch", &name]);
        (!output.status.success()).then_some((output, name))
    });
    let (output, name) = denied.expect("16 KiB are not for ever");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("denied (audit)"), "{}", text(&output.stderr));
    assert!(!workspace.path().join(name).exists(), "it ran without a record");
    // In the daemon's own mount namespace, which dies with it.
    let launcher = daemon.role("launcher").expect("it lives").to_string();
    let mut verify = Command::new("nsenter");
    verify
        .args(["--mount", "--target", &launcher])
        .arg(program("broker"))
        .args(["audit", "verify", "--state"]);
    let verified = verify.arg(daemon.state()).output().expect("nsenter runs");
    assert!(verified.status.success(), "{}", text_of(&verified));
}

/// A record of many files is one chain: what is wrong in an old one is found, and what lives is known across them.
#[test]
fn the_chain_goes_on_from_file_to_file() {
    let mut daemon = Daemon::start_with("true", "audit_bytes = \"2KiB\"\n");
    for _ in 0..8 {
        assert!(daemon.exec(0, &[], &["true"]).status.success());
    }
    let parts = || {
        let listed = fs::read_dir(daemon.state().join("record")).expect("a directory");
        let mut parts: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
        parts.retain(|path| path.extension().is_some_and(|ending| ending == "jsonl"));
        parts.sort();
        parts
    };
    assert!(within(Duration::from_secs(5), || parts().len() > 2), "{:?}", parts());
    let peer = lives::Peer::new(&daemon);
    let (_, handle) = peer.provision(None);
    peer.execute(&handle, "one", "exit 5");
    for _ in 0..4 {
        assert!(daemon.exec(0, &[], &["true"]).status.success());
    }
    daemon.kill_core();
    let peer = lives::Peer::new(&daemon);
    assert_eq!(peer.execute(&handle, "one", "exit 6").0["outcome"]["code"], 5, "known across files");
    peer.send("Records", &serde_json::json!({ "from": 7 }), false, &[]);
    let read = peer.reply().0["parameters"]["records"].as_array().cloned().unwrap_or_default();
    let numbers: Vec<u64> = read.iter().filter_map(|record| record["sequence"].as_u64()).collect();
    assert_eq!(numbers, (7..7 + numbers.len() as u64).collect::<Vec<_>>());
    assert!(numbers.len() > 10, "{numbers:?}");
    drop(handle);
    let parts = parts();
    daemon.stop();
    assert!(daemon.audit("verify").status.success(), "{}", text(&daemon.audit("verify").stderr));
    let whole = fs::read(&parts[1]).expect("a part");
    fs::remove_file(&parts[1]).expect("it is there");
    assert!(text(&daemon.audit("verify").stderr).contains("removed"), "a whole file");
    fs::write(&parts[1], text(&whole).replacen("true", "fals", 1)).expect("a part");
    assert!(text(&daemon.audit("verify").stderr).contains("edited"), "in an old file");
    fs::write(&parts[1], whole).expect("a part");
    assert!(daemon.audit("verify").status.success());
}

/// Prometheus' side is curl: a client that nobody here wrote.
#[test]
fn what_is_counted_can_be_scraped_by_who_may() {
    let folder = tempfile::tempdir().expect("a directory");
    set_mode(folder.path(), 0o755);
    let socket = folder.path().join("metrics.sock");
    let daemon = Daemon::start_with("true", &format!("metrics = {socket:?}\n"));
    assert!(daemon.exec(ADA, &[], &["true"]).status.success());
    assert_eq!(daemon.exec(EVE, &[], &["true"]).status.code(), Some(125));
    let scrape = |uid: u32, path: &str| {
        use std::os::unix::process::CommandExt;
        let mut curl = Command::new("curl");
        curl.args(["-s", "-i", "--max-time", "10", "--unix-socket"]).arg(&socket);
        text(&curl.arg(format!("http://broker{path}")).uid(uid).gid(uid).output().expect("curl runs").stdout)
    };
    let said = scrape(0, "/metrics");
    for line in [
        "HTTP/1.1 200 OK",
        "broker_begun_total{what=\"run\"} 1",
        "broker_ended_total{reason=\"command\"} 1",
        "broker_denials_total{code=\"policy-not-granted\"} 1",
        "broker_sandboxes 0",
    ] {
        assert!(said.lines().any(|found| found == line), "{line} is not in\n{said}");
    }
    assert!(scrape(ADA, "/metrics").contains("403 Forbidden"));
    assert!(scrape(0, "/other").contains("404 Not Found"));
}

/// A record is one daemon's: a second one on the same directory, and one whose record is broken, say so and end.
#[test]
fn a_daemon_that_cannot_record_does_not_serve() {
    let mut daemon = Daemon::start();
    assert!(daemon.exec(0, &[], &["true"]).status.success());
    let serve = || {
        let mut command = Command::new("timeout");
        command
            .args(["20"])
            .arg(program("broker"))
            .args(["serve", "--config"])
            .arg(daemon.folder.path().join("other.toml"));
        command.output().expect("it runs")
    };
    let other = daemon.folder.path().join("other.sock");
    let server = format!("[server]\nsocket = {other:?}\nstate = {:?}\n", daemon.state());
    fs::write(daemon.folder.path().join("other.toml"), server).expect("a configuration");
    let second = serve();
    assert_eq!(second.status.code(), Some(1));
    assert!(
        text(&second.stderr).contains("another daemon uses this state directory"),
        "{}",
        text(&second.stderr)
    );
    let signal = nix::sys::signal::Signal::SIGKILL;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.process.id().cast_signed()), signal)
        .expect("it lives");
    let _ = daemon.process.wait();
    let path = daemon.state().join("record/audit.jsonl");
    let edited = fs::read_to_string(&path).expect("the record").replacen("true", "fals", 1);
    fs::write(&path, edited).expect("the record");
    let broken = serve();
    assert_eq!(broken.status.code(), Some(1));
    assert!(text(&broken.stderr).contains("is broken: record 0: it was edited"), "{}", text(&broken.stderr));
    let none = Command::new(program("broker"))
        .args(["audit", "verify", "--state", "/nonexistent"])
        .output()
        .expect("it runs");
    assert!(
        !none.status.success() && text(&none.stderr).contains("there is no record"),
        "{}",
        text(&none.stderr)
    );
}
