//! What a workload leaves in a workspace of mode `cow`, and what somebody puts in the way of a commit: no link, mark, mount or
//! name leads anywhere.

use super::changes::{ask, change, listing, read, workspace};
use super::*;

/// A repository that was not there may come with a commit; a link or a file that says where another one is, may not.
#[test]
fn nothing_leads_to_another_repository() {
    let daemon = Daemon::start();
    for way in ["ln -s evil .git", "echo 'gitdir: evil' > .git", "mkdir .git; echo ../evil > .git/commondir"]
    {
        let own = folder_of(ADA);
        let script = format!("mkdir -p evil/hooks; echo evil > evil/config; {way}; echo fine > fine");
        let id = change(&daemon, own.path(), &script);
        let commit = ask(&daemon, ADA, &["commit", &id]);
        assert!(
            text(&commit.stdout).lines().any(|line| line.starts_with("P \".git")),
            "{way}: {}",
            text(&commit.stdout)
        );
        let found = own.path().join(".git");
        assert!(!found.is_symlink() && !found.is_file() && !found.join("commondir").exists(), "{way}");
        assert_eq!(read(own.path(), "fine").as_deref(), Some("fine\n"));
        assert!(ask(&daemon, ADA, &["discard", &id]).status.success());
    }
}

/// Nor does a link of the owner's own, through which a protected path is another.
#[test]
fn a_commit_is_refused_where_a_protected_path_leads_through_a_link() {
    let daemon = Daemon::start();
    let own = workspace();
    fs::rename(own.path().join(".git"), own.path().join("real")).expect("it is there");
    std::os::unix::fs::symlink("real", own.path().join(".git")).expect("a link");
    let id = change(&daemon, own.path(), "mkdir real/hooks; echo evil > real/hooks/pre-commit");
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(text(&commit.stderr).contains("symbolic link"), "{}", text(&commit.stderr));
    assert!(!own.path().join("real/hooks").exists());
}

