//! Both stores, by one contract; two drivers that both believe that they have a session; logs that were edited.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use harness::event::{Event, UserMessage};
use harness::store::{Connector, Postgres, Store, StoreError, Writer};
use serde_json::json;

use super::scene::Server;

fn message(text: &str) -> Event {
    UserMessage { content: vec![json!({ "type": "text", "text": text })] }.into()
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(work)
}

async fn postgres(server: &Server) -> Store {
    let socket = server.socket();
    let connector: Connector = Arc::new(move || Box::pin(tokio::net::UnixStream::connect(socket.clone())));
    Store::Postgres(Box::new(Postgres::open(connector, "harness", "postgres").await.expect("it answers")))
}

fn on_both(check: impl AsyncFn(Store)) {
    let folder = tempfile::tempdir().expect("a directory");
    block_on(async { check(Store::sqlite(&folder.path().join("log")).expect("it opens")).await });
    let server = Server::postgres();
    block_on(async { check(postgres(&server).await).await });
}

#[test]
fn appends_are_where_they_were_expected_or_not_at_all() {
    on_both(async |store| {
        store.create("a", &[message("one")]).await.expect("it is new");
        assert!(matches!(store.create("a", &[]).await, Err(StoreError::Exists(_))));
        assert!(matches!(store.lease("b", "me", 1000).await, Err(StoreError::NoSession(_))));
        let epoch = store.lease("a", "me", 60_000).await.expect("it is free");
        assert!(
            matches!(store.lease("a", "you", 1000).await, Err(StoreError::Taken { owner, .. }) if owner == "me")
        );
        let driver = |expected| Writer::Driver { epoch, expected };
        assert_eq!(
            store.append("a", driver(1), &[message("two"), message("three")], 7).await.expect("it fits"),
            1
        );
        assert!(matches!(store.append("a", driver(1), &[message("x")], 7).await, Err(StoreError::Moved(3))));
        assert_eq!(store.append("a", Writer::Client, &[message("four")], 8).await.expect("anybody may"), 3);
        assert!(matches!(store.append("a", driver(3), &[message("x")], 8).await, Err(StoreError::Moved(4))));
        let stale = Writer::Driver { epoch: epoch + 1, expected: 4 };
        assert!(matches!(store.append("a", stale, &[message("x")], 8).await, Err(StoreError::Lost)));
        let records = store.read("a", 0, u64::MAX).await.expect("it is whole");
        let stands: Vec<_> = records
            .iter()
            .map(|record| (record.position, record.epoch, record.batch, record.at_ms))
            .collect();
        assert_eq!(stands[1..], [(1, epoch, 1, 7), (2, epoch, 1, 7), (3, 0, 3, 8)]);
        assert_eq!(store.read("a", 2, 3).await.expect("a slice"), records[2..3]);
        assert!(store.read("a", 4, 9).await.expect("nothing").is_empty());
        store.release("a", epoch, None).await.expect("it is ours");
        assert_eq!(store.session("a").await.expect("it is there").wanted_ms, None);
        assert_eq!(store.lease("a", "you", 60_000).await.expect("it is free"), epoch + 1);
        assert!(matches!(store.renew("a", epoch, 1000).await, Err(StoreError::Lost)));
        // A log is chained to its session's name.
        assert!(matches!(store.import("c", records).await, Err(StoreError::Damaged { position: 0, .. })));
    });
}

#[test]
fn of_two_drivers_that_both_believe_exactly_one_appends() {
    on_both(async |store| {
        store.create("a", &[message("one")]).await.expect("it is new");
        let first = store.lease("a", "first", 50).await.expect("it is free");
        tokio::time::sleep(Duration::from_millis(120)).await;
        let second = store.lease("a", "second", 60_000).await.expect("the lease has ended");
        let driver = async |epoch: u64| {
            let (mut appended, mut lost, mut expected) = (0, 0, 1);
            for _ in 0..60 {
                match store.append("a", Writer::Driver { epoch, expected }, &[message("x")], 1).await {
                    Ok(_) => (appended, expected) = (appended + 1, expected + 1),
                    Err(StoreError::Lost) => lost += 1,
                    Err(StoreError::Moved(next)) => expected = next,
                    Err(error) => panic!("{error}"),
                }
            }
            (appended, lost)
        };
        let (stale, owner) = tokio::join!(driver(first), driver(second));
        assert_eq!((stale, owner), ((0, 60), (60, 0)));
        let records = store.read("a", 0, u64::MAX).await.expect("it is whole");
        assert!(records.len() == 61 && records[1..].iter().all(|record| record.epoch == second));
    });
}

