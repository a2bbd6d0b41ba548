//! Workspaces of mode `cow`: the workspace stays as it is, and what was changed is shown, made so or thrown away by the
//! caller's own right, whatever the workload left in it.

use serde_json::json;

use super::lives::Peer;
use super::*;

/// Everything below a directory: name, kind, content.
pub fn listing(folder: &Path) -> Vec<String> {
    let find = Command::new("find")
        .arg(folder)
        .args([
            "-mindepth",
            "1",
            "(",
            "-type",
            "l",
            "-printf",
            "%P -> %l\\n",
            "-o",
            "-printf",
            "%P %y %m\\n",
            ")",
        ])
        .output()
        .expect("find runs");
    let mut lines: Vec<String> = text(&find.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

pub fn read(folder: &Path, name: &str) -> Option<String> {
    fs::read_to_string(folder.join(name)).ok()
}

pub fn workspace() -> TempDir {
    let own = folder_of(ADA);
    let script = "mkdir -p src/deep gone kept && echo one > src/a && echo two > src/deep/b && echo x > gone/x && echo old > swap && \
        ln -s /etc/passwd link && mkdir .git && echo ours > .git/config";
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).current_dir(own.path()).uid(ADA).gid(ADA);
    assert!(shell.status().expect("sh runs").success());
    own
}

/// Runs `script` in it; the sandbox's name.
pub fn change(daemon: &Daemon, own: &Path, script: &str) -> String {
    let wish = format!("{}:cow", own.display());
    let output = daemon.exec(ADA, &["--workspace", &wish, "--report", "-"], &["sh", "-c", script]);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert_eq!(
        report["outcome"],
        json!({ "kind": "exited", "code": 0 }),
        "{report} {}",
        text(&output.stderr)
    );
    assert_eq!(report["changes"], text(&output.stderr).contains("broker commit"), "{}", text(&output.stderr));
    report["sandbox"].as_str().expect("a name").to_owned()
}

pub fn ask(daemon: &Daemon, uid: u32, words: &[&str]) -> Output {
    daemon.broker(uid, words).output().expect("it runs")
}

const SCRIPT: &str = "echo more >> src/a; rm src/deep/b; echo new > src/deep/c; rm -r gone; mkdir gone; echo y > gone/y; \
    rm swap; mkdir swap; echo z > swap/z; rm link; ln -s nowhere link; mkdir -m 700 made; echo s > made/s; chmod 755 made/s; \
    mv kept moved 2>/dev/null || cp -r kept moved";

#[test]
fn the_workspace_stays_as_it_is_until_its_owner_commits() {
    let daemon = Daemon::start();
    let own = workspace();
    let before = listing(own.path());
    let id = change(&daemon, own.path(), SCRIPT);
    assert_eq!(listing(own.path()), before, "nothing happened to it");
    let diff = ask(&daemon, ADA, &["diff", &id]);
    let expected = "M \"gone\"\nA \"gone/y\"\nM \"link\"\nA \"made\"\nA \"made/s\"\nA \"moved\"\nM \"src/a\"\nD \"src/deep/b\"\nA \"src/deep/c\"\n\
        M \"swap\"\nA \"swap/z\"\n";
    assert_eq!(text(&diff.stdout).replace("D \"kept\"\n", ""), expected, "{}", text(&diff.stderr));
    assert!(text(&ask(&daemon, ADA, &["diff"]).stdout).contains(&id), "it is listed");
    for uid in [EVE, 0] {
        let other = ask(&daemon, uid, &["diff", &id]);
        assert!(!other.status.success() && text(&other.stderr).contains("no sandbox"), "{uid}: it is Ada's");
    }
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(commit.status.success(), "{}", text(&commit.stderr));
    let own = own.path();
    assert_eq!(read(own, "src/a").as_deref(), Some("one\nmore\n"));
    assert_eq!((read(own, "src/deep/b"), read(own, "src/deep/c").as_deref()), (None, Some("new\n")));
    assert_eq!(
        (read(own, "gone/x"), read(own, "gone/y").as_deref()),
        (None, Some("y\n")),
        "another directory of that name"
    );
    assert_eq!(read(own, "swap/z").as_deref(), Some("z\n"));
    assert_eq!(fs::read_link(own.join("link")).expect("a link"), Path::new("nowhere"));
    for line in ["made d 700", "made/s f 755"] {
        assert!(listing(own).contains(&line.to_owned()), "{line}: {:?}", listing(own));
    }
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(own.join("made/s")).expect("it is there").uid(), ADA);
    assert!(!ask(&daemon, ADA, &["diff", &id]).status.success(), "and then it is gone");
    assert_eq!(fs::read_dir(daemon.state().join("changes")).expect("a directory").count(), 0);
}

