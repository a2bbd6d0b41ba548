//! What a session does in the world: sandboxes and connections, asked for at the broker. Blocking; each call has a connection of its own to the
//! broker, that can do for this session and no other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use broker_client::grant::{Name, Narrowing};
use broker_client::protocol::{
    AllGrants, Derive, Derived, Directory, Execute, Executed, Minted, Mode, Named, Narrow, Progress,
    Provision, Provisioned, Sandboxes, Signal, Streams,
};
use broker_client::{Client, ClientError, Door};
use rustix::fs::{CWD, Mode as FileMode, OFlags, openat};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::agent::Hands;

/// What is read of a tool's answer, in bytes; the helper sends less.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// The longest request of a tool's, in bytes: what a pipe of an ordinary user's holds (pipe(7)), and what it holds at first.
const REQUEST_BYTES_MAX: usize = 1 << 20;
const PIPE_BYTES: usize = 64 << 10;
/// How long an answer may be on its way after the helper has ended.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a tool may take beside what it was given, and one that was given nothing.
const GRACE: Duration = Duration::from_secs(30);
const TOOL_TIME: Duration = Duration::from_secs(120);
const TOOL_TIME_MAX: Duration = Duration::from_secs(600);
/// How often it is asked whether a call of an earlier driver's has ended.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Connections that a driver of one session holds: for a call, for what comes beside it.
const CHANNELS: usize = 3;

/// Why the broker did not do it.
#[derive(Debug)]
pub enum HandError {
    /// It cannot be reached: this driver is of no use any more.
    Gone(String),
    /// It says no, and why.
    Refused(String),
    /// There is no such sandbox any more.
    Lost(String),
}

impl std::fmt::Display for HandError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            HandError::Gone(why) => write!(out, "the broker has gone: {why}"),
            HandError::Refused(why) | HandError::Lost(why) => out.write_str(why),
        }
    }
}

impl From<ClientError> for HandError {
    fn from(error: ClientError) -> HandError {
        match &error {
            ClientError::Socket(why) => HandError::Gone(why.to_string()),
            ClientError::Refused { name, parameters }
                if name == "NotStarted" && parameters["message"] == "the sandbox ended" =>
            {
                HandError::Lost("the sandbox has ended".to_owned())
            }
            ClientError::Refused { name, .. } if name == "NoSuchSandbox" => {
                HandError::Lost("the sandbox is not there any more".to_owned())
            }
            ClientError::Refused { .. } => HandError::Refused(error.to_string()),
        }
    }
}

impl From<io::Error> for HandError {
    fn from(error: io::Error) -> HandError {
        HandError::Gone(error.to_string())
    }
}

/// What came of a tool, as the helper says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// For the model.
    pub content: String,
    /// It failed.
    #[serde(default)]
    pub is_error: bool,
}

/// A door to the model's grant.
#[derive(Debug)]
struct Held {
    door: Door,
    /// The name of its host, which requests have to say.
    host: String,
}

/// The broker, to one session.
#[derive(Debug)]
pub struct Broker {
    session: String,
    channels: Mutex<Vec<Client>>,
    /// Where the model is, and under which names the broker has that.
    door: Mutex<Option<Held>>,
    model_grant: Name,
}

impl Broker {
    /// Has connections minted for `session`, with no more rights than it needs; `user` is not used after.
    ///
    /// # Errors
    /// Where the broker does not give what the session is made with.
    pub fn mint(
        user: &mut Client,
        session: &str,
        hands: &Hands,
        model_grant: &str,
    ) -> Result<Broker, HandError> {
        let name = |text: &str| text.parse::<Name>().map_err(HandError::Refused);
        let model_grant = name(model_grant)?;
        let mut grants = hands.grants.iter().map(|grant| name(grant)).collect::<Result<Vec<_>, _>>()?;
        grants.push(model_grant.clone());
        grants.sort();
        grants.dedup();
        let policy = hands
            .policy
            .parse()
            .map_err(|error| HandError::Refused(format!("policy {:?}: {error}", hands.policy)))?;
        let narrow = Narrow { session: session.to_owned(), policies: vec![policy], grants };
        let channels = (0..CHANNELS).map(|_| {
            let (_, channel) = user.call_for_descriptor::<Minted>("Narrow", &narrow)?;
            Ok(Client::on(UnixStream::from(channel)))
        });
        let channels = channels.collect::<Result<_, ClientError>>()?;
        Ok(Broker {
            session: session.to_owned(),
            channels: Mutex::new(channels),
            door: Mutex::new(None),
            model_grant,
        })
    }

