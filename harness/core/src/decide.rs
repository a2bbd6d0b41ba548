//! What a session does next: `(State, Input) -> (events, effects)`. Time and everything random is in the input and the session's seed.
//! The same log gives the same decisions, and [`replay`] says where it does not. Pure.

use sha2::{Digest, Sha256};

use crate::agent::{Agent, Policy, RULES};
use crate::event::*;
use crate::state::{Control, Failed, Hand, Impossible, Stage, State, Status};
use crate::tools;

/// The first wait before the model is asked again, and the longest, in milliseconds.
const BACKOFF_MS: u64 = 500;
const BACKOFF_MS_MAX: u64 = 60_000;
/// The longest wait that a server may wish for.
const RETRY_AFTER_MS_MAX: u64 = 15 * 60_000;
/// The most sandboxes of a session.
const HANDS_MAX: usize = 8;

/// What the model hears of a call that a person stopped.
const INTERRUPTED: &str = "A person interrupted it.";

/// What a driver has heard.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Nothing but the time: it looks at what others have appended, and at what is due.
    Tick,
    /// The model has answered.
    Answered {
        /// The request.
        request: Position,
        /// Its content, as it came.
        blocks: Vec<serde_json::Value>,
        /// Why it stopped.
        stop_reason: String,
        /// What it cost.
        usage: Usage,
    },
    /// The model has not answered.
    Failed {
        /// The request.
        request: Position,
        /// Why.
        failure: Failure,
    },
    /// There is a sandbox.
    Provisioned {
        /// The `hand.provision`.
        effect: Position,
        /// Its name.
        sandbox: String,
    },
    /// There is none, or the one of a call has ended.
    Lost {
        /// The `hand.provision` or `hand.call`.
        effect: Position,
        /// Why.
        message: String,
    },
    /// A tool has run.
    Called {
        /// The `hand.call`.
        effect: Position,
        /// For the model.
        content: String,
        /// It failed.
        is_error: bool,
    },
}

/// What is to be done, once the events are on disk. Each is named by the event that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Ask the model.
    Request {
        /// Its name.
        id: Position,
        /// What for.
        purpose: Purpose,
    },
    /// Ask the broker for a sandbox.
    Provision {
        /// Its name.
        id: Position,
    },
    /// Run a tool.
    Call {
        /// Its name.
        id: Position,
        /// The `agent.tool_use`.
        tool_use: Position,
    },
    /// Give up what is under way under this name.
    Abort {
        /// Its name.
        id: Position,
    },
}

/// Events to append, and what to do then.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decision {
    /// In this order, all or none.
    pub events: Vec<Event>,
    /// Once they are durable.
    pub effects: Vec<Effect>,
}

/// An input that nobody waits for: what it is the end of was given up, or ended before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale;

/// What becomes of `input` at `now_ms` (milliseconds since 1970).
///
/// # Errors
/// Where nobody waits for it.
pub fn decide(state: &State, input: &Input, now_ms: u64) -> Result<Decision, Stale> {
    let mut step = Step { control: state.control.clone(), now_ms, decision: Decision::default() };
    for event in facts(&step.control, input)? {
        step.say(event).map_err(|_| Stale)?;
    }
    while let Some((event, effect)) = step.next() {
        if step.say(event).is_err() {
            break;
        }
        step.decision.effects.extend(effect);
    }
    Ok(step.decision)
}

