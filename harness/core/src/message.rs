//! An answer of the Messages API as it streams (<https://docs.claude.com/en/api/streaming>): events in, blocks out. Blocks of types that we
//! do not know are kept as they come. Pure.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::event::{ErrorKind, Failure, Usage};
use crate::sse::Sent;

/// The most blocks of one answer, and the most bytes of its events.
const BLOCKS_MAX: usize = 4096;
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How deep a block may be.
const DEPTH_MAX: usize = 64;
/// More tokens than anybody can have used; what counts more does not count.
const TOKENS_MAX: u64 = 1 << 40;

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// As they came.
    pub blocks: Vec<Value>,
    /// `end_turn`, `tool_use`, ...
    pub stop_reason: String,
    /// What it cost.
    pub usage: Usage,
}

/// What an event says.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// There is more to come.
    More,
    /// A piece of the model's words, for whoever looks on.
    Words(String),
    /// That was all.
    Whole,
}

/// An answer in the making.
#[derive(Debug, Default)]
pub struct Stream {
    answer: Answer,
    /// Of calls: their input, as JSON in pieces.
    inputs: Vec<String>,
    begun: bool,
    bytes: usize,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    MessageStart {
        message: Map<String, Value>,
    },
    ContentBlockStart {
        index: usize,
        content_block: Value,
    },
    ContentBlockDelta {
        index: usize,
        delta: Map<String, Value>,
    },
    ContentBlockStop {
        index: usize,
    },
    MessageDelta {
        delta: Map<String, Value>,
        #[serde(default)]
        usage: Map<String, Value>,
    },
    MessageStop {},
    Error {
        error: Map<String, Value>,
    },
    #[serde(other)]
    Unknown,
}

impl Stream {
    /// Follows one event.
    ///
    /// # Errors
    /// Where the API says that it failed, or it is no answer.
    pub fn take(&mut self, sent: &Sent) -> Result<Progress, Failure> {
        self.bytes += sent.data.len();
        if self.bytes > ANSWER_BYTES_MAX {
            return Err(Failure { retry: false, ..broken("it is too long") });
        }
        let said =
            serde_json::from_str(&sent.data).map_err(|_| broken("an event that is no JSON of the API's"))?;
        match said {
            Said::MessageStart { message } => {
                self.begun = true;
                if let Some(Value::Object(usage)) = message.get("usage") {
                    self.count(usage);
                }
            }
            _ if !self.begun && !matches!(said, Said::Error { .. } | Said::Unknown) => {
                return Err(broken("an answer without a beginning"));
            }
            Said::ContentBlockStart { index, content_block } => {
                if index != self.answer.blocks.len() || index >= BLOCKS_MAX || !content_block.is_object() {
                    return Err(broken("blocks out of order"));
                }
                self.answer.blocks.push(content_block);
                self.inputs.push(String::new());
            }
            Said::ContentBlockDelta { index, delta } => return self.add(index, delta),
            Said::ContentBlockStop { index } => {
                let text = self.inputs.get(index).filter(|text| !text.trim().is_empty());
                if let Some(text) = text {
                    let input: Value =
                        serde_json::from_str(text).map_err(|_| broken("a call whose input is no JSON"))?;
                    self.answer.blocks[index]["input"] = input;
                }
            }
            Said::MessageDelta { delta, usage } => {
                if let Some(reason) = delta.get("stop_reason").and_then(Value::as_str) {
                    reason.clone_into(&mut self.answer.stop_reason);
                }
                self.count(&usage);
            }
            // What is deeper could be written into the log, and not be read from it.
            Said::MessageStop {} if self.answer.blocks.iter().any(|block| !is_shallow(block, DEPTH_MAX)) => {
                return Err(Failure { retry: false, ..broken("it is nested too deep") });
            }
            Said::MessageStop {} => return Ok(Progress::Whole),
            Said::Error { error } => return Err(failure(None, &error)),
            Said::Unknown => {}
        }
        Ok(Progress::More)
    }

    /// All of it.
    pub fn into_answer(self) -> Answer {
        self.answer
    }

    fn add(&mut self, index: usize, delta: Map<String, Value>) -> Result<Progress, Failure> {
        let block = self.answer.blocks.get_mut(index).and_then(Value::as_object_mut);
        let block = block.ok_or_else(|| broken("a piece of no block"))?;
        if delta.get("type").and_then(Value::as_str) == Some("input_json_delta") {
            self.inputs[index] += delta.get("partial_json").and_then(Value::as_str).unwrap_or_default();
            return Ok(Progress::More);
        }
        if let Some(citation) = delta.get("citation") {
            match block.get_mut("citations") {
                Some(Value::Array(citations)) => citations.push(citation.clone()),
                _ => drop(block.insert("citations".into(), Value::Array(vec![citation.clone()]))),
            }
        }
        let words = delta.get("text").and_then(Value::as_str).map(str::to_owned);
        for (field, value) in delta {
            match (block.get_mut(&field), value) {
                _ if field == "type" || field == "citation" => {}
                // A signature comes whole; texts come in pieces.
                (Some(Value::String(text)), Value::String(piece)) if field != "signature" => {
                    text.push_str(&piece)
                }
                (_, value) => drop(block.insert(field, value)),
            }
        }
        Ok(words.map_or(Progress::More, Progress::Words))
    }

    /// What a later event says replaces what an earlier one did: these are totals.
    fn count(&mut self, said: &Map<String, Value>) {
        let usage = &mut self.answer.usage;
        for (name, total) in [
            ("input_tokens", &mut usage.input_tokens),
            ("output_tokens", &mut usage.output_tokens),
            ("cache_creation_input_tokens", &mut usage.cache_creation_input_tokens),
            ("cache_read_input_tokens", &mut usage.cache_read_input_tokens),
        ] {
            if let Some(count) = said.get(name).and_then(Value::as_u64) {
                *total = count.min(TOKENS_MAX);
            }
        }
    }
}

