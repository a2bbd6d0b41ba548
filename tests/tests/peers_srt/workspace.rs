//! The workspace and its protected paths.

use super::*;

/// mandatory-deny-paths: "Dangerous files" and "Dangerous directories", fifteen tests of one verb each. No verb changes
/// a protected file that is there.
#[test]
fn a_protected_file_changes_by_no_verb() {
    let script = format!(
        "for f in {}; do echo bad > $f; echo bad >> $f; echo bad > new; mv -f new $f; ln -f $f link; ln -sf new $f; \
         rm -f $f; chmod 777 $f; touch -d @0 $f; truncate -s 0 $f; cp --remove-destination /etc/passwd $f; \
         install -m 755 /etc/passwd $f; mv $f moved; [ link -ef $f ] && echo linked; rm -f link new moved; done; true",
        DANGEROUS.join(" ")
    );
    let control = furnished();
    let before = image(control.path());
    outside(control.path(), &script);
    assert!(image(control.path()) != before, "the control changes them");
    let workspace = furnished();
    let before = image(workspace.path());
    let output = inside(workspace.path(), &script);
    assert_eq!(answer(&output), "", "{output:?}");
    assert_eq!(image(workspace.path()), before);
}

/// mandatory-deny-paths: "Safe files still writable". git goes on working beside the protected paths.
#[test]
fn the_rest_of_a_repository_stays_writable() {
    let workspace = folder();
    assert!(outside(workspace.path(), "git init -q . && echo one > file").status.success());
    let commit =
        "git add -A && git -c user.name=a -c user.email=a@example.org commit -qm inside && echo two > other";
    let output = inside(workspace.path(), &format!("{commit}; git config a.b c && echo configured; true"));
    assert_eq!(answer(&output), "", "{output:?}");
    assert_eq!(
        answer(&outside(workspace.path(), "git log --format=%s; git config a.b; git ls-files")),
        "inside\nfile"
    );
    assert_eq!(content(workspace.path(), "other"), "two\n");
}

/// linux-ancestor-pin: "absent-path stub"; readonly-deny-dir-stubs. A protected path that is absent cannot be made, and
/// nothing stands in its place afterwards, when bubblewrap leaves a file.
#[test]
fn an_absent_protected_path_cannot_be_made() {
    let script = "mkdir -p .git/hooks; echo bad > .git/hooks/pre-commit; echo bad > .envrc; ln -s /tmp .vscode; \
                  mkfifo .bashrc; git init -q .; mkdir .idea/x; rmdir .envrc && echo bad > .envrc; \
                  mv .profile .p && echo bad > .profile; echo bad > .mcp.json";
    let control = folder();
    outside(control.path(), script);
    assert!(
        control.path().join(".git/hooks/pre-commit").exists() && control.path().join(".vscode").is_symlink()
    );
    let workspace = folder();
    inside(workspace.path(), script);
    assert!(names(workspace.path()).is_empty(), "{:?}", names(workspace.path()));
    // While it runs there is nothing but empty directories in their places, that the host obeys in no way.
    let during = folder();
    let line = format!("({script}) > /dev/null 2>&1; echo up; read -r");
    let running = Running::start(sandbox(during.path()).args(["bash", "-c", &line]));
    assert_eq!(answer(&outside(during.path(), "find . -mindepth 1 ! -type d")), "");
    assert_eq!(answer(&outside(during.path(), "find .git/hooks .envrc -mindepth 1")), "");
    running.finish();
    assert!(names(during.path()).is_empty(), "{:?}", names(during.path()));
}

