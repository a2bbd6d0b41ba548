//! `glob`, `grep`. Links are not followed, and every walk ends: by what it has seen, by what it has found, by time.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use globset::{GlobBuilder, GlobMatcher};
use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;
use walkdir::WalkDir;

use super::files::open_regular;
use super::{Answer, base, path, text};

const FOUND_MAX: usize = 1000;
const SEEN_MAX: usize = 500_000;
const TIME: Duration = Duration::from_secs(20);
const DEPTH_MAX: usize = 64;
/// The longest line that is shown, and the most that is read of one file, in bytes.
const LINE_BYTES_MAX: usize = 500;
const FILE_BYTES_MAX: u64 = 16 << 20;
/// What no source is in.
const SKIPPED: [&str; 2] = [".git", "node_modules"];

struct Walk {
    files: Vec<PathBuf>,
    /// Why it ended early.
    cut: Option<&'static str>,
}

fn root(input: &Value) -> Result<PathBuf, String> {
    if input["path"].is_null() { Ok(base()) } else { path(input, "path") }
}

fn pattern(text: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(text).literal_separator(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| error.to_string())
}

/// Regular files below `root` whose names from there `wanted` takes.
fn walk(root: &Path, until: Instant, wanted: impl Fn(&Path) -> bool) -> Result<Walk, String> {
    if !root.exists() {
        return Err(format!("{} is not there", root.display()));
    }
    let mut found = Walk { files: Vec::new(), cut: None };
    let enter = |entry: &walkdir::DirEntry| {
        entry.depth() == 0 || !SKIPPED.iter().any(|name| entry.file_name() == *name)
    };
    let entries = WalkDir::new(root).max_depth(DEPTH_MAX).sort_by_file_name().into_iter().filter_entry(enter);
    for (seen, entry) in entries.flatten().enumerate() {
        if seen >= SEEN_MAX || Instant::now() > until {
            found.cut = Some("there is too much to look at: name a directory further down");
            break;
        }
        let from_root = entry.path().strip_prefix(root).unwrap_or(entry.path());
        if entry.file_type().is_file() && wanted(from_root) {
            found.files.push(entry.into_path());
        }
    }
    Ok(found)
}

pub fn glob(input: &Value) -> Answer {
    let (root, pattern) = (root(input)?, pattern(text(input, "pattern")?)?);
    let Walk { files, cut } = walk(&root, Instant::now() + TIME, |path| pattern.is_match(path))?;
    let shown = files.iter().take(FOUND_MAX).map(|path| format!("{}\n", path.display()));
    let mut said: String = shown.collect();
    if files.len() > FOUND_MAX {
        said += &format!("[{} more]\n", files.len() - FOUND_MAX);
    }
    said.extend(cut.map(|why| format!("[{why}]\n")));
    Ok(if said.is_empty() { "nothing is called so".to_owned() } else { said })
}

pub fn grep(input: &Value) -> Answer {
    let root = root(input)?;
    let ignore_case = input["ignore_case"].as_bool().unwrap_or_default();
    let expression = RegexBuilder::new(text(input, "pattern")?).case_insensitive(ignore_case).build();
    let expression = expression.map_err(|error| error.to_string())?;
    let names = input["glob"].as_str().map(pattern).transpose()?;
    let wanted = |path: &Path| {
        let name = path.file_name().map(Path::new).unwrap_or(path);
        names.as_ref().is_none_or(|names| names.is_match(path) || names.is_match(name))
    };
    let until = Instant::now() + TIME;
    let Walk { files, mut cut } = walk(&root, until, wanted)?;
    let (mut said, mut found) = (String::new(), 0);
    for path in files {
        if found >= FOUND_MAX || Instant::now() > until {
            cut = Some("there is more: say more of what is looked for");
            break;
        }
        found += lines(&path, &expression, FOUND_MAX - found, &mut said);
    }
    said.extend(cut.map(|why| format!("[{why}]\n")));
    Ok(if said.is_empty() { "no line is like that".to_owned() } else { said })
}

/// Lines of one file; none of one that is no text.
fn lines(path: &Path, expression: &Regex, most: usize, said: &mut String) -> usize {
    let Ok(file) = open_regular(path) else { return 0 };
    let (mut reader, mut line, mut found) = (BufReader::new(file.take(FILE_BYTES_MAX)), Vec::new(), 0);
    for number in 1_u64.. {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(1..) if !line.contains(&0) => {}
            _ => break,
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        if expression.is_match(text) {
            let shown = String::from_utf8_lossy(&text[..text.len().min(LINE_BYTES_MAX)]);
            *said += &format!("{}:{number}:{shown}\n", path.display());
            found += 1;
            if found >= most {
                break;
            }
        }
    }
    found
}
