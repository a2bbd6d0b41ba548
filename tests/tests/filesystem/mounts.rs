//! Mounts, device nodes, raised privileges and handles.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use broker_tests::{Case, Sandbox, assert_refused, canary, cases, cases_in, until_ready};
use rustix::fs::{FileType, Mode};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::{assert_errno, copy, folder, with_workspace};

/// FS-10. Method: remounts and mount_setattr that clear the protecting flags; the control in mounts of its
/// own. Oracle: the errno of the filter, and a write to /usr afterwards.
#[test]
fn fs_10_read_only_mounts_cannot_be_loosened() {
    let sandbox = Sandbox::new();
    let control = sandbox.control("FS-10", &["unshare"]);
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-10", &nothing);
    assert_refused("FS-10", &control, &inside, &[]);
    assert_errno("FS-10", &inside, &[libc::EPERM]);
    let output = sandbox.shell("mount -o remount,bind,rw /usr; echo x > /usr/written-by-fs-10");
    assert!(!output.status.success(), "FS-10: {output:?}");
    assert!(!Path::new("/usr/written-by-fs-10").exists(), "FS-10: /usr was written");
}

/// FS-11. Method: every mount point is unmounted by every way; protected files of the workspace are written,
/// renamed, removed, replaced, and their parent is moved away. The control does so to a copy, in mounts of
/// its own. Oracle: the workspace as the host sees it afterwards.
#[test]
fn fs_11_what_is_masked_or_protected_stays_so() {
    let prepare = |place: &Path| {
        std::fs::create_dir_all(place.join(".git/hooks")).expect("directories");
        std::fs::write(place.join(".git/config"), "[core]\n").expect("a file");
    };
    let (free, workspace) = (folder("fs-11-"), folder("fs-11-"));
    prepare(free.path());
    prepare(workspace.path());
    let sandbox = with_workspace(workspace.path());
    let control = sandbox.control("FS-11", &[&*free.path().to_string_lossy(), "unshare"]);
    let inside = sandbox.probe("FS-11", &["/workspace"]);
    let read = |name: &str| std::fs::read_to_string(workspace.path().join(name)).unwrap_or_default();
    assert_eq!(read(".git/config"), "[core]\n", "FS-11: .git/config changed");
    let left = Command::new("find").arg(workspace.path()).args(["-type", "f"]).output().expect("find runs");
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    for name in ["post-checkout", "post-merge", ".envrc", "tasks.json"] {
        assert!(!left.contains(name), "FS-11: {name} is in the workspace: {left}");
    }
    for name in [".envrc", ".vscode"] {
        assert!(!workspace.path().join(name).exists(), "FS-11: the place of {name} was not given back");
    }
    assert_refused("FS-11", &control, &inside, &[]);
    assert_errno("FS-11", &inside[..3], &[libc::EPERM]);
    let protected = [libc::EPERM, libc::EACCES, libc::EROFS, libc::EBUSY, libc::EISDIR, libc::EXDEV];
    assert_errno("FS-11", &inside[3..], &protected);
}

/// FS-11, together. Method: two sandboxes share a workspace; the first ends, and takes away the places that
/// it held, while the second goes on. Oracle: the workspace on the host, while and after.
#[test]
fn fs_11_protection_lasts_as_long_as_the_last_run() {
    let workspace = folder("fs-11-");
    let sandbox = with_workspace(workspace.path());
    let mut command = sandbox.command();
    let script = "echo READY; read line; mkdir -p .vscode .git/hooks; echo attack > .vscode/tasks.json; \
                  echo attack > .git/hooks/pre-commit; echo attack > .envrc; true";
    let (mut first, _out, _) = until_ready(command.args(["sh", "-c", "echo READY; read line"]));
    let mut command = sandbox.command();
    let (mut second, _out, _) =
        until_ready(command.args(["sh", "-c", script]).stderr(std::process::Stdio::null()));
    drop(first.stdin.take());
    assert!(first.wait().expect("it ends").code().is_some(), "FS-11: the first ends by itself");
    drop(second.stdin.take());
    assert!(second.wait().expect("it ends").success(), "FS-11: the second ends by itself");
    let left: Vec<_> = std::fs::read_dir(workspace.path()).expect("readable").flatten().collect();
    assert!(left.is_empty(), "FS-11: left in the workspace: {left:?}");
}

/// FS-11, after a crash. Method: the broker is killed while it holds places in the workspace; the next run
/// ends well. Oracle: the workspace on the host.
#[test]
fn fs_11_the_next_run_takes_away_what_a_killed_one_held() {
    let workspace = folder("fs-11-");
    let sandbox = with_workspace(workspace.path());
    let mut command = sandbox.command();
    let (mut killed, _out, _) = until_ready(command.args(["sh", "-c", "echo READY; read line"]));
    killed.kill().expect("killed");
    killed.wait().expect("dead");
    let left = || std::fs::read_dir(workspace.path()).expect("readable").flatten().count();
    assert!(left() > 0, "FS-11: the killed one held places");
    let output = sandbox.shell("echo attack > .envrc; echo ran");
    assert_eq!(output.stdout, b"ran\n", "FS-11: {output:?}");
    assert_eq!(left(), 0, "FS-11: places are still held");
}