/// Marks that mean something to an overlay are the kernel's alone.
#[test]
fn marks_of_the_overlay_cannot_be_forged() {
    let daemon = Daemon::start();
    let own = workspace();
    let script = "import os, errno
for name in ('opaque', 'whiteout', 'redirect', 'metacopy', 'origin', 'upper'):
    for path in ('src', 'src/a'):
        try: os.setxattr(path, 'user.overlay.' + name, b'y')
        except OSError as error: assert error.errno in (errno.EPERM, errno.EOPNOTSUPP), error
print(sorted(os.listdir('src')), open('src/a').read())";
    let wish = format!("{}:cow", own.path().display());
    let output = daemon.exec(ADA, &["--workspace", &wish], &["python3", "-c", script]);
    assert_eq!(text(&output.stdout), "['a', 'deep'] one\n\n", "{}", text(&output.stderr));
    let said = text(&output.stderr);
    let id = said.split("broker diff ").nth(1).and_then(|rest| rest.split('`').next()).unwrap_or_default();
    let diff = text(&ask(&daemon, ADA, &["diff", id]).stdout);
    assert!(diff.is_empty() || diff == "M \"src/a\"\n", "no directory became another: {diff}");
    // The same marks in the lent directory, from an earlier run, lead nowhere either.
    let mut python = Command::new("python3");
    let forge = "import os; os.setxattr('src/a', 'user.overlay.metacopy', b''); os.setxattr('src/a', 'user.overlay.redirect', b'/../../etc/passwd'); \
        os.setxattr('src', 'user.overlay.redirect', b'/gone')";
    assert!(
        python
            .args(["-c", forge])
            .current_dir(own.path())
            .uid(ADA)
            .gid(ADA)
            .status()
            .expect("it runs")
            .success()
    );
    let output =
        daemon.exec(ADA, &["--workspace", &wish], &["sh", "-c", "cat src/a; ls src; ls /workspace/gone"]);
    // The kernel refuses to read what says that its content is elsewhere.
    assert_eq!(text(&output.stdout), "a\ndeep\nx\n", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Operation not permitted"));
}

/// Links that somebody put in the way since lead a commit nowhere, and links in the changes are not followed.
#[test]
fn no_link_leads_a_commit_out() {
    let daemon = Daemon::start();
    let (own, outside) = (workspace(), folder_of(ADA));
    fs::write(outside.path().join("a"), "outside\n").expect("a file");
    let id = change(&daemon, own.path(), "echo evil > src/a; ln -s /etc/passwd passwd; ln -s ../.. up");
    fs::remove_dir_all(own.path().join("src")).expect("it goes");
    std::os::unix::fs::symlink(outside.path(), own.path().join("src")).expect("a link");
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(
        !commit.status.success() && text(&commit.stderr).contains("what is held stays"),
        "{}",
        text(&commit.stderr)
    );
    assert_eq!(read(outside.path(), "a").as_deref(), Some("outside\n"), "the link was not followed");
    assert_eq!(listing(outside.path()).len(), 1);
    fs::remove_file(own.path().join("src")).expect("it goes");
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(commit.status.success(), "{}", text(&commit.stderr));
    assert_eq!(read(own.path(), "src/a").as_deref(), Some("evil\n"));
}

/// Deep, wide, and named to deceive: shown escaped, committed or refused with a reason, and removed in any case.
#[test]
fn strange_trees_hold_nobody_up() {
    let daemon = Daemon::start();
    let own = workspace();
    let script = "python3 - <<'X'
import os
os.mkdir('name\\n\\x1b[31m\\u202e')
open('name\\n\\x1b[31m\\u202e/\\udcff', 'w').write('x')
os.mkdir('closed'); open('closed/x', 'w').write('x'); os.chmod('closed', 0)
for n in range(2000): open('w%d' % n, 'w').close()
os.mkdir('deep'); os.chdir('deep')
for n in range(2500): os.mkdir('down'); os.chdir('down')
X";
    let id = change(&daemon, own.path(), script);
    let diff = ask(&daemon, ADA, &["diff", &id]);
    let all = [diff.stdout.as_slice(), &diff.stderr].concat();
    let control = |byte: &u8| byte.is_ascii_control() && *byte != b'\n';
    assert!(!all.iter().any(control) && !text(&all).contains('\u{202e}'), "a terminal is told nothing");
    assert!(!diff.status.success(), "longer than any path can be: {}", text(&diff.stderr));
    assert!(ask(&daemon, ADA, &["discard", &id]).status.success());
    assert_eq!(fs::read_dir(daemon.state().join("changes")).expect("a directory").count(), 0);
    let id = change(
        &daemon,
        own.path(),
        "mkdir \"$(printf 'a\\nb\\033c')\"; echo x > \"$(printf 'a\\nb\\033c/d')\"; chmod 000 src",
    );
    let commit = ask(&daemon, ADA, &["commit", &id]);
    assert!(text(&commit.stdout).contains("! \"src\"\n"), "it cannot be read: {}", text(&commit.stderr));
    assert!(ask(&daemon, ADA, &["discard", &id]).status.success());
}

/// What is handed over cannot be written, nor made writable in a namespace of one's own, and leads nowhere else.
#[test]
fn what_is_handed_over_is_read_only_and_leads_nowhere() {
    let daemon = Daemon::start();
    let own = workspace();
    let id = change(&daemon, own.path(), "echo b > b");
    let script = "
import array, ctypes, errno, json, os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(json.dumps({'method': 'io.broker.Control.Changes', 'parameters': {'sandbox': sys.argv[2]}}).encode() + b'\\0')
reply, control, _, _ = s.recvmsg(9999, 99)
fd = array.array('i', control[0][2])[0]
print(os.listdir(fd), os.fstat(fd).st_ino == os.stat('..', dir_fd=fd).st_ino)
def write():
    try: os.open('new', os.O_CREAT | os.O_WRONLY, 0o777, dir_fd=fd); return 'written'
    except OSError as error: return errno.errorcode[error.errno]
print(write())
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000 | 0x00020000))
attributes = (ctypes.c_uint64 * 4)(0, 1 | 2 | 4 | 8, 0, 0)
print(libc.syscall(442, fd, b'', 0x1000 | 0x8000, attributes, 32), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(428, fd, b'', 1 | 0x1000), write())";
    let mut python = Command::new("python3");
    python.args(["-c", script]).arg(daemon.socket()).arg(&id).uid(ADA).gid(ADA);
    let output = python.output().expect("it runs");
    let expected = "['b'] True\nEROFS\n0\n-1 EINVAL\n-1 EROFS\n";
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
}

/// What is mounted below the workspace was never shown inside, and is no business of a commit's.
#[test]
fn a_commit_leaves_what_is_mounted_below_alone() {
    let daemon = Daemon::start();
    let own = workspace();
    let id = change(
        &daemon,
        own.path(),
        "rm -rf kept; mkdir kept; echo evil > kept/evil; mkdir -p src/deep; echo evil > src/evil",
    );
    let script = format!(
        "cd {0} && mount -t tmpfs none kept && mount -t tmpfs none src && echo precious > kept/it && chmod 777 kept src && \
         setpriv --reuid {ADA} --regid {ADA} --clear-groups {1} commit {id} --connect {2}; ls kept src",
        own.path().display(),
        program("broker").display(),
        daemon.socket().display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().expect("it runs");
    assert!(
        text(&output.stdout).ends_with("kept:\nit\n\nsrc:\n"),
        "{} {}",
        text(&output.stdout),
        text(&output.stderr)
    );
}
