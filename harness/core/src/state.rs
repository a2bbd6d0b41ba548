//! What a session's log comes to. [`State::apply`] is all that changes it. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::context::{Conversation, block_tokens};
use crate::event::{Event, Permission, Position, Purpose, StopReason, Usage, Verdict};
use crate::tools;

/// A turn that the API pauses goes on so often.
const PAUSES_MAX: u32 = 16;

/// How it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Something is under way.
    Running,
    /// It waits for somebody.
    Idle(StopReason),
    /// It waits before it asks the model again; until then, in milliseconds since 1970.
    Rescheduled(u64),
    /// It is over.
    Terminated,
}

/// A call that the model wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The model's own name for it.
    pub id: String,
    /// Which tool.
    pub tool: String,
    /// In which sandbox.
    pub hand: Option<String>,
    /// How far it is.
    pub stage: Stage,
}

/// How far a call is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// It may run.
    Allowed,
    /// A person is asked.
    Asks,
    /// The client runs it.
    Custom,
    /// It may not run, and why.
    Denied(String),
    /// It runs: the position of its `hand.call`.
    Runs(Position),
}

/// A sandbox of the session's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hand {
    /// It was asked for: the position of its `hand.provision`.
    Asked(Position),
    /// It is there, by the broker's name.
    Ready(String),
    /// There is none to be had, and why.
    Refused(String),
}

/// A request to the model that has no answer yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The position of its `span.model_request_start`.
    pub id: Position,
    /// What for.
    pub purpose: Purpose,
    /// From 1.
    pub attempt: u32,
}

/// All but what was said: what is decided by.
#[derive(Debug, Clone, PartialEq)]
pub struct Control {
    /// Where the next event will stand.
    pub next: Position,
    /// What the session was made with, and when.
    pub agent: Option<(std::sync::Arc<Agent>, u64)>,
    /// How it is.
    pub status: Status,
    /// What the model is asked.
    pub request: Option<Request>,
    /// Calls of the model's last answer that have no result yet.
    pub uses: BTreeMap<Position, Use>,
    /// By the session's own names.
    pub hands: BTreeMap<String, Hand>,
    /// What the broker calls sandboxes that were lost, or given away.
    pub gone: Vec<String>,
    /// Something was said that the model has not been asked about.
    pub unheard: bool,
    /// What is under way is to be given up.
    pub interrupted: bool,
    /// A person works in the workspace.
    pub paused: bool,
    /// The model's last answer came to nothing: how often that was, and whether and when to try again.
    pub failed: Option<Failed>,
    /// What was used up.
    pub used: Usage,
    /// How many calls were begun.
    pub calls: u64,
    /// How many tokens the next request has, roughly.
    pub context: u64,
    /// How often on end the API has paused the turn.
    pub pauses: u32,
}

/// What came of the last request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// How often it was tried.
    pub attempt: u32,
    /// Whether what is done about it has been said.
    pub settled: bool,
    /// Whether it was waited long enough.
    pub waited: bool,
    /// What was wrong.
    pub failure: crate::event::Failure,
}

/// A log that these rules could not have written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Impossible {
    /// Where.
    pub position: Position,
    /// Its type.
    pub kind: &'static str,
    /// Why it cannot be.
    pub why: &'static str,
}

impl fmt::Display for Impossible {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "event {} ({}) cannot be: {}", self.position, self.kind, self.why)
    }
}

/// A session as its log says it is.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// What is decided by.
    pub control: Control,
    /// What was said.
    pub conversation: Conversation,
}

impl Default for State {
    fn default() -> State {
        State { control: Control::new(), conversation: Conversation::default() }
    }
}

impl State {
    /// Follows one event.
    ///
    /// # Errors
    /// Where the event is a driver's and cannot be here.
    pub fn apply(&mut self, event: &Event, at_ms: u64) -> Result<(), Impossible> {
        let position = self.control.next;
        self.control.apply(event, at_ms)?;
        self.conversation.apply(event, position);
        Ok(())
    }
}

impl Control {
    fn new() -> Control {
        Control {
            next: 0,
            agent: None,
            status: Status::Idle(StopReason::EndTurn),
            request: None,
            uses: BTreeMap::new(),
            hands: BTreeMap::new(),
            gone: Vec::new(),
            unheard: false,
            interrupted: false,
            paused: false,
            failed: None,
            used: Usage::default(),
            calls: 0,
            context: 0,
            pauses: 0,
        }
    }

