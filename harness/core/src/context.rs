//! What goes to the model: a pure function of the log. It is not the log: what is long past gives way to a summary, and results of
//! tools that are long and not new are cut. The log keeps them, and a tool reads them back.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::event::{Event, Position, Purpose};
use crate::tools;

/// Bytes of a token, roughly.
const TOKEN_BYTES: u64 = 4;
/// Of a result that is not new: what is kept of its beginning and of its end, in bytes.
const OLD_RESULT_BYTES: usize = 2048;
/// So many of the last messages are left whole; cutting goes on in steps, so that what the model's host has cached stays valid in between.
const WHOLE_MESSAGES: usize = 16;
const STEP_MESSAGES: usize = 32;

/// What the model is asked for where it is to sum up.
const SUM_UP: &str = "Sum up this conversation so far for yourself: you will go on from your summary alone. Say what was asked for, \
    what has been done and found out, names of files and commands that matter, what is left to do. Do not use tools.";

/// Messages as the model gets them, with where in the log they come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    messages: Vec<Message>,
    /// What was said since the model was asked last.
    heard: Vec<Value>,
    /// Results of the last answer's calls.
    results: BTreeMap<Position, Value>,
    /// The model's names for calls, and what it calls with.
    uses: BTreeMap<Position, (String, Value)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Message {
    role: &'static str,
    content: Vec<Value>,
    /// Positions of the results in it.
    results: Vec<Position>,
}

/// How many tokens a block has, roughly.
pub fn block_tokens(block: &Value) -> u64 {
    fn bytes(value: &Value) -> u64 {
        match value {
            Value::String(text) => text.len() as u64,
            Value::Array(items) => items.iter().map(bytes).sum(),
            Value::Object(fields) => fields.values().map(bytes).sum(),
            _ => 4,
        }
    }
    bytes(block) / TOKEN_BYTES + 1
}

impl Conversation {
    /// Follows one event.
    pub fn apply(&mut self, event: &Event, position: Position) {
        match event {
            Event::UserMessage(message) => self.heard.extend(message.content.iter().cloned()),
            Event::AgentMessage(said) => self.answer(&said.block),
            Event::Thinking(said) => self.answer(&said.block),
            Event::Block(said) => self.answer(&said.block),
            Event::ToolUse(wanted) => self.want(position, &wanted.block),
            Event::CustomToolUse(wanted) => self.want(position, &wanted.block),
            Event::ToolResult(result) => self.result(result.tool_use, &result.content, result.is_error),
            Event::CustomResult(result) => self.result(result.tool_use, &result.content, result.is_error),
            Event::RequestStart(_) => self.ask(),
            Event::Compacted(compacted) => {
                let text =
                    format!("This is your own summary of what was said until now:\n\n{}", compacted.summary);
                let content = vec![json!({ "type": "text", "text": text })];
                self.messages = vec![Message { role: "user", content, results: Vec::new() }];
            }
            _ => {}
        }
    }

    /// What a call that has no result yet is made with.
    pub fn input_of(&self, tool_use: Position) -> Value {
        self.uses.get(&tool_use).map(|(_, input)| input.clone()).unwrap_or_default()
    }

    fn answer(&mut self, block: &Value) {
        match self.messages.last_mut() {
            Some(last) if last.role == "assistant" => last.content.push(block.clone()),
            _ => {
                let content = vec![block.clone()];
                self.messages.push(Message { role: "assistant", content, results: Vec::new() });
            }
        }
    }

    fn want(&mut self, position: Position, block: &Value) {
        let id = block["id"].as_str().unwrap_or_default().to_owned();
        self.uses.insert(position, (id, block["input"].clone()));
        self.answer(block);
    }

    fn result(&mut self, tool_use: Position, content: &str, is_error: bool) {
        let Some((id, _)) = self.uses.remove(&tool_use) else { return };
        let mut result = json!({ "type": "tool_result", "tool_use_id": id, "content": content });
        if is_error {
            result["is_error"] = true.into();
        }
        self.results.insert(tool_use, result);
    }

    /// Results first, as the API demands, then what was said.
    fn ask(&mut self) {
        let (results, content): (Vec<_>, Vec<_>) = std::mem::take(&mut self.results).into_iter().unzip();
        let content: Vec<Value> = content.into_iter().chain(std::mem::take(&mut self.heard)).collect();
        if content.is_empty() {
            return;
        }
        match self.messages.last_mut() {
            Some(last) if last.role == "user" => {
                last.content.extend(content);
                last.results.extend(results);
            }
            _ => self.messages.push(Message { role: "user", content, results }),
        }
    }

    /// The body of a request (<https://docs.claude.com/en/api/messages>).
    pub fn request(&self, agent: &Agent, purpose: Purpose) -> Value {
        let whole = self.messages.len().saturating_sub(WHOLE_MESSAGES) / STEP_MESSAGES * STEP_MESSAGES;
        let message = |(number, message): (usize, &Message)| {
            let mut content = message.content.clone();
            if number < whole {
                for (result, position) in content.iter_mut().zip(&message.results) {
                    cut(result, *position);
                }
            }
            json!({ "role": message.role, "content": content })
        };
        let mut messages: Vec<Value> = self.messages.iter().enumerate().map(message).collect();
        if purpose == Purpose::Compaction {
            let sum_up = json!({ "type": "text", "text": SUM_UP });
            match messages.last_mut().filter(|last| last["role"] == "user") {
                Some(last) => {
                    last["content"].as_array_mut().into_iter().for_each(|all| all.push(sum_up.clone()))
                }
                None => messages.push(json!({ "role": "user", "content": [sum_up] })),
            }
        }
        // The last block that may have one: what was said until here is worth keeping for the next request.
        let mark = |block: &mut Value| {
            if block.is_object() {
                block["cache_control"] = json!({ "type": "ephemeral" });
            }
        };
        let markable = |block: &&mut Value| {
            let is_thinking = block["type"].as_str().is_some_and(|kind| kind.contains("thinking"));
            !is_thinking && block["text"] != "" && block["content"] != ""
        };
        let last = messages.last_mut().and_then(|last| last["content"].as_array_mut());
        last.and_then(|content| content.iter_mut().rev().find(markable)).map(mark);
        let mut tools = tools::definitions(agent);
        tools.last_mut().map(mark);
        let mut body = json!({ "model": agent.model, "max_tokens": agent.max_tokens, "stream": true, "messages": messages, "tools": tools });
        if let Some(system) = &agent.system {
            let mut block = json!({ "type": "text", "text": system });
            mark(&mut block);
            body["system"] = json!([block]);
        }
        body
    }
}

/// Leaves the beginning and the end of a long result.
fn cut(result: &mut Value, position: Position) {
    let Some(text) = result["content"].as_str().filter(|text| text.len() > 3 * OLD_RESULT_BYTES) else {
        return;
    };
    let (mut head, mut tail) = (OLD_RESULT_BYTES, text.len() - OLD_RESULT_BYTES);
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    let left = tail - head;
    let said = format!(
        "{}\n[{left} bytes are left out here; `session_events` with from={position} reads what came of it]\n{}",
        &text[..head],
        &text[tail..]
    );
    result["content"] = said.into();
}
