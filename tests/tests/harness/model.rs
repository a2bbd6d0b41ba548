//! A Messages server that is not ours, and how it fails: 429 with a wish, 529, a stream that is cut, no key, an error in JSON.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::scene::{Lines, SCRIPT, Scene, said};

/// A server in front that answers so, as often as its log says that it was not asked before.
fn refusing(status: &str, header: &str, kind: &str) -> String {
    // nginx lets the second request of a minute through where the first was let go: `limit_req` is the real thing for 429.
    format!(
        "error_page 460 = @refused; location @refused {{ default_type application/json; {header} \
         return {status} '{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":\"try later\"}}}}'; }}\n\
         if (-f $document_root/refuse) {{ return 460; }}\n"
    )
}

fn scene(more: &str) -> Scene {
    let root = tempfile::tempdir().expect("a directory").keep();
    super::scene::set_mode(&root, 0o755);
    let mut scene = Scene::with(SCRIPT, &format!("root {};\n{more}", root.display()));
    scene.keeps(root);
    scene
}

fn errors(events: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let said = |event: &Value| (text(&event["error"]["type"]), text(&event["error"]["retry_status"]));
    events.iter().filter(|event| event["type"] == "session.error").map(said).collect()
}

/// Refused once, and served then: the session waits, as long as the server wishes, and goes on.
fn refused_then_served(status: &str, header: &str, kind: &str, told: &str) -> Duration {
    let scene = scene(&refusing(status, header, kind));
    scene.refuse(true);
    let mut child = scene.run("one", &[]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    let waits = lines.until(|event| event["type"] == "session.status_rescheduled").expect("it waits");
    let began = Instant::now();
    scene.refuse(false);
    lines.until(|event| event["type"] == "span.model_request_start").expect("it tries again");
    let waited = began.elapsed();
    while lines.event().is_some() {}
    let ended = child.wait_with_output().expect("it ends");
    assert!(ended.status.success(), "{waits}: {}", said(&ended));
    assert_eq!(errors(&scene.events("one")), [(told.to_owned(), "retrying".to_owned())]);
    assert!(scene.seen().iter().any(|line| line.ends_with(&format!(" {status}"))), "{:?}", scene.seen());
    waited
}

#[test]
fn too_many_requests_are_waited_for_as_long_as_the_server_wishes() {
    let waited = refused_then_served(
        "429",
        "add_header Retry-After 2 always;",
        "rate_limit_error",
        "model_rate_limited_error",
    );
    assert!(waited > Duration::from_millis(1800), "{waited:?}");
}

#[test]
fn an_overloaded_model_is_asked_again() {
    refused_then_served("529", "", "overloaded_error", "model_overloaded_error");
}

#[test]
fn what_is_no_use_to_ask_again_is_said_and_ends_the_turn() {
    let scene = scene(&refusing("400", "", "invalid_request_error"));
    scene.refuse(true);
    let ended = scene.run("one", &[]).output().expect("it runs");
    assert_eq!(ended.status.code(), Some(1), "{}", said(&ended));
    let events = scene.events("one");
    assert_eq!(errors(&events), [("model_request_failed_error".to_owned(), "terminal".to_owned())]);
    assert_eq!(events.last().expect("events")["stop_reason"]["type"], "retries_exhausted");
    // Somebody has mended it, and says so.
    scene.refuse(false);
    assert!(scene.harness(&["send", "one", "please go on"]).status().expect("it runs").success());
    let woken = scene.wake("one");
    assert!(woken.status.success(), "{}", said(&woken));
    assert_eq!(scene.events("one").last().expect("events")["stop_reason"]["type"], "end_turn");
}

#[test]
fn the_model_is_asked_so_often_and_not_for_ever() {
    let scene = scene(&refusing("529", "", "overloaded_error"));
    scene.refuse(true);
    let ended = scene.run("one", &["--attempts", "3"]).output().expect("it runs");
    assert_eq!(ended.status.code(), Some(1), "{}", said(&ended));
    let told: Vec<String> = errors(&scene.events("one")).into_iter().map(|(_, retry)| retry).collect();
    assert_eq!(told, ["retrying", "retrying", "exhausted"]);
    assert_eq!(scene.seen().len(), 3);
}

/// The server is killed while it streams: nothing of half an answer is taken, and the next one is whole.
#[test]
fn a_stream_that_is_cut_is_no_answer() {
    let long = format!(
        "rules:\n  - name: long\n    when: {{messages_contain: mend}}\n    respond: {{content: \"{}\"}}\n",
        "word ".repeat(300)
    );
    let mut scene = Scene::new(&long);
    let mut command = scene.run("one", &["--output", "text"]);
    let mut child = command.spawn().expect("it starts");
    let mut out = child.stdout.take().expect("a pipe");
    let mut piece = [0; 64];
    let mut heard = String::new();
    while !heard.contains("word word word") {
        let count = std::io::Read::read(&mut out, &mut piece).expect("it reads");
        assert_ne!(count, 0, "{heard}");
        heard += &String::from_utf8_lossy(&piece[..count]);
    }
    scene.kill_fake();
    scene.restart_fake();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).expect("text");
    let ended = child.wait().expect("it ends");
    assert!(ended.success(), "{rest}");
    let events = scene.events("one");
    assert!(
        errors(&events).iter().all(|(_, retry)| retry == "retrying") && !errors(&events).is_empty(),
        "{events:#?}"
    );
    let words: Vec<&Value> = events.iter().filter(|event| event["type"] == "agent.message").collect();
    assert_eq!(words.len(), 1, "{words:#?}");
    assert_eq!(words[0]["block"]["text"], "word ".repeat(300));
}

