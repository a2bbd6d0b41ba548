//! What holds for every policy, wish and host. Expectations come from what the policy's text and the host literal say,
//! by rules written down here again, not from the code that plans.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use sandbox::{
    ByteSize, Caller, Cgroups, Controller, Cpus, Gap, Host, Job, LANDLOCK_ABI_TESTED, Library, PathKind,
    Plan, PlanError, Policy, PolicyError, Presets, Span, Step, Wishes, WorkspaceMode, WorkspaceWish,
};

const USER_HOME: &str = "/home/dev";

struct Texts(BTreeMap<String, String>);

impl Library for Texts {
    fn find(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

fn parse(text: &str) -> Policy {
    Policy::parse("test", text, &Presets).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn host(paths: BTreeMap<PathBuf, PathKind>) -> Host {
    let caller = Caller { uid: 0, gid: 0, home: Some(USER_HOME.into()), path: vec!["/usr/bin".into()] };
    Host {
        landlock_abi: 7,
        cgroups: Cgroups::V2 { controllers: Controller::ALL.into() },
        caller,
        disks: Vec::new(),
        paths,
    }
}

fn wishes(workspace: Option<WorkspaceMode>) -> Wishes {
    let workspace = workspace.map(|mode| WorkspaceWish { directory: "/srv/project".into(), mode });
    Wishes { command: vec!["true".into()], workspace, ..Wishes::default() }
}

fn plan_in(policy: &Policy, workspace: Option<WorkspaceMode>, host: &Host) -> Result<Plan, PlanError> {
    Plan::make(policy, &Job::narrow(policy, wishes(workspace)).expect("nothing is too much"), host)
}

fn plan(policy: &Policy, host: &Host) -> Result<Plan, PlanError> {
    plan_in(policy, None, host)
}

fn trees(plan: &Plan) -> Vec<(&Path, &Path, bool)> {
    let tree = |step| match step {
        &Step::Tree { ref source, ref path, directory } => {
            Some((source.as_path(), path.as_path(), directory))
        }
        _ => None,
    };
    plan.base.iter().chain(&plan.files).filter_map(tree).collect()
}

/// Few words, so that paths lie above, below and beside each other, the sandbox's own places and the caller's home.
fn host_path() -> impl Strategy<Value = String> {
    let words =
        ["usr", "bin", "etc", "home", "dev", "agent", "opt", "tmp", "proc", "workspace", ".ssh", "..."];
    (select(vec!["/", "/home/dev/", "~/"]), vec(select(words.to_vec()), 1..4))
        .prop_map(|(root, parts)| format!("{root}{}", parts.join("/")))
}

fn expand(path: &str) -> PathBuf {
    path.strip_prefix("~/").map_or(path.into(), |below| Path::new(USER_HOME).join(below))
}

fn path_kind() -> impl Strategy<Value = PathKind> {
    let end = prop_oneof![Just("/".to_owned()), Just(USER_HOME.to_owned()), host_path()];
    prop_oneof![
        Just(PathKind::Absent),
        Just(PathKind::Directory),
        Just(PathKind::File),
        (host_path(), proptest::option::of((end, any::<bool>()))).prop_map(|(target, end)| {
            PathKind::Symlink {
                target: expand(&target),
                resolved: end.map(|(end, directory)| (expand(&end), directory)),
            }
        }),
    ]
}

/// Distinct paths in any order, and what stands there.
fn named_paths() -> impl Strategy<Value = Vec<(String, PathKind)>> {
    btree_map(host_path(), path_kind(), 0..8)
        .prop_map(|map| map.into_iter().collect::<Vec<_>>())
        .prop_shuffle()
}

fn reading(named: &[(String, PathKind)]) -> String {
    format!("[files]\nread = {:?}\n", named.iter().map(|(path, _)| path).collect::<Vec<_>>())
}

fn standing(named: &[(String, PathKind)]) -> BTreeMap<PathBuf, PathKind> {
    named.iter().map(|(path, kind)| (expand(path), kind.clone())).collect()
}

/// The plan; a case that names one of the sandbox's own places is not one, and must have been refused for that.
macro_rules! planned {
    ($plan:expr) => {
        match $plan {
            Err(PlanError::Reserved { path }) => {
                let own = ["/dev", "/proc", "/workspace", "/mnt", "/etc", "/run", "/tmp", "/var", "/home"];
                prop_assert!(own.iter().any(|place| path.starts_with(place)), "{}", path.display());
                return Err(TestCaseError::reject("one of the sandbox's own places"));
            }
            plan => plan.expect("the host has all it takes"),
        }
    };
}

proptest! {
    // A failure prints its input; files beside the tests would be left behind.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sizes_come_back_as_they_were_written(count in 1_u64..1 << 20, unit in 0_usize..5) {
        let (word, factor) =
            [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)][unit];
        let size: ByteSize = format!("{count}{word}").parse().expect("a size");
        prop_assert_eq!(size.bytes(), count * factor);
        prop_assert_eq!(size.to_string().parse::<ByteSize>().expect("as printed"), size);
    }

    #[test]
    fn durations_come_back_as_they_were_written(count in 1_u64..8_000, unit in 0_usize..4) {
        let (word, factor) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)][unit];
        let span: Span = format!("{count}{word}").parse().expect("a duration");
        prop_assert_eq!(span.duration().as_millis(), u128::from(count * factor));
        prop_assert_eq!(span.to_string().parse::<Span>().expect("as printed"), span);
    }

    #[test]
    fn shares_of_processors_come_back_as_they_were_written(thousandths in 10_u32..=1_024_000) {
        let cpus: Cpus = format!("{}.{:03}", thousandths / 1000, thousandths % 1000).parse().expect("a share");
        prop_assert_eq!(cpus.thousandths(), thousandths);
        prop_assert_eq!(cpus.to_string().parse::<Cpus>().expect("as printed"), cpus);
    }

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        let _ = (text.parse::<ByteSize>(), text.parse::<Span>(), text.parse::<Cpus>());
        let _ = Policy::parse("test", &text, &Presets).map_err(|error| error.to_string());
    }

    /// Text that is TOML more often than not gets further into the parser.
    #[test]
    fn policies_put_together_from_their_own_words_never_panic(words in vec(select(WORDS.to_vec()), 0..24)) {
        let _ = Policy::parse("test", &words.concat(), &Presets).map_err(|error| error.to_string());
    }

    #[test]
    fn an_unknown_key_is_an_error_at_its_line(
        key in "x[a-z_]{1,12}", section in select(vec!["files", "limits", "workspace", "landlock", "syscalls", "env"]),
    ) {
        let text = format!("description = \"\"\n[{section}]\n{key} = 1\n");
        prop_assert!(complaint(&text).contains("line 3, column 1"), "{}", complaint(&text));
    }

    #[test]
    fn only_what_is_named_or_linked_from_there_is_shown(named in named_paths()) {
        let policy = parse(&reading(&named));
        let mut paths = standing(&named);
        // What the host has and the policy does not name.
        paths.extend(["/home/dev/.aws", "/root", "/srv"].map(|path| (path.into(), PathKind::Directory)));
        let plan = planned!(plan(&policy, &host(paths)));
        let mut allowed: BTreeSet<(PathBuf, bool)> = BTreeSet::new();
        for (path, kind) in &named {
            match kind {
                PathKind::Directory => allowed.insert((expand(path), true)),
                PathKind::File => allowed.insert((expand(path), false)),
                PathKind::Symlink { resolved: Some(end), .. } => allowed.insert(end.clone()),
                _ => false,
            };
        }
        for (source, path, directory) in trees(&plan) {
            prop_assert!(allowed.contains(&(source.to_owned(), directory)), "{source:?} is not named");
            prop_assert_ne!(source, Path::new("/"));
            prop_assert_eq!(source, path, "a tree is shown at its own place");
        }
    }

    /// Whatever stands on the host, and wherever links say that they lead.
    #[test]
    fn every_step_acts_on_a_plain_absolute_path(named in named_paths()) {
        let plan = planned!(plan(&parse(&reading(&named)), &host(standing(&named))));
        for step in plan.base.iter().chain(&plan.files) {
            let mut parts = step.path().components();
            prop_assert_eq!(parts.next(), Some(Component::RootDir), "{}", step);
            prop_assert!(parts.all(|part| matches!(part, Component::Normal(_))), "{}", step);
        }
    }

    /// A step's parent is made before it, or is part of what is shown already.
    #[test]
    fn every_step_finds_its_parent_and_none_is_made_twice(named in named_paths()) {
        let plan = planned!(plan(&parse(&reading(&named)), &host(standing(&named))));
        let mut there = BTreeSet::from([PathBuf::from("/")]);
        for step in plan.base.iter().chain(&plan.files) {
            let path = step.path();
            if let Step::Directory { .. } | Step::Symlink { .. } | Step::File { .. } | Step::Tree { .. } = step {
                prop_assert!(path.parent().is_some_and(|parent| there.contains(parent)), "{} stands on nothing", step);
                prop_assert!(there.insert(path.to_owned()), "{} is there already", step);
            }
        }
    }

    /// Directories above and below each other, far from the sandbox's own places.
    #[test]
    fn what_is_named_is_shown_whatever_the_order(paths in vec("/usr(/bin(/a)?)?|/opt(/go(/bin)?)?", 0..6)) {
        let distinct: Vec<_> = paths.iter().enumerate().filter(|(at, path)| !paths[..*at].contains(path))
            .map(|(_, path)| (path.clone(), PathKind::Directory)).collect();
        let plan = plan(&parse(&reading(&distinct)), &host(standing(&distinct))).expect("the host has all it takes");
        for path in &paths {
            prop_assert!(trees(&plan).iter().any(|tree| Path::new(path).starts_with(tree.0)), "{path} is not shown");
        }
    }

    #[test]
    fn an_empty_list_adds_nothing(named in named_paths(), preset in select(vec!["default", "python", "build"])) {
        prop_assert_eq!(parse("[files]\nread = []\n").hash(), parse("").hash());
        let none = plan(&parse("[files]\nread = []\n"), &host(standing(&named))).expect("the host has all it takes");
        prop_assert!(trees(&none).is_empty());
        let bare = parse(&format!("extends = \"{preset}\"\n"));
        let emptied = "allow_gaps = []\n[files]\nread = []\n[workspace]\nprotect = []\n[env]\npass = []\n";
        prop_assert_eq!(parse(&format!("extends = \"{preset}\"\n{emptied}")).hash(), bare.hash());
    }

    #[test]
    fn a_child_adds_to_lists(base in named_paths(), child in named_paths()) {
        let library = Texts(BTreeMap::from([("base".to_owned(), reading(&base))]));
        let text = format!("extends = \"base\"\n{}", reading(&child));
        let policy = Policy::parse("test", &text, &library).expect("both parse");
        let read: Vec<_> = policy.file().files.read.iter().map(|path| path.as_str().to_owned()).collect();
        let all: BTreeSet<_> = base.iter().chain(&child).map(|(path, _)| path.clone()).collect();
        prop_assert_eq!(read.len(), all.len(), "nothing twice");
        prop_assert_eq!(read.into_iter().collect::<BTreeSet<_>>(), all);
    }

    #[test]
    fn a_child_replaces_values_and_keeps_what_it_does_not_say(one in 1_u32..9999, other in 1_u32..9999) {
        let base = format!("[limits]\npids = {one}\nopen_files = {one}\n[env.set]\nA = \"a\"\nB = \"b\"\n");
        let library = Texts(BTreeMap::from([("base".to_owned(), base)]));
        let text = format!("extends = \"base\"\n[limits]\npids = {other}\n[env.set]\nB = \"child\"\n");
        let policy = Policy::parse("test", &text, &library).expect("both parse");
        let limits = &policy.file().limits;
        prop_assert_eq!(limits.pids.map(|count| count.get()), Some(other));
        prop_assert_eq!(limits.open_files.map(|count| count.get()), Some(one));
        let set: Vec<_> = policy.file().env.set.iter().map(|(name, text)| format!("{name}={text}")).collect();
        prop_assert_eq!(set, ["A=a", "B=child"]);
    }

    /// Six policies that extend each other in any way: it ends, and well only where the chain does.
    #[test]
    fn a_chain_that_comes_back_is_an_error(bases in vec(proptest::option::of(0_usize..6), 6)) {
        let text = |base: &Option<usize>| base.map_or(String::new(), |base| format!("extends = \"p{base}\"\n"));
        let library = Texts(bases.iter().enumerate().map(|(at, base)| (format!("p{at}"), text(base))).collect());
        let (mut at, mut links) = (Some(0), 0);
        while let Some(here) = at.filter(|_| links <= bases.len()) {
            (at, links) = (bases[here], links + 1);
        }
        match Policy::named("p0", &library) {
            Ok(_) => prop_assert!(at.is_none()),
            Err(error) => prop_assert!(at.is_some() && matches!(error, PolicyError::ExtendsLoop { .. }), "{error}"),
        }
    }

    #[test]
    fn narrowing_never_widens(
        policy in (1_u64..99, 1_u32..99, 10_u32..9999, 1_u64..99), wish in (1_u64..99, 1_u32..99, 10_u32..9999, 1_u64..99),
        limited in any::<[bool; 4]>(), asked in any::<[bool; 4]>(),
    ) {
        let share = |thousandths| f64::from(thousandths) / 1000.0;
        let lines = [format!("memory = \"{}KiB\"", policy.0), format!("pids = {}", policy.1),
            format!("cpus = {:?}", share(policy.2)), format!("timeout = \"{}ms\"", policy.3)];
        let lines: Vec<_> = lines.into_iter().zip(limited).filter(|(_, there)| *there).map(|(line, _)| line).collect();
        let base = parse(&format!("[limits]\n{}\n", lines.join("\n")));
        let wished = Wishes {
            memory: asked[0].then(|| format!("{}KiB", wish.0).parse().expect("a size")),
            pids: asked[1].then(|| wish.1.try_into().expect("not zero")),
            cpus: asked[2].then(|| Cpus::try_from(share(wish.2)).expect("a share")),
            timeout: asked[3].then(|| format!("{}ms", wish.3).parse().expect("a duration")),
            ..wishes(None)
        };
        let pairs = [(policy.0, wish.0), (policy.1.into(), wish.1.into()), (policy.2.into(), wish.2.into()), (policy.3, wish.3)];
        let wider = (0..4).any(|at| limited[at] && asked[at] && pairs[at].1 > pairs[at].0);
        let Ok(job) = Job::narrow(&base, wished) else { prop_assert!(wider, "refused, and not wider"); return Ok(()) };
        prop_assert!(!wider, "wider, and not refused");
        let plan = Plan::make(&base, &job, &host(BTreeMap::new())).expect("the host has all it takes");
        let group = plan.cgroup.as_ref();
        let found = [
            group.and_then(|group| group.memory_bytes_max).map(|bytes| bytes >> 10),
            group.and_then(|group| group.pids_max).map(|count| u64::from(count) - 1),
            group.and_then(|group| group.cpu_thousandths).map(u64::from),
            plan.timeout_ms,
        ];
        for at in 0..4 {
            let (limit, wish) = (limited[at].then_some(pairs[at].0), asked[at].then_some(pairs[at].1));
            prop_assert_eq!(found[at], limit.into_iter().chain(wish).min(), "limit {}", at);
        }
    }

    #[test]
    fn a_landlock_below_the_floor_is_an_error(floor in proptest::option::of(1_u8..=7), abi in 0_u8..=20) {
        let policy = parse(&floor.map_or(String::new(), |floor| format!("[landlock]\nfloor = {floor}\n")));
        let floor = floor.unwrap_or(2);
        let planned = plan(&policy, &Host { landlock_abi: abi, ..host(BTreeMap::new()) }).map(|plan| plan.landlock.abi);
        let refused = Err(PlanError::LandlockFloor { floor, found: abi });
        prop_assert_eq!(planned, if abi < floor { refused } else { Ok(abi.min(LANDLOCK_ABI_TESTED)) });
    }

    #[test]
    fn a_limit_without_its_controller_is_an_error_or_a_named_gap(has in any::<[bool; 4]>(), gap: bool) {
        let gaps = if gap { "allow_gaps = [\"no-cgroup\"]\n" } else { "" };
        let policy = parse(&format!("{gaps}[limits]\nmemory = \"1GiB\"\npids = 9\ncpus = 1\nio = \"1MiB\"\n"));
        let controllers = Controller::ALL.into_iter().zip(has).filter(|(_, has)| *has).map(|(one, _)| one).collect();
        match plan(&policy, &Host { cgroups: Cgroups::V2 { controllers }, ..host(BTreeMap::new()) }) {
            Ok(plan) => prop_assert_eq!(plan.gaps.as_slice(), if has == [true; 4] { &[][..] } else { &[Gap::NoCgroup] }),
            Err(error) => prop_assert!(!gap && has != [true; 4], "{error}"),
        }
    }
}

