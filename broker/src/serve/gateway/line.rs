//! What a gateway and the core say to each other, and the gateway's end of that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::grant::{Grant, GrantId, Name, Narrowing};
use crate::serve::inner::{packets, receive, send};

/// A grant as a sandbox has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Granted {
    /// By the configuration.
    pub name: Name,
    /// What it says there.
    pub grant: Grant,
    /// Where its host is, inside.
    pub addresses: [IpAddr; 2],
}

/// What a socket that was handed over is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Questions about names.
    Names,
    /// Connections.
    Listener {
        /// Of which grant.
        grant: Name,
        /// Whether TLS is spoken there.
        tls: bool,
    },
}

/// From the core to a gateway.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToGateway {
    /// First of all. Descriptors: for each grant of kind `http`, in order, the line on which the vault says what goes in.
    Setup(Vec<Granted>),
    /// Sockets to listen at, as many as places.
    Listen(Vec<Place>),
    /// What was asked for. Descriptors: the connection to the upstream; or both ends of one that was asked for at a door, the
    /// gateway's first.
    Opened {
        /// The gateway's number.
        number: u64,
    },
    /// It is not made.
    Refused {
        /// The gateway's number.
        number: u64,
        /// Why, in words.
        why: String,
    },
    /// A door. Descriptors: the gateway's end, and the holder's where the gateway has asked for it.
    Door {
        /// The core's number.
        number: u64,
        /// What can be asked for there.
        grants: Vec<GrantId>,
        /// From which the only one of them is derived, and how.
        derived: Option<(GrantId, Narrowing)>,
        /// The gateway's number, where it has asked.
        answers: Option<u64>,
    },
    /// Another secret goes into a grant from here on. The descriptor is the line on which the vault says which.
    Renew(Name),
}

/// From a gateway to the core. What it says of requests is its claim.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromGateway {
    /// It has what it takes.
    Ready {
        /// The authority to be trusted inside, PEM.
        authority: Option<String>,
    },
    /// It lacks something, and ends.
    Unfit {
        /// What.
        why: String,
    },
    /// A connection to the upstream of a grant. The descriptor is the workload's end.
    Open {
        /// The gateway's number.
        number: u64,
        /// Of which grant.
        grant: GrantId,
    },
    /// Both ends of a connection, for somebody who asked at a door.
    Pair {
        /// The gateway's number.
        number: u64,
        /// On which grant.
        grant: GrantId,
    },
    /// A door to a narrower grant, for somebody who asked at one.
    Derive {
        /// The gateway's number.
        number: u64,
        /// Of which.
        grant: GrantId,
        /// How much narrower.
        by: Narrowing,
    },
    /// Whoever has it wants this grant no more.
    Drop {
        /// Which.
        grant: GrantId,
    },
    /// It is done with that connection.
    Closed {
        /// The gateway's number.
        number: u64,
    },
    /// Nobody is at that door.
    DoorClosed {
        /// The core's number.
        number: u64,
    },
    /// A request that was passed on or refused.
    Asked {
        /// On which grant.
        grant: GrantId,
        /// As it was sent.
        method: String,
        /// Its path, without a query.
        path: String,
        /// What was answered.
        status: u16,
    },
    /// A name was asked for that nobody granted.
    Unknown {
        /// Which.
        name: String,
    },
}

/// What comes of asking the core for something.
pub struct Given {
    pub descriptors: Vec<OwnedFd>,
    /// Of a door: the grant that was derived.
    pub grant: Option<GrantId>,
}

type Answer = Result<Given, String>;
/// What was given says of its end wherever it is dropped, also on its way to who has stopped waiting.
type Guarded = Result<(Given, Open), String>;
/// Why a connection is not served, in words.
pub type Failure = Box<dyn std::error::Error>;

/// The line to the core.
pub struct Line {
    channel: UnixStream,
    waiting: RefCell<BTreeMap<u64, oneshot::Sender<Guarded>>>,
    next: Cell<u64>,
}

/// A connection to an upstream, until it is dropped.
pub struct Opened {
    pub stream: OwnedFd,
    pub guard: Open,
}

/// Tells the core of the end.
pub struct Open {
    line: Rc<Line>,
    number: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        let (line, number) = (Rc::clone(&self.line), self.number);
        tokio::task::spawn_local(async move { line.say(&FromGateway::Closed { number }, None).await });
    }
}

impl Line {
    pub fn new(channel: OwnedFd) -> io::Result<Rc<Line>> {
        let (waiting, next) = (RefCell::default(), Cell::new(0));
        Ok(Rc::new(Line { channel: packets(channel)?, waiting, next }))
    }

    pub async fn say(&self, message: &FromGateway, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let given: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        let say = || send(&self.channel, message, &given, SendFlags::DONTWAIT);
        self.channel.async_io(Interest::WRITABLE, say).await
    }

    /// What the core says next; nothing where it has gone.
    pub async fn hear(&self) -> io::Result<Option<(ToGateway, Vec<OwnedFd>)>> {
        self.channel.async_io(Interest::READABLE, || receive(&self.channel, RecvFlags::DONTWAIT)).await
    }

    /// An answer that the core has given.
    pub fn answer(self: &Rc<Self>, number: u64, answer: Answer) {
        let told = self.waiting.borrow_mut().remove(&number);
        let answer = answer.map(|given| (given, Open { line: Rc::clone(self), number }));
        let _ = told.map(|told| told.send(answer));
    }

    async fn ask(
        &self,
        message: impl FnOnce(u64) -> FromGateway,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(Given, Open), Failure> {
        let (told, answer) = oneshot::channel();
        let number = self.next.get() + 1;
        self.next.set(number);
        self.waiting.borrow_mut().insert(number, told);
        self.say(&message(number), descriptor).await?;
        Ok(answer.await??)
    }

    /// Asks the core for a connection on `grant`.
    pub async fn open(&self, grant: &GrantId, workload: &OwnedFd) -> Result<Opened, Failure> {
        let open = |number| FromGateway::Open { number, grant: grant.clone() };
        let (given, guard) = self.ask(open, Some(workload)).await?;
        let stream = given.descriptors.into_iter().next().ok_or("the core gave no connection")?;
        Ok(Opened { stream, guard })
    }

    /// Both ends of a connection on `grant`, the gateway's and the holder's.
    pub async fn pair(&self, grant: &GrantId) -> Result<(OwnedFd, OwnedFd, Open), Failure> {
        let pair = |number| FromGateway::Pair { number, grant: grant.clone() };
        let (given, guard) = self.ask(pair, None).await?;
        let ends: [OwnedFd; 2] = given.descriptors.try_into().map_err(|_| "the core gave no two ends")?;
        let [near, far] = ends;
        Ok((near, far, guard))
    }

    /// A door to a grant that is narrower than `grant`: its name, and the holder's end.
    pub async fn derive(&self, grant: &GrantId, by: Narrowing) -> Result<(GrantId, OwnedFd), Failure> {
        let derive = |number| FromGateway::Derive { number, grant: grant.clone(), by };
        let (given, _) = self.ask(derive, None).await?;
        let far = given.descriptors.into_iter().next().ok_or("the core gave no door")?;
        Ok((given.grant.ok_or("the core gave no name")?, far))
    }

    pub async fn asked(&self, grant: &GrantId, method: &str, path: &str, status: u16) {
        let cut = |text: &str| text.chars().take(200).collect();
        let (grant, method, path) = (grant.clone(), cut(method), cut(path));
        let _ = self.say(&FromGateway::Asked { grant, method, path, status }, None).await;
    }
}