fn is_shallow(value: &Value, depth: usize) -> bool {
    match value {
        Value::Array(items) => depth > 0 && items.iter().all(|item| is_shallow(item, depth - 1)),
        Value::Object(fields) => depth > 0 && fields.values().all(|field| is_shallow(field, depth - 1)),
        _ => true,
    }
}

/// A stream that broke off, or is none: asking again may help.
pub fn broken(why: &str) -> Failure {
    Failure {
        kind: ErrorKind::ModelRequestFailed,
        message: format!("the model's answer is broken: {why}"),
        retry: true,
        retry_after_ms: None,
    }
}

/// What an error of the API comes to (<https://docs.claude.com/en/api/errors>). `error` is what stands below that name in the body.
pub fn failure(status: Option<u16>, error: &Map<String, Value>) -> Failure {
    let text = |field: &str| error.get(field).and_then(Value::as_str).unwrap_or_default();
    let (kind, retry) = match (status, text("type")) {
        (Some(529 | 503), _) | (_, "overloaded_error") => (ErrorKind::ModelOverloaded, true),
        (Some(429), _) | (_, "rate_limit_error") => (ErrorKind::ModelRateLimited, true),
        (Some(402), _) | (_, "billing_error") => (ErrorKind::Billing, false),
        (Some(408 | 409 | 500..), _) | (_, "api_error" | "timeout_error") => {
            (ErrorKind::ModelRequestFailed, true)
        }
        _ => (ErrorKind::ModelRequestFailed, false),
    };
    let status = status.map_or_else(|| "in the stream".to_owned(), |status| status.to_string());
    let message: String = format!("the model's host answers {status}: {} {}", text("type"), text("message"))
        .chars()
        .take(500)
        .collect();
    Failure { kind, message: message.trim_end().to_owned(), retry, retry_after_ms: None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(stream: &mut Stream, data: Value) -> Result<Progress, Failure> {
        stream.take(&Sent { event: String::new(), data: data.to_string() })
    }

    /// The API's documented streams: text, a call in pieces, thinking with a signature, and types nobody has told us of.
    #[test]
    fn blocks_come_out_as_they_were_sent() {
        let mut stream = Stream::default();
        let usage = json!({ "input_tokens": 472, "output_tokens": 2, "cache_read_input_tokens": 7 });
        let mut take = |data| take(&mut stream, data).expect("it is well formed");
        take(json!({ "type": "message_start", "message": { "id": "msg_1", "usage": usage } }));
        take(json!({ "type": "ping" }));
        take(
            json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "thinking", "thinking": "", "signature": "" } }),
        );
        take(
            json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "thinking_delta", "thinking": "Let" } }),
        );
        take(
            json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "thinking_delta", "thinking": " me" } }),
        );
        take(
            json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "signature_delta", "signature": "EqQB" } }),
        );
        take(json!({ "type": "content_block_stop", "index": 0 }));
        take(
            json!({ "type": "content_block_start", "index": 1, "content_block": { "type": "text", "text": "" } }),
        );
        let words = take(
            json!({ "type": "content_block_delta", "index": 1, "delta": { "type": "text_delta", "text": "Okay" } }),
        );
        assert_eq!(words, Progress::Words("Okay".into()));
        take(json!({ "type": "content_block_stop", "index": 1 }));
        take(
            json!({ "type": "content_block_start", "index": 2, "content_block": { "type": "tool_use", "id": "toolu_1", "name": "bash", "input": {} } }),
        );
        for piece in ["", "{\"command\":", " \"l", "s\"}"] {
            take(
                json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "input_json_delta", "partial_json": piece } }),
            );
        }
        take(json!({ "type": "content_block_stop", "index": 2 }));
        let unknown = json!({ "type": "next_years_block", "data": { "a": [1, 2.5, "x"] } });
        take(json!({ "type": "content_block_start", "index": 3, "content_block": unknown }));
        take(json!({ "type": "content_block_stop", "index": 3 }));
        take(json!({ "type": "next_years_event", "more": 1 }));
        take(
            json!({ "type": "message_delta", "delta": { "stop_reason": "tool_use" }, "usage": { "output_tokens": 89 } }),
        );
        assert_eq!(take(json!({ "type": "message_stop" })), Progress::Whole);
        let answer = stream.into_answer();
        assert_eq!(
            answer.blocks,
            [
                json!({ "type": "thinking", "thinking": "Let me", "signature": "EqQB" }),
                json!({ "type": "text", "text": "Okay" }),
                json!({ "type": "tool_use", "id": "toolu_1", "name": "bash", "input": { "command": "ls" } }),
                unknown,
            ]
        );
        assert_eq!((answer.stop_reason.as_str(), answer.usage.tokens()), ("tool_use", 472 + 89 + 7));
    }

    #[test]
    fn what_is_no_answer_is_a_failure() {
        for events in [
            vec![json!({ "type": "content_block_start", "index": 0, "content_block": {} })],
            vec![
                json!({ "type": "message_start", "message": {} }),
                json!({ "type": "content_block_start", "index": 1, "content_block": {} }),
            ],
            vec![
                json!({ "type": "message_start", "message": {} }),
                json!({ "type": "content_block_delta", "index": 0, "delta": {} }),
            ],
            vec![
                json!({ "type": "error", "error": { "type": "overloaded_error", "message": "Overloaded" } }),
            ],
        ] {
            let mut stream = Stream::default();
            assert!(events.into_iter().any(|event| take(&mut stream, event).is_err()));
        }
    }
}