/// FS-12. Method: all calls of the old and the new mount API with arguments that cannot work. Oracle: the
/// errno: of the kernel's own code on the host, of the filter inside.
#[test]
fn fs_12_the_mount_calls_are_out_of_reach() {
    let sandbox = Sandbox::new();
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-12", &nothing);
    assert_refused("FS-12", &sandbox.control("FS-12", &nothing), &inside, &[]);
    let newer = ["open_tree_attr", "statmount", "listmount"];
    let (new, known): (Vec<Case>, Vec<Case>) =
        inside.into_iter().partition(|case| newer.contains(&case.name.as_str()));
    assert_errno("FS-12", &known, &[libc::EPERM]);
    assert_errno("FS-12", &new, &[libc::EPERM, libc::ENOSYS]);
}

/// FS-13. Method: device nodes are made in every kind of place; one that the host planted in the workspace is
/// opened. Oracle: the errno, and the host's look at the workspace.
#[test]
fn fs_13_device_nodes_cannot_be_made_or_used() {
    let plant = |place: &Path| {
        let zero = rustix::fs::makedev(1, 5);
        let path = place.join("planted");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, Mode::from(0o666), zero)
            .expect("mknod");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).expect("chmod");
    };
    let (free, workspace, other) = (folder("fs-13-"), folder("fs-13-"), folder("fs-13-"));
    plant(free.path());
    plant(workspace.path());
    let disk = std::fs::metadata("/").expect("/").dev().to_string();
    let sandbox = with_workspace(workspace.path());
    let place = |label: &str, path: &Path| format!("{label}={}", path.display());
    let places = [place("ws", free.path()), place("tmp", other.path()), place("dev", other.path())];
    let control = sandbox.control("FS-13", &[std::slice::from_ref(&disk), &places].concat());
    let inside = sandbox.probe("FS-13", &[&*disk, "ws=/workspace", "tmp=/tmp", "dev=/dev"]);
    assert_refused("FS-13", &control, &inside, &[]);
    let (planted, made): (Vec<Case>, Vec<Case>) = inside.into_iter().partition(|case| case.name == "planted");
    assert_errno("FS-13", &made, &[libc::EPERM]);
    assert_errno("FS-13", &planted, &[libc::EACCES]);
    assert!(!workspace.path().join("node").exists(), "FS-13: a node is in the workspace");
}

