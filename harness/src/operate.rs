//! What people and programs do with sessions beside driving them: look, say, answer, pass on.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use broker_client::grant::{Name, Narrowing};
use broker_client::protocol::{Derive, Derived, Minted, Named, Narrow, Provisioned};
use broker_client::{Client, Door};
use harness::agent::Agent;
use harness::driver::follow;
use harness::event::{
    Confirmation, CustomResult, Event, Given, Interrupt, Pause, Position, Received, Resume, UserMessage,
    Verdict,
};
use harness::hands;
use harness::state::{Hand, Stage, State, Status};
use harness::store::{Connector, Postgres, Record, Session, Store, StoreError, Writer, now_ms};
use serde_json::{Value, json};

use crate::cli::{self, Command};
use crate::show;

/// Where sessions are.
pub enum Place {
    File(PathBuf),
    /// Behind a grant: its name, and as whom in which database.
    Grant {
        grant: String,
        user: String,
        database: String,
        socket: PathBuf,
    },
}

/// Where the options say that sessions are.
pub fn place(options: &cli::Store) -> Result<Place, String> {
    let Some(text) = &options.store else {
        let state = std::env::var_os("STATE_DIRECTORY").or_else(|| {
            std::env::var_os("XDG_STATE_HOME").map(|home| Path::new(&home).join("harness").into())
        });
        let home =
            || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state/harness").into());
        let folder: PathBuf = state.or_else(home).ok_or("where are sessions? --store sqlite:PATH")?.into();
        std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        return Ok(Place::File(folder.join("sessions.sqlite")));
    };
    match text.split_once(':') {
        Some(("sqlite", path)) if !path.is_empty() => Ok(Place::File(path.into())),
        Some(("grant", rest)) => {
            let (grant, options_text) = rest.split_once('?').unwrap_or((rest, ""));
            let (mut user, mut database) = ("harness".to_owned(), "harness".to_owned());
            for pair in options_text.split('&').filter(|pair| !pair.is_empty()) {
                match pair.split_once('=') {
                    Some(("user", value)) => value.clone_into(&mut user),
                    Some(("database", value)) => value.clone_into(&mut database),
                    _ => return Err(format!("--store: {pair:?} is not known; `user=` and `database=` are")),
                }
            }
            Ok(Place::Grant {
                grant: grant.to_owned(),
                user,
                database,
                socket: options.store_connect.clone(),
            })
        }
        _ => Err(format!("--store {text:?}: `sqlite:PATH` or `grant:NAME?user=USER&database=NAME`")),
    }
}

/// A store that is still to be opened, once this process is confined.
pub enum Closed {
    File(PathBuf),
    Grant { connector: Connector, user: String, database: String },
}

impl Place {
    fn closed(&self) -> Result<Closed, String> {
        match self {
            Place::File(path) => Ok(Closed::File(path.clone())),
            Place::Grant { grant, user, database, socket } => {
                let grant: Name = grant.parse()?;
                let unreachable = |error: String| format!("the store behind grant {grant}: {error}");
                let mut client = hands::connect(socket).map_err(|error| unreachable(error.to_string()))?;
                let wish = Derive { grant: grant.clone(), by: Some(Narrowing::default()) };
                let (_, door) = client
                    .call_for_descriptor::<Derived>("Derive", &wish)
                    .map_err(|error| unreachable(error.to_string()))?;
                let door = Arc::new(Door::from(door));
                let connector: Connector = Arc::new(move || {
                    let door = Arc::clone(&door);
                    Box::pin(async move {
                        let opened = tokio::task::spawn_blocking(move || door.open(None)).await;
                        let stream = opened.map_err(std::io::Error::other)??;
                        stream.set_nonblocking(true)?;
                        tokio::net::UnixStream::from_std(stream)
                    })
                });
                Ok(Closed::Grant { connector, user: user.clone(), database: database.clone() })
            }
        }
    }

    /// Gives up what a driver does not need; what it has read until now, a person wrote.
    pub fn confine(&self) -> Result<Closed, String> {
        let closed = self.closed()?;
        let folder = match &closed {
            Closed::File(path) => {
                let folder =
                    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
                Some(folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?)
            }
            Closed::Grant { .. } => None,
        };
        broker_client::confine_client(folder.as_deref())
            .map_err(|error| format!("this process cannot be confined: {error}"))?;
        Ok(closed)
    }

    /// To look and to say something, one thing after the other.
    pub fn open_to_client(&self) -> Result<Sessions, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let closed = self.closed()?;
        let store = runtime.block_on(closed.opened())?;
        Ok(Sessions { runtime, store })
    }
}

