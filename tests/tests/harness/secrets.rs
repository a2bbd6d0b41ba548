//! The key is looked for wherever an agent, its harness or its sandbox could have it.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::scene::{Lines, Scene};

/// Whether a process has `needle` in memory that it can write, its environment or its command line.
fn holds(pid: i32, needle: &[u8]) -> bool {
    let has = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    if has(&file("environ")) || has(&file("cmdline")) {
        return true;
    }
    let Ok(mut memory) = fs::File::open(format!("/proc/{pid}/mem")) else { return false };
    let maps = String::from_utf8_lossy(&file("maps")).into_owned();
    maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|mode| mode.starts_with("rw"))).any(
        |line| {
            let (from, to) =
                line.split_whitespace().next().and_then(|range| range.split_once('-')).expect("a range");
            let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).expect("an address"));
            let mut bytes = Vec::new();
            memory.seek(SeekFrom::Start(from)).is_ok()
                && (&mut memory).take(to - from).read_to_end(&mut bytes).is_ok()
                && has(&bytes)
        },
    )
}

fn descendants(of: i32) -> Vec<i32> {
    let children = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let children = children.flat_map(|task| {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
    });
    children.flat_map(|pid| descendants(pid).into_iter().chain([pid])).collect()
}

fn in_files(folder: &Path, needle: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(in_files(&path, needle));
        } else if fs::read(&path)
            .is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
        {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn the_key_is_nowhere_but_in_the_vault_and_the_gateway() {
    let rules = "rules:\n  - name: end\n    when: {tool_result_contains: begun}\n    respond: {content: \"Done.\"}\n  - name: look\n    when: {messages_contain: mend}\n    respond: {tool_calls: [{name: bash, arguments: {command: \"echo begun; env; cat /proc/*/environ /proc/*/cmdline; ls -R /tmp /run; sleep 3\"}}]}\n";
    let scene = Scene::new(rules);
    let mut child = scene.run("one", &[]).spawn().expect("it starts");
    let mut lines = Lines::of(&mut child);
    lines.until(|event| event["type"] == "hand.call").expect("a tool runs");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let needle = scene.key.as_bytes();
    let harness = child.id().cast_signed();
    assert!(!holds(harness, needle), "the harness has the key");
    let daemon = scene.daemon_pid().cast_signed();
    let holders: Vec<i32> =
        descendants(daemon).into_iter().chain([daemon]).filter(|pid| holds(*pid, needle)).collect();
    let roles: Vec<i32> = ["vault", "gateway"]
        .iter()
        .flat_map(|role| scene.roles(role))
        .map(nix::unistd::Pid::as_raw)
        .collect();
    assert!(holders.iter().all(|pid| roles.contains(pid)), "{holders:?} of {roles:?}");
    assert!(!holders.is_empty(), "the search finds it where it is");
    // It is confined itself: it can make no connection and execute nothing, and nobody of its user's can look into it.
    let status = fs::read_to_string(format!("/proc/{harness}/status")).expect("it runs");
    assert_eq!(broker_tests::field(&status, "Seccomp").trim(), "2");
    assert_eq!(broker_tests::field(&status, "NoNewPrivs").trim(), "1");
    let sockets = fs::read_dir(format!("/proc/{harness}/fd")).expect("its descriptors").flatten();
    let names: Vec<String> = sockets
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|name| name.display().to_string())
        .collect();
    let tcp = fs::read_to_string(format!("/proc/{harness}/net/tcp")).expect("its network");
    let is_tcp = |name: &String| {
        let inode = name.trim_start_matches("socket:[").trim_end_matches(']');
        name.starts_with("socket:") && tcp.lines().any(|line| line.split_whitespace().nth(9) == Some(inode))
    };
    assert!(!names.iter().any(is_tcp), "{names:?}");
    while lines.event().is_some() {}
    assert!(child.wait().expect("it ends").success());
    let (files, listed) = (in_files(&scene.path("sessions"), needle), scene.events("one"));
    assert!(files.is_empty() && in_files(&scene.path("workspace"), needle).is_empty(), "{files:?}");
    assert!(in_files(&scene.path("state"), needle).is_empty());
    assert!(!listed.iter().any(|event| event.to_string().contains(&scene.key)), "{listed:#?}");
    assert!(scene.seen().iter().all(|line| line.starts_with("agent ")), "{:?}", scene.seen());
}