    /// One call on a connection that nobody else uses meanwhile.
    fn on_channel<T>(&self, work: impl FnOnce(&mut Client) -> Result<T, HandError>) -> Result<T, HandError> {
        let taken = self.channels().pop();
        let mut channel =
            taken.ok_or_else(|| HandError::Refused("too much is under way at once".to_owned()))?;
        let done = work(&mut channel);
        if !matches!(done, Err(HandError::Gone(_))) {
            self.channels().push(channel);
        }
        done
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, Vec<Client>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A private connection to the model's host, and that one's name.
    ///
    /// # Errors
    /// `Gone`; `Refused` where the grant was revoked or does not allow it: asking again does not help.
    pub fn model(&self) -> Result<(UnixStream, String), HandError> {
        let mut held = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Held { door, host }) = held.as_ref() {
            match door.open(None) {
                Ok(connection) => return Ok((connection, host.clone())),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(HandError::Refused(error.to_string()));
                }
                // Its gateway was lost, or it was taken away: the broker knows whether there is another for us.
                Err(_) => *held = None,
            }
        }
        let Held { door, host } = held.insert(self.new_door()?);
        let opened = door.open(None).map_err(|error| HandError::Refused(error.to_string()))?;
        Ok((opened, host.clone()))
    }

    fn new_door(&self) -> Result<Held, HandError> {
        let derive = Derive { grant: self.model_grant.clone(), by: Some(Narrowing::default()) };
        self.on_channel(|client| {
            let (Derived { held: name, .. }, door) = client.call_for_descriptor("Derive", &derive)?;
            let AllGrants { grants } = client.call("ListGrants", &json!({}))?;
            let own = grants.into_iter().find(|has| has.sandbox == name);
            let own = own.ok_or_else(|| HandError::Refused("the grant ended as it was given".to_owned()))?;
            Ok(Held { door: door.into(), host: own.host })
        })
    }

    /// A sandbox, kept for as long as the session says. Its name.
    ///
    /// # Errors
    /// As the broker says.
    pub fn provision(&self, hands: &Hands) -> Result<String, HandError> {
        let refused = |error: String| HandError::Refused(error);
        let directory = match &hands.workspace {
            Some(workspace) => Some(
                openat(
                    CWD,
                    workspace.directory.as_str(),
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                    FileMode::empty(),
                )
                .map_err(|error| refused(format!("workspace {}: {error}", workspace.directory)))?,
            ),
            None => None,
        };
        let mode = |read_only| if read_only { Mode::Ro } else { Mode::Rw };
        let workspace = hands.workspace.as_ref().map(|workspace| Directory {
            descriptor: 0,
            name: workspace.directory.clone(),
            mode: mode(workspace.read_only),
        });
        let wish = Provision {
            policy: hands.policy.clone(),
            environment: Vec::new(),
            path: PATH.to_owned(),
            workspace,
            limits: None,
            grants: hands
                .grants
                .iter()
                .map(|grant| grant.parse().map_err(refused))
                .collect::<Result<_, _>>()?,
            keep: Some(
                hands.keep.parse().map_err(|_| refused(format!("keep: {:?} is no duration", hands.keep)))?,
            ),
        };
        let given: Vec<BorrowedFd<'_>> = directory.iter().map(AsFd::as_fd).collect();
        self.on_channel(|client| {
            let (made, _handle) = client.call_with::<Provisioned>("Provision", &wish, &given)?;
            Ok(made.sandbox)
        })
    }

    /// Runs a tool in a sandbox, once: where an earlier driver has begun it under the same name, its end is waited for.
    ///
    /// # Errors
    /// As the broker says; `Lost` where the sandbox has ended meanwhile.
    pub fn call(&self, sandbox: &str, tools: &str, effect: &str, request: &Value) -> Result<Said, HandError> {
        let input = request.to_string();
        let limit = limit_of(request);
        let until = Instant::now() + limit;
        self.on_channel(|client| {
            loop {
                let command = [tools, "call", effect].map(str::to_owned);
                match self.run(client, sandbox, effect, &command, input.as_bytes(), limit)? {
                    Ran::Whole { outcome, output } => {
                        return match serde_json::from_slice(&output) {
                            Ok(said) => Ok(said),
                            Err(_) => self.kept(client, sandbox, tools, effect, &outcome),
                        };
                    }
                    Ran::Earlier(Some(outcome)) => {
                        return self.kept(client, sandbox, tools, effect, &outcome);
                    }
                    Ran::Earlier(None) if Instant::now() > until => {
                        let sandbox = Named { sandbox: sandbox.to_owned() };
                        let _ = client.call::<Value>("Kill", &sandbox)?;
                        return Err(HandError::Lost(
                            "it did not end, and was ended with its sandbox".to_owned(),
                        ));
                    }
                    Ran::Earlier(None) => std::thread::sleep(ASK_AGAIN),
                }
            }
        })
    }

    /// Ends what the session's shell runs in a sandbox.
    pub fn cancel(&self, sandbox: &str, tools: &str, effect: &str) {
        let command = [tools, "cancel", effect].map(str::to_owned);
        let name = format!("{effect}-cancel");
        let _ = self.on_channel(|client| self.run(client, sandbox, &name, &command, &[], GRACE));
        // Whatever became of the helper.
        let killed =
            Signal { sandbox: sandbox.to_owned(), signal: libc::SIGKILL, effect: Some(effect.to_owned()) };
        let _ = self.on_channel(|client| Ok(client.call::<Value>("Signal", &killed)?));
    }

    /// Ends sandboxes of this session that its log does not know: a driver was killed before it could say so.
    ///
    /// # Errors
    /// As the broker says.
    pub fn end_strays(&self, known: &[&str]) -> Result<(), HandError> {
        self.on_channel(|client| {
            let Sandboxes { sandboxes } = client.call("List", &json!({}))?;
            let own = |session: Option<&str>| session == Some(self.session.as_str());
            for stray in sandboxes
                .iter()
                .filter(|sandbox| own(sandbox.session.as_deref()) && !known.contains(&sandbox.id.as_str()))
            {
                let _ = client.call::<Value>("Kill", &Named { sandbox: stray.id.clone() });
            }
            Ok(())
        })
    }
}

