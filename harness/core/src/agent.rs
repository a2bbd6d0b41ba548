//! What a session is made with, and what stays the same for as long as it lives. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which rules of deciding a log was written by. A log of other rules is followed, and not compared.
pub const RULES: u32 = 1;

/// `session.created`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// The rules of deciding that were valid.
    pub rules: u32,
    /// The model's name, as the Messages API takes it.
    pub model: String,
    /// The most tokens of one answer.
    pub max_tokens: u64,
    /// What it is told before anything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The grant that the model is reached over.
    pub model_grant: String,
    /// What its sandboxes are made with.
    pub hands: Hands,
    /// Who is asked before a tool runs. `*` is each that is not named.
    #[serde(default)]
    pub permissions: BTreeMap<String, Policy>,
    /// Tools that the client answers, as the Messages API describes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub custom_tools: Vec<Value>,
    /// What it may use up.
    #[serde(default)]
    pub budget: Budget,
    /// How many tokens are sent before what was said is summed up.
    pub context_tokens: u64,
    /// How often the model is asked before that is given up.
    pub attempts: u32,
    /// What makes its jitter its own.
    pub seed: u64,
}

/// What sandboxes are made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hands {
    /// A policy of the broker's.
    pub policy: String,
    /// Grants of the broker's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<String>,
    /// A directory of the host's, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Workspace>,
    /// Where the helper that runs tools stands, inside.
    pub tools: String,
    /// How long one is kept that nobody uses, as `30m`.
    pub keep: String,
}

/// What is mounted at `/workspace`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workspace {
    /// Where it is on the host.
    pub directory: String,
    /// Nothing is written there.
    pub read_only: bool,
}

/// Who is asked before a tool runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Nobody.
    AlwaysAllow,
    /// A person.
    AlwaysAsk,
}

/// Where a session ends on its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Tokens, read and written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Milliseconds since the session was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wall_ms: Option<u64>,
    /// Calls of tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<u64>,
}

impl Agent {
    /// Who is asked before `tool` runs.
    pub fn policy(&self, tool: &str) -> Policy {
        let named = self.permissions.get(tool).or_else(|| self.permissions.get("*"));
        named.copied().unwrap_or(Policy::AlwaysAllow)
    }

    /// Whether the client answers `tool`.
    pub fn is_custom(&self, tool: &str) -> bool {
        self.custom_tools.iter().any(|custom| custom["name"] == tool)
    }
}