/// FS-15. Method: set-user-id-root, set-group-id-root and file-capability copies of the probe, planted by the
/// host in the workspace and in a shown directory, are run. The control runs them as nobody. Oracle: ids and
/// the kernel's CapEff.
#[test]
fn fs_15_set_id_and_capabilities_of_files_do_not_raise() {
    let workspace = folder("fs-15-");
    let sandbox = with_workspace(workspace.path());
    let shown = sandbox.probe_path().parent().expect("a folder").to_owned();
    let free = folder("fs-15-");
    std::fs::set_permissions(free.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    // vfs_cap_data, revision 2 with the effective bit: the first 32 capabilities permitted.
    let mut capabilities = [0_u8; 20];
    capabilities[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    capabilities[4..8].copy_from_slice(&0x0000_04ff_u32.to_le_bytes());
    for place in [workspace.path(), &shown, free.path()] {
        for (name, mode) in [("suid", 0o4755), ("sgid", 0o2755), ("fcap", 0o755)] {
            let path = place.join(name);
            copy(&sandbox.probe_path(), &path);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        }
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(place.join("fcap"), "security.capability", &capabilities, flags)
            .expect("setxattr");
    }
    for name in ["suid", "sgid", "fcap"] {
        let mut nobody = Command::new(free.path().join(name));
        let control = cases(nobody.args(["FS-15", name]).uid(65534).gid(65534));
        for place in [Path::new("/workspace"), &shown] {
            let mut command = sandbox.command();
            let inside = cases(command.arg(place.join(name)).args(["FS-15", name]));
            assert_refused("FS-15", &control, &inside, &[]);
            assert!(inside[0].detail.starts_with("uid 1000/1000 gid 1000/1000"), "FS-15: {inside:?}");
        }
    }
}

/// FS-15, the other way: set-id bits and capabilities that a workload leaves on files for others. Method:
/// every call that can set a mode, and the extended attribute. Oracle: modes and attributes of the workspace,
/// on the host.
#[test]
fn fs_15_no_raising_file_is_left_in_the_workspace() {
    let (workspace, free) = (folder("fs-15-"), folder("fs-15-"));
    let sandbox = with_workspace(workspace.path());
    let control = sandbox.control("FS-15", &["make", &*free.path().to_string_lossy()]);
    let inside = sandbox.probe("FS-15", &["make", "/workspace"]);
    assert_refused("FS-15", &control, &inside, &[]);
    let raising = |place: &Path| {
        let found = Command::new("find").arg(place).args(["-perm", "/6000"]).output().expect("find runs");
        String::from_utf8_lossy(&found.stdout).into_owned()
    };
    assert!(!raising(free.path()).is_empty(), "FS-15: the search finds the control's");
    assert_eq!(raising(workspace.path()), "", "FS-15: files with set-id bits");
    let (refused, other): (Vec<Case>, Vec<Case>) =
        inside.into_iter().partition(|case| !case.name.contains("at2"));
    assert_errno("FS-15", &refused, &[libc::EPERM]);
    // glibc falls back from these two where they are unknown.
    assert_errno("FS-15", &other, &[libc::EPERM, libc::ENOSYS]);
}

/// FS-24 ("shocker"). Method: a file by its handle, and the file system's root by a forged one, on the
/// workspace's mount. Oracle: the errno.
#[test]
fn fs_24_handles_do_not_open_files() {
    let workspace = folder("fs-24-");
    let file = workspace.path().join("file");
    std::fs::write(&file, "file\n").expect("a file");
    let sandbox = with_workspace(workspace.path());
    let control = sandbox.control("FS-24", &[&*workspace.path().to_string_lossy(), &file.to_string_lossy()]);
    let inside = sandbox.probe("FS-24", &["/workspace", "/workspace/file"]);
    assert_refused("FS-24", &control, &inside, &[]);
    assert_errno("FS-24", &inside, &[libc::EPERM, libc::ENOSYS]);
}

/// FS-28. Method: the workspace is a shared mount, below which the host mounts while a sandbox runs. The
/// control is a namespace that does receive from the host's. Oracle: the canary in what was mounted, and the
/// host's mount table.
#[test]
fn fs_28_later_mounts_of_the_host_do_not_propagate() {
    // A thread of its own: its mounts are gone with it, and no other test sees them.
    std::thread::spawn(propagation).join().expect("the claim holds");
}

fn propagation() {
    use nix::sched::CloneFlags;
    nix::sched::unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("unshare");
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .expect("private");
    let (token, workspace) = (canary(), folder("fs-28-"));
    let place = workspace.path();
    rustix::mount::mount_bind(place, place).expect("bind");
    rustix::mount::mount_change(place, MountPropagationFlags::SHARED).expect("shared");
    let below = place.join("below");
    std::fs::create_dir(&below).expect("a directory");

    let attempt = |command: &mut Command| {
        let (mut child, mut out, _) = until_ready(command);
        let during = mounts();
        rustix::mount::mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).expect("mount");
        std::fs::write(below.join("canary"), &token).expect("the canary is written");
        std::fs::set_permissions(below.join("canary"), std::fs::Permissions::from_mode(0o644))
            .expect("chmod");
        child.stdin.take().expect("a pipe").write_all(b"go\n").expect("it listens");
        let mut text = String::new();
        out.read_to_string(&mut text).expect("lines come");
        child.wait().expect("it ends");
        rustix::mount::unmount(&below, UnmountFlags::empty()).expect("umount");
        (cases_in(&text), during)
    };
    let sandbox = with_workspace(place);
    let mut receiving = Command::new("unshare");
    receiving.args(["--mount", "--propagation", "slave"]).arg(sandbox.probe_path()).arg("FS-28");
    let (control, _) = attempt(receiving.arg(below.join("canary")));
    let control: Vec<Case> = control.into_iter().map(|case| Case { detail: String::new(), ..case }).collect();

    let before = mounts();
    let mut command = sandbox.command();
    let (inside, during) =
        attempt(command.arg(sandbox.probe_path()).args(["FS-28", "/workspace/below/canary"]));
    assert_refused("FS-28", &control, &inside, &[]);
    assert_eq!(before, during, "FS-28: the sandbox's mounts show on the host");
    assert_eq!(before, mounts(), "FS-28: a mount was left on the host");
    rustix::mount::unmount(place, UnmountFlags::DETACH).expect("umount");
}

fn mounts() -> BTreeSet<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("readable");
    table.lines().map(String::from).collect()
}

/// The sandbox's root is no directory of the host's: nothing is left of it in the host's /tmp.
#[test]
fn fs_28_a_run_leaves_no_mount_behind() {
    let before = mounts();
    let output = Sandbox::new().shell("cat /proc/self/mountinfo | wc -l");
    assert!(output.status.success(), "FS-28: {output:?}");
    let left: Vec<String> = mounts().difference(&before).cloned().collect();
    assert!(left.iter().all(|line| !line.contains("broker")), "FS-28: left behind: {left:?}");
}
