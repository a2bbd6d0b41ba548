//! `bash`: a shell that stays between calls, in a process group of its own. It reads what it is to run from a FIFO, and each call's output goes to a file:
//! what runs in the background may go on writing, and a call that nobody waits for any more still comes to its end.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use serde_json::Value;

use super::files::{open_regular, replace};
use super::{Answer, base, is_word, place};

const TIMEOUT_MS: u64 = 120_000;
const TIMEOUT_MS_MAX: u64 = 600_000;
const LOOK: Duration = Duration::from_millis(5);
/// What is shown of a call's output: of its beginning, and of its end, in bytes.
const HEAD_BYTES: u64 = 16 << 10;
const TAIL_BYTES: u64 = 48 << 10;

/// The files of one call.
struct Call {
    script: PathBuf,
    output: PathBuf,
    status: PathBuf,
}

impl Call {
    fn named(name: &str) -> std::io::Result<Call> {
        let place = place("calls")?;
        let file = |ending: &str| place.join(format!("{name}.{ending}"));
        Ok(Call { script: file("sh"), output: file("out"), status: file("status") })
    }

    fn status(&self) -> Option<String> {
        let mut text = String::new();
        open_regular(&self.status).ok()?.take(64).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    /// What it has said, and how it ended where it has.
    fn shown(&self) -> String {
        let mut said = self.output();
        if let Some(status) = self.status().filter(|status| status != "0") {
            said += &format!("[it ended with status {status}]\n");
        }
        said
    }

    fn output(&self) -> String {
        let Ok(mut file) = open_regular(&self.output) else { return String::new() };
        let length = file.metadata().map(|about| about.len()).unwrap_or_default();
        let mut take = |from: u64, count: u64| {
            let mut bytes = Vec::new();
            let _ = file
                .seek(SeekFrom::Start(from))
                .and_then(|_| (&mut file).take(count).read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let mut said = if length <= HEAD_BYTES + TAIL_BYTES {
            take(0, length)
        } else {
            let left = length - HEAD_BYTES - TAIL_BYTES;
            format!(
                "{}\n[{left} bytes are left out; all of it is in {}]\n{}",
                take(0, HEAD_BYTES),
                self.output.display(),
                take(length - TAIL_BYTES, TAIL_BYTES)
            )
        };
        if !said.is_empty() && !said.ends_with('\n') {
            said.push('\n');
        }
        said
    }
}

pub fn bash(name: &str, input: &Value) -> Answer {
    let io = |error: std::io::Error| format!("the shell cannot be reached: {error}");
    if input["restart"].as_bool().unwrap_or_default() {
        end();
        return Ok("the shell was ended; the next call begins a new one".to_owned());
    }
    if let Some(other) = input["output_of"].as_str() {
        let call = Call::named(other).map_err(io)?;
        if !is_word(other) || !call.script.exists() {
            return Err(format!("nothing was run under the name {other:?}"));
        }
        let ended = if call.status().is_some() { "[it has ended]" } else { "[it runs]" };
        return Ok(format!("{}{ended}", call.shown()));
    }
    let command = input["command"].as_str().ok_or("`command` is a text")?;
    let call = Call::named(name).map_err(io)?;
    // Whatever stands in their places was planted.
    for planted in [&call.script, &call.output, &call.status] {
        let _ = fs::remove_file(planted);
    }
    replace(&call.script, format!("{command}\n").as_bytes(), 0o600).map_err(io)?;
    if input["background"].as_bool().unwrap_or_default() {
        background(&call).map_err(io)?;
        return Ok(format!("it runs in the background; `output_of` {name:?} reads what it says"));
    }
    let timeout = input["timeout_ms"].as_u64().unwrap_or(TIMEOUT_MS).clamp(1, TIMEOUT_MS_MAX);
    let until = Instant::now() + Duration::from_millis(timeout);
    let shell = running().map_or_else(begin, Ok).map_err(io)?;
    tell(&order(&call), until).map_err(io)?;
    loop {
        if let Some(status) = call.status() {
            let said = call.shown();
            return if status == "0" { Ok(said) } else { Err(said) };
        }
        if test_kill_process_group(shell).is_err() || running() != Some(shell) {
            // Its last words may have come in between.
            if call.status().is_some() {
                continue;
            }
            return Err(format!("{}[the shell ended; the next call begins a new one]", call.output()));
        }
        if Instant::now() > until {
            end();
            return Err(format!("{}[it was ended after {timeout} ms, and the shell with it]", call.output()));
        }
        std::thread::sleep(LOOK);
    }
}

fn quoted(path: &Path) -> String {
    // Names of ours: no quote is in them.
    format!("'{}'", path.display())
}

/// What the shell is told: run the script here, then say how it ended, whole or not at all.
fn order(call: &Call) -> String {
    let [script, output, status] = [&call.script, &call.output, &call.status].map(|path| quoted(path));
    format!(". {script} > {output} 2>&1 < /dev/null; echo $? > {status}.new; mv {status}.new {status}\n")
}

fn background(call: &Call) -> std::io::Result<()> {
    let [script, status] = [&call.script, &call.status].map(|path| quoted(path));
    let ended = format!("bash {script}; echo $? > {status}.new; mv {status}.new {status}");
    let output = File::create(&call.output)?;
    let mut command = Command::new("bash");
    command.args(["-c", &ended]).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    command.current_dir(base()).process_group(0).spawn().map(drop)
}

fn pid_file() -> PathBuf {
    Path::new(super::PLACE).join("shell.pid")
}

fn fifo() -> PathBuf {
    Path::new(super::PLACE).join("shell.in")
}

/// The shell, where there is one: its process group. A number alone says nothing, since others may have it after a hand-over: somebody has
/// to read orders too.
fn running() -> Option<Pid> {
    open_fifo().ok()?;
    let mut text = String::new();
    open_regular(&pid_file()).ok()?.take(32).read_to_string(&mut text).ok()?;
    // Never 0 or 1: those would be our own group, and everything.
    let pid = text.trim().parse().ok().filter(|pid| *pid > 1).and_then(Pid::from_raw)?;
    test_kill_process_group(pid).is_ok().then_some(pid)
}

/// A new shell, in a process group of its own: what it starts is ended with it.
fn begin() -> std::io::Result<Pid> {
    place("calls")?;
    let fifo = fifo();
    let _ = fs::remove_file(&fifo);
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    // Open for both: it never reads an end, whoever comes and goes.
    let orders = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&fifo)?;
    let null = || Stdio::null();
    let mut command = Command::new("bash");
    command
        .args(["--noprofile", "--norc", "-s"])
        .stdin(orders)
        .stdout(null())
        .stderr(null())
        .current_dir(base());
    let shell = command.process_group(0).spawn()?;
    let pid = Pid::from_child(&shell);
    replace(&pid_file(), pid.as_raw_nonzero().to_string().as_bytes(), 0o600)?;
    Ok(pid)
}

/// To write; there is an error where nobody reads (fifo(7)).
fn open_fifo() -> std::io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let file = fs::OpenOptions::new().write(true).custom_flags(flags).open(fifo())?;
    if file.metadata()?.file_type().is_fifo() {
        return Ok(file);
    }
    Err(std::io::ErrorKind::InvalidInput.into())
}

/// Writes into the FIFO, which may be full.
fn tell(order: &str, until: Instant) -> std::io::Result<()> {
    let mut fifo = open_fifo()?;
    loop {
        match fifo.write(order.as_bytes()) {
            Ok(count) if count == order.len() => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(LOOK);
            }
            // Orders are shorter than PIPE_BUF: they go whole or not at all (pipe(7)).
            Ok(_) => return Err(std::io::ErrorKind::WriteZero.into()),
            Err(error) => return Err(error),
        }
    }
}

/// Ends the shell and what it has started.
pub fn end() {
    if let Some(shell) = running() {
        let _ = kill_process_group(shell, Signal::KILL);
    }
    let _ = fs::remove_file(pid_file());
}