#[test]
fn what_was_not_changed_is_not_held_and_what_is_thrown_away_is_gone() {
    let daemon = Daemon::start();
    let own = workspace();
    change(&daemon, own.path(), "cat src/a > /dev/null; ls -R . > /dev/null");
    let held = || fs::read_dir(daemon.state().join("changes")).expect("a directory").count();
    assert_eq!(held(), 0);
    let id = change(&daemon, own.path(), "echo x > y");
    assert_eq!(held(), 2, "the changes and what is noted of them");
    daemon.kill_core();
    let known = || ask(&daemon, ADA, &["diff", &id]).status.success();
    assert!(within(Duration::from_secs(2), known), "the next core knows of it");
    assert!(!ask(&daemon, EVE, &["discard", &id]).status.success());
    assert!(ask(&daemon, ADA, &["discard", &id]).status.success());
    assert_eq!(held(), 0);
    assert!(!own.path().join("y").exists());
}

/// What the host runs or obeys later is not changed by a commit either, and what is no file is none of a workspace's.
#[test]
fn what_is_protected_or_special_is_not_committed() {
    let daemon = Daemon::start();
    let own = workspace();
    let script = "echo evil > .git/config; mkdir -p .git/hooks; echo evil > .git/hooks/post-commit; echo evil > .bashrc; mkfifo fifo; \
        echo fine > fine; rm -r .git/x 2>/dev/null; mkdir .vscode; echo evil > .vscode/tasks.json; true";
    let id = change(&daemon, own.path(), script);
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(
        commit.status.success() && text(&commit.stderr).contains("stay held"),
        "{}",
        text(&commit.stderr)
    );
    let said = text(&commit.stdout);
    for line in [
        "A \"fine\"",
        "! \"fifo\"",
        "P \".bashrc\"",
        "P \".git/config\"",
        "P \".git/hooks\"",
        "P \".vscode\"",
    ] {
        assert!(said.lines().any(|found| found == line), "{line}: {said}");
    }
    assert_eq!(read(own.path(), ".git/config").as_deref(), Some("ours\n"));
    let found = listing(own.path());
    assert!(
        !found.iter().any(|line| line.contains("hooks") || line.contains("bashrc") || line.contains("fifo")),
        "{found:?}"
    );
    assert_eq!(read(own.path(), "fine").as_deref(), Some("fine\n"));
    // Removing what holds a protected path is a change to it.
    let id = change(&daemon, own.path(), "rm -rf .git && echo file > .git");
    assert!(text(&ask(&daemon, ADA, &["commit", &id]).stdout).contains("P \".git\""));
    assert_eq!(read(own.path(), ".git/config").as_deref(), Some("ours\n"));
}

/// What a sandbox that lives changes is its own, and may be another principal's by now.
#[test]
fn the_changes_of_a_sandbox_that_lives_stay_with_it() {
    let daemon = Daemon::start();
    let own = folder_of(0);
    fs::write(own.path().join("a"), "one\n").expect("a file");
    let peer = Peer::new(&daemon);
    let (id, handle) = peer.provision_as(Some(own.path()), "cow");
    peer.execute(&handle, "one", "echo two > a; echo b > b");
    for word in ["diff", "commit", "discard"] {
        let output = ask(&daemon, 0, &[word, &id]);
        assert!(text(&output.stderr).contains("denied (lives)"), "{word}: {}", text(&output.stderr));
    }
    assert_eq!(read(own.path(), "a").as_deref(), Some("one\n"));
    drop(handle);
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()));
    assert_eq!(text(&ask(&daemon, 0, &["diff", &id]).stdout), "M \"a\"\nA \"b\"\n");
    assert!(ask(&daemon, 0, &["commit", &id]).status.success());
    assert_eq!(
        (read(own.path(), "a").as_deref(), read(own.path(), "b").as_deref()),
        (Some("two\n"), Some("b\n"))
    );
}

/// Closed directories hold up nobody but themselves.
#[test]
fn what_the_workload_closed_is_said_and_the_rest_goes_on() {
    let daemon = Daemon::start();
    let own = workspace();
    let script =
        "mkdir shut cache; echo x > shut/x; chmod 0 shut; echo y > cache/y; chmod 555 cache; echo z > z";
    let id = change(&daemon, own.path(), script);
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(
        commit.status.success() && text(&commit.stdout).contains("! \"shut\"\n"),
        "{}",
        text(&commit.stderr)
    );
    assert_eq!(
        (read(own.path(), "cache/y").as_deref(), read(own.path(), "z").as_deref()),
        (Some("y\n"), Some("z\n"))
    );
    assert!(listing(own.path()).contains(&"cache d 555".to_owned()));
    assert!(ask(&daemon, ADA, &["discard", &id]).status.success());
}

/// What the caller changed meanwhile is not overwritten without a word.
#[test]
fn a_commit_overwrites_nothing_that_was_changed_since() {
    let daemon = Daemon::start();
    let own = workspace();
    let id = change(&daemon, own.path(), "echo inside > src/a; echo new > made");
    fs::write(own.path().join("src/a"), "host\n").expect("it is written");
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(text(&commit.stdout).contains("C \"src/a\"\n") && text(&commit.stderr).contains("--force"));
    assert_eq!(
        (read(own.path(), "src/a").as_deref(), read(own.path(), "made").as_deref()),
        (Some("host\n"), Some("new\n"))
    );
    let commit = ask(&daemon, ADA, &["commit", "--force", &id]);
    assert!(commit.status.success(), "{}", text(&commit.stderr));
    assert_eq!(read(own.path(), "src/a").as_deref(), Some("inside\n"));
}
