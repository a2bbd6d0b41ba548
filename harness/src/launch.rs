//! `run`, `wake`, `drive`: a driver's process. First it is handed all that it needs, then it gives up the rest, then it looks at the first byte
//! that a model or a sandbox has written.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use broker_client::Client;
use harness::agent::{Agent, Budget, Hands, Policy, RULES, Workspace};
use harness::driver::{DriveError, Seen, Terms, Watcher, drive};
use harness::event::{Created, Event, StopReason, UserMessage};
use harness::hands::{self, Broker};
use harness::state::Status;
use harness::store::{Store, StoreError, now_ms};
use serde_json::{Value, json};

use crate::cli::{Drive, Output, Run};
use crate::complain;
use crate::operate::{agent_of, place};
use crate::show;

/// A broker that has gone: trying later may help (sysexits.h).
const TEMPORARY: u8 = 75;
/// How long a session is left alone after its driver ended, at first and at most.
const REST: Duration = Duration::from_millis(200);
const REST_MAX: Duration = Duration::from_secs(60);
/// The session waits for a person.
const WAITS: u8 = 3;

type Done = Result<ExitCode, String>;

/// `harness run`
pub fn run(run: Run) -> Done {
    let agent = agent(&run)?;
    let task = text_or_file(&run.task)?;
    let session = run.session.clone().map_or_else(new_name, Ok)?;
    if !is_name(&session) {
        return Err(format!("{session:?} is no session's name: 1 to 64 letters, digits, `-` and `_`"));
    }
    let message = UserMessage { content: vec![json!({ "type": "text", "text": task })] };
    let events = [Created { agent: Box::new(agent.clone()) }.into(), message.into()];
    let place = place(&run.drive.store)?;
    if run.detach {
        place.open_to_client()?.create(&session, &events)?;
        println!("{session}");
        return Ok(ExitCode::SUCCESS);
    }
    let broker = minted(&run.drive, &session, &agent)?;
    let store = place.confine()?;
    runtime()?.block_on(store.open(async |store| {
        store.create(&session, &events).await.map_err(|error| error.to_string())?;
        complain!("session {session}");
        driven(store, broker, &session, &run.drive).await
    }))
}

/// `harness wake`
pub fn wake(session: &str, options: &Drive) -> Done {
    let place = place(&options.store)?;
    let agent = agent_of(&place, session)?;
    let broker = minted(options, session, &agent)?;
    let store = place.confine()?;
    runtime()?.block_on(store.open(async |store| driven(store, broker, session, options).await))
}

