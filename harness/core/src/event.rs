//! What a session's log holds. Names and fields follow the public Managed Agents API where it has them; `hand.*` and `agent.block`
//! are our own. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agent::Agent;

/// Where an event stands in its session's log, from 0; also its name in the session.
pub type Position = u64;

macro_rules! events {
    ($($(#[$doc:meta])* $kind:literal $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

            impl From<$name> for Event {
                fn from(event: $name) -> Event {
                    Event::$name(event)
                }
            }
        )*

        /// One event.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Event { $($(#[$doc])* $name($name)),* }

        impl Event {
            /// Its type, as `user.message`.
            pub fn kind(&self) -> &'static str {
                match self { $(Event::$name(_) => $kind),* }
            }

            /// Its fields as a JSON object.
            pub fn body(&self) -> String {
                let text = match self { $(Event::$name(event) => serde_json::to_string(event)),* };
                // Maps here have strings for keys: there is nothing that JSON cannot say.
                text.unwrap_or_default()
            }

            /// Of its type and fields.
            ///
            /// # Errors
            /// Where the type is unknown, or the fields are not its own.
            pub fn parse(kind: &str, body: &str) -> Result<Event, serde_json::Error> {
                match kind {
                    $($kind => serde_json::from_str::<$name>(body).map(Event::$name),)*
                    _ => Err(serde::de::Error::custom(format!("unknown type of event {kind:?}"))),
                }
            }
        }
    };
}

events! {
    /// The first of every session: all that it is made with.
    "session.created" Created {
        /// What drives it.
        agent: Box<Agent>,
    }
    /// Somebody said something. It waits until the model is asked next.
    "user.message" UserMessage {
        /// Blocks of the Messages API.
        content: Vec<Value>,
    }
    /// What is under way is given up.
    "user.interrupt" Interrupt {}
    /// A person's answer, where a tool asks before.
    "user.tool_confirmation" Confirmation {
        /// The `agent.tool_use` it is for.
        tool_use: Position,
        /// The answer.
        result: Verdict,
        /// Why not, for the model.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deny_message: Option<String>,
    }
    /// What came of a tool that the client runs.
    "user.custom_tool_result" CustomResult {
        /// The `agent.custom_tool_use` it is for.
        tool_use: Position,
        /// For the model.
        content: String,
        /// It failed.
        #[serde(default)]
        is_error: bool,
    }
    /// The model's words.
    "agent.message" AgentMessage {
        /// One block, as it came.
        block: Value,
    }
    /// The model's thinking, with its signature.
    "agent.thinking" Thinking {
        /// The block as it came: it goes back untouched.
        block: Value,
    }
    /// A block of a type that we do not know; it goes back untouched.
    "agent.block" Block {
        /// As it came.
        block: Value,
    }
    /// The model wants a tool of ours.
    "agent.tool_use" ToolUse {
        /// The block as it came.
        block: Value,
        /// What the permissions say.
        evaluated_permission: Permission,
    }
    /// The model wants a tool of the client's.
    "agent.custom_tool_use" CustomToolUse {
        /// The block as it came.
        block: Value,
    }
    /// What came of a tool.
    "agent.tool_result" ToolResult {
        /// The `agent.tool_use`.
        tool_use: Position,
        /// The `hand.call` that it is the end of, if there was one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        call: Option<Position>,
        /// For the model.
        content: String,
        /// It failed.
        #[serde(default)]
        is_error: bool,
        /// A person stopped it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        interrupted: bool,
    }
    /// What was said until now gave way to a summary of it.
    "agent.thread_context_compacted" Compacted {
        /// The request whose answer it is.
        request: Position,
        /// In the model's words.
        summary: String,
        /// What it cost.
        usage: Usage,
    }
    /// It has something to do.
    "session.status_running" Running {}
    /// It waits for somebody.
    "session.status_idle" Idle {
        /// Why.
        stop_reason: StopReason,
    }
    /// It waits before it tries again.
    "session.status_rescheduled" Rescheduled {
        /// Until then; milliseconds since 1970.
        until_ms: u64,
    }
    /// It is over for good.
    "session.status_terminated" Terminated {}
    /// Something went wrong.
    "session.error" Trouble {
        /// What.
        error: ErrorSaid,
    }
    /// The model is asked. Its position is the effect's name.
    "span.model_request_start" RequestStart {
        /// What for.
        purpose: Purpose,
        /// From 1.
        attempt: u32,
    }
    /// The model has answered, or not.
    "span.model_request_end" RequestEnd {
        /// The `span.model_request_start`.
        request: Position,
        /// As the API said: `end_turn`, `tool_use`, ...
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop_reason: Option<String>,
        /// What it cost.
        #[serde(default)]
        usage: Usage,
        /// Why there is no answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        /// A person did not want one any more.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        interrupted: bool,
    }
    /// A sandbox is asked for. Its position is the effect's name.
    "hand.provision" Provision {
        /// What the session calls it.
        hand: String,
    }
    /// A sandbox is there.
    "hand.provisioned" Provisioned {
        /// What the session calls it.
        hand: String,
        /// The `hand.provision`.
        effect: Position,
        /// What the broker calls it.
        sandbox: String,
    }
    /// There is no sandbox to be had, or the one that there was has ended.
    "hand.lost" Lost {
        /// What the session calls it.
        hand: String,
        /// The `hand.provision` that failed, or the `hand.call` that found it gone.
        effect: Position,
        /// For the model.
        message: String,
    }
    /// A tool is run in a sandbox, or on the log itself. Its position is the effect's name.
    "hand.call" Call {
        /// The `agent.tool_use`.
        tool_use: Position,
        /// Where; nowhere for the log.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hand: Option<String>,
    }
    /// One of its sandboxes is another session's now.
    "hand.given" Given {
        /// What this session called it.
        hand: String,
        /// The session that has it.
        to: String,
    }
    /// A sandbox of another session is this one's now.
    "hand.received" Received {
        /// What this session calls it.
        hand: String,
        /// What the broker calls it.
        sandbox: String,
        /// The session that had it.
        from: String,
    }
    /// A session of a person who works in the workspace: nothing runs until it is resumed.
    "user.pause" Pause {}
    /// The session goes on.
    "user.resume" Resume {}
}