/// What an input is in the log.
fn facts(control: &Control, input: &Input) -> Result<Vec<Event>, Stale> {
    let asked = |id: Position| control.request.filter(|request| request.id == id).ok_or(Stale);
    Ok(match input {
        Input::Tick => Vec::new(),
        Input::Answered { request, blocks, stop_reason, usage } => {
            let (agent, _) = control.agent.as_ref().ok_or(Stale)?;
            if asked(*request)?.purpose == Purpose::Compaction {
                let text = |block: &serde_json::Value| block["text"].as_str().map(str::to_owned);
                let summary = blocks.iter().filter_map(text).collect::<Vec<_>>().join("\n");
                return Ok(vec![Compacted { request: *request, summary, usage: *usage }.into()]);
            }
            let end = RequestEnd {
                request: *request,
                stop_reason: Some(stop_reason.clone()),
                usage: *usage,
                failure: None,
                interrupted: false,
            };
            blocks.iter().map(|block| said(agent, block)).chain([end.into()]).collect()
        }
        Input::Failed { request, failure } => {
            asked(*request)?;
            let failure = Some(failure.clone());
            let (request, usage, interrupted) = (*request, Usage::default(), false);
            vec![RequestEnd { request, stop_reason: None, usage, failure, interrupted }.into()]
        }
        Input::Provisioned { effect, sandbox } => {
            let hand = control.hand_asked(*effect).ok_or(Stale)?;
            vec![Provisioned { hand, effect: *effect, sandbox: sandbox.clone() }.into()]
        }
        Input::Lost { effect, message } => {
            let (effect, message) = (*effect, message.clone());
            if let Some(hand) = control.hand_asked(effect) {
                return Ok(vec![Lost { hand, effect, message }.into()]);
            }
            let (tool_use, hand) = control.running(effect).ok_or(Stale)?;
            let content = format!("It was interrupted, and may have happened in part: {message}");
            let result =
                ToolResult { tool_use, call: Some(effect), content, is_error: true, interrupted: false };
            let lost = hand.filter(|hand| matches!(control.hands.get(hand), Some(Hand::Ready(_))));
            let lost = lost.map(|hand| Lost { hand, effect, message }.into());
            std::iter::once(result.into()).chain(lost).collect()
        }
        Input::Called { effect, content, is_error } => {
            let (tool_use, _) = control.running(*effect).ok_or(Stale)?;
            let (content, is_error) = (content.clone(), *is_error);
            vec![ToolResult { tool_use, call: Some(*effect), content, is_error, interrupted: false }.into()]
        }
    })
}

/// One block of an answer.
fn said(agent: &Agent, block: &serde_json::Value) -> Event {
    let block = block.clone();
    match block["type"].as_str() {
        Some("text") => AgentMessage { block }.into(),
        Some("thinking" | "redacted_thinking") => Thinking { block }.into(),
        Some("tool_use") => {
            let tool = block["name"].as_str().unwrap_or_default();
            if agent.is_custom(tool) {
                return CustomToolUse { block }.into();
            }
            let evaluated_permission = match (tools::is_known(tool), agent.policy(tool)) {
                (false, _) => Permission::Deny,
                (true, Policy::AlwaysAsk) => Permission::Ask,
                (true, Policy::AlwaysAllow) => Permission::Allow,
            };
            ToolUse { block, evaluated_permission }.into()
        }
        _ => Block { block }.into(),
    }
}

/// A decision in the making: each event is followed before the next is thought of.
struct Step {
    control: Control,
    now_ms: u64,
    decision: Decision,
}

impl Step {
    fn say(&mut self, event: Event) -> Result<(), Impossible> {
        self.control.apply(&event, self.now_ms)?;
        self.decision.events.push(event);
        Ok(())
    }

    /// The next thing to say, and what to do about it; nothing where something is waited for.
    fn next(&self) -> Option<(Event, Option<Effect>)> {
        let control = &self.control;
        let (agent, created_ms) = control.agent.as_ref()?;
        if control.status == Status::Terminated {
            return None;
        }
        if control.interrupted {
            return Some(self.give_up());
        }
        if control.request.is_some() {
            return None;
        }
        if let Some(failed) = control.failed.as_ref().filter(|failed| !failed.settled) {
            return Some((self.trouble(agent, failed), None));
        }
        if control.uses.is_empty() && !control.unheard {
            return self.idle(StopReason::EndTurn);
        }
        if control.paused {
            return self.unless_running(StopReason::Paused);
        }
        if self.is_spent(agent, *created_ms) {
            return self.unless_running(StopReason::BudgetReached);
        }
        if let Some(next) = self.after_failure(agent) {
            return next;
        }
        if let Some(tool_use) = control.denied() {
            return Some((tool_use, None));
        }
        if !control.uses.is_empty() {
            return self.go_on_with_tools();
        }
        if let Some(event) = self.run() {
            return Some((event, None));
        }
        let purpose = if control.context > agent.context_tokens && control.context > 0 {
            Purpose::Compaction
        } else {
            Purpose::Turn
        };
        let attempt = control.failed.as_ref().map_or(1, |failed| failed.attempt + 1);
        Some((RequestStart { purpose, attempt }.into(), Some(Effect::Request { id: control.next, purpose })))
    }

