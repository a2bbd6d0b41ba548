//! Events as a person reads them. What models and sandboxes say is shown without what a terminal would obey.

use harness::event::{Event, Permission, StopReason};
use serde_json::Value;

/// The longest text of a result that is shown, in bytes and lines.
const RESULT_BYTES: usize = 600;
const RESULT_LINES: usize = 8;

/// Without what a terminal would obey: control characters but newline and tab, and those that turn the direction of a text.
pub fn tame(text: &str) -> String {
    let shown = |letter: char| match letter {
        '\n' | '\t' => letter.to_string(),
        letter if turns(letter) => String::new(),
        letter if letter.is_control() => letter.escape_default().to_string(),
        letter => letter.to_string(),
    };
    text.chars().map(shown).collect()
}

/// What turns the direction of a text, or begins another line.
fn turns(letter: char) -> bool {
    matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{2028}' | '\u{2029}')
}

/// JSON with what a terminal would obey escaped: it stays the same JSON.
pub fn escaped(json: &str) -> String {
    let shown = |letter: char| match letter {
        letter if letter.is_control() || turns(letter) => format!("\\u{:04x}", u32::from(letter)),
        letter => letter.to_string(),
    };
    json.chars().map(shown).collect()
}

/// One event; nothing where there is nothing to say of it.
pub fn event(position: u64, event: &Event) -> Option<String> {
    let line = match event {
        Event::Created(created) => format!("session made for {}", created.agent.model),
        Event::UserMessage(message) => format!("> {}", words(&message.content)),
        Event::Interrupt(_) => "> (interrupted)".to_owned(),
        Event::Confirmation(answer) => {
            format!("> {:?} event {}", answer.result, answer.tool_use).to_lowercase()
        }
        Event::CustomResult(result) => {
            format!("> answer to event {}: {}", result.tool_use, short(&result.content))
        }
        Event::AgentMessage(said) => words(std::slice::from_ref(&said.block)),
        Event::Thinking(_)
        | Event::Block(_)
        | Event::RequestStart(_)
        | Event::Running(_)
        | Event::Call(_) => return None,
        // Whoever is asked sees all that would run.
        Event::ToolUse(wanted) if wanted.evaluated_permission == Permission::Ask => {
            format!("[{position}] {} {:#}", name(&wanted.block), wanted.block["input"])
        }
        Event::ToolUse(wanted) => format!("[{position}] {} {}", name(&wanted.block), input(&wanted.block)),
        Event::CustomToolUse(wanted) => {
            format!("[{position}] {} {} (yours to answer)", name(&wanted.block), input(&wanted.block))
        }
        Event::ToolResult(result) => {
            let mark = if result.is_error { "failed: " } else { "" };
            format!("[{}] {mark}{}", result.tool_use, short(&result.content))
        }
        Event::Compacted(_) => "(what was said until now was summed up)".to_owned(),
        Event::Idle(idle) => match &idle.stop_reason {
            StopReason::EndTurn => "(done)".to_owned(),
            StopReason::RequiresAction { event_ids } => {
                let ids: Vec<String> = event_ids.iter().map(u64::to_string).collect();
                format!("(waits for an answer to event {}: harness approve | deny | answer)", ids.join(", "))
            }
            StopReason::RetriesExhausted => "(given up: the model cannot be reached)".to_owned(),
            StopReason::BudgetReached => "(its budget is used up)".to_owned(),
            StopReason::Paused => "(paused)".to_owned(),
        },
        Event::Rescheduled(_) => "(tries again soon)".to_owned(),
        Event::Terminated(_) => "(ended for good)".to_owned(),
        Event::Trouble(trouble) => format!("! {}", trouble.error.message),
        Event::RequestEnd(_) => return None,
        Event::Provision(asked) => format!("(a sandbox is made: {})", asked.hand),
        Event::Provisioned(made) => format!("({} is sandbox {})", made.hand, made.sandbox),
        Event::Lost(lost) => format!("! {} is lost: {}", lost.hand, lost.message),
        Event::Given(given) => format!("({} was given to session {})", given.hand, given.to),
        Event::Received(received) => {
            format!("({} was received from session {})", received.hand, received.from)
        }
        Event::Pause(_) => "> (paused)".to_owned(),
        Event::Resume(_) => "> (resumed)".to_owned(),
    };
    Some(tame(&line))
}

fn words(content: &[Value]) -> String {
    let text =
        |block: &Value| block["text"].as_str().map_or_else(|| format!("({})", block["type"]), str::to_owned);
    content.iter().map(text).collect::<Vec<_>>().join("\n")
}

fn name(block: &Value) -> &str {
    block["name"].as_str().unwrap_or_default()
}

/// What a call is about, by its tool; all of it where that is not ours.
fn input(block: &Value) -> String {
    let input = &block["input"];
    let field = match name(block) {
        "bash" => "command",
        "read" | "write" | "edit" => "path",
        "glob" | "grep" => "pattern",
        _ => "",
    };
    let hand = input["hand"].as_str().map_or_else(String::new, |hand| format!(" (in {hand})"));
    input[field].as_str().map_or_else(|| short(&input.to_string()), short) + &hand
}

fn short(text: &str) -> String {
    let mut end = text.len().min(RESULT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut lines = text[..end].trim_end().lines();
    let mut shown: Vec<&str> = lines.by_ref().take(RESULT_LINES).collect();
    if lines.next().is_some() || end < text.len() {
        shown.push("...");
    }
    shown.join("\n    ")
}