/// How long a tool is waited for; it ends itself before.
fn limit_of(request: &Value) -> Duration {
    let given = request["input"]["timeout_ms"].as_u64().map(Duration::from_millis);
    given.unwrap_or(TOOL_TIME).min(TOOL_TIME_MAX) + GRACE
}

/// Where commands are looked for inside.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// What came of a command.
enum Ran {
    /// It ran, now.
    Whole { outcome: Value, output: Vec<u8> },
    /// It was begun before, and has ended, or not.
    Earlier(Option<Value>),
}

impl Broker {
    /// The answer that the helper has left in the sandbox, since it could not be heard.
    fn kept(
        &self,
        client: &mut Client,
        sandbox: &str,
        tools: &str,
        effect: &str,
        outcome: &Value,
    ) -> Result<Said, HandError> {
        // Reading changes nothing: each reading has a name of its own.
        let name = format!("{effect}-read-{}", crate::store::now_ms());
        let command = [tools, "result", effect].map(str::to_owned);
        if let Ran::Whole { output, .. } = self.run(client, sandbox, &name, &command, &[], GRACE)?
            && let Ok(said) = serde_json::from_slice(&output)
        {
            return Ok(said);
        }
        let content = format!(
            "It was interrupted, and may have happened in part: what came of it is not known ({outcome})."
        );
        Ok(Said { content, is_error: true })
    }