impl Closed {
    async fn opened(self) -> Result<Store, String> {
        let store = match self {
            Closed::File(path) => Store::sqlite(&path),
            Closed::Grant { connector, user, database } => Postgres::open(connector, &user, &database)
                .await
                .map(|store| Store::Postgres(Box::new(store))),
        };
        store.map_err(|error| error.to_string())
    }

    /// Opens it, and does `work` with it.
    pub async fn open(
        self,
        work: impl AsyncFnOnce(&Store) -> Result<ExitCode, String>,
    ) -> Result<ExitCode, String> {
        work(&self.opened().await?).await
    }
}

/// Sessions, to somebody who does not drive them.
pub struct Sessions {
    runtime: tokio::runtime::Runtime,
    store: Store,
}

impl Sessions {
    fn wait<T>(&self, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, String> {
        self.runtime.block_on(work).map_err(|error| error.to_string())
    }

    /// Makes one.
    pub fn create(&self, id: &str, events: &[Event]) -> Result<(), String> {
        self.wait(self.store.create(id, events))
    }

    /// Those that somebody should drive, and nobody does.
    pub fn due(&self, now: u64) -> Result<Vec<String>, String> {
        let due = |session: &Session| {
            session.wanted_ms.is_some_and(|wanted| wanted <= now) && session.lease_until_ms <= now
        };
        Ok(self.wait(self.store.sessions())?.into_iter().filter(due).map(|session| session.id).collect())
    }

    fn state(&self, id: &str) -> Result<State, String> {
        self.runtime.block_on(follow(&self.store, id)).map_err(|error| error.to_string())
    }

    fn say(&self, id: &str, event: Event) -> Result<(), String> {
        self.wait(self.store.append(id, Writer::Client, &[event], now_ms())).map(drop)
    }
}

/// What a session was made with.
pub fn agent_of(place: &Place, session: &str) -> Result<Agent, String> {
    let sessions = place.open_to_client()?;
    let first = sessions.wait(sessions.store.read(session, 0, 1))?;
    match first.first().map(|record| Event::parse(&record.kind, &record.body)) {
        Some(Ok(Event::Created(created))) => Ok(*created.agent),
        _ => Err(format!("session {session} does not begin as a session does")),
    }
}

/// One event as a JSON line.
pub fn line(position: Position, event: &Event) -> String {
    let mut value = json!({ "position": position, "type": event.kind() });
    if let (Some(all), Ok(Value::Object(body))) = (value.as_object_mut(), serde_json::from_str(&event.body()))
    {
        all.extend(body);
    }
    show::escaped(&value.to_string())
}

fn record_line(record: &Record) -> String {
    let mut value = json!({ "position": record.position, "type": record.kind, "at_ms": record.at_ms });
    if let (Some(all), Ok(Value::Object(body))) = (value.as_object_mut(), serde_json::from_str(&record.body))
    {
        all.extend(body);
    }
    show::escaped(&value.to_string())
}

/// Everything but driving.
pub fn run(command: Command) -> Result<ExitCode, String> {
    match command {
        Command::List { store, json } => list(&place(&store)?.open_to_client()?, json),
        Command::Show { session, store, json } => show_one(&place(&store)?.open_to_client()?, &session, json),
        Command::Events { session, from, to, kinds, reverse, follow, store } => {
            let sessions = place(&store)?.open_to_client()?;
            events(&sessions, &session, from, to, &kinds, Order { reverse, follow })
        }
        Command::Send { session, text, store } => {
            let content = vec![json!({ "type": "text", "text": text_or_input(text)? })];
            place(&store)?.open_to_client()?.say(&session, UserMessage { content }.into())
        }
        Command::Interrupt { session, store } => {
            place(&store)?.open_to_client()?.say(&session, Interrupt {}.into())
        }
        Command::Pause { session, store } => place(&store)?.open_to_client()?.say(&session, Pause {}.into()),
        Command::Resume { session, store } => {
            place(&store)?.open_to_client()?.say(&session, Resume {}.into())
        }
        Command::Approve { session, event, store } => {
            let answer = Confirmation { tool_use: event, result: Verdict::Allow, deny_message: None };
            answer_call(&place(&store)?.open_to_client()?, &session, event, &Stage::Asks, answer.into())
        }
        Command::Deny { session, event, reason, store } => {
            let answer = Confirmation { tool_use: event, result: Verdict::Deny, deny_message: reason };
            answer_call(&place(&store)?.open_to_client()?, &session, event, &Stage::Asks, answer.into())
        }
        Command::Answer { session, event, text, error, store } => {
            let answer = CustomResult { tool_use: event, content: text_or_input(text)?, is_error: error };
            answer_call(&place(&store)?.open_to_client()?, &session, event, &Stage::Custom, answer.into())
        }
        Command::Hand { session, sandbox, to, name, connect, store } => {
            hand(&place(&store)?.open_to_client()?, &connect.connect, &session, &sandbox, &to, &name)
        }
        Command::Export { session, store } => export(&place(&store)?.open_to_client()?, &session),
        Command::Import { file, store } => import(&place(&store)?.open_to_client()?, &file),
        _ => Ok(()),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn text_or_input(text: String) -> Result<String, String> {
    if text != "-" {
        return Ok(text);
    }
    let mut read = String::new();
    std::io::stdin().read_to_string(&mut read).map_err(|error| format!("standard input: {error}"))?;
    Ok(read)
}

/// Prints; a reader that has gone is the end of it.
fn print(text: &str) -> Result<(), String> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(format!("standard output: {error}"))
        }
        _ => Ok(()),
    }
}