    /// Follows one event; see [`State::apply`].
    ///
    /// # Errors
    /// The same.
    pub fn apply(&mut self, event: &Event, at_ms: u64) -> Result<(), Impossible> {
        let position = self.next;
        let impossible = |why| Err(Impossible { position, kind: event.kind(), why });
        if self.agent.is_none() != matches!(event, Event::Created(_)) {
            return impossible("a session begins with session.created, once");
        }
        match event {
            Event::Created(created) => self.agent = Some((created.agent.clone().into(), at_ms)),
            Event::UserMessage(message) => {
                self.unheard = true;
                self.failed = None;
                self.context += message.content.iter().map(block_tokens).sum::<u64>();
            }
            Event::Interrupt(_) => {
                self.interrupted = self.is_busy();
                self.unheard = false;
                self.failed = None;
            }
            Event::Confirmation(answer) => self.confirm(answer),
            Event::CustomResult(result) => {
                if self.uses.get(&result.tool_use).is_some_and(|wanted| wanted.stage == Stage::Custom) {
                    self.end_use(result.tool_use, &result.content);
                }
            }
            Event::AgentMessage(crate::event::AgentMessage { block })
            | Event::Thinking(crate::event::Thinking { block })
            | Event::Block(crate::event::Block { block }) => {
                if self.request.is_none() {
                    return impossible("the model was not asked");
                }
                self.context += block_tokens(block);
            }
            Event::ToolUse(wanted) => {
                if self.request.is_none() {
                    return impossible("the model was not asked");
                }
                let stage = match wanted.evaluated_permission {
                    Permission::Allow => Stage::Allowed,
                    Permission::Ask => Stage::Asks,
                    Permission::Deny => Stage::Denied("there is no such tool".to_owned()),
                };
                self.begin_use(position, &wanted.block, stage);
            }
            Event::CustomToolUse(wanted) => {
                if self.request.is_none() {
                    return impossible("the model was not asked");
                }
                self.begin_use(position, &wanted.block, Stage::Custom);
            }
            Event::ToolResult(result) => {
                let Some(wanted) = self.uses.get(&result.tool_use) else {
                    return impossible("no call waits for it");
                };
                if result.call.is_some_and(|call| wanted.stage != Stage::Runs(call)) {
                    return impossible("it is not the end of the call that runs");
                }
                self.end_use(result.tool_use, &result.content);
            }
            Event::Compacted(compacted) => {
                if self.request.is_none_or(|request| request.id != compacted.request) {
                    return impossible("no summary was asked for");
                }
                self.request = None;
                self.add(&compacted.usage);
                self.context = block_tokens(&json!(compacted.summary));
                self.unheard = true;
            }
            Event::Running(_) => {
                if let (Status::Rescheduled(_), Some(failed)) = (&self.status, &mut self.failed) {
                    failed.waited = true;
                }
                self.status = Status::Running;
            }
            Event::Idle(idle) => {
                self.status = Status::Idle(idle.stop_reason.clone());
                self.interrupted = false;
            }
            Event::Rescheduled(until) => {
                self.status = Status::Rescheduled(until.until_ms);
            }
            Event::Terminated(_) => self.status = Status::Terminated,
            Event::Trouble(_) => {
                if let Some(failed) = &mut self.failed {
                    failed.settled = true;
                }
            }
            Event::RequestStart(start) => {
                if self.request.is_some() || !self.uses.is_empty() {
                    return impossible("something is under way");
                }
                self.failed = None;
                self.request = Some(Request { id: position, purpose: start.purpose, attempt: start.attempt });
                self.unheard = false;
            }
            Event::RequestEnd(end) => {
                let Some(request) = self.request.filter(|request| request.id == end.request) else {
                    return impossible("it was not asked");
                };
                self.request = None;
                self.add(&end.usage);
                let attempt = request.attempt;
                self.failed = end.failure.clone().map(|failure| Failed {
                    attempt,
                    settled: false,
                    waited: false,
                    failure,
                });
                // A turn that is only paused goes on, and a request that failed is still to be answered.
                let goes_on = end.stop_reason.as_deref() == Some("pause_turn") && self.pauses < PAUSES_MAX;
                self.pauses = if goes_on { self.pauses + 1 } else { 0 };
                self.unheard |= self.failed.is_some() || goes_on;
                if end.usage.tokens() > 0 && self.failed.is_none() {
                    // What the API has counted counts, and the answer is in it already; unless it says less than we know.
                    self.context = self.context.max(end.usage.tokens());
                }
            }
            Event::Provision(asked) => {
                if matches!(self.hands.get(&asked.hand), Some(Hand::Asked(_) | Hand::Ready(_))) {
                    return impossible("there is such a hand");
                }
                self.hands.insert(asked.hand.clone(), Hand::Asked(position));
            }
            Event::Provisioned(made) => {
                if self.hands.get(&made.hand) != Some(&Hand::Asked(made.effect)) {
                    return impossible("it was not asked for");
                }
                self.hands.insert(made.hand.clone(), Hand::Ready(made.sandbox.clone()));
            }
            Event::Lost(lost) => match self.hands.get(&lost.hand) {
                Some(Hand::Asked(_)) => {
                    self.hands.insert(lost.hand.clone(), Hand::Refused(lost.message.clone()));
                }
                Some(Hand::Ready(sandbox)) => {
                    self.gone.push(sandbox.clone());
                    self.hands.remove(&lost.hand);
                }
                _ => return impossible("there was no such hand"),
            },
            Event::Call(call) => {
                let Some(wanted) = self.uses.get_mut(&call.tool_use) else {
                    return impossible("no call is wanted");
                };
                if wanted.stage != Stage::Allowed {
                    return impossible("it may not run");
                }
                wanted.stage = Stage::Runs(position);
                self.calls += 1;
            }
            Event::Given(given) => {
                if let Some(Hand::Ready(sandbox)) = self.hands.remove(&given.hand) {
                    self.gone.push(sandbox);
                }
            }
            Event::Received(received) => {
                self.hands.insert(received.hand.clone(), Hand::Ready(received.sandbox.clone()));
            }
            Event::Pause(_) => self.paused = true,
            Event::Resume(_) => self.paused = false,
        }
        self.next += 1;
        Ok(())
    }

