//! `kill -9` after every single event of a scripted session: of the harness, its sandbox, its gateway, the core, the daemon.

use std::fs;

use serde_json::{Value, json};

use super::scene::{Lines, SCRIPT, Scene, said};

/// What is left of a log when what tells of an interruption is left out: what was said and done, each thing once.
fn essence(events: &[Value]) -> Vec<Value> {
    let interrupted = |use_at: &Value| {
        events.iter().any(|event| {
            let content = event["content"].as_str().unwrap_or_default();
            event["type"] == "agent.tool_result"
                && event["tool_use"] == *use_at
                && ((content.starts_with("It was interrupted") || content.starts_with("There is no sandbox"))
                    || content.contains("is not in /workspace"))
        })
    };
    let mut kept: Vec<Value> = Vec::new();
    for event in events {
        let one = match event["type"].as_str() {
            Some("user.message") => json!(["user", event["content"]]),
            Some("agent.tool_use") if !interrupted(&event["position"]) => {
                json!(["use", event["block"]["name"], event["block"]["input"]])
            }
            Some("agent.tool_result") if !interrupted(&event["tool_use"]) => {
                json!(["result", event["content"]])
            }
            Some("session.status_idle") => json!(["idle", event["stop_reason"]]),
            _ => continue,
        };
        if kept.last() != Some(&one) {
            kept.push(one);
        }
    }
    kept
}

fn calls(events: &[Value], tool: &str) -> usize {
    let is =
        |at: &Value| events.iter().any(|event| event["position"] == *at && event["block"]["name"] == tool);
    events.iter().filter(|event| event["type"] == "hand.call" && is(&event["tool_use"])).count()
}

/// Runs the script and kills `victim` after event `at`; whether it went that far.
fn killed_after(scene: &mut Scene, victim: &str, at: u64, whole: &[Value]) -> bool {
    scene.reset();
    let session = format!("{victim}-{at}");
    let task = format!("please mend sums.py ({session})");
    let mut child = scene.run(&session, &["--task", &task]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    if lines.until(|event| event["position"] == at).is_none() {
        let ended = child.wait_with_output().expect("it ends");
        assert!(ended.status.success(), "{victim} {at}: {}", said(&ended));
        return false;
    }
    match victim {
        "harness" => child.kill().expect("it runs"),
        "sandbox" => {
            let listed = scene.broker(&["ps", "--json"]).output().expect("it runs");
            let all: Vec<Value> = serde_json::from_slice(&listed.stdout).expect("a list");
            for sandbox in all.iter().filter(|sandbox| sandbox["session"] == session) {
                let _ = scene.broker(&["kill", sandbox["id"].as_str().expect("a name")]).output();
            }
        }
        "daemon" => scene.kill_daemon(),
        role => scene.kill_role(role),
    }
    while lines.event().is_some() {}
    let first = child.wait_with_output().expect("it ends");
    let mut ended = first.status.success();
    for _ in 0..20 {
        if ended {
            break;
        }
        let woken = scene.wake(&session);
        ended = woken.status.success();
        let temporary = woken.status.code() == Some(75) || said(&woken).contains("the broker at");
        assert!(ended || temporary, "{victim} {at}: {}{}", said(&woken), scene.log());
    }
    assert!(ended, "{victim} {at}: it is never done: {}", said(&first));
    let events = scene.events(&session);
    // A core that is killed between a call's record and its start leaves one that never ends: its sandbox is ended for it.
    let lived = ["harness", "gateway"].contains(&victim);
    // Where its sandbox was killed with it, the edit may have happened and its result be lost: the model finds it done then.
    let is_edit =
        |one: &Value| one[1] == "edit" || one[1].as_str().is_some_and(|said| said.starts_with("1 replaced"));
    let seen: Vec<Value> = essence(&events).into_iter().filter(|one| lived || !is_edit(one)).collect();
    let mut expected: Vec<Value> = whole.iter().filter(|one| lived || !is_edit(one)).cloned().collect();
    expected[0] = json!(["user", [{ "type": "text", "text": task }]]);
    assert_eq!(seen, expected, "{victim} {at}: {events:#?}");
    let ran = fs::read_to_string(scene.path("workspace/ran")).expect("it ran").lines().count();
    let begun = calls(&events, "bash");
    assert!(ran <= begun, "{victim} {at}: {ran} runs of {begun} calls");
    if lived {
        assert_eq!((ran, begun), (1, 1), "{victim} {at}: the sandbox lived, and knew it: {events:#?}");
    }
    assert!(fs::read_to_string(scene.path("workspace/sums.py")).expect("it is there").contains("a + b"));
    true
}

fn crash_at_every_event(mut scene: Scene, victims: &[&str], every: usize) {
    let whole = scene.run("whole", &[]).output().expect("it runs");
    assert!(whole.status.success(), "{}{}", said(&whole), scene.log());
    let events = scene.events("whole");
    let essential = essence(&events);
    assert_eq!(essential.len(), 8, "{essential:#?}");
    let count = events.len() as u64;
    assert!(count > 25, "{events:#?}");
    let mut killed = 0;
    for victim in victims {
        for at in (1..count).step_by(every) {
            killed += u64::from(killed_after(&mut scene, victim, at, &essential));
        }
    }
    println!("{killed} kills");
    assert!(killed as usize >= victims.len() * (count as usize / every) * 9 / 10, "{killed}");
}

/// How often a kill is tried: at every event in the long run, at each third where everything is tested.
fn every() -> usize {
    if std::env::var_os("EVERY_EVENT").is_some() { 1 } else { 3 }
}

#[test]
fn a_killed_harness_is_as_if_it_had_not_been_on_sqlite() {
    crash_at_every_event(Scene::new(SCRIPT), &["harness"], 1);
}

#[test]
fn a_killed_harness_is_as_if_it_had_not_been_on_postgresql() {
    let mut scene = Scene::new(SCRIPT);
    scene.start_postgres();
    crash_at_every_event(scene, &["harness"], every());
}

#[test]
fn what_else_is_killed_is_told_and_gone_on_from_on_sqlite() {
    crash_at_every_event(Scene::new(SCRIPT), &["sandbox", "gateway", "core", "daemon"], every());
}

#[test]
fn what_else_is_killed_is_told_and_gone_on_from_on_postgresql() {
    let mut scene = Scene::new(SCRIPT);
    scene.start_postgres();
    crash_at_every_event(scene, &["sandbox", "gateway", "core", "daemon"], 2 * every() - 1);
}
