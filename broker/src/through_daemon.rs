//! `broker exec` through the daemon: the caller opens what is its own, and only pipes go over.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix::sys::signal::SigSet;
use rustix::fs::{CWD, Mode as FileMode, OFlags, ResolveFlags, openat2};
use rustix::pipe::{PipeFlags, pipe_with};
use sandbox::{Stream, Wishes, WorkspaceMode};
use serde_json::{Value, json};

use crate::grant::Name;
use crate::protocol::{Directory, Execute, Executed, Limits, Mode, Ran, Run, Signal, Streams, Variable};
use crate::say::complain;
use crate::{Client, ClientError};

/// Runs the command of `wishes` under the policy of that name, and returns the report.
pub fn run(
    mut client: Client,
    socket: &Path,
    policy: &str,
    wishes: &Wishes,
    mut grants: Vec<Name>,
) -> Result<Value, ClientError> {
    grants.sort();
    grants.dedup();
    let signals = blocked()?;
    let Offered { mut descriptors, streams, pumps } = Offered::of(wishes)?;
    let workspace = wishes.workspace.as_ref().map(|wish| -> io::Result<Directory> {
        descriptors.push(open(&wish.directory, OFlags::PATH)?);
        let (mode, directory) = match wish.mode {
            WorkspaceMode::ReadOnly => (Mode::Ro, wish.directory.clone()),
            WorkspaceMode::ReadWrite => (Mode::Rw, wish.directory.clone()),
            // The changes have to find it again.
            WorkspaceMode::CopyOnWrite => (Mode::Cow, std::path::absolute(&wish.directory)?),
        };
        Ok(Directory { descriptor: descriptors.len() - 1, name: directory.display().to_string(), mode })
    });
    let run = Run {
        policy: policy.to_owned(),
        command: words(wishes)?,
        environment: variables(wishes)?,
        path: std::env::var("PATH").unwrap_or_default(),
        streams,
        workspace: workspace.transpose()?,
        limits: Some(Limits {
            timeout: wishes.timeout,
            memory: wishes.memory,
            pids: wishes.pids,
            cpus: wishes.cpus,
        }),
        grants,
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    client.send("Run", &run, true, &borrowed)?;
    drop(descriptors);
    let (Ran { sandbox, report }, continues) = client.reply()?;
    if let Some(report) = report.filter(|_| !continues) {
        return Ok(finished(report, pumps));
    }
    pass_signals_on(signals, socket.to_owned(), sandbox, None);
    let (Ran { report, .. }, _) = client.reply()?;
    Ok(finished(report.unwrap_or_default(), pumps))
}

/// Runs the command of `wishes` in a sandbox of the caller's that lives, and returns what there is of a report.
pub fn run_in(
    mut client: Client,
    socket: &Path,
    sandbox: &str,
    wishes: &Wishes,
) -> Result<Value, ClientError> {
    let signals = blocked()?;
    let Offered { descriptors, streams, pumps } = Offered::of(wishes)?;
    // A name of its own: asking again is another run.
    let nanoseconds = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    let effect = format!("exec-{}-{nanoseconds}", std::process::id());
    let execute = Execute {
        handle: None,
        sandbox: Some(sandbox.to_owned()),
        effect: effect.clone(),
        command: words(wishes)?,
        environment: variables(wishes)?,
        path: std::env::var("PATH").unwrap_or_default(),
        streams,
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    client.send("Execute", &execute, true, &borrowed)?;
    drop(descriptors);
    let (Executed { sandbox, outcome, .. }, continues) = client.reply()?;
    let outcome = if continues {
        pass_signals_on(signals, socket.to_owned(), sandbox.clone(), Some(effect));
        client.reply::<Executed>()?.0.outcome
    } else {
        outcome
    };
    Ok(finished(json!({ "outcome": outcome, "sandbox": sandbox }), pumps))
}

/// Signals that are to be passed on; before there is a second thread, which they would end the process by.
fn blocked() -> io::Result<SigSet> {
    let signals = SigSet::from_iter(sandbox::PASSED_ON);
    signals.thread_block()?;
    Ok(signals)
}

/// What goes over of the standard streams.
struct Offered {
    descriptors: Vec<OwnedFd>,
    /// Positions among them.
    streams: Streams,
    pumps: Vec<JoinHandle<()>>,
}

impl Offered {
    fn of(wishes: &Wishes) -> io::Result<Offered> {
        let mut offered = Offered { descriptors: Vec::new(), streams: Streams::default(), pumps: Vec::new() };
        let mut positions = [None; 3];
        for (number, stream) in wishes.streams.iter().enumerate() {
            let given = match stream {
                Stream::Pipe => Some(standard(number)?),
                Stream::Null | Stream::Closed => None,
                Stream::Other => Some(pump(number, &mut offered.pumps)?),
            };
            positions[number] = given.map(|given| {
                offered.descriptors.push(given);
                offered.descriptors.len() - 1
            });
        }
        let [input, output, error] = positions;
        offered.streams = Streams { input, output, error };
        Ok(offered)
    }
}

fn text(text: &OsStr) -> io::Result<String> {
    let refused = || {
        io::Error::new(io::ErrorKind::InvalidInput, "an argument or variable is not UTF-8; use --embedded")
    };
    text.to_str().map(str::to_owned).ok_or_else(refused)
}

fn words(wishes: &Wishes) -> io::Result<Vec<String>> {
    wishes.command.iter().map(|word| text(word)).collect()
}

fn variables(wishes: &Wishes) -> io::Result<Vec<Variable>> {
    let variable = |(name, value): &(sandbox::EnvName, OsString)| {
        Ok(Variable { name: name.clone(), value: text(value)? })
    };
    wishes.env.iter().map(variable).collect()
}

/// What comes out has come out when the last writer is gone, and they all are by now.
fn finished(report: Value, pumps: Vec<JoinHandle<()>>) -> Value {
    for pump in pumps {
        let _ = pump.join();
    }
    report
}

fn standard(number: usize) -> io::Result<OwnedFd> {
    match number {
        0 => io::stdin().as_fd().try_clone_to_owned(),
        1 => io::stdout().as_fd().try_clone_to_owned(),
        _ => io::stderr().as_fd().try_clone_to_owned(),
    }
}

/// A pipe in place of a stream that may not go in, and a thread that copies.
fn pump(number: usize, pumps: &mut Vec<JoinHandle<()>>) -> io::Result<OwnedFd> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    let own = File::from(standard(number)?);
    if number == 0 {
        // Not waited for: nobody has to finish typing.
        std::thread::spawn(move || copy(own, File::from(write)));
        Ok(read)
    } else {
        pumps.push(std::thread::spawn(move || copy(File::from(read), own)));
        Ok(write)
    }
}

/// Byte by byte as they come; the end of either side is the end.
fn copy(mut from: File, mut to: File) {
    let mut buffer = [0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// By the caller's own right; a link on the way could have been left by an earlier run.
pub fn open(directory: &Path, how: OFlags) -> io::Result<OwnedFd> {
    let flags = how | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat2(
        CWD,
        directory,
        flags,
        FileMode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    );
    opened.map_err(|error| {
        let why = if error == rustix::io::Errno::LOOP {
            "it leads through a symbolic link"
        } else {
            "cannot open it"
        };
        io::Error::new(
            io::Error::from(error).kind(),
            format!("workspace {}: {why}: {error}", directory.display()),
        )
    })
}

fn pass_signals_on(signals: SigSet, socket: PathBuf, sandbox: String, effect: Option<String>) {
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            let passed = Signal { sandbox: sandbox.clone(), signal: signal as i32, effect: effect.clone() };
            let passed = Client::connect(&socket)
                .map_err(ClientError::from)
                .and_then(|mut client| client.call::<Value>("Signal", &passed));
            if let Err(error) = passed {
                complain!("the signal was not passed on: {error}");
            }
        }
    });
}
