//! Drivers that crash, lose their leases and believe that they still have them; models, brokers and people that answer in any order, or not;
//! and what has to be true whatever happens. Everything comes from one seed: `SIMULATION_SEED`, `SIMULATION_SCHEDULES`.

use std::collections::{BTreeMap, BTreeSet};

use harness_core::agent::{Agent, Budget, Hands, Policy, RULES};
use harness_core::decide::{Effect, Input, Logged, decide, replay, under_way};
use harness_core::event::*;
use harness_core::state::{Stage, State, Status};
use serde_json::{Value, json};

/// As many steps has a schedule before everybody becomes well-behaved, and as many until it has to be idle then.
const STEPS: usize = 60;
const STEPS_TO_IDLE: usize = 400;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// A driver: what it has followed, and what it waits for. It dies without a word.
struct Driver {
    epoch: u64,
    state: State,
    waits: Vec<Effect>,
}

/// The store, the broker and the clock; these do not fail.
struct World {
    random: Random,
    log: Vec<(u64, Logged)>,
    epoch: u64,
    now_ms: u64,
    drivers: Vec<Driver>,
    /// What the broker has executed, by the effect's name: what came of it.
    executed: BTreeMap<Position, (String, bool)>,
    sandboxes: usize,
    calls: usize,
}

