//! The mount table, device nodes, and files that raise whoever runs them.

use std::ffi::CString;
use std::io::{BufRead, Read};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::{call, code, errno, read_case};
use crate::case::Reporter;

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;
const AT_RECURSIVE: usize = 0x8000;

/// The control changes mounts for itself alone.
fn leave_the_hosts_mounts(arguments: &[String]) {
    if arguments.first().is_some_and(|word| word == "unshare") {
        assert_eq!(call(libc::SYS_unshare, &[libc::CLONE_NEWNS as usize]), 0, "unshare: {}", errno());
        let flags = (libc::MS_REC | libc::MS_PRIVATE) as usize;
        let root = c"/".as_ptr() as usize;
        assert_eq!(call(libc::SYS_mount, &[0, root, 0, flags, 0]), 0, "make private: {}", errno());
    }
}

fn outcome(report: &Reporter, case: &str, result: i64) {
    // Unlike `Reporter::syscall`: of the mount calls only these two say that the filter answered.
    match if result < 0 { errno() } else { 0 } {
        refused @ (libc::EPERM | libc::ENOSYS) => report.denied(case, refused, ""),
        reached => report.open(case, &format!("returned {result}, errno {reached}")),
    }
}

/// FS-10 `[unshare]`: loosens the read-only and nosuid flags.
pub fn remount(report: &Reporter, arguments: &[String]) {
    leave_the_hosts_mounts(arguments);
    let (usr, root) = (c"/usr".as_ptr() as usize, c"/".as_ptr() as usize);
    let flags = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
    outcome(report, "remount /usr", call(libc::SYS_mount, &[0, usr, 0, flags, 0]));
    outcome(report, "remount /", call(libc::SYS_mount, &[0, root, 0, flags, 0]));
    let clear = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    let attributes: [u64; 4] = [0, clear, 0, 0];
    let pointer = attributes.as_ptr() as usize;
    let result = call(libc::SYS_mount_setattr, &[usize::MAX, root, AT_RECURSIVE, pointer, 32]);
    outcome(report, "mount_setattr", result);
    let propagate = (libc::MS_REC | libc::MS_SHARED) as usize;
    outcome(report, "make shared", call(libc::SYS_mount, &[0, root, 0, propagate, 0]));
}

/// FS-11 `WORKSPACE [unshare]`: takes away mounts that hide something; removes and renames what is protected.
pub fn unmask(report: &Reporter, arguments: &[String]) {
    leave_the_hosts_mounts(&arguments[1..]);
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<CString> = table
        .lines()
        .filter_map(|line| CString::new(line.split(' ').nth(4)?.replace("\\040", " ")).ok())
        .collect();
    points.extend(["/proc/keys", "/proc/sys", "/usr", "/"].map(|path| CString::new(path).expect("no NUL")));
    points.reverse();
    for (case, flags) in
        [("umount", 0), ("MNT_DETACH", libc::MNT_DETACH), ("UMOUNT_NOFOLLOW", libc::UMOUNT_NOFOLLOW)]
    {
        let mut worst = None;
        for point in &points {
            let result = call(libc::SYS_umount2, &[point.as_ptr() as usize, flags as usize]);
            let errno = if result < 0 { errno() } else { 0 };
            if worst.is_none() || !matches!(errno, libc::EPERM | libc::ENOSYS) {
                worst = Some((errno, point.to_string_lossy().into_owned()));
            }
        }
        match worst {
            Some((errno @ (libc::EPERM | libc::ENOSYS), _)) => {
                report.denied(case, errno, &format!("{} tried", points.len()))
            }
            Some((errno, point)) => report.open(case, &format!("{point}: errno {errno}")),
            None => report.open(case, "no mount point was tried"),
        }
    }
    let at = |name: &str| format!("{}/{name}", arguments[0]);
    let said = |case: &str, result: std::io::Result<()>| match result {
        Ok(()) => report.open(case, ""),
        Err(error) => report.denied(case, code(&error), ""),
    };
    said("write below .git/hooks", std::fs::write(at(".git/hooks/post-checkout"), "attack"));
    said("write .git/config", std::fs::OpenOptions::new().append(true).open(at(".git/config")).map(drop));
    let replaced =
        std::fs::write(at("new"), "attack").and_then(|()| std::fs::rename(at("new"), at(".git/config")));
    said("replace .git/config", replaced);
    // And back: the next attempts find it in its place where this one worked.
    let renamed = std::fs::rename(at(".git/config"), at("moved-config"));
    said("rename .git/config", renamed.and_then(|()| std::fs::rename(at("moved-config"), at(".git/config"))));
    said("remove .git/config", std::fs::remove_file(at(".git/config")));
    said("rename .git/hooks", std::fs::rename(at(".git/hooks"), at("moved-hooks")));
    said("create .envrc", std::fs::write(at(".envrc"), "attack"));
    std::fs::create_dir(at(".vscode")).ok();
    said("write below .vscode", std::fs::write(at(".vscode/tasks.json"), "attack"));
    // The parent of a mount point is no mount point: moving it away frees the name.
    let moved = std::fs::rename(at(".git"), at("moved-git"))
        .and_then(|()| std::fs::create_dir_all(at(".git/hooks")))
        .and_then(|()| std::fs::write(at(".git/hooks/post-merge"), "attack"));
    said("move .git and make another", moved);
}

