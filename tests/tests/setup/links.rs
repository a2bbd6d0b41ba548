//! Workspaces and shown paths with links in them.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use broker_tests::{Sandbox, canary};
use tempfile::TempDir;

use super::{folder, text};

/// All of a directory that a change would show in: names, kinds, contents and times.
fn picture(place: &Path) -> Vec<(PathBuf, u32, i64, i64, Vec<u8>)> {
    let mut waiting = vec![place.to_owned()];
    let mut seen = Vec::new();
    while let Some(path) = waiting.pop() {
        let about = path.symlink_metadata().expect("there");
        if about.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("readable").flatten().map(|entry| entry.path()));
        }
        let content = if about.is_file() { std::fs::read(&path).expect("readable") } else { Vec::new() };
        seen.push((path, about.mode(), about.mtime(), about.mtime_nsec(), content));
    }
    seen.sort();
    seen
}

/// A host directory with what a misled set-up would change: `hooks` is empty, so that it could even be
/// removed.
fn host_canary() -> TempDir {
    let place = folder("su-01-host-");
    std::fs::create_dir(place.path().join("hooks")).expect("a directory");
    std::fs::write(place.path().join("config"), "host\n").expect("a file");
    for path in [place.path().to_owned(), place.path().join("hooks"), place.path().join("config")] {
        let mode = if path.is_dir() { 0o777 } else { 0o666 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
    place
}

/// SU-01 (CVE-2025-31133 and its kin). Method: protected names of the workspace, and directories on their
/// way, are links to a host directory: absolute, relative, by /proc and by names that a half-built root may
/// have. Oracle: a picture of that directory, with times, while the run lasts and after it. That the picture
/// shows a change at all is the control.
#[test]
fn su_01_links_in_the_workspace_do_not_lead_the_set_up_out() {
    let host = host_canary();
    let before = picture(host.path());
    std::fs::write(host.path().join("control"), "").expect("a file");
    assert!(before != picture(host.path()), "SU-01: the picture shows a new file");
    std::fs::remove_file(host.path().join("control")).expect("removed");

    let plain = folder("su-01-");
    std::fs::create_dir(plain.path().join(".git")).expect("a directory");
    let sandbox = Sandbox::new().option("--workspace").option(plain.path().display().to_string());
    assert_eq!(text(&sandbox.shell("echo ran").stdout), "ran\n", "SU-01: without links it runs");

    let target = host.path().display().to_string();
    let texts = [
        target.clone(),
        format!("../../../../../..{target}"),
        format!("/proc/self/root{target}"),
        format!("/proc/1/root{target}"),
        format!("/oldroot{target}"),
        format!("/old_root{target}"),
        format!("/.old{target}"),
        format!("./../{}", host.path().file_name().expect("a name").to_string_lossy()),
    ];
    // What is linked, below it what the policy protects: the middle, the end, and a name that is absent.
    for link in [".git", ".git/hooks", ".git/config", ".vscode", ".envrc", ".cargo"] {
        for target in &texts {
            let workspace = folder("su-01-");
            let path = workspace.path().join(link);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("directories");
            let file = if link.ends_with("config") || link.ends_with(".envrc") { "/config" } else { "" };
            symlink(format!("{target}{file}"), &path).expect("a link");
            let before = picture(host.path());
            let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
            let attack = format!(
                "echo attack > {link}/attack; echo attack > {link}/config; echo attack >> {link}; \
                 rmdir {link}/hooks; mkdir {link}/made; exit 0"
            );
            let output = sandbox.shell(&attack);
            let status = output.status.code();
            assert!(matches!(status, Some(0 | 125)), "SU-01: {link} -> {target}: {output:?}");
            assert!(
                before == picture(host.path()),
                "SU-01: {link} -> {target}: the host's directory changed"
            );
            assert!(path.is_symlink(), "SU-01: {link} -> {target}: the host's own link is gone");
        }
    }
}

/// SU-01, the clean-up. Method: places that the set-up made are swapped for links to a host directory with
/// the same names in it, before the run ends. Oracle: the picture of that directory.
#[test]
fn su_01_the_clean_up_follows_no_swapped_directory() {
    for swap in [
        "mv .git .gone; ln -s TARGET .git",
        "mv .git .gone; mkdir .git; ln -s TARGET/hooks .git/hooks",
        "rm -rf .vscode .envrc; ln -s TARGET/hooks .vscode; ln -s TARGET/config .envrc",
        "mkdir x; mv x .git; rmdir .git; ln -s TARGET .git",
    ] {
        for prepared in [true, false] {
            let (host, workspace) = (host_canary(), folder("su-01-"));
            if prepared {
                std::fs::create_dir(workspace.path().join(".git")).expect("a directory");
            }
            let before = picture(host.path());
            let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
            let script = swap.replace("TARGET", &host.path().display().to_string());
            let output = sandbox.shell(&format!("{script}; exit 0"));
            assert_eq!(output.status.code(), Some(0), "SU-01: {swap}: {output:?}");
            assert!(
                before == picture(host.path()),
                "SU-01: {swap}: the clean-up changed the host's directory"
            );
        }
    }
}

/// SU-01, the other side: links that are right go on working. bubblewrap's strict repair broke `/var/run`.
#[test]
fn su_01_legal_links_work() {
    let (place, token) = (folder("su-01-"), canary());
    std::fs::create_dir(place.path().join("real")).expect("a directory");
    std::fs::write(place.path().join("real/marker"), &token).expect("a file");
    symlink("real", place.path().join("link")).expect("a link");
    symlink("marker", place.path().join("real/inner")).expect("a link");
    let real = place.path().join("real").display().to_string();
    let sandbox = Sandbox::new().option("--workspace").option(real);
    let output = sandbox
        .shell("cat inner; /bin/sh -c 'test -d /lib' && test -e /lib64/ld-linux-x86-64.so.2 && echo; pwd");
    assert_eq!(text(&output.stdout), format!("{token}\n/workspace\n"), "SU-01: {output:?}");
}

/// SU-01, a link that an earlier run planted where the caller names a workspace below its own. Oracle: the exit status, and
/// that the error names the place itself, which the caller can then choose.
#[test]
fn su_01_a_planted_link_does_not_become_the_next_workspace() {
    let (host, place) = (host_canary(), folder("su-01-"));
    let first = Sandbox::new().option("--workspace").option(place.path().display().to_string());
    let target = host.path().display().to_string();
    assert_eq!(
        first.shell(&format!("ln -s {target} sub")).status.code(),
        Some(0),
        "SU-01: the link is planted"
    );
    assert!(place.path().join("sub").is_dir(), "SU-01: the control: whoever follows links is led away");
    let second = Sandbox::new().option("--workspace").option(place.path().join("sub").display().to_string());
    let output = second.shell("ls");
    assert_eq!(output.status.code(), Some(125), "SU-01: {output:?}");
    assert!(text(&output.stderr).contains(&target), "SU-01: {output:?}");
}

/// SU-01, the shown paths. Method: a policy shows a directory and a path that leads through a link in it to a
/// host directory, in both orders. Oracle: the picture of the host directory; that what it hides is not seen
/// inside.
#[test]
fn su_01_places_of_shown_paths_are_not_made_through_links() {
    let token = canary();
    for reverse in [false, true] {
        let (host, place) = (host_canary(), folder("su-01-"));
        std::fs::write(host.path().join("secret"), &token).expect("a file");
        std::fs::set_permissions(host.path().join("secret"), std::fs::Permissions::from_mode(0o644))
            .expect("chmod");
        let shown = place.path().join("shown");
        std::fs::create_dir(&shown).expect("a directory");
        symlink(host.path(), shown.join("link")).expect("a link");
        let before = picture(host.path());
        let mut read = [shown.display().to_string(), format!("{}/link/hooks", shown.display())];
        if reverse {
            read.reverse();
        }
        let policy = place.path().join("policy.toml");
        let text = format!("extends = \"default\"\n[files]\nread = {read:?}\n");
        std::fs::write(&policy, text).expect("the policy is written");
        let script =
            format!("echo ran; cat {0}/link/secret; echo x > {0}/link/hooks/written", shown.display());
        let output = super::bare(&policy).args(["--", "sh", "-c", &script]).output().expect("broker runs");
        let seen = super::text(&output.stdout);
        assert!(seen == "ran\n" || output.status.code() == Some(125), "SU-01: {read:?}: {output:?}");
        assert!(before == picture(host.path()), "SU-01: {read:?}: the host's directory changed");
    }
}

/// SU-01, the race. Method: while workspaces are set up, another process keeps exchanging a directory on the
/// way to protected names with a link to a host directory. The control is a program that creates a file by
/// its path meanwhile. Oracle: names in the host directory; the kernel's times would be touched by a removal
/// as well.
#[test]
fn su_01_a_race_with_the_set_up_does_not_lead_out() {
    let (host, workspace) = (host_canary(), folder("su-01-"));
    let (git, other) = (workspace.path().join(".git"), workspace.path().join("other"));
    std::fs::create_dir(&git).expect("a directory");
    symlink(host.path(), &other).expect("a link");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stop = &stop;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                renameat_with(CWD, &git, CWD, &other, RenameFlags::EXCHANGE).expect("exchanged");
            }
        });
        let race = || {
            let control = (0..10_000).any(|index| {
                std::fs::write(workspace.path().join(format!(".git/raced-{index}")), "")
                    .expect("written somewhere");
                host.path().join(format!("raced-{index}")).exists()
            });
            assert!(control, "SU-01: the control's race is won now and then");
            for name in std::fs::read_dir(host.path()).expect("readable").flatten() {
                if name.file_name().to_string_lossy().starts_with("raced-") {
                    std::fs::remove_file(name.path()).expect("removed");
                }
            }
            let before = picture(host.path());
            for _ in 0..60 {
                let sandbox =
                    Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
                let output = sandbox.shell("exit 0");
                assert!(matches!(output.status.code(), Some(0 | 125)), "SU-01: {output:?}");
                assert!(before == picture(host.path()), "SU-01: the host's directory changed in a race");
            }
        };
        let raced = std::panic::catch_unwind(std::panic::AssertUnwindSafe(race));
        // Also when a claim does not hold: the other thread has to end before the scope does.
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Err(failure) = raced {
            std::panic::resume_unwind(failure);
        }
    });
}