/// A budget of calls ends the turn, and says so.
#[test]
fn a_budget_is_a_stop() {
    let scene = Scene::new(SCRIPT);
    let ended = scene.run("one", &["--budget-calls", "1"]).output().expect("it runs");
    assert_eq!(ended.status.code(), Some(1), "{}", said(&ended));
    let events = scene.events("one");
    assert_eq!(events.last().expect("events")["stop_reason"]["type"], "budget_reached");
    assert_eq!(events.iter().filter(|event| event["type"] == "hand.call").count(), 1);
}

/// What goes over is what the API's own client would send: the version, the key from the broker alone, and its stream.
#[test]
fn what_was_said_is_summed_up_where_it_is_too_long() {
    let rules = r#"
rules:
  - name: sum
    when: {messages_contain: "Sum up this conversation"}
    respond: {content: "SUMMARY: it was asked to mend."}
  - name: after
    when: {messages_contain: "your own summary"}
    respond: {content: "I go on from my summary."}
  - name: first
    when: {messages_contain: "mend"}
    respond: {content: "Look.", tool_calls: [{name: bash, arguments: {command: "seq 20000"}}]}
"#;
    let scene = Scene::new(rules);
    let ended = scene.run("one", &["--context-tokens", "4000"]).output().expect("it runs");
    assert!(ended.status.success(), "{}", said(&ended));
    let compacted = scene.of_type("one", "agent.thread_context_compacted");
    assert_eq!(compacted.len(), 1, "{:#?}", scene.events("one"));
    assert_eq!(compacted[0]["summary"], "SUMMARY: it was asked to mend.");
    let words = scene.of_type("one", "agent.message");
    assert_eq!(words.last().expect("words")["block"]["text"], "I go on from my summary.");
}

/// Each request that the server got is one that the API's own package could have sent: by the types that it is made of.
#[test]
fn requests_are_what_the_api_s_own_types_say() {
    let scene = Scene::new(SCRIPT);
    let ended = scene.run("one", &["--system", "Be brief."]).output().expect("it runs");
    assert!(ended.status.success(), "{}", said(&ended));
    let check = r#"
import json, sys
from pydantic import TypeAdapter, ConfigDict
from anthropic.types.message_create_params import MessageCreateParamsStreaming
adapter = TypeAdapter(MessageCreateParamsStreaming)
def whole(value):
    # What is iterable is checked as it is gone through.
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else [whole(part) for part in value]
def check(body):
    whole(adapter.validate_python(body))
bodies = [json.loads(line) for line in open(sys.argv[1])]
for sent in bodies:
    assert (sent["version"], sent["type"], sent["accept"]) == ("2023-06-01", "application/json", "text/event-stream"), sent
    check(json.loads(sent["body"]))
broken = json.loads(bodies[0]["body"]); broken["messages"][0]["role"] = "nobody"
try:
    check(broken)
except ValueError:
    print(len(bodies))
"#;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let python = root.join("target/fakellm/bin/python");
    let checked = std::process::Command::new(python)
        .args(["-c", check])
        .arg(scene.path("bodies"))
        .output()
        .expect("it runs");
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "4\n", "{}", said(&checked));
}

