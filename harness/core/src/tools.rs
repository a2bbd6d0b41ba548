//! The tools that the model gets, as the Messages API describes them, and where each runs. Pure.

use serde_json::{Value, json};

use crate::agent::Agent;

/// The sandbox of calls that name none.
pub const MAIN: &str = "main";
/// The tool that reads the session's own log.
pub const SESSION_EVENTS: &str = "session_events";

const IN_SANDBOX: [&str; 6] = ["bash", "read", "write", "edit", "glob", "grep"];

/// Whether it is one of ours.
pub fn is_known(tool: &str) -> bool {
    tool == SESSION_EVENTS || IN_SANDBOX.contains(&tool)
}

/// In which sandbox a call runs; in none where it is about the log, or is not ours.
pub fn hand_of(tool: &str, input: &Value) -> Option<String> {
    IN_SANDBOX.contains(&tool).then(|| {
        let named = input["hand"].as_str().filter(|name| is_name(name));
        named.unwrap_or(MAIN).to_owned()
    })
}

/// Whether a sandbox may be called so.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    (1..=32).contains(&name.len()) && name.bytes().all(plain)
}

/// All of them, with the client's own after ours.
pub fn definitions(agent: &Agent) -> Vec<Value> {
    let text = |about: &str| json!({ "type": "string", "description": about });
    let number = |about: &str| json!({ "type": "integer", "minimum": 0, "description": about });
    let flag = |about: &str| json!({ "type": "boolean", "description": about });
    let hand = text("which sandbox; `main` where it is left out, a new name makes a new one");
    let path = || text("absolute, or from /workspace");
    let tool = |name: &str, about: &str, fields: Value, required: Value| {
        let mut properties = fields;
        properties["hand"] = hand.clone();
        json!({ "name": name, "description": about,
            "input_schema": { "type": "object", "properties": properties, "required": required } })
    };
    let mut all = vec![
        tool(
            "bash",
            "Runs a command in a shell that stays: directory, variables and functions are kept between calls. Nothing can be \
             typed into it. With `background` it runs beside the shell, and `output_of` with its name reads what it has said.",
            json!({
                "command": text("what to run"),
                "timeout_ms": number("after so long it is ended, and the shell with it; 120000 where it is left out, at most 600000"),
                "background": flag("do not wait for it"),
                "output_of": text("instead of a command: the name of one that was started in the background"),
                "restart": flag("instead of a command: end the shell; the next call begins a new one"),
            }),
            json!([]),
        ),
        tool(
            "read",
            "Reads a text file, with numbered lines.",
            json!({ "path": path(), "offset": number("the first line, from 1"), "limit": number("how many lines; 2000 where it is left out") }),
            json!(["path"]),
        ),
        tool(
            "write",
            "Writes a file, with the directories above it, in the place of what is there.",
            json!({ "path": path(), "content": text("all of it") }),
            json!(["path", "content"]),
        ),
        tool(
            "edit",
            "Replaces a text in a file. It has to be there exactly once, unless `replace_all`.",
            json!({ "path": path(), "old_string": text("what is there"), "new_string": text("what comes in its place"),
                "replace_all": flag("each time that it is there") }),
            json!(["path", "old_string", "new_string"]),
        ),
        tool(
            "glob",
            "Finds files by a pattern of their names, as `**/*.rs`.",
            json!({ "pattern": text("`*`, `?`, `[...]`, `{a,b}`, and `**` for directories"), "path": text("where to look; /workspace where it is left out") }),
            json!(["pattern"]),
        ),
        tool(
            "grep",
            "Finds lines in files by a regular expression (no look-around, no back-references).",
            json!({ "pattern": text("the expression"), "path": text("a file or a directory; /workspace where it is left out"),
                "glob": text("only files of such names"), "ignore_case": flag("upper or lower case") }),
            json!(["pattern"]),
        ),
        json!({ "name": SESSION_EVENTS,
            "description": "Reads events of this session's own log, whole: also what was cut or summed up in the conversation.",
            "input_schema": { "type": "object", "required": ["from"],
                "properties": { "from": number("the first"), "limit": number("how many; 1 where it is left out, at most 20") } } }),
    ];
    all.extend(agent.custom_tools.iter().cloned());
    all
}