    /// Whatever is under way ends, one after the other, and then it is idle.
    fn give_up(&self) -> (Event, Option<Effect>) {
        if let Some(request) = self.control.request {
            let (request, usage, interrupted) = (request.id, Usage::default(), true);
            let end = RequestEnd { request, stop_reason: None, usage, failure: None, interrupted };
            return (end.into(), Some(Effect::Abort { id: request }));
        }
        if let Some((tool_use, wanted)) = self.control.uses.first_key_value() {
            let (call, effect) = match wanted.stage {
                Stage::Runs(id) => (Some(id), Some(Effect::Abort { id })),
                _ => (None, None),
            };
            let content = INTERRUPTED.to_owned();
            let (tool_use, is_error, interrupted) = (*tool_use, true, true);
            return (ToolResult { tool_use, call, content, is_error, interrupted }.into(), effect);
        }
        (Idle { stop_reason: StopReason::EndTurn }.into(), None)
    }

    /// What is done about a request that came to nothing.
    fn trouble(&self, agent: &Agent, failed: &Failed) -> Event {
        let Failed { attempt, failure, .. } = failed;
        let retry_status = match (failure.retry, *attempt < agent.attempts) {
            (false, _) => RetryStatus::Terminal,
            (true, true) => RetryStatus::Retrying,
            (true, false) => RetryStatus::Exhausted,
        };
        let error = ErrorSaid { kind: failure.kind, message: failure.message.clone(), retry_status };
        Trouble { error }.into()
    }

    /// The wait after a request that came to nothing, and its end; `None` where there is nothing to wait for.
    #[allow(clippy::option_option)]
    fn after_failure(&self, agent: &Agent) -> Option<Option<(Event, Option<Effect>)>> {
        let failed = self.control.failed.as_ref()?;
        if !failed.failure.retry || failed.attempt >= agent.attempts {
            return Some(self.idle(StopReason::RetriesExhausted));
        }
        match self.control.status {
            // Killed in the middle is nobody's overload: there is nothing to wait for.
            _ if failed.waited || failed.failure.kind == ErrorKind::Interrupted => None,
            Status::Rescheduled(until_ms) if until_ms > self.now_ms => Some(None),
            Status::Rescheduled(_) => None,
            _ => {
                let until_ms = self.now_ms + backoff_ms(agent.seed, self.control.next, failed);
                Some(Some((Rescheduled { until_ms }.into(), None)))
            }
        }
    }

    /// The next call that can run, or what is waited for.
    fn go_on_with_tools(&self) -> Option<(Event, Option<Effect>)> {
        let control = &self.control;
        if control.uses.values().any(|wanted| matches!(wanted.stage, Stage::Runs(_))) {
            return None;
        }
        let allowed = control.uses.iter().find(|(_, wanted)| wanted.stage == Stage::Allowed);
        let Some((tool_use, wanted)) = allowed else {
            let event_ids = control.uses.keys().copied().collect();
            return self.idle(StopReason::RequiresAction { event_ids });
        };
        if let Some(event) = self.run() {
            return Some((event, None));
        }
        let tool_use = *tool_use;
        let call = |hand: Option<String>| {
            (Call { tool_use, hand }.into(), Some(Effect::Call { id: control.next, tool_use }))
        };
        let Some(hand) = &wanted.hand else { return Some(call(None)) };
        match control.hands.get(hand) {
            Some(Hand::Ready(_)) => Some(call(Some(hand.clone()))),
            Some(Hand::Asked(_)) => None,
            Some(Hand::Refused(why)) => {
                let content = format!("There is no sandbox to run it in: {why}");
                Some((
                    ToolResult { tool_use, call: None, content, is_error: true, interrupted: false }.into(),
                    None,
                ))
            }
            _ if control.hands.len() >= HANDS_MAX && !control.hands.contains_key(hand) => {
                let content = format!("A session has {HANDS_MAX} sandboxes at most.");
                Some((
                    ToolResult { tool_use, call: None, content, is_error: true, interrupted: false }.into(),
                    None,
                ))
            }
            _ => {
                Some((Provision { hand: hand.clone() }.into(), Some(Effect::Provision { id: control.next })))
            }
        }
    }

