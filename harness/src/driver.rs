//! Drives a session: takes its lease, follows its log, and then, again and again: decide, append, perform, hear what came of it. This is the
//! only loop. A driver keeps nothing that the log does not say: it can be killed anywhere, and the next one goes on.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::agent::Agent;
use crate::decide::{Decision, Divergence, Effect, Input, Logged, Stale, decide, replay, under_way};
use crate::event::{ErrorKind, Event, Failure, Position};
use crate::hands::{Broker, HandError, Said};
use crate::model;
use crate::state::{Hand, State, Status};
use crate::store::{Slice, Store, StoreError, Writer, now_ms};

/// How long what is given up in sandboxes may take to end.
const CANCEL_TIME: Duration = Duration::from_secs(60);
/// The most events that `session_events` gives at once.
const EVENTS_READ_MAX: u64 = 20;
/// The most bytes of them.
const EVENTS_READ_BYTES_MAX: usize = 100 << 10;

/// What whoever looks on sees.
pub enum Seen<'a> {
    /// An event that is in the log.
    Event(Position, &'a Event),
    /// A piece of the model's words, before they are in the log.
    Words(&'a str),
}

/// Looks on.
pub type Watcher = Arc<dyn Fn(Seen<'_>) + Send + Sync>;

/// Why a driver stopped before the session was idle.
#[derive(Debug)]
pub enum DriveError {
    /// The store.
    Store(StoreError),
    /// The log is not what these rules come to.
    Diverged(Divergence),
    /// The broker has gone.
    Broker(String),
}

impl std::fmt::Display for DriveError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DriveError::Store(error) => error.fmt(out),
            DriveError::Diverged(why) => write!(out, "the log cannot be followed: {why}"),
            DriveError::Broker(why) => out.write_str(why),
        }
    }
}

impl From<StoreError> for DriveError {
    fn from(error: StoreError) -> DriveError {
        DriveError::Store(error)
    }
}

/// How a session is driven.
pub struct Terms {
    /// Who drives, for whoever comes too.
    pub owner: String,
    /// How long the lease lasts that is not renewed.
    pub lease: Duration,
    /// Looks on.
    pub watcher: Watcher,
}

/// Drives a session until it is idle.
///
/// # Errors
/// Where it cannot go on; whatever that was, any driver may wake the session later.
pub async fn drive(
    store: &Store,
    broker: Arc<Broker>,
    session: &str,
    terms: Terms,
) -> Result<Status, DriveError> {
    let span_ms = u64::try_from(terms.lease.as_millis()).unwrap_or(u64::MAX);
    let epoch = store.lease(session, &terms.owner, span_ms).await?;
    let mut driver = Driver {
        store,
        broker,
        session,
        epoch,
        terms,
        span_ms,
        state: Rc::default(),
        tasks: JoinSet::new(),
        aborts: BTreeMap::new(),
        cancels: JoinSet::new(),
    };
    let driven = driver.wake().await;
    // Whoever stopped something wants it stopped, not only written down.
    let all = async { while driver.cancels.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(CANCEL_TIME, all).await;
    let wanted_ms = match (&driven, &driver.state.control.status) {
        (Ok(()), Status::Idle(_) | Status::Terminated) => None,
        _ => Some(0),
    };
    // Where the lease is lost it is another's to give back.
    let _ = store.release(session, epoch, wanted_ms).await;
    driven.map(|()| driver.state.control.status.clone())
}

struct Driver<'a> {
    store: &'a Store,
    broker: Arc<Broker>,
    session: &'a str,
    epoch: u64,
    terms: Terms,
    span_ms: u64,
    state: Rc<State>,
    tasks: JoinSet<Result<Input, HandError>>,
    aborts: BTreeMap<Position, AbortHandle>,
    /// What is being ended in sandboxes.
    cancels: JoinSet<()>,
}

