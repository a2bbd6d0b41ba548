//! `harness-tools`: runs one tool inside a sandbox, for a harness outside. `call NAME` takes a request on standard input and answers on standard
//! output; the answer is kept under its name, so that `result NAME` gives it again to a harness that was killed meanwhile. Everything here
//! may have been planted: nothing is opened that could make us wait, nothing is followed, everything is bounded.

mod files;
mod search;
mod shell;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is kept inside, of calls and of the shell.
const PLACE: &str = "/tmp/.harness";
/// The longest request, and the longest answer, in bytes.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
pub(crate) const ANSWER_BYTES_MAX: usize = 100 << 10;
/// So many answers are kept.
const KEPT_MAX: usize = 64;
/// Where relative paths begin.
const WORKSPACE: &str = "/workspace";

#[derive(Deserialize)]
struct Request {
    name: String,
    input: Value,
}

/// An answer.
#[derive(Serialize)]
pub(crate) struct Said {
    content: String,
    is_error: bool,
}

/// What a tool comes to: for the model, either way.
pub(crate) type Answer = Result<String, String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["call", name] if is_word(name) => call(name),
        ["result", name] if is_word(name) => result(name),
        ["cancel", name] if is_word(name) => {
            shell::end();
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!(
                "harness-tools: runs the tools of a harness, inside a sandbox: call|result|cancel NAME"
            );
            ExitCode::from(125)
        }
    }
}

fn is_word(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn call(name: &str) -> ExitCode {
    let mut text = Vec::new();
    let read = std::io::stdin().lock().take(REQUEST_BYTES_MAX).read_to_end(&mut text);
    let request = read.map_err(|error| error.to_string()).and_then(|_| {
        serde_json::from_slice::<Request>(&text).map_err(|error| format!("the request is none: {error}"))
    });
    let answer = request.and_then(|request| run(name, &request));
    let said = match answer {
        Ok(content) => Said { content: bounded(content), is_error: false },
        Err(content) => Said { content: bounded(content), is_error: true },
    };
    let text = serde_json::to_vec(&said).unwrap_or_default();
    // Kept before it is said: whoever was to hear it may be gone.
    let _ = keep(name, &text);
    say(&text)
}

fn run(name: &str, request: &Request) -> Answer {
    let input = &request.input;
    match request.name.as_str() {
        "bash" => shell::bash(name, input),
        "read" => files::read(input),
        "write" => files::write(input),
        "edit" => files::edit(input),
        "glob" => search::glob(input),
        "grep" => search::grep(input),
        other => Err(format!("there is no tool {other:?}")),
    }
}

fn result(name: &str) -> ExitCode {
    match files::open_regular(&kept(name)) {
        Ok(file) => {
            let mut text = Vec::new();
            let _ = file.take(REQUEST_BYTES_MAX).read_to_end(&mut text);
            say(&text)
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn say(text: &[u8]) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn kept(name: &str) -> PathBuf {
    Path::new(PLACE).join("kept").join(name)
}

fn keep(name: &str, text: &[u8]) -> std::io::Result<()> {
    let place = place("kept")?;
    forget_old(&place);
    files::replace(&kept(name), text, 0o600)
}

/// Those that were kept first go first.
fn forget_old(place: &Path) {
    let entries = fs::read_dir(place).into_iter().flatten().flatten().take(10_000);
    let mut all: Vec<_> =
        entries.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    all.sort();
    let many = all.len().saturating_sub(KEPT_MAX);
    all.into_iter().take(many).for_each(|(_, path)| drop(fs::remove_file(path)));
}

/// A directory of ours.
pub(crate) fn place(name: &str) -> std::io::Result<PathBuf> {
    let place = Path::new(PLACE).join(name);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&place)?;
    Ok(place)
}

/// The beginning and the end of what is too long.
fn bounded(text: String) -> String {
    if text.len() <= ANSWER_BYTES_MAX {
        return text;
    }
    let (mut head, mut tail) = (ANSWER_BYTES_MAX / 2, text.len() - ANSWER_BYTES_MAX / 2);
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{}\n[{} bytes are left out]\n{}", &text[..head], tail - head, &text[tail..])
}

/// A path of the model's.
pub(crate) fn path(input: &Value, field: &str) -> Result<PathBuf, String> {
    let text = input[field].as_str().filter(|text| !text.is_empty() && !text.contains('\0'));
    let text = text.ok_or_else(|| format!("`{field}` is a path"))?;
    Ok(base().join(text))
}

/// Where relative paths begin: the workspace, or the directory we stand in where there is none.
pub(crate) fn base() -> PathBuf {
    let workspace = Path::new(WORKSPACE);
    if workspace.is_dir() {
        workspace.to_owned()
    } else {
        std::env::current_dir().unwrap_or_else(|_| "/".into())
    }
}

pub(crate) fn text<'a>(input: &'a Value, field: &str) -> Result<&'a str, String> {
    input[field].as_str().ok_or_else(|| format!("`{field}` is a text"))
}

pub(crate) fn says(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
}