const WORDS: [&str; 24] = [
    "[files]\n",
    "[limits]\n",
    "[env.set]\n",
    "[workspace.hold]\n",
    "[[files]]\n",
    "read",
    "memory",
    "cpus",
    "hold",
    "=",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "\"/usr\"",
    "\"1GiB\"",
    "1.5",
    "nan",
    "true",
    "1979-05-27",
    "extends=\"default\"\n",
    "floor",
];

fn complaint(text: &str) -> String {
    Policy::parse("test", text, &Presets).map(|_| ()).expect_err(text).to_string()
}

/// One mistake a text, and the line it is in; of a list the line where it begins. TOML has no null, so what stands for it elsewhere is one too.
#[test]
fn every_mistake_is_an_error_that_points_at_its_line() {
    #[rustfmt::skip]
    let mistakes = [
        ("unknown = 1", 1), ("\n[unknown]", 2), ("[files]\nread = []\nread = []", 3),
        ("[files]\ntmp = \"1MiB\"\n[files]", 3), ("extends = \"default\"\nextends = \"default\"", 2),
        ("[env.set]\nA = \"1\"\nA = \"2\"", 3), ("[files]\nread = [\"/usr\", \"/usr\"]", 2),
        ("[workspace]\nprotect = [\".git\", \".git\"]", 2), ("[env]\npass = [\"TERM\", \"TERM\"]", 2),
        ("\nallow_gaps = [\"no-cgroup\", \"no-cgroup\"]", 2), ("files = []", 1), ("files = [[\"/usr\"]]", 1),
        ("\n[[files]]\nread = []", 2), ("\n[[limits]]", 2), ("landlock = [2]", 1), ("syscalls = [true]", 1),
        ("[workspace]\nhold = []", 2), ("[env]\nset = [\"A\"]", 2), ("[files]\nread = \"/usr\"", 2),
        ("[files]\nread = {}", 2), ("[files]\nread = [[]]", 2), ("[files]\nread = [1]", 2),
        ("[files]\nread = [\"\"]", 2), ("[files]\nread = [\n\"/usr\",\n\"relative\"]", 2),
        ("[files]\nread = [\"/\"]", 2), ("[files]\nread = [\"~\"]", 2),
        ("[files]\nread = [\"/usr/../root\"]", 2), ("[workspace]\nprotect = [\"/etc\"]", 2),
        ("[workspace]\nprotect = [\"../x\"]", 2), ("[env.set]\n\"A=B\" = \"\"", 2),
        ("[limits]\nmemory = null", 2), ("[limits]\nmemory =", 2), ("[limits]\nmemory = \"\"", 2),
        ("[limits]\nmemory = \"unlimited\"", 2), ("[limits]\nmemory = 5", 2),
        ("[limits]\nmemory = \"0MiB\"", 2), ("[limits]\npids = 0", 2), ("[limits]\npids = -1", 2),
        ("[limits]\npids = 4294967296", 2), ("[limits]\npids = \"9\"", 2), ("[limits]\ncpus = nan", 2),
        ("[limits]\ncpus = inf", 2), ("[limits]\ntimeout = \"0s\"", 2), ("[limits]\ntimeout = false", 2),
        ("[landlock]\nfloor = 0", 2), ("[landlock]\nfloor = 8", 2), ("[landlock]\nfloor = 300", 2),
        ("[syscalls]\nunix_sockets = \"true\"", 2), ("[syscalls]\nunix_sockets = 1", 2),
        ("allow_gaps = [\"everything\"]", 1), ("extends = [\"default\"]", 1), ("extends = \"\"", 1),
        ("extends = \"../default\"", 1), ("description = {}", 1),
    ];
    for (text, line) in mistakes {
        let found = complaint(text);
        assert!(found.contains(&format!("line {line}, column ")), "{text:?}: {found}");
    }
}

#[test]
fn unix_sockets_beside_a_workspace_need_the_gap_by_name() {
    const GAP: &str = "allow_gaps = [\"unix-sockets-in-workspace\"]\n";
    let gap = Gap::UnixSocketsInWorkspace;
    for (gaps, mode, expected) in [
        ("", Some(WorkspaceMode::ReadOnly), Err(PlanError::GapNotAllowed { gap })),
        (GAP, Some(WorkspaceMode::ReadWrite), Ok(vec![gap])),
        ("", None, Ok(vec![])),
    ] {
        let policy = parse(&format!("{gaps}[syscalls]\nunix_sockets = true\n"));
        assert_eq!(plan_in(&policy, mode, &host(BTreeMap::new())).map(|plan| plan.gaps), expected);
    }
}

#[test]
fn only_root_gets_a_plan() {
    let mut other = host(BTreeMap::new());
    other.caller.uid = 1000;
    assert_eq!(plan(&parse(""), &other), Err(PlanError::NotRoot));
}