fn agent(random: &mut Random) -> Agent {
    let budget = if random.one_in(4) {
        Budget {
            tokens: Some(400 + random.below(4000) as u64),
            wall_ms: None,
            tool_calls: Some(1 + random.below(6) as u64),
        }
    } else {
        Budget::default()
    };
    Agent {
        rules: RULES,
        model: "m".into(),
        max_tokens: 100,
        system: None,
        model_grant: "model".into(),
        hands: Hands {
            policy: "default".into(),
            grants: vec![],
            workspace: None,
            tools: "/t".into(),
            keep: "1m".into(),
        },
        permissions: [("bash".to_owned(), Policy::AlwaysAsk)].into(),
        custom_tools: vec![json!({ "name": "ticket" })],
        budget,
        context_tokens: if random.one_in(3) { 300 } else { 100_000 },
        attempts: 1 + random.below(4) as u32,
        seed: random.next(),
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let created = Created { agent: Box::new(agent(&mut random)) };
        let mut world = World {
            random,
            log: Vec::new(),
            epoch: 0,
            now_ms: 1_000_000,
            drivers: Vec::new(),
            executed: BTreeMap::new(),
            sandboxes: 0,
            calls: 0,
        };
        world.append(0, vec![created.into()]);
        world.say("begin");
        world
    }

    fn append(&mut self, epoch: u64, events: Vec<Event>) {
        let batch = self.log.len() as Position;
        for event in events {
            let own = self.log.len() as Position;
            let logged = Logged { batch: if epoch == 0 { own } else { batch }, at_ms: self.now_ms, event };
            self.log.push((epoch, logged));
        }
    }

    fn say(&mut self, text: &str) {
        self.append(0, vec![UserMessage { content: vec![json!({ "type": "text", "text": text })] }.into()]);
    }

    /// A driver that has taken the lease and followed the log, and takes up what was under way.
    fn wake(&mut self) {
        self.epoch += 1;
        let mut state = State::default();
        let logged: Vec<Logged> = self.log.iter().map(|(_, logged)| logged.clone()).collect();
        if let Err(why) = replay(&mut state, &logged) {
            panic!("a log that was written cannot be followed: {why}");
        }
        let mut waits = under_way(&state.control);
        let request = waits.iter().position(|effect| matches!(effect, Effect::Request { .. }));
        let interrupted = request.map(|at| waits.remove(at));
        self.drivers.push(Driver { epoch: self.epoch, state, waits });
        let which = self.drivers.len() - 1;
        let input = match interrupted {
            Some(Effect::Request { id, .. }) => {
                Input::Failed { request: id, failure: failure(ErrorKind::Interrupted, true) }
            }
            _ => Input::Tick,
        };
        self.step(which, &input);
    }

    /// As the driver does it: decide, append under the lease, perform.
    fn step(&mut self, which: usize, input: &Input) {
        loop {
            let driver = &self.drivers[which];
            let Ok(decision) = decide(&driver.state, input, self.now_ms) else { return };
            assert!(decision.events.len() < 200, "a decision without an end");
            if decision.events.is_empty() {
                assert!(decision.effects.is_empty(), "an effect that nothing in the log says");
                return;
            }
            if driver.epoch != self.epoch {
                // It lost its lease, and finds out now.
                self.drivers.remove(which);
                return;
            }
            if driver.state.control.next != self.log.len() as Position {
                self.catch_up(which);
                continue;
            }
            let epoch = driver.epoch;
            self.append(epoch, decision.events.clone());
            let driver = &mut self.drivers[which];
            for event in &decision.events {
                if let Err(why) = driver.state.apply(event, self.now_ms) {
                    panic!("decided what cannot be: {why}");
                }
            }
            for effect in decision.effects {
                match effect {
                    Effect::Abort { id } => driver.waits.retain(|waits| name(waits) != id),
                    effect => {
                        if let Effect::Request { purpose, .. } = effect {
                            let end = self.log.iter().rev().find_map(|(_, logged)| match &logged.event {
                                Event::RequestEnd(end) => end.stop_reason.as_deref(),
                                _ => None,
                            });
                            check_request(&driver.state, purpose, end == Some("pause_turn"));
                        }
                        driver.waits.push(effect);
                    }
                }
            }
            return;
        }
    }

    fn catch_up(&mut self, which: usize) {
        let driver = &mut self.drivers[which];
        let from = driver.state.control.next as usize;
        for (epoch, logged) in &self.log[from..] {
            assert_eq!(*epoch, 0, "a driver with the lease is the only one that appends");
            driver.state.apply(&logged.event, logged.at_ms).expect("people may say anything");
        }
    }

    /// Hears that others have appended.
    fn look(&mut self, which: usize) {
        if self.drivers[which].epoch == self.epoch {
            self.catch_up(which);
            self.step(which, &Input::Tick);
        } else {
            self.drivers.remove(which);
        }
    }

    /// What comes of one effect.
    fn answer(&mut self, which: usize, good: bool) {
        let count = self.drivers[which].waits.len();
        if count == 0 {
            return;
        }
        let at = self.random.below(count);
        let effect = self.drivers[which].waits.remove(at);
        let input = match effect {
            Effect::Request { id, purpose } => self.model(id, purpose, good),
            Effect::Provision { id } if good || !self.random.one_in(4) => {
                self.sandboxes += 1;
                Input::Provisioned { effect: id, sandbox: format!("s{}", self.sandboxes) }
            }
            Effect::Provision { id } => Input::Lost { effect: id, message: "no room".into() },
            Effect::Call { id, .. } if !good && self.random.one_in(5) => {
                Input::Lost { effect: id, message: "it died".into() }
            }
            Effect::Call { id, .. } => {
                // The broker does what it was asked under one name once.
                let calls = &mut self.calls;
                let (content, is_error) = self.executed.entry(id).or_insert_with(|| {
                    *calls += 1;
                    (format!("result of {id}"), id % 3 == 0)
                });
                Input::Called { effect: id, content: content.clone(), is_error: *is_error }
            }
            Effect::Abort { .. } => return,
        };
        self.step(which, &input);
    }

    fn model(&mut self, request: Position, purpose: Purpose, good: bool) -> Input {
        if !good && self.random.one_in(4) {
            let kinds =
                [ErrorKind::ModelOverloaded, ErrorKind::ModelRateLimited, ErrorKind::ModelRequestFailed];
            let kind = kinds[self.random.below(3)];
            let retry = !self.random.one_in(3);
            return Input::Failed { request, failure: failure(kind, retry) };
        }
        let text = json!({ "type": "text", "text": "words ".repeat(self.random.below(40)) });
        let mut blocks = vec![text];
        if self.random.one_in(3) {
            blocks.insert(0, json!({ "type": "thinking", "thinking": "hm", "signature": "s" }));
        }
        let uses = if good || purpose == Purpose::Compaction { 0 } else { self.random.below(4) };
        for number in 0..uses {
            let tool =
                ["bash", "read", "write", "ticket", "session_events", "nonsense"][self.random.below(6)];
            let hand = if self.random.one_in(4) { "other" } else { "main" };
            blocks.push(json!({ "type": "tool_use", "id": format!("t{request}-{number}"), "name": tool, "input": { "hand": hand } }));
        }
        let stop_reason = if uses > 0 {
            "tool_use"
        } else if self.random.one_in(20) && !good {
            "pause_turn"
        } else if self.random.one_in(20) {
            "interrupted"
        } else {
            "end_turn"
        };
        let usage =
            Usage { input_tokens: self.random.below(300) as u64, output_tokens: 10, ..Usage::default() };
        Input::Answered { request, blocks, stop_reason: stop_reason.into(), usage }
    }

    /// Somebody who is not the driver does something.
    fn person(&mut self, good: bool) {
        let state = self.latest();
        let waiting = |stage: Stage| {
            state
                .control
                .uses
                .iter()
                .filter(move |(_, wanted)| wanted.stage == stage)
                .map(|(at, _)| *at)
                .collect::<Vec<_>>()
        };
        let (asks, customs) = (waiting(Stage::Asks), waiting(Stage::Custom));
        let any = self.random.below(self.log.len()) as Position;
        if good {
            let allow =
                |tool_use| Confirmation { tool_use, result: Verdict::Allow, deny_message: None }.into();
            let answer = |tool_use| CustomResult { tool_use, content: "done".into(), is_error: false }.into();
            let resume = state.control.paused.then(|| Resume {}.into());
            let all: Vec<Event> =
                asks.into_iter().map(allow).chain(customs.into_iter().map(answer)).chain(resume).collect();
            return self.append(0, all);
        }
        let event = match self.random.below(9) {
            0 | 1 => return self.say("more"),
            2 => Interrupt {}.into(),
            3 => Pause {}.into(),
            4 => Resume {}.into(),
            5 | 6 => {
                let tool_use = asks.first().copied().unwrap_or(any);
                let result = if self.random.one_in(3) { Verdict::Deny } else { Verdict::Allow };
                Confirmation { tool_use, result, deny_message: None }.into()
            }
            7 => CustomResult {
                tool_use: customs.first().copied().unwrap_or(any),
                content: "done".into(),
                is_error: false,
            }
            .into(),
            _ => {
                let hand = if self.random.one_in(2) { "main" } else { "other" };
                Given { hand: hand.into(), to: "x".into() }.into()
            }
        };
        self.append(0, vec![event]);
    }

    fn latest(&self) -> State {
        let mut state = State::default();
        for (_, logged) in &self.log {
            state.apply(&logged.event, logged.at_ms).expect("a log that was written");
        }
        state
    }

    fn disorder(&mut self) {
        let count = self.drivers.len();
        let which = self.random.below(count);
        match self.random.below(12) {
            0 if count > 0 => drop(self.drivers.remove(which)),
            0 | 1 if count < 3 => self.wake(),
            2 | 3 => self.person(false),
            4 => self.now_ms += 1 << self.random.below(18),
            5 if count > 0 => self.step(which, &Input::Tick),
            6 if count > 0 => self.look(which),
            7 if count > 0 => {
                // An answer to something that nobody asked, or not any more.
                let effect = self.random.below(self.log.len()) as Position;
                let stray = [
                    Input::Called { effect, content: "stray".into(), is_error: false },
                    Input::Lost { effect, message: "stray".into() },
                    Input::Provisioned { effect, sandbox: "stray".into() },
                ];
                let input = &stray[self.random.below(3)];
                let control = &self.drivers[which].state.control;
                let waited = self.drivers[which].waits.iter().any(|waits| name(waits) == effect);
                if !waited && !under_way(control).iter().any(|pending| name(pending) == effect) {
                    assert!(
                        decide(&self.drivers[which].state, input, self.now_ms).is_err(),
                        "a stray answer is taken"
                    );
                }
            }
            _ if count > 0 => self.answer(which, false),
            _ => self.wake(),
        }
    }

    /// Everybody answers, nobody dies: it has to come to rest.
    fn settle(&mut self) {
        self.drivers.clear();
        self.wake();
        for _ in 0..STEPS_TO_IDLE {
            if self.drivers.is_empty() {
                self.wake();
            }
            self.person(true);
            self.now_ms += 20 * 60_000;
            self.look(0);
            if !self.drivers.is_empty() {
                self.answer(0, true);
            }
            let rests = |driver: &Driver| {
                driver.waits.is_empty() && matches!(driver.state.control.status, Status::Idle(_))
            };
            if self.drivers.first().is_some_and(rests)
                && !matches!(
                    self.drivers[0].state.control.status,
                    Status::Idle(StopReason::RequiresAction { .. } | StopReason::Paused)
                )
            {
                return;
            }
        }
        panic!("it never comes to rest: {:?}", self.latest().control);
    }

    /// Time alone wakes nobody: what is paused stays so, also where the model had just failed.
    fn stays_at_rest(&mut self) {
        self.say("and this");
        self.drivers.clear();
        self.wake();
        self.answer_all_badly();
        self.append(0, vec![Pause {}.into()]);
        self.look(0);
        let events = self.log.len();
        for _ in 0..6 {
            self.now_ms += 20 * 60_000;
            self.look(0);
        }
        assert_eq!(self.log.len(), events, "a session that is paused goes on: {:?}", self.latest().control);
    }

    /// Each request under way fails, and could be tried again.
    fn answer_all_badly(&mut self) {
        let waits: Vec<Effect> = self.drivers[0].waits.drain(..).collect();
        for effect in waits {
            if let Effect::Request { id, .. } = effect {
                let failure = failure(ErrorKind::ModelRequestFailed, true);
                self.step(0, &Input::Failed { request: id, failure });
            }
        }
    }

    /// What a log says, whoever wrote it.
    fn check(&self) {
        let mut epochs = 0;
        let (mut allowed, mut asked, mut begun, mut results) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let mut state = State::default();
        for (position, (epoch, logged)) in (0_u64..).zip(&self.log) {
            state.apply(&logged.event, logged.at_ms).expect("a log that was written");
            assert!(*epoch == 0 || *epoch >= epochs, "a stale driver has appended");
            epochs = epochs.max(*epoch);
            match &logged.event {
                Event::ToolUse(wanted) => {
                    assert_eq!(
                        wanted.block["name"] == "bash",
                        wanted.evaluated_permission == Permission::Ask
                    );
                    assert_eq!(
                        wanted.block["name"] == "nonsense",
                        wanted.evaluated_permission == Permission::Deny
                    );
                    match wanted.evaluated_permission {
                        Permission::Allow => drop(allowed.insert(position)),
                        Permission::Ask => drop(asked.insert(position)),
                        Permission::Deny => {}
                    }
                }
                Event::Confirmation(answer)
                    if answer.result == Verdict::Allow && asked.contains(&answer.tool_use) =>
                {
                    allowed.insert(answer.tool_use);
                }
                // The first answer counts.
                Event::Confirmation(answer)
                    if answer.result == Verdict::Deny
                        && !begun.contains(&answer.tool_use)
                        && !allowed.contains(&answer.tool_use) =>
                {
                    asked.remove(&answer.tool_use);
                }
                Event::Call(call) => {
                    assert!(
                        allowed.contains(&call.tool_use),
                        "{} runs, and nobody has allowed it",
                        call.tool_use
                    );
                    assert!(begun.insert(call.tool_use), "{} runs twice", call.tool_use);
                }
                Event::Idle(Idle { stop_reason: StopReason::EndTurn }) => {
                    let control = &state.control;
                    assert!(
                        control.uses.is_empty() && control.request.is_none(),
                        "it rests, and something is under way"
                    );
                }
                Event::ToolResult(result) => *results.entry(result.tool_use).or_insert(0) += 1,
                _ => {}
            }
        }
        let (agent, _) = state.control.agent.as_ref().expect("it was made");
        assert!(
            agent.budget.tool_calls.is_none_or(|most| begun.len() as u64 <= most),
            "more calls than it may"
        );
        assert!(results.values().all(|count| *count == 1), "a call has two results");
        assert_eq!(self.calls, self.executed.len());
        let known = |id: &Position| matches!(self.log[*id as usize].1.event, Event::Call(_));
        assert!(self.executed.keys().all(known), "something was executed that the log does not say");
    }
}