impl Event {
    /// Whether people and programs beside the driver say this.
    pub fn is_clients(&self) -> bool {
        matches!(
            self,
            Event::UserMessage(_)
                | Event::Interrupt(_)
                | Event::Confirmation(_)
                | Event::CustomResult(_)
                | Event::Given(_)
                | Event::Received(_)
                | Event::Pause(_)
                | Event::Resume(_)
        )
    }
}

/// An answer to a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Yes.
    Allow,
    /// No.
    Deny,
}

/// What the permissions say of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Permission {
    /// It runs.
    Allow,
    /// A person is asked.
    Ask,
    /// There is no such tool.
    Deny,
}

/// Why a session is idle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StopReason {
    /// The model has finished its turn.
    EndTurn,
    /// These wait for an answer.
    RequiresAction {
        /// Positions of `agent.tool_use` and `agent.custom_tool_use`.
        event_ids: Vec<Position>,
    },
    /// The model could not be reached.
    RetriesExhausted,
    /// What it may use is used up.
    BudgetReached,
    /// A person has paused it.
    Paused,
}

/// What a request to the model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// To go on.
    Turn,
    /// To sum up what was said.
    Compaction,
}

/// What went wrong, as `session.error` says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorSaid {
    /// What kind.
    #[serde(rename = "type")]
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// What is done about it.
    pub retry_status: RetryStatus,
}

/// The Managed Agents API's types of errors, as far as they can happen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// None of those below.
    #[serde(rename = "unknown_error")]
    Unknown,
    /// 529, 503.
    #[serde(rename = "model_overloaded_error")]
    ModelOverloaded,
    /// 429.
    #[serde(rename = "model_rate_limited_error")]
    ModelRateLimited,
    /// Any other answer than the one wanted, or a stream that was cut.
    #[serde(rename = "model_request_failed_error")]
    ModelRequestFailed,
    /// 402, or the API says so.
    #[serde(rename = "billing_error")]
    Billing,
    /// The grant is revoked or its host cannot be reached.
    #[serde(rename = "credential_host_unreachable_error")]
    CredentialHostUnreachable,
    /// The harness was killed while the model answered.
    #[serde(rename = "harness_interrupted_error")]
    Interrupted,
}

/// What is done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryStatus {
    /// It is tried again.
    Retrying,
    /// It was tried often enough.
    Exhausted,
    /// Trying again would not help.
    Terminal,
}

/// Why a request to the model came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind.
    #[serde(rename = "type")]
    pub kind: ErrorKind,
    /// For people; never what was sent.
    pub message: String,
    /// Whether trying again may help.
    pub retry: bool,
    /// The server's wish, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// Tokens, as the API counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Read.
    pub input_tokens: u64,
    /// Written.
    pub output_tokens: u64,
    /// Written into the cache.
    pub cache_creation_input_tokens: u64,
    /// Read from the cache.
    pub cache_read_input_tokens: u64,
}

impl Usage {
    /// All of them.
    pub fn tokens(&self) -> u64 {
        let all = [
            self.input_tokens,
            self.output_tokens,
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        ];
        all.into_iter().fold(0, u64::saturating_add)
    }
}