/// srt cleans up the stubs that a killed run left, by name and size. Ours may cost nobody a file, though the host makes
/// one meanwhile that has the name, and perhaps the inode number, of what was left.
#[test]
fn what_a_killed_run_left_costs_nobody_a_file() {
    let workspace = folder();
    let left =
        [".bashrc", ".envrc", ".gitconfig", ".gitmodules", ".mcp.json", ".profile", ".ripgreprc", ".zshrc"];
    let mut running = Running::start(sandbox(workspace.path()).args(["bash", "-c", "echo up; read -r; :"]));
    let number = |name: &&str| workspace.path().join(name).symlink_metadata().map(|about| about.ino()).ok();
    let numbers: Vec<_> = left.iter().filter_map(number).collect();
    running.child.kill().expect("killed");
    running.child.wait().expect("it ended");
    // One by one, so that each is likely to get the number that has just become free.
    for name in left {
        std::fs::remove_dir(workspace.path().join(name)).expect("it was left");
        plant(workspace.path(), name, "original\n");
    }
    outside(workspace.path(), "find . -mindepth 1 -type d -empty -delete");
    // Whether the filesystem gives the same numbers again is its own affair; ext4 does.
    let reused = left.iter().filter_map(number).filter(|number| numbers.contains(number)).count();
    let before = image(workspace.path());
    assert!(inside(workspace.path(), "true").status.success());
    assert_eq!(image(workspace.path()), before, "{reused} numbers were used again");
}

/// readonly-deny-dir-stubs: "bwrap still boots". Absent protected paths are no reason not to start where nothing can be
/// made: in a read-only workspace, and in one that its owner may not write.
#[test]
fn a_workspace_that_cannot_be_written_still_starts() {
    let workspace = folder();
    let read_only = PathBuf::from(format!("{}:ro", workspace.path().display()));
    assert_eq!(answer(&inside(&read_only, "echo ran")), "ran");
    std::fs::set_permissions(workspace.path(), std::fs::Permissions::from_mode(0o555)).expect("chmod");
    assert_eq!(answer(&inside(&read_only, "echo ran")), "ran");
    assert_eq!(answer(&inside(workspace.path(), "echo ran; echo x > file; true")), "ran");
    assert!(names(workspace.path()).is_empty());
    assert_eq!(workspace.path().metadata().expect("there").mode() & 0o7777, 0o555);
}

/// linux-ancestor-pin: "renaming .git aside". A parent of a protected file is not moved away and made again.
#[test]
fn the_parents_of_a_protected_file_do_not_move() {
    let script = "mv .git aside && mkdir .git && echo planted > .git/config";
    let control = furnished();
    assert!(outside(control.path(), script).status.success());
    assert_eq!(content(control.path(), ".git/config"), "planted\n", "the control plants it");
    // A mount on the file alone does not hold: this is what bubblewrap's users write.
    let leaf = furnished();
    let mut command = bubblewrap(leaf.path());
    command.args(["--ro-bind"]).arg(leaf.path().join(".git/config")).arg("/tmp/workspace/.git/config");
    bash(command, script);
    assert_eq!(content(leaf.path(), ".git/config"), "planted\n", "the control in bubblewrap plants it");
    let workspace = furnished();
    let before = image(workspace.path());
    assert!(!inside(workspace.path(), script).status.success());
    assert_eq!(image(workspace.path()), before);
}

/// linux-ancestor-pin: "rmdir and exchange-rename".
#[test]
fn the_parents_of_a_protected_file_are_not_exchanged() {
    let exchange = |first: &str, second: &str| {
        let number = libc::SYS_renameat2;
        // Perl hands no constant string to a system call.
        let strings = format!("$a = \"{first}\"; $b = \"{second}\"; $! = 0");
        format!("perl -e '{strings}; $r = syscall({number}, -100, $a, -100, $b, 2); print \"$r \", $! + 0'")
    };
    let script = format!("mkdir -p e/hooks; echo bad > e/config; {}; mv -T e .git", exchange(".git", "e"));
    let control = furnished();
    assert!(answer(&outside(control.path(), &script)).starts_with("0 0"), "the control exchanges");
    let workspace = furnished();
    let before = image(workspace.path());
    let output = inside(workspace.path(), &format!("{script}; rm -r e"));
    assert_eq!(errnos(&output), [libc::EBUSY], "{output:?}");
    assert_eq!(image(workspace.path()), before);
    let output = inside(workspace.path(), &format!("echo bad > e; {}; rm e", exchange(".bashrc", "e")));
    assert_eq!(errnos(&output), [libc::EBUSY], "{output:?}");
    assert_eq!(image(workspace.path()), before);
}

