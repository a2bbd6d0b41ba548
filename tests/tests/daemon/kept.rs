//! Sandboxes that are kept: they outlive whoever asked for them by as long as was said, and are found again by their names.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use serde_json::json;

use super::holders::mint;
use super::lives::Peer;
use super::*;

fn provision(peer: &Peer, keep: &str) -> Result<(String, OwnedFd), Value> {
    let wish = json!({ "policy": "default", "environment": [], "path": "/usr/bin:/bin", "keep": keep });
    peer.send("Provision", &wish, false, &[]);
    let (reply, mut descriptors) = peer.reply();
    match reply["parameters"]["sandbox"].as_str() {
        Some(id) => Ok((id.to_owned(), descriptors.remove(0))),
        None => Err(reply),
    }
}

/// A command in a sandbox by its name, and what it says.
fn execute(peer: &Peer, sandbox: &str, effect: &str, script: &str) -> (Value, String) {
    let (mut out, into) = std::io::pipe().expect("a pipe");
    let parameters = json!({ "sandbox": sandbox, "effect": effect, "command": ["sh", "-c", script], "environment": [],
        "path": "/usr/bin:/bin", "streams": { "output": 0 } });
    peer.send("Execute", &parameters, false, &[into.as_fd()]);
    drop(into);
    let (reply, _) = peer.reply();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut out, &mut said).expect("text");
    (reply, said)
}

#[test]
fn one_that_is_kept_outlives_its_handle_and_the_core_and_ends_when_unused() {
    let daemon = Daemon::start();
    let (id, handle) = provision(&Peer::new(&daemon), "2s").expect("it is made");
    drop(handle);
    let (_, unkept) = Peer::new(&daemon).provision(None);
    drop(unkept);
    assert!(within(Duration::from_secs(2), || daemon.list(0).len() == 1), "the other ends with its handle");
    let (reply, _) = execute(&Peer::new(&daemon), &id, "a", "echo kept > /tmp/file");
    assert_eq!(reply["parameters"]["state"], "finished", "{reply}");
    daemon.kill_core();
    assert!(within(Duration::from_secs(10), || daemon.list(0).len() == 1), "{}", daemon.log());
    assert_eq!(execute(&Peer::new(&daemon), &id, "b", "cat /tmp/file").1, "kept\n");
    // Longer than it is kept for: it is in use.
    let began = Instant::now();
    assert_eq!(execute(&Peer::new(&daemon), &id, "c", "sleep 3; echo slept").1, "slept\n");
    assert_eq!(daemon.list(0).len(), 1);
    assert!(within(Duration::from_secs(10), || daemon.list(0).is_empty()), "nobody uses it");
    assert!(began.elapsed() > Duration::from_millis(4900), "{:?}", began.elapsed());
}

#[test]
fn a_day_is_the_longest() {
    let daemon = Daemon::start();
    let refused = provision(&Peer::new(&daemon), "25h").expect_err("it is too long");
    assert_eq!(refused["parameters"]["code"], "not-narrower", "{refused}");
}

/// The user passes a sandbox of one session on to another; the first one has it no more, by name or handle.
#[test]
fn a_new_handle_passes_it_from_session_to_session() {
    let daemon = Daemon::start();
    let user = Peer::new(&daemon);
    let [one, two] = ["one", "two"].map(|name| mint(&user, name, &["default"]).expect("it is minted"));
    let (id, first) = provision(&one, "1m").expect("it is made");
    assert_eq!(
        execute(&one, &id, "a", "echo mine > /tmp/file; sleep 61 > /dev/null &").0["error"],
        Value::Null
    );
    let asked = |peer: &Peer| {
        peer.send("Handle", &json!({ "sandbox": id }), false, &[]);
        peer.reply()
    };
    assert_eq!(asked(&two).0["error"], "io.broker.Control.NoSuchSandbox");
    let (answer, mut handles) = asked(&user);
    assert_eq!(handles.len(), 1, "{answer}");
    let handle = handles.remove(0);
    assert!(
        one.execute(&first, "b", "true").0["error"]
            .as_str()
            .is_some_and(|error| error.ends_with("NoSuchHandle"))
    );
    let taken = two.execute(&handle, "a", "cat /tmp/file; pgrep -c sleep");
    assert_eq!(taken.1, "mine\n0\n", "{}", taken.0);
    assert_eq!(execute(&two, &id, "b", "cat /tmp/file").1, "mine\n");
    assert_eq!(execute(&one, &id, "c", "true").0["error"], "io.broker.Control.NoSuchSandbox");
    assert_eq!(daemon.list(0)[0]["session"], "two");
    daemon.kill_core();
    let two = mint(&Peer::new(&daemon), "two", &["default"]).expect("it is minted");
    assert_eq!(execute(&two, &id, "d", "cat /tmp/file").1, "mine\n", "{}", daemon.log());
}
