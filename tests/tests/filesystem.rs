//! The file system rows, FS-01 to FS-28: what the host has is not there, cannot be changed and cannot be
//! reached.
//!
//! Unless a test says otherwise its method is the same attempt on the host, where it must work, and inside;
//! the oracles are canaries and files that only the host's side looks at.

#[path = "filesystem/kernel_files.rs"]
mod kernel_files;
#[path = "filesystem/mounts.rs"]
mod mounts;
#[path = "filesystem/paths.rs"]
mod paths;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use broker_tests::{Case, Sandbox};
use tempfile::TempDir;

/// A directory to be the workspace, or the host's own.
fn folder(prefix: &str) -> TempDir {
    tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary directory")
}

fn with_workspace(workspace: &Path) -> Sandbox {
    Sandbox::new().option("--workspace").option(workspace.display().to_string())
}

/// Every case ended with one of these.
fn assert_errno(row: &str, cases: &[Case], allowed: &[i32]) {
    for case in cases {
        assert!(
            allowed.contains(&case.errno),
            "{row}: errno {} is not one of {allowed:?}: {case:?}",
            case.errno
        );
    }
}

/// A file of the host that anybody may read, gone with the test, together with the directories made for it.
struct Planted {
    file: PathBuf,
    made: Vec<PathBuf>,
}

impl Planted {
    fn new(path: &str, content: &str) -> Self {
        let file = PathBuf::from(path);
        let folders = file.ancestors().skip(1);
        let made = folders.take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("the folder is made");
        std::fs::write(&file, content).expect("the canary is written");
        Planted { file, made }
    }

    fn text(&self) -> String {
        self.file.display().to_string()
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        std::fs::remove_file(&self.file).ok();
        for folder in &self.made {
            std::fs::remove_dir(folder).ok();
        }
    }
}

/// A process that ends with the test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Running(command.spawn().expect("the command starts"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A copy made by another process: a descriptor open for writing in this one could be inherited by what
/// another test starts meanwhile, and running the copy would fail with `ETXTBSY`.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg(from).arg(to).status().expect("cp runs");
    assert!(status.success(), "cp {} {}", from.display(), to.display());
}

/// The same command, held by a process that passes on descriptors of its own.
fn held(sandbox: &Sandbox, directory: &Path, file: &Path, command: &Command) -> Command {
    let mut outer = Command::new(sandbox.probe_path());
    outer.arg("FS-18").arg("hold").arg(directory).arg(file).arg("--");
    outer.arg(command.get_program()).args(command.get_args()).stdin(std::process::Stdio::null());
    outer
}