fn list(sessions: &Sessions, json: bool) -> Result<(), String> {
    let all = sessions.wait(sessions.store.sessions())?;
    if json {
        return print(&(serde_json::to_string_pretty(&all).map_err(|error| error.to_string())? + "\n"));
    }
    let mut text = format!("{:<24} {:>8} {:<8} DRIVER\n", "SESSION", "EVENTS", "STATE");
    let now = now_ms();
    for session in all {
        let driven = session.lease_until_ms > now;
        let state = match (driven, session.wanted_ms) {
            (true, _) => "driven",
            (false, Some(_)) => "due",
            (false, None) => "idle",
        };
        let owner = session.owner.filter(|_| driven).unwrap_or_default();
        text += &format!(
            "{:<24} {:>8} {state:<8} {}\n",
            show::tame(&session.id),
            session.events,
            show::tame(&owner)
        );
    }
    print(&text)
}

fn show_one(sessions: &Sessions, id: &str, json: bool) -> Result<(), String> {
    let state = sessions.state(id)?;
    let control = &state.control;
    let status = match &control.status {
        Status::Running => "running".to_owned(),
        Status::Idle(reason) => format!("idle: {}", serde_json::to_string(reason).unwrap_or_default()),
        Status::Rescheduled(until) => format!("waits until {until} ms since 1970"),
        Status::Terminated => "terminated".to_owned(),
    };
    let hand = |(name, hand): (&String, &Hand)| match hand {
        Hand::Ready(sandbox) => (name.clone(), sandbox.clone()),
        Hand::Asked(_) => (name.clone(), "(asked for)".to_owned()),
        Hand::Refused(why) => (name.clone(), format!("(refused: {why})")),
    };
    let hands: Vec<(String, String)> = control.hands.iter().map(hand).collect();
    if json {
        let hands: serde_json::Map<String, Value> =
            hands.into_iter().map(|(name, sandbox)| (name, sandbox.into())).collect();
        let shown = json!({ "session": id, "events": control.next, "status": status, "usage": control.used, "calls": control.calls, "hands": hands });
        return print(&format!("{shown:#}\n"));
    }
    let mut text = String::new();
    let mut from = 0;
    while from < control.next {
        let records = sessions.wait(sessions.store.slice(id, from, u64::MAX))?.records;
        for record in &records {
            let event = Event::parse(&record.kind, &record.body).map_err(|error| error.to_string())?;
            text.extend(show::event(record.position, &event).map(|line| line + "\n"));
        }
        from += records.len() as u64;
        if records.is_empty() {
            break;
        }
    }
    text += &format!(
        "\n{status}; {} events, {} tokens, {} calls\n",
        control.next,
        control.used.tokens(),
        control.calls
    );
    for (name, sandbox) in hands {
        text += &format!("{name}: sandbox {sandbox}\n");
    }
    print(&text)
}

struct Order {
    reverse: bool,
    follow: bool,
}

fn events(
    sessions: &Sessions,
    id: &str,
    from: Position,
    to: Option<Position>,
    kinds: &[String],
    order: Order,
) -> Result<(), String> {
    let wanted = |record: &&Record| kinds.is_empty() || kinds.contains(&record.kind);
    let mut changes = sessions.store.changes();
    let mut from = from;
    let mut all = Vec::new();
    loop {
        let records = sessions.wait(sessions.store.slice(id, from, to.unwrap_or(u64::MAX)))?.records;
        from += records.len() as u64;
        let lines = records.iter().filter(wanted).map(|record| record_line(record) + "\n");
        if order.reverse {
            all.extend(lines);
        } else {
            print(&lines.collect::<String>())?;
        }
        if !records.is_empty() {
            continue;
        }
        if !order.follow {
            all.reverse();
            return print(&all.concat());
        }
        sessions.runtime.block_on(async {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(500), changes.changed()).await;
        });
    }
}