    fn is_spent(&self, agent: &Agent, created_ms: u64) -> bool {
        let (budget, control) = (agent.budget, &self.control);
        budget.tokens.is_some_and(|tokens| control.used.tokens() >= tokens)
            || budget.wall_ms.is_some_and(|wall| self.now_ms.saturating_sub(created_ms) >= wall)
            || budget.tool_calls.is_some_and(|calls| control.calls >= calls)
    }

    /// That it runs, where that has not been said.
    fn run(&self) -> Option<Event> {
        (self.control.status != Status::Running).then(|| Running {}.into())
    }

    /// That it is idle, where that has not been said.
    fn idle(&self, stop_reason: StopReason) -> Option<(Event, Option<Effect>)> {
        let said = self.control.status == Status::Idle(stop_reason.clone());
        (!said).then(|| (Idle { stop_reason }.into(), None))
    }

    /// The same, once what runs has ended.
    fn unless_running(&self, stop_reason: StopReason) -> Option<(Event, Option<Effect>)> {
        let runs = self.control.uses.values().any(|wanted| matches!(wanted.stage, Stage::Runs(_)));
        if runs { None } else { self.idle(stop_reason) }
    }
}

impl Control {
    fn hand_asked(&self, effect: Position) -> Option<String> {
        let asked = self.hands.iter().find(|(_, hand)| **hand == Hand::Asked(effect));
        asked.map(|(name, _)| name.clone())
    }

    /// The call that runs under this name, and where.
    fn running(&self, effect: Position) -> Option<(Position, Option<String>)> {
        let running = self.uses.iter().find(|(_, wanted)| wanted.stage == Stage::Runs(effect));
        running.map(|(tool_use, wanted)| (*tool_use, wanted.hand.clone()))
    }

    fn denied(&self) -> Option<Event> {
        self.uses.iter().find_map(|(tool_use, wanted)| match &wanted.stage {
            Stage::Denied(why) => Some(
                ToolResult {
                    tool_use: *tool_use,
                    call: None,
                    content: why.clone(),
                    is_error: true,
                    interrupted: false,
                }
                .into(),
            ),
            _ => None,
        })
    }
}

/// Doubled each time, with a quarter of jitter that is the session's own; or what the server wishes, where that is longer.
fn backoff_ms(seed: u64, position: Position, failed: &Failed) -> u64 {
    let doubled =
        BACKOFF_MS.saturating_mul(1 << failed.attempt.saturating_sub(1).min(16)).min(BACKOFF_MS_MAX);
    let digest =
        Sha256::new().chain_update(seed.to_le_bytes()).chain_update(position.to_le_bytes()).finalize();
    let part = u64::from(digest[0]);
    let wished = failed.failure.retry_after_ms.unwrap_or_default().min(RETRY_AFTER_MS_MAX);
    (doubled - doubled * part / 1024).max(wished)
}

/// What is under way in a session that nobody drives: each is asked about, or taken for interrupted.
pub fn under_way(control: &Control) -> Vec<Effect> {
    let request = control.request.map(|request| Effect::Request { id: request.id, purpose: request.purpose });
    let hands = control.hands.values().filter_map(|hand| match hand {
        Hand::Asked(id) => Some(Effect::Provision { id: *id }),
        _ => None,
    });
    let calls = control.uses.iter().filter_map(|(tool_use, wanted)| match wanted.stage {
        Stage::Runs(id) => Some(Effect::Call { id, tool_use: *tool_use }),
        _ => None,
    });
    request.into_iter().chain(hands).chain(calls).collect()
}

/// One event as the log has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Logged {
    /// Where its batch began: what a driver decided at once. A client's stands for itself.
    pub batch: Position,
    /// When; milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    pub event: Event,
}