/// linux-ancestor-pin: "git and cross-directory renames work". What is held does not get into the way of the rest.
#[test]
fn ordinary_files_and_directories_still_move() {
    let workspace = furnished();
    plant(workspace.path(), "a/file", "x");
    let output = inside(
        workspace.path(),
        "perl -e 'rename(\"a/file\", \"file\") && rename(\"a\", \"b\") && rename(\"file\", \"b/file\") or die \"$!\"' && \
         mv b .git/b && rm -r .git/b && mkdir -p sub/.github && mv sub c",
    );
    assert!(output.status.success(), "{output:?}");
    assert!(workspace.path().join("c/.github").is_dir() && !workspace.path().join("a").exists());
}

/// symlinked-deny-paths: relative, absolute, dangling, cyclic; mandatory-deny-paths: "symlink replacement". A protected
/// name that is a link is refused before anything runs, so neither the link nor what it leads to changes.
#[test]
fn a_protected_name_that_is_a_link_is_refused() {
    let script = "rm -rf .vscode .git .bashrc; mkdir .vscode .git; echo bad > .vscode/settings.json; echo bad > .bashrc";
    let outside_it = folder();
    plant(outside_it.path(), "settings.json", "original");
    let absolute = outside_it.path().display().to_string();
    for (name, target) in [
        (".vscode", "real"),
        (".vscode", absolute.as_str()),
        (".git", absolute.as_str()),
        (".bashrc", "nowhere"),
        (".git", "../outside"),
        (".git", ".git"),
        (".envrc", "/etc/passwd"),
    ] {
        let workspace = folder();
        plant(workspace.path(), "real/settings.json", "original");
        symlink(target, workspace.path().join(name)).expect("a link");
        let before = (image(workspace.path()), image(outside_it.path()));
        let output = inside(workspace.path(), script);
        assert_eq!(status(output.status), 125, "{name} -> {target}: {output:?}");
        assert!(
            said(&output).contains(name) && said(&output).lines().count() == 1,
            "{name} -> {target}: {output:?}"
        );
        assert_eq!((image(workspace.path()), image(outside_it.path())), before, "{name} -> {target}");
        outside(workspace.path(), script);
        assert!(image(workspace.path()) != before.0, "the control replaces {name}");
    }
}

/// integration: "symlink-based escape"; symlink-write-path, symlink-boundary. Links of the workspace, the host's or
/// one's own, lead nowhere outside of it.
#[test]
fn links_lead_nowhere_out_of_the_workspace() {
    let (token, place) = (canary(), folder());
    plant(place.path(), "secret", &token);
    plant(place.path(), "out/file", "original\n");
    std::fs::create_dir(place.path().join("workspace")).expect("a directory");
    let workspace = place.path().join("workspace");
    symlink("..", workspace.join("up")).expect("a link");
    symlink(place.path().join("out"), workspace.join("across")).expect("a link");
    let far = place.path().display().to_string();
    let script = format!(
        "cat up/secret {far}/secret /proc/self/cwd/../secret; echo bad > across/file; echo bad > up/new; ln -s {far}/out own; \
         echo bad > own/file; ln -s ../../../../../../..{far}/secret s; cat s; cat /proc/1/root{far}/secret"
    );
    let before = image(&place.path().join("out"));
    let output = inside(&workspace, &script);
    assert!(!said(&output).contains(&token), "{output:?}");
    assert_eq!(image(&place.path().join("out")), before);
    assert!(!place.path().join("new").exists());
    let control = outside(&workspace, &script);
    assert!(said(&control).contains(&token) && place.path().join("new").exists(), "the control goes through");
}

/// symlink-write-path: the directory to be shared is itself a link that leads nowhere, or no directory.
#[test]
fn a_workspace_that_is_no_directory_is_refused() {
    let place = folder();
    symlink("nowhere", place.path().join("dangling")).expect("a link");
    symlink("cycle", place.path().join("cycle")).expect("a link");
    plant(place.path(), "file", "");
    for name in ["dangling", "cycle", "file", "file/", "absent/.."] {
        let output = inside(&place.path().join(name), "echo ran");
        assert_eq!((status(output.status), answer(&output).as_str()), (125, ""), "{name}: {output:?}");
    }
    assert_eq!(names(place.path()), ["cycle", "dangling", "file"]);
}
