//! What `scripts/bench log` and `scripts/bench wake` measure of ours, one thing a run: prints numbers, one a line.
//! `append DIR WRITERS COUNT`: microseconds for each durable append, as seen by all writers together.
//! `fill FILE SESSION COUNT`, then `wake FILE SESSION`: milliseconds to follow that log.
//! `drive FILE COUNT`: bytes of memory that each of so many sessions takes which are followed at once.

use std::path::Path;
use std::time::Instant;

use harness::agent::{Agent, Budget, Hands, RULES};
use harness::driver::follow;
use harness::event::{Created, Event, UserMessage};
use harness::store::{Store, Writer};
use serde_json::json;

fn message(bytes: usize) -> Event {
    UserMessage { content: vec![json!({ "type": "text", "text": "x".repeat(bytes) })] }.into()
}

fn created() -> Event {
    let hands = Hands {
        policy: "default".into(),
        grants: vec![],
        workspace: None,
        tools: "/t".into(),
        keep: "1m".into(),
    };
    let agent = Agent {
        rules: RULES,
        model: "m".into(),
        max_tokens: 1,
        system: None,
        model_grant: "model".into(),
        hands,
        permissions: [].into(),
        custom_tools: vec![],
        budget: Budget::default(),
        context_tokens: u64::MAX,
        attempts: 1,
        seed: 1,
    };
    Created { agent: Box::new(agent) }.into()
}

async fn append(folder: &str, writers: usize, count: usize) {
    let store = Store::sqlite(&Path::new(folder).join("log.sqlite")).expect("it opens");
    for writer in 0..writers {
        store.create(&format!("s{writer}"), &[]).await.expect("it is new");
    }
    let began = Instant::now();
    let all = (0..writers).map(|writer| {
        let store = store.clone();
        tokio::task::spawn_local(async move {
            let id = format!("s{writer}");
            let epoch = store.lease(&id, "bench", 600_000).await.expect("it is free");
            let event = [message(300)];
            for expected in 0..(count / writers) as u64 {
                store.append(&id, Writer::Driver { epoch, expected }, &event, 1).await.expect("it fits");
            }
        })
    });
    for one in all.collect::<Vec<_>>() {
        one.await.expect("it ends");
    }
    println!("{}", began.elapsed().as_secs_f64() * 1e6 / count as f64);
}

async fn fill(file: &str, session: &str, count: usize) {
    let store = Store::sqlite(Path::new(file)).expect("it opens");
    store.create(session, &[created()]).await.expect("it is new");
    let events: Vec<Event> = (0..1000).map(|_| message(512 - 60)).collect();
    for _ in 0..count / events.len() {
        store.append(session, Writer::Client, &events, 1).await.expect("anybody may");
    }
}

async fn wake(file: &str, session: &str) {
    let began = Instant::now();
    let store = Store::sqlite(Path::new(file)).expect("it opens");
    let state = follow(&store, session).await.expect("it is whole");
    println!("{}", began.elapsed().as_secs_f64() * 1e3);
    assert!(state.control.next > 0);
}

/// What this process has in memory (proc_pid_status(5)).
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("it is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a field");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

async fn drive(file: &str, count: usize) {
    let store = Store::sqlite(Path::new(file)).expect("it opens");
    for number in 0..count {
        store
            .create(&format!("d{number}"), &[created(), message(452), message(452)])
            .await
            .expect("it is new");
    }
    let before = resident_bytes();
    let mut states = Vec::new();
    for number in 0..count {
        states.push(follow(&store, &format!("d{number}")).await.expect("it is whole"));
    }
    println!("{}", (resident_bytes() - before) as f64 / states.len() as f64);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        match words.as_slice() {
            ["append", folder, writers, count] => append(folder, number(writers), number(count)).await,
            ["fill", file, session, count] => fill(file, session, number(count)).await,
            ["wake", file, session] => wake(file, session).await,
            ["drive", file, count] => drive(file, number(count)).await,
            _ => println!("see the file"),
        }
    });
}
