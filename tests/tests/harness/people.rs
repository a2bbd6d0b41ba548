//! What people do: allow, deny, stop, pause, answer, pass a sandbox on, take a grant away.

use std::time::Duration;

use broker_tests::within;
use serde_json::Value;

use super::scene::{Lines, SCRIPT, Scene, said};

fn idle(events: &[Value]) -> &Value {
    &events.last().expect("events")["stop_reason"]
}

/// A question survives whoever asked it.
#[test]
fn a_call_that_asks_waits_for_a_person_and_survives_a_crash() {
    let scene = Scene::new(SCRIPT);
    let mut child = scene.run("one", &["--ask", "bash"]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    let wanted = lines.until(|event| event["evaluated_permission"] == "ask").expect("it asks");
    let _ = child.kill();
    let _ = child.wait();
    let woken = scene.wake("one");
    assert_eq!(woken.status.code(), Some(3), "{}", said(&woken));
    let call = wanted["position"].to_string();
    assert_eq!(idle(&scene.events("one"))["event_ids"].to_string(), format!("[{call}]"));
    assert!(!scene.path("workspace/ran").exists(), "nothing has run");
    let wrong = scene.harness(&["approve", "one", "1"]).output().expect("it runs");
    assert!(said(&wrong).contains(&format!("{call} does")), "{}", said(&wrong));
    assert!(scene.harness(&["approve", "one", &call]).status().expect("it runs").success());
    let woken = scene.wake("one");
    assert!(woken.status.success(), "{}", said(&woken));
    assert!(scene.path("workspace/ran").exists());
}

#[test]
fn a_call_that_is_denied_does_not_run_and_the_model_hears_why() {
    let scene = Scene::new(SCRIPT);
    let ended = scene.run("one", &["--ask", "*"]).output().expect("it runs");
    assert_eq!(ended.status.code(), Some(3), "{}", said(&ended));
    let call = idle(&scene.events("one"))["event_ids"][0].to_string();
    assert!(
        scene.harness(&["deny", "one", &call, "--reason", "not today"]).status().expect("it runs").success()
    );
    // The scripted model goes on asking; it is enough that it heard.
    let _ = scene.wake("one");
    let results = scene.of_type("one", "agent.tool_result");
    assert_eq!(
        (&results[0]["content"], &results[0]["is_error"]),
        (&"It was not run: not today".into(), &true.into())
    );
    assert!(scene.of_type("one", "hand.call").is_empty());
}

/// What runs is stopped in the sandbox too, at once.
#[test]
fn an_interrupt_ends_what_runs() {
    let rules = "rules:\n  - name: again\n    when: {messages_contain: instead}\n    respond: {content: \"I stop.\"}\n  - name: long\n    when: {messages_contain: mend}\n    respond: {tool_calls: [{name: bash, arguments: {command: \"echo $$ > pid; sleep 97.53\"}}]}\n";
    let scene = Scene::new(rules);
    let mut child = scene.run("one", &[]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    lines.until(|event| event["type"] == "hand.call").expect("it runs");
    let sleeps = || {
        let found =
            std::process::Command::new("pgrep").args(["-f", "sleep 97.53"]).output().expect("pgrep runs");
        found.status.success()
    };
    assert!(within(Duration::from_secs(5), sleeps));
    assert!(scene.harness(&["interrupt", "one"]).status().expect("it runs").success());
    lines.until(|event| event["type"] == "session.status_idle").expect("it stops");
    assert!(within(Duration::from_secs(5), || !sleeps()), "it still runs");
    while lines.event().is_some() {}
    assert!(child.wait().expect("it ends").success());
    assert!(scene.harness(&["send", "one", "do this instead"]).status().expect("it runs").success());
    assert!(scene.wake("one").status.success());
    let words = scene.of_type("one", "agent.message");
    assert_eq!(words.last().expect("words")["block"]["text"], "I stop.");
}

#[test]
fn a_tool_of_the_client_s_is_the_client_s_to_answer() {
    let rules = "rules:\n  - name: end\n    when: {tool_result_contains: \"ticket 7\"}\n    respond: {content: \"Filed.\"}\n  - name: file\n    when: {messages_contain: mend}\n    respond: {tool_calls: [{name: file_ticket, arguments: {title: sums}}]}\n";
    let scene = Scene::new(rules);
    let tools = scene.path("tools.json");
    std::fs::write(
        &tools,
        r#"[{"name":"file_ticket","description":"files a ticket","input_schema":{"type":"object"}}]"#,
    )
    .expect("it is ours");
    let ended =
        scene.run("one", &["--custom-tools", &tools.display().to_string()]).output().expect("it runs");
    assert_eq!(ended.status.code(), Some(3), "{}", said(&ended));
    let call = idle(&scene.events("one"))["event_ids"][0].to_string();
    assert!(scene.harness(&["answer", "one", &call, "ticket 7"]).status().expect("it runs").success());
    assert!(scene.wake("one").status.success());
    assert_eq!(scene.of_type("one", "agent.message").last().expect("words")["block"]["text"], "Filed.");
}

/// While a person works in the workspace no call begins.
#[test]
fn a_pause_holds_calls_until_it_is_over() {
    let scene = Scene::new(SCRIPT);
    let made = scene.run("one", &["--detach"]).output().expect("it runs");
    assert!(made.status.success(), "{}", said(&made));
    assert!(scene.harness(&["pause", "one"]).status().expect("it runs").success());
    assert_eq!(scene.wake("one").status.code(), Some(3));
    assert!(scene.of_type("one", "hand.call").is_empty());
    assert!(scene.harness(&["resume", "one"]).status().expect("it runs").success());
    assert!(scene.wake("one").status.success());
}

/// The sandbox goes to another session with its files and without what ran in it; then that session's way to the model is cut.
#[test]
fn a_sandbox_is_handed_to_a_reviewer_and_a_revoked_grant_stops_it() {
    let long = "word ".repeat(300);
    let rules = &format!(
        "rules:\n  - name: long\n    when: {{messages_contain: \"once more\"}}\n    respond: {{content: \"{long}\"}}\n  - name: seen\n    when: {{tool_result_contains: \"return a\"}}\n    respond: {{content: \"Reviewed.\"}}\n  - name: review\n    when: {{messages_contain: review}}\n    respond: {{tool_calls: [{{name: bash, arguments: {{command: \"cat /tmp/left; cat sums.py; pgrep -c sleep\"}}}}]}}\n  - name: done\n    when: {{tool_result_contains: left}}\n    respond: {{content: \"Done.\"}}\n  - name: work\n    when: {{messages_contain: mend}}\n    respond: {{tool_calls: [{{name: bash, arguments: {{command: \"echo mine > /tmp/left; sleep 600 & echo left\"}}}}]}}\n"
    );
    let scene = Scene::new(rules);
    let ended = scene.run("coder", &[]).output().expect("it runs");
    assert!(ended.status.success(), "{}", said(&ended));
    let made = scene.run("reviewer", &["--task", "please review", "--detach"]).output().expect("it runs");
    assert!(made.status.success(), "{}", said(&made));
    let handed = scene.harness(&["hand", "coder", "main", "--to", "reviewer"]).output().expect("it runs");
    assert!(handed.status.success(), "{}{}", said(&handed), scene.log());
    let woken = scene.wake("reviewer");
    assert!(woken.status.success(), "{}", said(&woken));
    let results = scene.of_type("reviewer", "agent.tool_result");
    let content = results[0]["content"].as_str().expect("text");
    assert!(
        content.starts_with("mine\n") && content.contains("return a") && content.contains("\n0\n"),
        "{content}"
    );
    assert!(scene.of_type("reviewer", "hand.provision").is_empty(), "it has the coder's");
    // Who gave it has it no more.
    let given = scene.harness(&["hand", "coder", "main", "--to", "reviewer"]).output().expect("it runs");
    assert!(said(&given).contains("has no sandbox"), "{}", said(&given));
    // A harness that goes on holds the grant; taken away, its next request is refused, and so is another door.
    assert!(
        scene.harness(&["send", "reviewer", "please review, once more"]).status().expect("it runs").success()
    );
    let mut child = scene.harness(&["wake", "reviewer", "--output", "json", "--lease", "0.4"]);
    let mut child = child.stdout(std::process::Stdio::piped()).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    lines.until(|event| event["type"] == "span.model_request_start").expect("it asks");
    let holds = || {
        let listed = scene.broker(&["grant", "list", "--json"]).output().expect("it runs");
        String::from_utf8_lossy(&listed.stdout).contains("\"model\"")
    };
    assert!(within(Duration::from_secs(2), holds), "it holds the grant while the model speaks");
    let revoked = scene.broker(&["grant", "revoke", "model"]).output().expect("it runs");
    assert!(revoked.status.success(), "{}", said(&revoked));
    while lines.event().is_some() {}
    let ended = child.wait_with_output().expect("it ends");
    let events = scene.events("reviewer");
    let before = scene.seen().len();
    assert_eq!(idle(&events)["type"], "retries_exhausted", "{} {events:#?}", said(&ended));
    assert!(scene.harness(&["send", "reviewer", "try"]).status().expect("it runs").success());
    assert_eq!(scene.wake("reviewer").status.code(), Some(1));
    assert_eq!(scene.seen().len(), before, "nothing reaches the model's host any more");
    let said = scene.of_type("reviewer", "session.error");
    assert_eq!(said.last().expect("an error")["error"]["type"], "credential_host_unreachable_error");
}

/// The examples are run as they stand, one after the other.
#[test]
fn the_examples_run() {
    let rules = r#"
rules:
  - name: taken
    when: {tool_result_contains: "successor sees plan"}
    respond: {content: "I go on from there."}
  - name: successor
    when: {messages_contain: "You take over"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo successor sees $(cat /tmp/PLAN.md)"}}]}
  - name: reviewed
    when: {tool_result_contains: "reviewer sees plan"}
    respond: {content: "It is well."}
  - name: review
    when: {messages_contain: "Review what was done"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo reviewer sees $(cat /tmp/PLAN.md)"}}]}
  - name: coded
    when: {tool_result_contains: "coder has written"}
    respond: {content: "Coded."}
  - name: code
    when: {tool_result_contains: "coder sees plan"}
    respond: {tool_calls: [{name: bash, arguments: {command: "cp /workspace/sums.py /tmp/PLAN.md; echo plan > /tmp/PLAN.md; echo x >> /workspace/coded; echo coder has written"}}]}
  - name: coder
    when: {messages_contain: "in the sandbox `plan`"}
    respond: {tool_calls: [{name: bash, arguments: {hand: plan, command: "echo coder sees $(cat /tmp/PLAN.md)"}}]}
  - name: planned
    when: {tool_result_contains: "planner has written"}
    respond: {content: "Planned."}
  - name: plan
    when: {messages_contain: "mend"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo plan > /tmp/PLAN.md; touch /workspace/no || echo planner has written"}}]}
"#;
    let scene = Scene::new(rules);
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let programs = broker_tests::program("harness").parent().expect("a folder").display().to_string();
    let example = |name: &str, words: &[&str]| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", "54321", "--regid", "54321", "--clear-groups", "sh"]);
        command.arg(root.join("harness/examples").join(name)).args(words);
        command.env("HARNESS_STORE", scene.store()).env("BROKER_SOCKET", scene.path("broker.sock"));
        command.env("PATH", format!("{programs}:/usr/bin:/bin"));
        command.env("RUN_OPTIONS", "--tools /usr/local/games/harness-tools");
        let output = command.output().expect("it runs");
        assert!(output.status.success(), "{name}: {}{}", said(&output), scene.log());
        String::from_utf8_lossy(&output.stdout).lines().last().expect("a name").to_owned()
    };
    let workspace = scene.path("workspace").display().to_string();
    let coder = example("planner-coder.sh", &["scripted", &workspace, "please mend sums.py"]);
    assert!(scene.path("workspace/coded").exists());
    let reviewer = example("reviewer.sh", &["scripted", &coder]);
    assert!(scene.events(&reviewer).iter().any(|event| event.to_string().contains("It is well.")));
    let successor = example("successor.sh", &["scripted", &reviewer]);
    assert!(scene.events(&successor).iter().any(|event| event.to_string().contains("I go on from there.")));
}

/// A workload that stops the helper stops itself: the call ends, and so does the harness when a person has enough.
#[test]
fn a_helper_that_is_stopped_holds_nobody_up() {
    let rules = "rules:\n  - name: again\n    when: {messages_contain: instead}\n    respond: {content: \"I stop.\"}\n  - name: hang\n    when: {messages_contain: mend}\n    respond: {tool_calls: [{name: bash, arguments: {command: \"kill -STOP $(pgrep -f 'harness-tools call')\"}}]}\n";
    let scene = Scene::new(rules);
    let mut child = scene.run("one", &[]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    lines.until(|event| event["type"] == "hand.call").expect("it runs");
    std::thread::sleep(Duration::from_millis(500));
    assert!(scene.harness(&["interrupt", "one"]).status().expect("it runs").success());
    lines.until(|event| event["type"] == "session.status_idle").expect("it stops");
    while lines.event().is_some() {}
    assert!(within(Duration::from_secs(5), || matches!(child.try_wait(), Ok(Some(_)))), "the harness ends");
    assert!(scene.harness(&["send", "one", "do this instead"]).status().expect("it runs").success());
    assert!(scene.wake("one").status.success());
}
