//! Stage × victim: each process that a sandbox depends on is killed at each stage of a sandbox's life, while another tenant
//! has a running command and a sandbox that lives. What is found is printed, and compared with `ARCHITECTURE.md`, "What dies
//! with whom". Everything is looked at from the host; the daemon's own word is only asked for last.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use broker_tests::canary;

#[path = "scene.rs"]
mod scene;

use scene::Scene;

use super::hostile::descriptors;
use super::lifetime::{inside, sleeping};
use super::lives::Peer;
use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The core has the request, and it is not recorded.
    Asked,
    /// Init is born, and has done nothing yet.
    Starting,
    Running,
    /// It waits for commands.
    Idle,
    Executing,
    /// Its supervisor was told to end it, and has done nothing yet.
    Ending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Core,
    Launcher,
    Supervisor,
    Init,
    Caller,
}

/// What was seen of one cell.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    sandbox: &'static str,
    other: &'static str,
    back: &'static str,
}

/// `ARCHITECTURE.md`, "What dies with whom"; nothing where there is no such victim at that stage.
fn promised(stage: Stage, victim: Victim) -> Option<Seen> {
    let seen = |sandbox, other, back| Some(Seen { sandbox, other, back });
    match (stage, victim) {
        (Stage::Asked, Victim::Supervisor | Victim::Init) => None,
        (_, Victim::Launcher) => seen("ends", "ends", "nothing"),
        (Stage::Asked | Stage::Ending, Victim::Core) => seen("ends", "lives on", "core"),
        (_, Victim::Core) => seen("lives on", "lives on", "core"),
        (_, Victim::Supervisor | Victim::Init | Victim::Caller) => seen("ends", "lives on", "nothing"),
    }
}

#[test]
fn what_dies_with_whom_is_as_written() {
    use Stage::{Asked, Ending, Executing, Idle, Running, Starting};
    println!("{:<10} {:<11} {:<9} {:<9} {:<18} came back", "stage", "victim", "sandbox", "other", "left");
    for stage in [Asked, Starting, Running, Idle, Executing, Ending] {
        for victim in [Victim::Core, Victim::Launcher, Victim::Supervisor, Victim::Init, Victim::Caller] {
            let Some(promised) = promised(stage, victim) else {
                println!("{:<10} {:<11} is not there yet", format!("{stage:?}"), format!("{victim:?}"));
                continue;
            };
            let (seen, left) = cell(stage, victim, &promised);
            let names = [format!("{stage:?}"), format!("{victim:?}")];
            println!(
                "{:<10} {:<11} {:<9} {:<9} {left:<18} {}",
                names[0], names[1], seen.sandbox, seen.other, seen.back
            );
            assert_eq!(seen, promised, "{stage:?} {victim:?}");
        }
    }
}

/// One cell, and what was left before anybody else had a run.
fn cell(stage: Stage, victim: Victim, promised: &Seen) -> (Seen, &'static str) {
    let mounts = mounts();
    let mut daemon = Daemon::start();
    let other = Other::start(&daemon);
    let before = Held::of(&daemon);
    let mut scene = Scene::reach(&daemon, stage);
    scene.kill(&mut daemon, victim);
    scene.hold.release();

    let core = scene.core;
    let restarted = || daemon.role("core").is_some_and(|pid| pid != core) && answers(&daemon);
    let back =
        if victim == Victim::Core && within(Duration::from_secs(5), restarted) { "core" } else { "nothing" };
    // What lives on is looked at for a moment; what ends has its time.
    let limit = Duration::from_secs(if promised.sandbox == "ends" { 5 } else { 1 });
    let ended = within(limit, || scene.is_over(&daemon));
    // What dies by a parent's death dies a moment after it.
    let mut others = "";
    within(Duration::from_secs(2), || {
        others = other.state(&daemon);
        others != "is torn"
    });
    let seen = Seen { sandbox: if ended { "ends" } else { "lives on" }, other: others, back };
    let left = if ended && scene.has_group() { "an empty group" } else { "nothing" };

    // An embedded run that is killed leaves its group too, and the next run removes it.
    let may_leave = matches!(victim, Victim::Launcher | Victim::Supervisor);
    assert!(left == "nothing" || may_leave, "{stage:?} {victim:?}: {left}");
    // Whatever is promised to live on does, is known, and can be ended.
    if !ended {
        let goes_on = || stage == Stage::Idle || inside(&scene.token) > 0;
        assert!(within(Duration::from_secs(5), goes_on), "{stage:?} {victim:?}: nothing runs in it");
        let id = ids(&daemon).into_iter().find(|id| !other.ids.contains(id)).expect("the daemon knows it");
        assert!(daemon.broker(ADA, &["kill", &id]).status().expect("it runs").success());
        assert!(
            within(Duration::from_secs(5), || scene.is_over(&daemon)),
            "{stage:?} {victim:?}: it goes on"
        );
    }
    scene.caller.end();
    assert_given_back(&daemon, &scene, victim, &other, &before);
    assert!(within(Duration::from_secs(2), || !scene.has_group()), "{stage:?} {victim:?}: its group stays");
    assert_recorded(&daemon, stage, victim, &other);
    let verified = daemon.audit("verify");
    assert!(verified.status.success(), "{stage:?} {victim:?}: {}", text(&verified.stderr));
    drop((other, daemon));
    assert!(
        within(Duration::from_secs(2), || self::mounts() == mounts),
        "{stage:?} {victim:?}: the host's mounts"
    );
    (seen, left)
}