/// A model of our enemy's: what it streams is written here, and each stream is one answer.
struct Hostile {
    port: u16,
}

impl Hostile {
    fn start(answers: Vec<Vec<u8>>) -> Hostile {
        use std::io::{BufRead, BufReader, Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            for mut stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
                let (mut line, mut length) = (String::new(), 0);
                while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                    if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = text.trim().parse().unwrap_or(0);
                    }
                    line.clear();
                }
                let _ = (&mut reader).take(length).read_to_end(&mut Vec::new());
                let Some(answer) = answers.next() else { continue };
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&answer));
            }
        });
        Hostile { port }
    }
}

fn streamed(events: &[Value]) -> Vec<u8> {
    let start = serde_json::json!({ "type": "message_start", "message": {} });
    let all = std::iter::once(&start).chain(events);
    all.map(|event| format!("data: {event}\n\n")).collect::<String>().into_bytes()
}

fn block(index: usize, content: Value) -> Value {
    serde_json::json!({ "type": "content_block_start", "index": index, "content_block": content })
}

fn end(reason: &str) -> [Value; 2] {
    let delta = serde_json::json!({ "type": "message_delta", "delta": { "stop_reason": reason }, "usage": { "output_tokens": u64::MAX, "input_tokens": 1 } });
    [delta, serde_json::json!({ "type": "message_stop" })]
}

/// Whatever it says, the log can be followed after, and the session goes on.
#[test]
fn no_answer_poisons_a_log() {
    let text = |text: String| serde_json::json!({ "type": "text", "text": text });
    let citation = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    let deep = |depth: usize| {
        let input = format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        let call = serde_json::json!({ "type": "tool_use", "id": "t", "name": "nonsense", "input": {} });
        let delta = serde_json::json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "input_json_delta", "partial_json": input } });
        let stop = serde_json::json!({ "type": "content_block_stop", "index": 0 });
        streamed(&[[block(0, call), delta, stop].as_slice(), &end("tool_use")].concat())
    };
    let cited = format!(
        "data: {{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"x\",\"citation\":{}}}}}\n\n",
        citation(122)
    );
    let good = || streamed(&[[block(0, text("good".into()))].as_slice(), &end("end_turn")].concat());
    let names = serde_json::json!({ "type": "tool_use", "id": "", "name": "\u{1b}]0;x\u{7}\u{202e}", "input": [1], "cache_control": 7 });
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("interrupted", streamed(&[[block(0, text("x".into()))].as_slice(), &end("interrupted")].concat())),
        ("deep", deep(126)),
        (
            "deep citation",
            [
                streamed(&[block(0, text("x".into()))]),
                cited.into_bytes(),
                streamed(&end("end_turn"))[..].to_vec(),
            ]
            .concat(),
        ),
        ("less deep", deep(60)),
        ("strange names", streamed(&[[block(0, names)].as_slice(), &end("tool_use")].concat())),
        ("pauses", streamed(&[[block(0, text("x".into()))].as_slice(), &end("pause_turn")].concat())),
        (
            "too long",
            streamed(&(0..40).map(|index| block(index, text("y".repeat(1 << 20)))).collect::<Vec<_>>()),
        ),
    ];
    for (what, answer) in hostile {
        let model = Hostile::start(std::iter::once(answer).chain((0..9).map(|_| good())).collect());
        let mut scene = Scene::new(SCRIPT);
        scene.ask_at(model.port);
        let ended = scene.run("one", &["--attempts", "2"]).output().expect("it runs");
        assert!(ended.status.code().is_some_and(|code| code < 2), "{what}: {}", said(&ended));
        assert!(scene.harness(&["send", "one", "go on"]).status().expect("it runs").success());
        let woken = scene.wake("one");
        assert!(woken.status.success(), "{what}: {}", said(&woken));
        let words = scene.of_type("one", "agent.message");
        assert_eq!(words.last().expect("words")["block"]["text"], "good", "{what}");
        let shown = scene.harness(&["show", "one"]).output().expect("it runs");
        let json = scene.harness(&["events", "one"]).output().expect("it runs");
        for output in [shown, json] {
            let text = String::from_utf8(output.stdout).expect("text");
            assert!(!text.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{what}: {text:?}");
        }
    }
}