impl Driver<'_> {
    async fn wake(&mut self) -> Result<(), DriveError> {
        let mut changes = self.store.changes();
        self.state = Rc::new(follow(self.store, self.session).await?);
        self.end_strays().await?;
        let pending = under_way(&self.state.control);
        let renew_every = self.terms.lease / 3;
        let mut renew = Instant::now() + renew_every;
        let mut heard = Some(Input::Tick);
        for effect in pending {
            match effect {
                // What the model had said is lost with whoever heard it.
                Effect::Request { id, .. } => {
                    heard = Some(Input::Failed { request: id, failure: interrupted() })
                }
                other => self.perform(other),
            }
        }
        loop {
            if let Some(input) = heard.take() {
                self.step(&input).await?;
            }
            if self.tasks.is_empty()
                && matches!(self.state.control.status, Status::Idle(_) | Status::Terminated)
            {
                return Ok(());
            }
            let due = match self.state.control.status {
                Status::Rescheduled(until_ms) => {
                    Some(Instant::now() + Duration::from_millis(until_ms.saturating_sub(now_ms())))
                }
                _ => None,
            };
            heard = tokio::select! {
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => match done {
                    Ok(Ok(input)) => Some(input),
                    Ok(Err(error)) => return Err(DriveError::Broker(error.to_string())),
                    // It was given up.
                    Err(_) => None,
                },
                _ = changes.changed() => self.catch_up().await?.then_some(Input::Tick),
                () = sleep_until(renew) => {
                    self.store.renew(self.session, self.epoch, self.span_ms).await?;
                    renew = Instant::now() + renew_every;
                    None
                }
                () = sleep_until(due.unwrap_or(renew)), if due.is_some() => Some(Input::Tick),
            };
        }
    }

    /// Decide, append, perform. Where others have appended meanwhile, it is decided again.
    async fn step(&mut self, input: &Input) -> Result<(), DriveError> {
        loop {
            let at_ms = now_ms();
            let Decision { events, effects } = match decide(&self.state, input, at_ms) {
                Ok(decision) => decision,
                Err(Stale) => return Ok(()),
            };
            if events.is_empty() {
                return Ok(());
            }
            let writer = Writer::Driver { epoch: self.epoch, expected: self.state.control.next };
            match self.store.append(self.session, writer, &events, at_ms).await {
                Ok(_) => {}
                Err(StoreError::Moved(_)) => {
                    self.catch_up().await?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            for event in events {
                self.follow(&Logged { batch: 0, at_ms, event })?;
            }
            effects.into_iter().for_each(|effect| self.perform(effect));
            return Ok(());
        }
    }

    fn follow(&mut self, logged: &Logged) -> Result<(), DriveError> {
        (self.terms.watcher)(Seen::Event(self.state.control.next, &logged.event));
        let state = Rc::make_mut(&mut self.state);
        state
            .apply(&logged.event, logged.at_ms)
            .map_err(|why| DriveError::Diverged(Divergence::Impossible(why)))
    }

    /// Follows what others have appended; whether they have.
    async fn catch_up(&mut self) -> Result<bool, DriveError> {
        let records = self.store.slice(self.session, self.state.control.next, u64::MAX).await?.records;
        for record in &records {
            // Only who has a newer lease appends as a driver.
            if record.epoch != 0 {
                return Err(StoreError::Lost.into());
            }
            self.follow(&record.logged(self.session)?)?;
        }
        Ok(!records.is_empty())
    }

    async fn end_strays(&self) -> Result<(), DriveError> {
        let known: Vec<String> =
            self.state.control.hands.values().filter_map(ready).map(str::to_owned).collect();
        let broker = Arc::clone(&self.broker);
        let ended = tokio::task::spawn_blocking(move || {
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            broker.end_strays(&known)
        });
        match ended.await {
            Ok(Err(HandError::Gone(why))) => Err(DriveError::Broker(why)),
            _ => Ok(()),
        }
    }

    /// Begins an effect; what comes of it is heard later.
    fn perform(&mut self, effect: Effect) {
        let control = &self.state.control;
        let Some((agent, _)) = &control.agent else { return };
        let (agent, broker) = (Arc::clone(agent), Arc::clone(&self.broker));
        let handle = match effect {
            Effect::Request { id, purpose } => {
                let body = self.state.conversation.request(&agent, purpose);
                let watcher = Arc::clone(&self.terms.watcher);
                let task = self.tasks.spawn_local(async move { request(broker, id, body, &watcher).await });
                (id, task)
            }
            Effect::Provision { id } => (id, self.tasks.spawn_local(provision(broker, id, agent))),
            Effect::Call { id, tool_use } => {
                let Some(wanted) = control.uses.get(&tool_use) else { return };
                let input = self.state.conversation.input_of(tool_use);
                match &wanted.hand {
                    None => {
                        let (store, session) = (self.store.clone(), self.session.to_owned());
                        (
                            id,
                            self.tasks
                                .spawn_local(async move { Ok(read_log(&store, &session, id, &input).await) }),
                        )
                    }
                    Some(hand) => {
                        let sandbox = control.hands.get(hand).and_then(ready).map(str::to_owned);
                        let request = json!({ "name": wanted.tool, "input": input });
                        (id, self.tasks.spawn_local(call(broker, id, sandbox, agent, request)))
                    }
                }
            }
            Effect::Abort { id } => return self.abort(id, &agent),
        };
        self.aborts.insert(handle.0, handle.1);
    }

    fn abort(&mut self, id: Position, agent: &Arc<Agent>) {
        if let Some(task) = self.aborts.remove(&id) {
            task.abort();
        }
        let sandboxes: Vec<String> =
            self.state.control.hands.values().filter_map(ready).map(str::to_owned).collect();
        let (broker, agent) = (Arc::clone(&self.broker), Arc::clone(agent));
        self.cancels.spawn_blocking(move || {
            for sandbox in sandboxes {
                broker.cancel(&sandbox, &agent.hands.tools, &effect_name(id));
            }
        });
    }
}

fn ready(hand: &Hand) -> Option<&str> {
    match hand {
        Hand::Ready(sandbox) => Some(sandbox),
        _ => None,
    }
}

/// What the broker knows an effect by.
pub fn effect_name(id: Position) -> String {
    format!("e{id}")
}

/// A session's state by its log, each record checked and each decision made again.
///
/// # Errors
/// `Store`, `Diverged`.
pub async fn follow(store: &Store, session: &str) -> Result<State, DriveError> {
    let (mut state, mut from) = (State::default(), 0);
    let mut slice = store.slice(session, from, u64::MAX).await?;
    loop {
        let Slice { mut records, is_last } = slice;
        if !is_last {
            // A batch is followed whole.
            let cut = records.last().map(|last| last.batch).unwrap_or_default();
            let cut_at = records.iter().position(|record| record.batch == cut).unwrap_or_default();
            if cut_at == 0 {
                let why = "a batch is longer than any that was written";
                return Err(StoreError::Damaged { session: session.to_owned(), position: cut, why }.into());
            }
            records.truncate(cut_at);
        }
        from += records.len() as u64;
        // The store reads on while this slice is followed: it is asked by the first poll.
        let mut ahead = pin!(store.slice(session, from, u64::MAX));
        let mut first_poll = async || {
            poll_fn(|context| match ahead.as_mut().poll(context) {
                Poll::Ready(done) => Poll::Ready(Some(done)),
                Poll::Pending => Poll::Ready(None),
            })
            .await
        };
        let early = if is_last { None } else { first_poll().await };
        let logged = records.iter().map(|record| record.logged(session)).collect::<Result<Vec<_>, _>>()?;
        replay(&mut state, &logged).map_err(DriveError::Diverged)?;
        if is_last {
            return Ok(state);
        }
        slice = match early {
            Some(done) => done?,
            None => ahead.await?,
        };
    }
}

fn interrupted() -> Failure {
    let message = "the harness ended while the model answered".to_owned();
    Failure { kind: ErrorKind::Interrupted, message, retry: true, retry_after_ms: None }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

async fn request(
    broker: Arc<Broker>,
    request: Position,
    body: Value,
    watcher: &Watcher,
) -> Result<Input, HandError> {
    let opened = blocking(move || broker.model()).await;
    let asked = match opened.unwrap_or_else(|| Err(HandError::Refused("it was given up".to_owned()))) {
        Ok((stream, host)) => {
            stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(stream)?;
            model::ask(stream, &host, &body, |words| watcher(Seen::Words(words))).await
        }
        Err(HandError::Gone(why)) => return Err(HandError::Gone(why)),
        Err(why) => Err(model::no_connection(&why)),
    };
    Ok(match asked {
        Ok(answer) => Input::Answered {
            request,
            blocks: answer.blocks,
            stop_reason: answer.stop_reason,
            usage: answer.usage,
        },
        Err(failure) => Input::Failed { request, failure },
    })
}

async fn provision(broker: Arc<Broker>, effect: Position, agent: Arc<Agent>) -> Result<Input, HandError> {
    let made = blocking(move || broker.provision(&agent.hands)).await;
    match made.unwrap_or_else(|| Err(HandError::Lost("it was given up".to_owned()))) {
        Ok(sandbox) => Ok(Input::Provisioned { effect, sandbox }),
        Err(HandError::Gone(why)) => Err(HandError::Gone(why)),
        Err(why) => Ok(Input::Lost { effect, message: why.to_string() }),
    }
}

async fn call(
    broker: Arc<Broker>,
    effect: Position,
    sandbox: Option<String>,
    agent: Arc<Agent>,
    request: Value,
) -> Result<Input, HandError> {
    let Some(sandbox) = sandbox else {
        return Ok(Input::Lost { effect, message: "the sandbox is another session's now".to_owned() });
    };
    let called =
        blocking(move || broker.call(&sandbox, &agent.hands.tools, &effect_name(effect), &request)).await;
    match called.unwrap_or_else(|| Err(HandError::Lost("it was given up".to_owned()))) {
        Ok(Said { content, is_error }) => Ok(Input::Called { effect, content, is_error }),
        Err(HandError::Gone(why)) => Err(HandError::Gone(why)),
        Err(HandError::Refused(content)) => Ok(Input::Called { effect, content, is_error: true }),
        Err(HandError::Lost(message)) => Ok(Input::Lost { effect, message }),
    }
}

/// `session_events`: the session's own log.
async fn read_log(store: &Store, session: &str, effect: Position, input: &Value) -> Input {
    let from = input["from"].as_u64().unwrap_or_default();
    let limit = input["limit"].as_u64().unwrap_or(1).clamp(1, EVENTS_READ_MAX);
    match store.read(session, from, from.saturating_add(limit)).await {
        Ok(records) => {
            let mut content = String::new();
            for record in &records {
                content += &format!(
                    "{} {} {}
",
                    record.position, record.kind, record.body
                );
                if content.len() > EVENTS_READ_BYTES_MAX {
                    let end = (0..=EVENTS_READ_BYTES_MAX).rev().find(|end| content.is_char_boundary(*end));
                    content.truncate(end.unwrap_or_default());
                    content += "
[there is more]
";
                    break;
                }
            }
            Input::Called { effect, content, is_error: false }
        }
        Err(error) => Input::Called { effect, content: error.to_string(), is_error: true },
    }
}