/// After the next run nothing is held for it any more.
fn assert_given_back(daemon: &Daemon, scene: &Scene, victim: Victim, other: &Other, before: &Held) {
    if victim == Victim::Launcher {
        // The next run on this host removes what was left.
        assert!(
            Command::new(program("broker"))
                .args(["exec", "--embedded", "--", "true"])
                .status()
                .expect("it runs")
                .success()
        );
        assert!(
            within(Duration::from_secs(2), || !Path::new(&format!("/proc/{}", scene.core)).exists()),
            "the core lives"
        );
    } else {
        assert!(daemon.exec(0, &[], &["true"]).status.success(), "{victim:?}: {}", daemon.log());
        let given_back = || Held::of(daemon).is_no_more_than(before) && ids(daemon) == other.ids;
        assert!(
            within(Duration::from_secs(5), given_back),
            "{victim:?}: {:?} after {before:?}",
            Held::of(daemon)
        );
    }
}

/// What was not recorded was not begun; and of what was, a daemon that is there has recorded the end.
fn assert_recorded(daemon: &Daemon, stage: Stage, victim: Victim, other: &Other) {
    let of = |kinds: &[&str]| -> BTreeSet<String> {
        let records = daemon.records();
        let events = records.iter().map(|record| &record["event"]);
        let wanted = events.filter(|event| kinds.iter().any(|kind| event["kind"] == *kind));
        let names = wanted.filter_map(|event| Some(event["sandbox"].as_str()?.to_owned()));
        names.filter(|id| !other.ids.contains(id)).collect()
    };
    let begun = of(&["start", "provision"]);
    if victim == Victim::Launcher {
        assert_eq!(begun.len(), usize::from(stage != Stage::Asked), "{stage:?} {victim:?}: {begun:?}");
        return;
    }
    // One more is the next run.
    let expected = if (stage, victim) == (Stage::Asked, Victim::Core) { 1 } else { 2 };
    assert_eq!(begun.len(), expected, "{stage:?} {victim:?}");
    // Nobody waits for the record of an end.
    assert!(
        within(Duration::from_secs(5), || of(&["end"]) == begun),
        "{stage:?} {victim:?}: {:?}",
        of(&["end"])
    );
}

/// Mounts of the host, without the number of each, which is new whenever another comes and goes.
fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("it can be read");
    table.lines().map(|line| line.split(' ').skip(2).collect::<Vec<_>>().join(" ")).collect()
}

fn answers(daemon: &Daemon) -> bool {
    daemon.broker(0, &["ps"]).stderr(Stdio::null()).output().is_ok_and(|output| output.status.success())
}

fn ids(daemon: &Daemon) -> BTreeSet<String> {
    daemon.list(0).iter().filter_map(|sandbox| Some(sandbox["id"].as_str()?.to_owned())).collect()
}

/// How many descriptors the launcher and the core have.
#[derive(Debug)]
struct Held {
    launcher: usize,
    core: usize,
}

impl Held {
    fn of(daemon: &Daemon) -> Held {
        let launcher = fs::read_dir(format!("/proc/{}/fd", daemon.process.id())).map_or(0, Iterator::count);
        Held { launcher, core: descriptors(daemon) }
    }

    fn is_no_more_than(&self, before: &Held) -> bool {
        self.launcher <= before.launcher && self.core <= before.core
    }
}

/// The other tenant: root, with a command that runs and a sandbox that lives.
struct Other {
    _run: Process,
    token: String,
    handle: OwnedFd,
    ids: BTreeSet<String>,
}

impl Other {
    fn start(daemon: &Daemon) -> Other {
        let token = canary();
        let _run = Process(sleeping(daemon, 0, &token));
        let (_, handle) = Peer::new(daemon).provision(None);
        Other { _run, token, handle, ids: ids(daemon) }
    }

    /// Both of its sandboxes are as they were, or neither is there.
    fn state(&self, daemon: &Daemon) -> &'static str {
        let runs = inside(&self.token) > 0;
        let obeys = UnixStream::connect(daemon.socket()).is_ok()
            && Peer::new(daemon).execute(&self.handle, &canary(), "echo here").1 == "here\n";
        match (runs, obeys) {
            (true, true) => "lives on",
            (false, false) => "ends",
            _ => "is torn",
        }
    }
}

/// A process of ours, ended when it is dropped.
pub struct Process(pub Child);

impl Process {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}