/// `harness drive`: a process for each session that is due, so that none has another's rights.
pub fn drive_all(most: usize, options: &Drive) -> Done {
    let client = place(&options.store)?.open_to_client()?;
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut running: BTreeMap<String, std::process::Child> = BTreeMap::new();
    // A session that failed again is left alone for longer each time.
    let mut rests: BTreeMap<String, (u32, Instant)> = BTreeMap::new();
    let _ = sd_ready();
    loop {
        running.retain(|session, child| match child.try_wait() {
            Ok(Some(ended)) => {
                let (fails, until) = rests.entry(session.clone()).or_insert((0, Instant::now()));
                *fails = if ended.success() { 0 } else { *fails + 1 };
                *until = Instant::now() + REST.saturating_mul(1 << (*fails).min(8)).min(REST_MAX);
                false
            }
            _ => true,
        });
        let rested = |session: &String| rests.get(session).is_none_or(|(_, until)| *until <= Instant::now());
        let due = client.due(now_ms())?;
        for session in due
            .into_iter()
            .filter(|id| !running.contains_key(id) && rested(id))
            .take(most.saturating_sub(running.len()))
            .collect::<Vec<_>>()
        {
            let mut command = std::process::Command::new(&own);
            command.args(["wake", "--output", "none", "--lease", &options.lease.to_string()]);
            command.arg("--connect").arg(&options.connect.connect);
            command.arg("--store-connect").arg(&options.store.store_connect);
            if let Some(store) = &options.store.store {
                command.args(["--store", store]);
            }
            command.args(["--", &session]);
            complain!("wakes {session}");
            match command.stdin(std::process::Stdio::null()).spawn() {
                Ok(child) => drop(running.insert(session, child)),
                Err(error) => complain!("{session}: {error}"),
            }
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Tells systemd that this serves now (sd_notify(3)).
fn sd_ready() -> std::io::Result<()> {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let own = std::os::unix::net::UnixDatagram::unbound()?;
    own.send_to(b"READY=1", Path::new(&socket)).map(drop)
}

/// Drives the session until it is idle, and says how it ended.
async fn driven(store: &Store, broker: Broker, session: &str, options: &Drive) -> Done {
    let broker = Arc::new(broker);
    let lease = Duration::try_from_secs_f64(options.lease)
        .map_err(|_| "--lease is a number of seconds".to_owned())?;
    let mut said = false;
    let ended = loop {
        let terms = Terms { owner: owner(), lease, watcher: watcher(options.output) };
        match drive(store, Arc::clone(&broker), session, terms).await {
            // Who was killed has its lease until it ends.
            Err(DriveError::Store(StoreError::Taken { owner, until_ms })) => {
                if !std::mem::replace(&mut said, true) {
                    complain!(
                        "{owner} has the lease, for {} ms at most; waiting",
                        until_ms.saturating_sub(now_ms())
                    );
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            ended => break ended,
        }
    };
    match ended {
        Ok(Status::Idle(StopReason::EndTurn) | Status::Terminated) => Ok(ExitCode::SUCCESS),
        Ok(Status::Idle(StopReason::RequiresAction { .. } | StopReason::Paused)) => Ok(ExitCode::from(WAITS)),
        Ok(_) => Ok(ExitCode::FAILURE),
        Err(error @ DriveError::Broker(_)) => {
            complain!("{error}; `harness wake {session}` goes on");
            Ok(ExitCode::from(TEMPORARY))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// All that a driver asks of the broker, for this session alone.
fn minted(options: &Drive, session: &str, agent: &Agent) -> Result<Broker, String> {
    let socket = &options.connect.connect;
    let unreachable = |error: std::io::Error| {
        format!("the broker at {}: {error}; is `broker serve` running?", socket.display())
    };
    let mut user: Client = hands::connect(socket).map_err(unreachable)?;
    Broker::mint(&mut user, session, &agent.hands, &agent.model_grant).map_err(|error| error.to_string())
}

fn runtime() -> Result<Runtime, String> {
    let built =
        tokio::runtime::Builder::new_current_thread().enable_all().thread_stack_size(512 << 10).build();
    built.map(Runtime).map_err(|error| error.to_string())
}

/// One thread, and tasks that stay on it.
struct Runtime(tokio::runtime::Runtime);

impl Runtime {
    /// What is still under way when the work is done was given up: it is not waited for.
    fn block_on<T>(self, work: impl Future<Output = T>) -> T {
        let done = tokio::task::LocalSet::new().block_on(&self.0, work);
        self.0.shutdown_background();
        done
    }
}

fn agent(run: &Run) -> Result<Agent, String> {
    let workspace = run.workspace.as_deref().map(workspace).transpose()?;
    let tools = match &run.tools {
        Some(tools) => tools.clone(),
        None => std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("harness-tools"),
    };
    let custom_tools: Vec<Value> = match &run.custom_tools {
        Some(file) => {
            let said = |error: String| format!("{}: {error}", file.display());
            let text = std::fs::read_to_string(file).map_err(|error| said(error.to_string()))?;
            serde_json::from_str(&text).map_err(|error| said(error.to_string()))?
        }
        None => Vec::new(),
    };
    let asks = run.ask.iter().map(|tool| (tool.clone(), Policy::AlwaysAsk));
    let allows = run.allow.iter().map(|tool| (tool.clone(), Policy::AlwaysAllow));
    Ok(Agent {
        rules: RULES,
        model: run.model.clone(),
        max_tokens: run.max_tokens,
        system: run.system.as_deref().map(text_or_file).transpose()?,
        model_grant: run.model_grant.clone(),
        hands: Hands {
            policy: run.policy.clone(),
            grants: run.grants.clone(),
            workspace,
            tools: tools.display().to_string(),
            keep: run.keep.clone(),
        },
        permissions: asks.chain(allows).collect(),
        custom_tools,
        budget: Budget {
            tokens: run.budget_tokens,
            wall_ms: run.budget_seconds.map(|seconds| seconds.saturating_mul(1000)),
            tool_calls: run.budget_calls,
        },
        context_tokens: run.context_tokens,
        attempts: run.attempts.max(1),
        seed: u64::from_le_bytes(random()?),
    })
}

fn workspace(text: &str) -> Result<Workspace, String> {
    let (directory, read_only) = match text.rsplit_once(':') {
        Some((directory, "ro")) => (directory, true),
        Some((directory, "rw")) => (directory, false),
        _ => (text, false),
    };
    let found =
        std::fs::canonicalize(directory).map_err(|error| format!("--workspace {directory}: {error}"))?;
    let directory =
        found.to_str().ok_or_else(|| format!("--workspace {directory}: its name is not UTF-8"))?.to_owned();
    Ok(Workspace { directory, read_only })
}

fn text_or_file(text: &str) -> Result<String, String> {
    let path = PathBuf::from(text);
    if text.len() < 4096 && path.is_file() {
        return std::fs::read_to_string(&path).map_err(|error| format!("{text}: {error}"));
    }
    Ok(text.to_owned())
}

fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    let flags = rustix::rand::GetRandomFlags::empty();
    match rustix::rand::getrandom(&mut bytes, flags) {
        Ok(count) if count == N => Ok(bytes),
        _ => Err("the kernel gives no random bytes".to_owned()),
    }
}

fn new_name() -> Result<String, String> {
    Ok(random::<6>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether a session may be called so.
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

fn owner() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}:{}", std::process::id())
}

/// Prints what happens: the model's words as they come, everything else as it is logged.
fn watcher(output: Output) -> Watcher {
    let streamed = Mutex::new(false);
    Arc::new(move |seen| {
        let mut streamed = streamed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = std::io::stdout().lock();
        // Whoever has stopped reading does not stop the session.
        let _ = match (output, seen) {
            (Output::None, _) | (Output::Json, Seen::Words(_)) => Ok(()),
            (Output::Json, Seen::Event(position, event)) => {
                writeln!(out, "{}", crate::operate::line(position, event))
            }
            (Output::Text, Seen::Words(words)) => {
                *streamed = true;
                write!(out, "{}", show::tame(words)).and_then(|()| out.flush())
            }
            (Output::Text, Seen::Event(_, Event::AgentMessage(_))) if *streamed => Ok(()),
            (Output::Text, Seen::Event(position, event)) => {
                let end = if std::mem::take(&mut *streamed) { "\n" } else { "" };
                match show::event(position, event) {
                    Some(line) => writeln!(out, "{end}{line}"),
                    None => write!(out, "{end}"),
                }
            }
        };
    })
}
