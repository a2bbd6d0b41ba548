//! Any bytes as a policy; what parses is planned on a fixed host. Neither may panic, and a plan never shows `/` or a
//! place that is written with `..`.

#![no_main]

use std::collections::BTreeMap;
use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use sandbox::{
    Caller, Cgroups, Controller, Host, HostPath, Job, PathKind, Plan, Policy, Presets, Step, Stream, Wishes,
    WorkspaceMode, WorkspaceWish,
};

/// Every named path gets a kind by its own bytes, so that the fuzzer can reach each of them.
fn host(policy: &Policy) -> Host {
    let caller = Caller { uid: 0, gid: 0, home: Some("/home/dev".into()), path: vec!["/usr/bin".into()] };
    let kind = |path: &HostPath| match path.as_str().bytes().map(usize::from).sum::<usize>() % 6 {
        0 => PathKind::Absent,
        1 => PathKind::File,
        2 => PathKind::Symlink { target: "usr/bin".into(), resolved: Some(("/usr/bin".into(), true)) },
        3 => PathKind::Symlink { target: "/".into(), resolved: Some(("/".into(), true)) },
        4 => PathKind::Symlink { target: "nowhere".into(), resolved: None },
        _ => PathKind::Directory,
    };
    let read = policy.file().files.read.iter();
    let paths: BTreeMap<_, _> = read.filter_map(|path| Some((caller.expand(path)?, kind(path)))).collect();
    Host {
        landlock_abi: 7,
        cgroups: Cgroups::V2 { controllers: Controller::ALL.into() },
        caller,
        disks: Vec::new(),
        paths,
    }
}

fn wishes(workspace: Option<WorkspaceMode>) -> Wishes {
    Wishes {
        command: vec!["true".into()],
        workspace: workspace.map(|mode| WorkspaceWish { directory: "/home/dev/project".into(), mode }),
        streams: [Stream::Pipe; 3],
        ..Wishes::default()
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let policy = match Policy::parse("fuzz", text, &Presets) {
        Ok(policy) => policy,
        Err(error) => {
            let _ = error.to_string();
            return;
        }
    };
    let host = host(&policy);
    for workspace in [None, Some(WorkspaceMode::ReadOnly), Some(WorkspaceMode::ReadWrite)] {
        let job =
            Job::narrow(&policy, wishes(workspace)).expect("a command and no limits are never too much");
        let plan = match Plan::make(&policy, &job, &host) {
            Ok(plan) => plan,
            Err(error) => {
                let _ = error.to_string();
                continue;
            }
        };
        let _ = (plan.to_string(), plan.hash());
        for step in plan.base.iter().chain(&plan.files) {
            assert!(step.path().components().all(|part| part != Component::ParentDir), "{step}");
            if let Step::Tree { source, .. } = step {
                assert_ne!(source, Path::new("/"), "the whole host is shown");
            }
        }
    }
});