/// Why a log cannot be followed.
#[derive(Debug, Clone, PartialEq)]
pub enum Divergence {
    /// It could not have been written.
    Impossible(Impossible),
    /// These rules decide something else.
    Decided {
        /// Where the batch begins.
        position: Position,
        /// What the log has.
        logged: Vec<&'static str>,
        /// What is decided now.
        decided: Vec<&'static str>,
    },
}

impl std::fmt::Display for Divergence {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Divergence::Impossible(why) => why.fmt(out),
            Divergence::Decided { position, logged, decided } => write!(
                out,
                "from event {position} on the log says {}, where these rules decide {}",
                logged.join(", "),
                decided.join(", ")
            ),
        }
    }
}

/// Follows whole batches, and decides each of them again: the same inputs have to come to the same events.
///
/// # Errors
/// Where they do not, or an event cannot be.
pub fn replay(state: &mut State, events: &[Logged]) -> Result<(), Divergence> {
    let mut rest = events;
    while let Some(first) = rest.first() {
        let own = |logged: &&Logged| logged.batch == first.batch && !first.event.is_clients();
        let length = rest.iter().take_while(own).count().max(1);
        let (batch, after) = rest.split_at(length);
        let same_rules = state.control.agent.as_ref().is_some_and(|(agent, _)| agent.rules == RULES);
        if same_rules && !first.event.is_clients() {
            compare(state, batch)?;
        }
        for logged in batch {
            state.apply(&logged.event, logged.at_ms).map_err(Divergence::Impossible)?;
        }
        rest = after;
    }
    Ok(())
}

fn compare(state: &State, batch: &[Logged]) -> Result<(), Divergence> {
    let input = input_of(batch);
    let decided = decide(state, &input, batch[0].at_ms).unwrap_or_default().events;
    if decided.iter().eq(batch.iter().map(|logged| &logged.event)) {
        return Ok(());
    }
    Err(Divergence::Decided {
        position: state.control.next,
        logged: batch.iter().map(|logged| logged.event.kind()).collect(),
        decided: decided.iter().map(Event::kind).collect(),
    })
}

/// What was heard when this was decided.
fn input_of(batch: &[Logged]) -> Input {
    let block = |event: &Event| match event {
        Event::AgentMessage(AgentMessage { block })
        | Event::Thinking(Thinking { block })
        | Event::Block(Block { block })
        | Event::ToolUse(ToolUse { block, .. })
        | Event::CustomToolUse(CustomToolUse { block }) => Some(block.clone()),
        _ => None,
    };
    let blocks: Vec<_> = batch.iter().map_while(|logged| block(&logged.event)).collect();
    match batch.get(blocks.len()).map(|logged| &logged.event) {
        Some(Event::RequestEnd(RequestEnd { request, failure: Some(failure), .. })) => {
            Input::Failed { request: *request, failure: failure.clone() }
        }
        Some(Event::RequestEnd(RequestEnd { request, stop_reason: Some(reason), usage, .. })) => {
            Input::Answered { request: *request, blocks, stop_reason: reason.clone(), usage: *usage }
        }
        Some(Event::Compacted(Compacted { request, summary, usage })) => {
            let blocks = vec![serde_json::json!({ "type": "text", "text": summary })];
            Input::Answered { request: *request, blocks, stop_reason: String::new(), usage: *usage }
        }
        Some(Event::Provisioned(made)) => {
            Input::Provisioned { effect: made.effect, sandbox: made.sandbox.clone() }
        }
        Some(Event::Lost(lost)) => Input::Lost { effect: lost.effect, message: lost.message.clone() },
        Some(Event::ToolResult(ToolResult {
            call: Some(call),
            content,
            is_error,
            interrupted: false,
            ..
        })) => match batch.get(1).map(|logged| &logged.event) {
            Some(Event::Lost(lost)) if lost.effect == *call => {
                Input::Lost { effect: *call, message: lost.message.clone() }
            }
            _ => Input::Called { effect: *call, content: content.clone(), is_error: *is_error },
        },
        _ => Input::Tick,
    }
}