    fn run(
        &self,
        client: &mut Client,
        sandbox: &str,
        effect: &str,
        command: &[String],
        input: &[u8],
        limit: Duration,
    ) -> Result<Ran, HandError> {
        let [(stdin, into), (from, stdout), (errors, stderr)] = [pipe()?, pipe()?, pipe()?];
        // All of it is in the pipe before anybody hears of the call: whoever is killed then has said all or nothing.
        if input.len() > REQUEST_BYTES_MAX {
            return Err(HandError::Refused(format!("a call has {REQUEST_BYTES_MAX} bytes at most")));
        }
        if input.len() > PIPE_BYTES {
            rustix::pipe::fcntl_setpipe_size(&into, REQUEST_BYTES_MAX).map_err(io::Error::from)?;
        }
        File::from(into).write_all(input)?;
        let wish = Execute {
            handle: None,
            sandbox: Some(sandbox.to_owned()),
            effect: effect.to_owned(),
            command: command.to_vec(),
            environment: Vec::new(),
            path: PATH.to_owned(),
            streams: Streams { input: Some(0), output: Some(1), error: Some(2) },
        };
        client.send("Execute", &wish, true, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
        drop((stdin, stdout, stderr));
        let (first, continues) = client.reply::<Executed>()?;
        if !continues {
            return Ok(Ran::Earlier(first.outcome.filter(|_| first.state == Progress::Finished)));
        }
        let output = read_all(from);
        drop(read_all(errors));
        let ended = self.end_of(client, sandbox, limit)?;
        let outcome = ended.outcome.unwrap_or_default();
        Ok(Ran::Whole { outcome, output: drained(output) })
    }

    /// The end of a command, which has to come: a sandbox whose processes hold it up is ended.
    fn end_of(&self, client: &mut Client, sandbox: &str, limit: Duration) -> Result<Executed, HandError> {
        client.wait_for(Some(limit))?;
        let mut ended = client.reply::<Executed>();
        if matches!(&ended, Err(ClientError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock) {
            let _ = self
                .on_channel(|other| Ok(other.call::<Value>("Kill", &Named { sandbox: sandbox.to_owned() })?));
            client.wait_for(Some(GRACE))?;
            ended = client.reply();
        }
        client.wait_for(None)?;
        Ok(ended?.0)
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

type Output = std::sync::mpsc::Receiver<Vec<u8>>;

fn read_all(from: OwnedFd) -> Output {
    let (whole, output) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = File::from(from).take(ANSWER_BYTES_MAX).read_to_end(&mut bytes);
        let _ = whole.send(bytes);
    });
    output
}

/// Somebody inside may keep the pipe open for ever: it is not waited for.
fn drained(output: Output) -> Vec<u8> {
    output.recv_timeout(DRAIN).unwrap_or_default()
}

/// Makes whoever `taker` stands for the principal of the sandbox whose handle this is: it executes in it.
///
/// # Errors
/// As the broker says.
pub fn take(taker: &mut Client, handle: &OwnedFd, effect: &str) -> Result<(), HandError> {
    let wish = Execute {
        handle: Some(0),
        sandbox: None,
        effect: effect.to_owned(),
        command: vec!["true".to_owned()],
        environment: Vec::new(),
        path: PATH.to_owned(),
        streams: Streams::default(),
    };
    taker.send("Execute", &wish, false, &[handle.as_fd()])?;
    taker.reply::<Executed>()?;
    Ok(())
}

/// A connection to the daemon at `socket`.
///
/// # Errors
/// Where nobody listens there.
pub fn connect(socket: &Path) -> io::Result<Client> {
    Client::connect(socket)
}