fn name(effect: &Effect) -> Position {
    match effect {
        Effect::Request { id, .. }
        | Effect::Provision { id }
        | Effect::Call { id, .. }
        | Effect::Abort { id } => *id,
    }
}

fn failure(kind: ErrorKind, retry: bool) -> Failure {
    Failure { kind, message: "no".into(), retry, retry_after_ms: None }
}

/// What the API demands of a request, as its reference says it.
fn check_request(state: &State, purpose: Purpose, paused: bool) {
    let (agent, _) = state.control.agent.as_ref().expect("it was made");
    let body = state.conversation.request(agent, purpose);
    let messages = body["messages"].as_array().expect("messages");
    assert!(
        !messages.is_empty() && messages[0]["role"] == "user",
        "a conversation begins with the user: {body}"
    );
    for (at, message) in messages.iter().enumerate() {
        assert_eq!(message["role"], ["user", "assistant"][at % 2], "{body}");
        let content = message["content"].as_array().expect("content");
        assert!(!content.is_empty(), "{body}");
        let of = |message: Option<&Value>, kind: &str, field: &str| -> Vec<Value> {
            let blocks =
                message.and_then(|message| message["content"].as_array()).cloned().unwrap_or_default();
            blocks
                .into_iter()
                .filter(|block| block["type"] == kind)
                .map(|block| block[field].clone())
                .collect()
        };
        let uses = of(Some(message), "tool_use", "id");
        let results = of(messages.get(at + 1), "tool_result", "tool_use_id");
        assert_eq!(
            uses, results,
            "each call has its result in the next message, and nothing else has: {body}"
        );
        let first_other =
            content.iter().position(|block| block["type"] != "tool_result").unwrap_or(content.len());
        assert!(
            content[first_other..].iter().all(|block| block["type"] != "tool_result"),
            "results come first: {body}"
        );
    }
    // Only a turn that the server has paused goes on from its own words.
    assert!(paused || messages.last().is_some_and(|last| last["role"] == "user"), "{body}");
}

#[test]
fn whatever_happens_a_session_stays_whole() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let random = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
    let (seed, schedules) =
        (number("SIMULATION_SEED").unwrap_or(random), number("SIMULATION_SCHEDULES").unwrap_or(100_000));
    println!("SIMULATION_SEED={seed} SIMULATION_SCHEDULES={schedules}");
    let mut events = 0;
    for schedule in 0..schedules {
        let own = Random(seed ^ schedule.wrapping_mul(0xd134_2543_de82_ef95)).next();
        let ran = std::panic::catch_unwind(|| {
            let mut world = World::new(own);
            for _ in 0..STEPS {
                world.disorder();
            }
            world.check();
            world.settle();
            world.check();
            world.stays_at_rest();
            world.log.len()
        });
        match ran {
            Ok(count) => events += count,
            Err(_) => {
                panic!("SIMULATION_SEED={seed}: schedule {schedule} of {schedules} went wrong; see above")
            }
        }
    }
    println!("{schedules} schedules, {events} events");
}