fn answer_call(
    sessions: &Sessions,
    id: &str,
    call: Position,
    stage: &Stage,
    event: Event,
) -> Result<(), String> {
    let state = sessions.state(id)?;
    let waits = state.control.uses.get(&call).is_some_and(|wanted| wanted.stage == *stage);
    if !waits {
        let waiting: Vec<String> = state
            .control
            .uses
            .iter()
            .filter(|(_, wanted)| wanted.stage == *stage)
            .map(|(at, _)| at.to_string())
            .collect();
        let which =
            if waiting.is_empty() { "none does".to_owned() } else { format!("{} does", waiting.join(", ")) };
        return Err(format!("event {call} of session {id} waits for no such answer; {which}"));
    }
    sessions.say(id, event)
}

/// Passes a sandbox on: said in the log of who gives it, then of who gets it, then done. Whoever is killed in between leaves a sandbox that is
/// nobody's, and ends unused.
fn hand(
    sessions: &Sessions,
    socket: &Path,
    from: &str,
    hand: &str,
    to: &str,
    name: &str,
) -> Result<(), String> {
    let state = sessions.state(from)?;
    let Some(Hand::Ready(sandbox)) = state.control.hands.get(hand) else {
        let names: Vec<&str> = state.control.hands.keys().map(String::as_str).collect();
        return Err(format!("session {from} has no sandbox {hand:?}; it has: {}", names.join(", ")));
    };
    let target = sessions.state(to)?;
    if !harness::tools::is_name(name) || target.control.hands.contains_key(name) {
        return Err(format!("session {to} cannot call it {name:?}: that is no name, or taken; `--as NAME`"));
    }
    let (agent, _) = target.control.agent.ok_or("the session has no beginning")?;
    let broker = |error: broker_client::ClientError| error.to_string();
    let mut user =
        hands::connect(socket).map_err(|error| format!("the broker at {}: {error}", socket.display()))?;
    let policy = agent.hands.policy.parse().map_err(|error| format!("policy: {error}"))?;
    let narrow = Narrow { session: to.to_owned(), policies: vec![policy], grants: Vec::new() };
    let (_, channel) = user.call_for_descriptor::<Minted>("Narrow", &narrow).map_err(broker)?;
    let (_, handle) = user
        .call_for_descriptor::<Provisioned>("Handle", &Named { sandbox: sandbox.clone() })
        .map_err(broker)?;
    sessions.say(from, Given { hand: hand.to_owned(), to: to.to_owned() }.into())?;
    sessions.say(
        to,
        Received { hand: name.to_owned(), sandbox: sandbox.clone(), from: from.to_owned() }.into(),
    )?;
    // Whoever presents the handle takes it over, with the first command.
    let mut taker = Client::on(channel.into());
    hands::take(&mut taker, &handle, &format!("take-{}", now_ms())).map_err(|error| error.to_string())?;
    print(&format!("{sandbox} is {name} of session {to}\n"))
}

fn export(sessions: &Sessions, id: &str) -> Result<(), String> {
    print(&format!("{}\n", json!({ "session": id, "format": 1 })))?;
    let mut from = 0;
    loop {
        let records = sessions.wait(sessions.store.slice(id, from, u64::MAX))?.records;
        if records.is_empty() {
            return Ok(());
        }
        from += records.len() as u64;
        let lines = records.iter().map(|record| serde_json::to_string(record).map(|line| line + "\n"));
        print(&lines.collect::<Result<String, _>>().map_err(|error| error.to_string())?)?;
    }
}

fn import(sessions: &Sessions, file: &Path) -> Result<(), String> {
    let at = |line: usize, why: String| format!("{}, line {}: {why}", file.display(), line + 1);
    let open = std::fs::File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut lines = BufReader::new(open).lines().enumerate();
    let (_, head) = lines.next().ok_or_else(|| at(0, "it is empty".to_owned()))?;
    let head: Value = head
        .map_err(|error| at(0, error.to_string()))
        .and_then(|line| serde_json::from_str(&line).map_err(|error| at(0, error.to_string())))?;
    let id = head["session"]
        .as_str()
        .filter(|_| head["format"] == 1)
        .ok_or_else(|| at(0, "it is no export of a session".to_owned()))?;
    if !crate::launch::is_name(id) {
        return Err(at(0, format!("{id:?} is no session's name")));
    }
    let record = |(number, line): (usize, std::io::Result<String>)| {
        let line = line.map_err(|error| at(number, error.to_string()))?;
        serde_json::from_str::<Record>(&line).map_err(|error| at(number, error.to_string()))
    };
    let records = lines.map(record).collect::<Result<Vec<_>, _>>()?;
    sessions.wait(sessions.store.import(id, records))?;
    print(&format!("{id}\n"))
}