/// FS-12: every call that changes mounts or the root, with arguments that cannot work.
pub fn surface(report: &Reporter, _: &[String]) {
    let bad = usize::MAX;
    let calls: [(&str, libc::c_long, &[usize]); 14] = [
        ("mount", libc::SYS_mount, &[0, 0, 0, 0, 0]),
        ("umount2", libc::SYS_umount2, &[0, 0]),
        ("pivot_root", libc::SYS_pivot_root, &[0, 0]),
        ("chroot", libc::SYS_chroot, &[0]),
        ("fsopen", libc::SYS_fsopen, &[0, 0]),
        ("fsconfig", libc::SYS_fsconfig, &[bad, 0, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, &[bad, 0, 0]),
        ("fspick", libc::SYS_fspick, &[bad, 0, 0]),
        ("open_tree", libc::SYS_open_tree, &[bad, 0, 1]),
        ("move_mount", libc::SYS_move_mount, &[bad, 0, bad, 0, 0]),
        ("mount_setattr", libc::SYS_mount_setattr, &[bad, 0, 0, 0, 0]),
        ("open_tree_attr", 467, &[bad, 0, 1, 0, 0]),
        ("statmount", 457, &[0, 0, 0, 0]),
        ("listmount", 458, &[0, 0, 0, 0]),
    ];
    for (case, number, arguments) in calls {
        outcome(report, case, call(number, arguments));
    }
}

/// FS-13 `DISK LABEL=DIRECTORY...`: makes device nodes in each directory; opens the one that the host planted
/// in the first.
pub fn device_nodes(report: &Reporter, arguments: &[String]) {
    let disk: u64 = arguments[0].parse().expect("a device number");
    let nodes = [
        ("c 1:1", libc::S_IFCHR, libc::makedev(1, 1)),
        ("c 10:229", libc::S_IFCHR, libc::makedev(10, 229)),
        ("c 10:232", libc::S_IFCHR, libc::makedev(10, 232)),
        ("b 8:0", libc::S_IFBLK, libc::makedev(8, 0)),
        ("b host disk", libc::S_IFBLK, disk),
    ];
    for (label, directory) in arguments[1..].iter().filter_map(|argument| argument.split_once('=')) {
        for (name, kind, device) in nodes {
            let path = CString::new(format!("{directory}/node")).expect("no NUL in arguments");
            let here = libc::AT_FDCWD as usize;
            let words = [here, path.as_ptr() as usize, (kind | 0o666) as usize, device as usize];
            let at = call(libc::SYS_mknodat, &words);
            outcome(report, &format!("mknodat {name} {label}"), at);
            std::fs::remove_file(format!("{directory}/node")).ok();
            outcome(report, &format!("mknod {name} {label}"), call(libc::SYS_mknod, &words[1..]));
            std::fs::remove_file(format!("{directory}/node")).ok();
        }
    }
    let (_, first) = arguments[1].split_once('=').expect("LABEL=DIRECTORY");
    let read = std::fs::File::open(format!("{first}/planted")).and_then(|mut node| node.read_exact(&mut [0]));
    match read {
        Ok(()) => report.open("planted", ""),
        Err(error) => report.denied("planted", code(&error), ""),
    }
}

/// FS-15 `CASE`: run from a file with set-user-id or file capabilities: says whether it raised us. `make
/// DIRECTORY`: leaves such files behind, for whoever runs them outside.
pub fn raised(report: &Reporter, arguments: &[String]) {
    if arguments[0] == "make" {
        return leave_raising_files(report, &arguments[1]);
    }
    // SAFETY: these calls take nothing and cannot fail.
    let (real, effective, group, effective_group) =
        unsafe { (libc::getuid(), libc::geteuid(), libc::getgid(), libc::getegid()) };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim().to_owned();
    let detail = format!("uid {real}/{effective} gid {group}/{effective_group} CapEff {}", field("CapEff:"));
    let raised = real != effective
        || group != effective_group
        || effective == 0
        || field("CapEff:") != "0000000000000000";
    match raised {
        true => report.open(&arguments[0], &detail),
        false => report.denied(&arguments[0], 0, &detail),
    }
}

fn leave_raising_files(report: &Reporter, directory: &str) {
    let here = libc::AT_FDCWD as usize;
    let text = |name: &str| CString::new(format!("{directory}/{name}")).expect("no NUL in arguments");
    let create = (libc::O_CREAT | libc::O_WRONLY | libc::O_EXCL) as usize;
    let tried = |case: &str, result: i64| match result {
        ..0 => report.denied(case, errno(), ""),
        _ => report.open(case, ""),
    };
    for (kind, bits) in [("suid", 0o4755), ("sgid", 0o2755)] {
        // One that is there, to change; all others are to be made with the bits on.
        std::fs::write(format!("{directory}/{kind}"), "#!/bin/sh\n")
            .expect("files can be made in the directory");
        let (path, file) =
            (text(kind), std::fs::File::open(format!("{directory}/{kind}")).expect("it opens"));
        let (old, fd) = (path.as_ptr() as usize, file.as_raw_fd() as usize);
        tried(&format!("{kind} chmod"), call(libc::SYS_chmod, &[old, bits]));
        tried(&format!("{kind} fchmodat"), call(libc::SYS_fchmodat, &[here, old, bits]));
        tried(&format!("{kind} fchmodat2"), call(452, &[here, old, bits, 0]));
        tried(&format!("{kind} fchmod"), call(libc::SYS_fchmod, &[fd, bits]));
        let new = |way: &str| text(&format!("{kind}-{way}"));
        tried(&format!("{kind} open"), call(libc::SYS_open, &[new("open").as_ptr() as usize, create, bits]));
        tried(&format!("{kind} creat"), call(libc::SYS_creat, &[new("creat").as_ptr() as usize, bits]));
        tried(
            &format!("{kind} openat"),
            call(libc::SYS_openat, &[here, new("openat").as_ptr() as usize, create, bits]),
        );
        let how = [create as u64, bits as u64, 0];
        let path = new("openat2");
        let words = [here, path.as_ptr() as usize, how.as_ptr() as usize, 24];
        tried(&format!("{kind} openat2"), call(libc::SYS_openat2, &words));
        let mode = libc::S_IFREG as usize | bits;
        tried(&format!("{kind} mknod"), call(libc::SYS_mknod, &[new("mknod").as_ptr() as usize, mode, 0]));
        tried(
            &format!("{kind} mknodat"),
            call(libc::SYS_mknodat, &[here, new("mknodat").as_ptr() as usize, mode, 0]),
        );
        let unnamed = (libc::O_TMPFILE | libc::O_WRONLY) as usize;
        tried(
            &format!("{kind} O_TMPFILE"),
            call(libc::SYS_openat, &[here, text("").as_ptr() as usize, unnamed, bits]),
        );
    }
    let (file, name) = (text("suid"), c"security.capability");
    let words = [file.as_ptr() as usize, name.as_ptr() as usize, FILE_CAPABILITIES.as_ptr() as usize, 20, 0];
    tried("security.capability", call(libc::SYS_setxattr, &words));
}

/// `vfs_cap_data`, revision 2 with the effective bit, CAP_CHOWN.
const FILE_CAPABILITIES: [u32; 5] = [0x0200_0001, 1, 0, 0, 0];

/// FS-24 `DIRECTORY FILE`: a file by its handle on the mount of `DIRECTORY`, and the file system's root by a
/// forged one.
pub fn handles(report: &Reporter, arguments: &[String]) {
    let directory = CString::new(arguments[0].as_str()).expect("no NUL in arguments");
    let file = CString::new(arguments[1].as_str()).expect("no NUL in arguments");
    let here = libc::AT_FDCWD as usize;
    // A header of two words, then room for any handle.
    let mut handle = [0_u32; 34];
    handle[0] = 128;
    let mut mount: libc::c_int = 0;
    let words = [here, file.as_ptr() as usize, handle.as_mut_ptr() as usize, (&raw mut mount) as usize, 0];
    outcome(report, "name_to_handle_at", call(libc::SYS_name_to_handle_at, &words));
    let fd = call(libc::SYS_openat, &[here, directory.as_ptr() as usize, libc::O_RDONLY as usize, 0]);
    let opened =
        call(libc::SYS_open_by_handle_at, &[fd as usize, handle.as_ptr() as usize, libc::O_RDONLY as usize]);
    outcome(report, "open_by_handle_at", opened);
    // FILEID_INO32_GEN, eight bytes: inode 2 is the root of every ext4, generation 0.
    let forged: [u32; 4] = [8, 1, 2, 0];
    let opened =
        call(libc::SYS_open_by_handle_at, &[fd as usize, forged.as_ptr() as usize, libc::O_RDONLY as usize]);
    outcome(report, "forged handle of inode 2", opened);
}

/// FS-28 `FILE`: says `READY`, waits for a line, then looks for what the host mounted meanwhile.
pub fn propagation(report: &Reporter, arguments: &[String]) {
    println!("READY");
    std::io::stdin().lock().read_line(&mut String::new()).ok();
    let path = Path::new(&arguments[0]);
    read_case(report, "mounted by the host meanwhile", &path.to_string_lossy());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let parent = path.parent().unwrap_or(path).to_string_lossy();
    match table.lines().find(|line| line.split(' ').nth(4) == Some(&*parent)) {
        Some(line) => report.open("in the mount table", line),
        None => report.denied("in the mount table", 0, ""),
    }
}
