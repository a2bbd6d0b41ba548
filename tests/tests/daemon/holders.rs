//! Whose a sandbox is: what is narrower, what another principal finds when it takes one over, what a number is worth.

use std::os::fd::{AsFd, OwnedFd};

use serde_json::json;

use super::lives::Peer;
use super::*;

/// A channel for `session` that `peer` mints, with the policies of that name.
pub fn mint(peer: &Peer, session: &str, policies: &[&str]) -> Result<Peer, Value> {
    peer.send("Narrow", &json!({ "session": session, "policies": policies }), false, &[]);
    let (reply, mut descriptors) = peer.reply();
    if reply["error"].is_null() { Ok(Peer::from(descriptors.remove(0))) } else { Err(reply) }
}

fn say_live(peer: &Peer, handle: &OwnedFd) -> Value {
    peer.send("HandOver", &json!({ "handle": 0, "mode": "live" }), false, &[handle.as_fd()]);
    peer.reply().0
}

const LEAVE: &str = "echo kept > /tmp/file; echo own > result; echo shared > /dev/shm/it; setsid sleep 300 > /dev/null 2>&1 & exit 0";
const FIND: &str = "cat /tmp/file result /dev/shm/it; pgrep -c sleep; ls -d .git/hooks";

/// By default the next principal finds the files and nobody who runs; the caller that still waits hears of it.
#[test]
fn what_ran_for_one_principal_does_not_run_beside_another() {
    let daemon = Daemon::start();
    let own = folder_of(0);
    fs::create_dir(own.path().join(".git")).expect("a directory");
    fs::create_dir(own.path().join(".git/hooks")).expect("a directory");
    let user = Peer::new(&daemon);
    let (one, two) =
        (mint(&user, "one", &["default"]).expect("a channel"), mint(&user, "two", &[]).expect("one"));
    let beside = mint(&user, "one", &[]).expect("another channel of the same session");
    let (id, handle) = one.provision(Some(own.path()));
    one.execute(&handle, "leave", LEAVE);
    let mut out = one.ask(&handle, "wait", "echo begun; sleep 300");
    let mut begun = [0; 6];
    std::io::Read::read_exact(&mut out, &mut begun).expect("it begins");
    assert_eq!(beside.execute(&handle, "look", FIND).1, "kept\nown\nshared\n2\n.git/hooks\n", "the control");
    let (reply, said) = two.execute(&handle, "look again", FIND);
    assert_eq!(said, "kept\nown\nshared\n0\n.git/hooks\n", "{reply}");
    let waited = one.reply().0;
    assert_eq!(waited["parameters"]["outcome"]["ended_by"], "hand_over", "{waited}");
    let (reply, said) =
        two.execute(&handle, "protected", "echo x > .git/hooks/pre-commit; echo y > made; cat made");
    assert_eq!(said, "y\n", "what is protected still is: {reply}");
    assert!(!own.path().join(".git/hooks/pre-commit").exists());
    let kinds: Vec<Value> = daemon.records().into_iter().map(|record| record["event"].clone()).collect();
    let handed = kinds.iter().find(|event| event["kind"] == "handed_over").expect("it is recorded");
    assert_eq!((&handed["session"], &handed["from"]["session"]), (&json!("two"), &json!("one")), "{id}");
}

#[test]
fn live_has_to_be_said_by_who_holds_it_and_holds_once() {
    let daemon = Daemon::start();
    let user = Peer::new(&daemon);
    let (one, two) =
        (mint(&user, "one", &["default"]).expect("a channel"), mint(&user, "two", &[]).expect("one"));
    let (_, handle) = one.provision(None);
    one.execute(&handle, "leave", "setsid sleep 300 > /dev/null 2>&1 & exit 0");
    assert_eq!(say_live(&two, &handle)["parameters"]["code"], "not-yours", "who does not hold it");
    assert!(say_live(&one, &handle)["error"].is_null());
    assert_eq!(two.execute(&handle, "look", "pgrep -c sleep").1, "1\n", "as it runs");
    assert_eq!(one.execute(&handle, "look back", "pgrep -c sleep").1, "0\n", "it was said for one hand-over");
}

/// The core that comes after knows whose it is.
#[test]
fn a_hand_over_survives_the_core() {
    let daemon = Daemon::start();
    let user = Peer::new(&daemon);
    let (one, two) =
        (mint(&user, "one", &["default"]).expect("a channel"), mint(&user, "two", &[]).expect("one"));
    let (_, handle) = one.provision(None);
    assert!(say_live(&one, &handle)["error"].is_null());
    two.execute(&handle, "leave", "setsid sleep 300 > /dev/null 2>&1 & exit 0");
    daemon.kill_core();
    let user = Peer::new(&daemon);
    let two = mint(&user, "two", &[]).expect("a channel");
    assert_eq!(two.execute(&handle, "look", "pgrep -c sleep").1, "1\n", "two holds it still");
    assert_eq!(user.execute(&handle, "look too", "pgrep -c sleep").1, "0\n", "the user is another principal");
}