/// A driver and people, all at once: nobody's event is lost, and each stands where it says.
#[test]
fn a_driver_and_people_append_side_by_side() {
    on_both(async |store| {
        store.create("a", &[message("one")]).await.expect("it is new");
        let epoch = store.lease("a", "me", 60_000).await.expect("it is free");
        let people =
            (0..20).map(|number| {
                let store = store.clone();
                async move {
                    store.append("a", Writer::Client, &[message(&number.to_string())], 1).await.map(drop)
                }
            });
        let driver = async {
            let (mut done, mut expected) = (0, 1);
            while done < 20 {
                match store
                    .append("a", Writer::Driver { epoch, expected }, &[message("d"), message("e")], 1)
                    .await
                {
                    Ok(at) => (done, expected) = (done + 1, at + 2),
                    Err(StoreError::Moved(next)) => expected = next,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let people = async {
            for person in people {
                person.await.expect("anybody may");
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(driver, people);
        assert_eq!(store.read("a", 0, u64::MAX).await.expect("it is whole").len(), 1 + 40 + 20);
    });
}

/// Edited by somebody who may write the store itself, past its own refusals.
#[test]
fn what_was_edited_or_torn_off_is_found() {
    let edits = [
        ("UPDATE events SET body = replace(body, 'three', 'seven') WHERE position = 2", 2),
        ("UPDATE events SET at_ms = at_ms + 1 WHERE position = 3", 3),
        ("DELETE FROM events WHERE position = 5", 5),
        ("DELETE FROM events WHERE position = 2", 2),
        (
            "UPDATE events SET hash = (SELECT hash FROM events AS other WHERE other.position = 1) WHERE position = 4",
            4,
        ),
    ];
    let words = ["one", "two", "three", "four", "five", "six"];
    let check = async |store: &Store, found: u64, edit: &str| match store.read("a", 0, u64::MAX).await {
        Err(StoreError::Damaged { position, .. }) => assert_eq!(position, found, "{edit}"),
        other => panic!("{edit}: {other:?}"),
    };
    for (edit, found) in edits {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("log");
        block_on(async {
            let store = Store::sqlite(&file).expect("it opens");
            store.create("a", &words.map(message)).await.expect("it is new");
            let sql = |text: &str| {
                let python = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript(sys.argv[2]); c.commit()";
                Command::new("python3").args(["-c", python]).arg(&file).arg(text).output().expect("it runs")
            };
            assert!(!sql(edit).status.success(), "the store itself refuses: {edit}");
            let forced = format!("DROP TRIGGER events_stay; DROP TRIGGER events_are_kept; {edit}");
            assert!(sql(&forced).status.success());
            check(&store, found, edit).await;
        });
    }
    let server = Server::postgres();
    for (number, (edit, found)) in edits.into_iter().enumerate() {
        block_on(async {
            if number > 0 {
                server.sql("ALTER TABLE events DISABLE TRIGGER ALL; DELETE FROM events; DELETE FROM sessions; ALTER TABLE events ENABLE TRIGGER ALL");
            }
            let store = postgres(&server).await;
            store.create("a", &words.map(message)).await.expect("it is new");
            assert!(!server.sql(edit), "the store itself refuses: {edit}");
            assert!(server.sql(&format!("ALTER TABLE events DISABLE TRIGGER ALL; {edit}")));
            check(&store, found, edit).await;
        });
    }
}

/// A writer that is killed while it appends, again and again: what it was told is there, and nothing else.
#[test]
fn a_log_is_whole_after_kill_9() {
    let scene = super::scene::Scene::new(super::scene::SCRIPT);
    let mut child = scene.run("one", &[]).spawn().expect("it starts");
    std::thread::sleep(Duration::from_millis(150));
    let _ = child.kill();
    let _ = child.wait();
    let exported = scene.harness(&["export", "one"]).output().expect("it runs");
    assert!(exported.status.success(), "{}", super::scene::said(&exported));
    let file = scene.path("exported");
    std::fs::write(&file, &exported.stdout).expect("it is ours");
    let other = format!("sqlite:{}", scene.path("sessions/other.sqlite").display());
    let import = |store: &str| {
        scene.harness(&["import", &file.display().to_string(), "--store", store]).output().expect("it runs")
    };
    assert!(import(&other).status.success());
    let again = scene.harness(&["export", "one", "--store", &other]).output().expect("it runs");
    assert_eq!(again.stdout, exported.stdout);
    let text = String::from_utf8_lossy(&exported.stdout).replace("please mend", "please break");
    std::fs::write(&file, text).expect("it is ours");
    let third = format!("sqlite:{}", scene.path("sessions/third.sqlite").display());
    let refused = import(&third);
    assert!(
        !refused.status.success() && super::scene::said(&refused).contains("damaged at event 1"),
        "{}",
        super::scene::said(&refused)
    );
}