    /// Whether something is under way, or wanted.
    pub fn is_busy(&self) -> bool {
        self.request.is_some()
            || !self.uses.is_empty()
            || self.unheard
            || matches!(self.status, Status::Rescheduled(_))
    }

    fn add(&mut self, usage: &Usage) {
        for (used, more) in [
            (&mut self.used.input_tokens, usage.input_tokens),
            (&mut self.used.output_tokens, usage.output_tokens),
            (&mut self.used.cache_creation_input_tokens, usage.cache_creation_input_tokens),
            (&mut self.used.cache_read_input_tokens, usage.cache_read_input_tokens),
        ] {
            *used = used.saturating_add(more);
        }
    }

    fn begin_use(&mut self, position: Position, block: &Value, stage: Stage) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let tool = text(&block["name"]);
        let hand = tools::hand_of(&tool, &block["input"]);
        self.context += block_tokens(block);
        self.uses.insert(position, Use { id: text(&block["id"]), tool, hand, stage });
    }

    fn end_use(&mut self, position: Position, content: &str) {
        let hand = self.uses.remove(&position).and_then(|ended| ended.hand);
        // Who hears that there is no sandbox has heard it: the next call asks again.
        if let Some(hand) = hand.filter(|hand| matches!(self.hands.get(hand), Some(Hand::Refused(_)))) {
            self.hands.remove(&hand);
        }
        self.context += block_tokens(&json!(content));
        // The model wants to hear of it, but not at once of what a person stopped.
        self.unheard |= !self.interrupted;
    }

    fn confirm(&mut self, answer: &crate::event::Confirmation) {
        let asked = self.uses.get_mut(&answer.tool_use).filter(|wanted| wanted.stage == Stage::Asks);
        if let Some(wanted) = asked {
            wanted.stage = match answer.result {
                Verdict::Allow => Stage::Allowed,
                Verdict::Deny => {
                    let why = answer.deny_message.as_deref().unwrap_or("a person said no");
                    Stage::Denied(format!("It was not run: {why}"))
                }
            };
        }
    }
}