#[test]
fn a_narrower_channel_is_narrower() {
    let daemon = Daemon::start();
    let user = Peer::new(&daemon);
    let (id, _handle) = user.provision(None);
    let one = mint(&user, "one", &["default"]).expect("a channel");
    let bare = mint(&one, "bare", &[]).expect("a narrower one");
    let denied = |peer: &Peer, method: &str, parameters: Value| {
        peer.send(method, &parameters, false, &[]);
        peer.reply().0
    };
    let provision = json!({ "policy": "default", "environment": [], "path": "/bin" });
    assert_eq!(denied(&bare, "Provision", provision)["parameters"]["code"], "policy-not-granted");
    assert_eq!(
        mint(&bare, "wider", &["default"]).err().expect("no")["parameters"]["code"],
        "policy-not-granted"
    );
    assert_eq!(mint(&one, "a/b", &[]).err().expect("no")["parameters"]["code"], "not-narrower");
    // The user is root here; its session is not root's.
    assert_eq!(denied(&one, "Metrics", json!({}))["parameters"]["code"], "not-yours");
    for method in ["Kill", "Inspect"] {
        let reply = denied(&one, method, json!({ "sandbox": id }));
        assert_eq!(reply["error"], "io.broker.Control.NoSuchSandbox", "{method}: {reply}");
    }
    let (below, _kept) = one.provision(None);
    assert_eq!(
        denied(&user, "Inspect", json!({ "sandbox": below }))["parameters"]["sandbox"]["session"],
        "one"
    );
    assert_eq!(denied(&bare, "List", json!({}))["parameters"]["sandboxes"], json!([]));
    assert_eq!(daemon.list(0).len(), 2);
}

/// What one holder called its commands is nothing to the next: no outcome that was there before passes for its own.
#[test]
fn names_of_effects_are_each_principal_s_own() {
    let daemon = Daemon::start();
    let user = Peer::new(&daemon);
    let (one, two) =
        (mint(&user, "one", &["default"]).expect("a channel"), mint(&user, "two", &[]).expect("one"));
    let (_, handle) = one.provision(None);
    assert_eq!(one.execute(&handle, "build", "exit 0").0["outcome"]["code"], 0);
    let (reply, said) = two.execute(&handle, "build", "echo ran; exit 7");
    assert_eq!((&reply["outcome"]["code"], said.as_str()), (&json!(7), "ran\n"), "{reply}");
    assert_eq!(one.execute(&handle, "build", "exit 5").0["outcome"]["code"], 0, "its own, still");
    daemon.kill_core();
    let two = mint(&Peer::new(&daemon), "two", &[]).expect("a channel");
    assert_eq!(
        two.execute(&handle, "build", "exit 5").0["outcome"]["code"],
        7,
        "the next core knows whose is whose"
    );
}

/// A name alone is worth nothing; a name and the kernel's word for who asks is.
#[test]
fn one_s_own_sandbox_is_used_by_its_name() {
    let daemon = Daemon::start();
    let own = Peer::new(&daemon);
    let (id, handle) = own.provision(None);
    own.execute(&handle, "leave", "echo kept > /tmp/file");
    let run = |uid: u32, script: &str| {
        let mut words = daemon.broker(uid, &["exec", "--in", &id]);
        words.args(["--", "sh", "-c", script]).output().expect("it runs")
    };
    let output = run(0, "cat /tmp/file; exit 3");
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("kept\n", Some(3)),
        "{}",
        text(&output.stderr)
    );
    let output = run(ADA, "cat /tmp/file");
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("", Some(125)));
    assert!(text(&output.stderr).contains("no sandbox"), "{}", text(&output.stderr));
    drop(handle);
    assert!(within(Duration::from_secs(2), || run(0, "true").status.code() == Some(125)), "it has ended");
}

/// A peer that reads nothing gets one descriptor, and is dropped; nobody else waits for it.
#[test]
fn one_unread_descriptor_is_in_flight() {
    let daemon = Daemon::start();
    let idle = Peer::new(&daemon);
    for _ in 0..4 {
        idle.send("Narrow", &json!({ "session": "x", "policies": [] }), false, &[]);
    }
    assert!(daemon.exec(0, &[], &["true"]).status.success(), "others are served meanwhile");
    let minted = || daemon.records().iter().filter(|record| record["event"]["kind"] == "derive").count();
    assert!(within(Duration::from_secs(10), || minted() == 2), "{}", minted());
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(minted(), 2, "the second was minted and could not be handed over: the peer is gone");
    assert_eq!(idle.reply().1.len(), 1);
}
