//! A gateway: one for each sandbox that has grants. It speaks with the workload, holds only this sandbox's secrets, and has no network
//! but the sockets that it was handed: those that listen inside, and connections that the core made.

mod http;
mod mask;
mod names;
mod tls;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, TcpStream as StdStream, UdpSocket as StdDatagrams};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use hyper::header::HeaderName;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

use super::inner::{PACKET_BYTES_MAX, packets, receive, receive_into, send};
use super::vault::Provided;
use crate::grant::{Grant, Kind, Name, UpstreamTls};
use crate::say::complain;
use http::Http;

/// Connections of one workload that are served at the same time; others wait.
const CONNECTIONS_MAX: usize = 1024;
/// Names that nobody granted, that the core is told of.
const UNKNOWN_MAX: usize = 64;
/// The longest bundle of authorities.
const BUNDLE_BYTES_MAX: usize = 8 << 20;
const COPY_BYTES: usize = 128 << 10;

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
    /// The connection that was asked for. The descriptor is it.
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
        grant: Name,
    },
    /// It is done with that connection.
    Closed {
        /// The gateway's number.
        number: u64,
    },
    /// A request that was passed on or refused.
    Asked {
        /// On which grant.
        grant: Name,
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

/// The line to the core.
pub struct Line {
    channel: UnixStream,
    waiting: RefCell<BTreeMap<u64, oneshot::Sender<Result<OwnedFd, String>>>>,
    next: RefCell<u64>,
    names: BTreeMap<String, Name>,
}

/// A connection to an upstream, until it is dropped.
struct Opened {
    stream: StreamFd,
    guard: Open,
}

struct StreamFd(OwnedFd);

impl From<StreamFd> for StdStream {
    fn from(stream: StreamFd) -> StdStream {
        stream.0.into()
    }
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
    async fn say(&self, message: &FromGateway, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let given: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        let say = || send(&self.channel, message, &given, SendFlags::DONTWAIT);
        self.channel.async_io(Interest::WRITABLE, say).await
    }

    /// Asks the core for a connection on `grant`.
    async fn open(
        self: &Rc<Self>,
        grant: &Grant,
        workload: &OwnedFd,
    ) -> Result<Opened, Box<dyn std::error::Error>> {
        let (told, opened) = oneshot::channel();
        let number = {
            let mut next = self.next.borrow_mut();
            *next += 1;
            *next
        };
        self.waiting.borrow_mut().insert(number, told);
        let grant = self.name_of(grant);
        self.say(&FromGateway::Open { number, grant }, Some(workload)).await?;
        let stream = opened.await??;
        Ok(Opened { stream: StreamFd(stream), guard: Open { line: Rc::clone(self), number } })
    }

    /// No sandbox has two grants at one host and port.
    fn name_of(&self, grant: &Grant) -> Name {
        self.names[&key(grant)].clone()
    }

    async fn asked(&self, grant: &Grant, method: &str, path: &str, status: u16) {
        let cut = |text: &str| text.chars().take(200).collect();
        let (grant, method, path) = (self.name_of(grant), cut(method), cut(path));
        let _ = self.say(&FromGateway::Asked { grant, method, path, status }, None).await;
    }
}

fn key(grant: &Grant) -> String {
    format!("{}:{:?}", grant.host, grant.ports())
}

/// What is done with a connection that arrives.
#[derive(Clone)]
enum Service {
    Tcp(Rc<Grant>),
    Http { http: Rc<Http>, acceptor: TlsAcceptor },
}

impl Service {
    fn grant(&self) -> &Grant {
        match self {
            Service::Tcp(grant) => grant,
            Service::Http { http, .. } => &http.grant,
        }
    }
}

/// The life of a gateway, confined already; `core` is its line to the core.
pub fn live(core: OwnedFd) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(core))
}

async fn serve(core: OwnedFd) -> io::Result<()> {
    let (setup, lines) = match receive::<ToGateway>(&core, RecvFlags::empty())? {
        Some((ToGateway::Setup(granted), lines)) => (granted, lines),
        None => return Ok(()),
        _ => return Err(io::Error::other("the core said nothing")),
    };
    let names = setup.iter().map(|granted| (key(&granted.grant), granted.name.clone())).collect();
    let (waiting, next) = (RefCell::default(), RefCell::default());
    let line = Rc::new(Line { channel: packets(core)?, waiting, next, names });
    let (services, authority) = match services(&setup, lines) {
        Ok(made) => made,
        Err(error) => {
            let why = error.to_string();
            return line.say(&FromGateway::Unfit { why }, None).await;
        }
    };
    line.say(&FromGateway::Ready { authority }, None).await?;
    let table: Rc<BTreeMap<String, [IpAddr; 2]>> =
        Rc::new(setup.iter().map(|granted| (granted.grant.host.to_string(), granted.addresses)).collect());
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let heard = || receive::<ToGateway>(&line.channel, RecvFlags::DONTWAIT);
        // Without a core nothing is forwarded.
        let Some((message, descriptors)) = line.channel.async_io(Interest::READABLE, heard).await? else {
            return Ok(());
        };
        match message {
            ToGateway::Listen(places) => {
                for (place, socket) in places.into_iter().zip(descriptors) {
                    match place {
                        Place::Names => {
                            let socket = UdpSocket::from_std(StdDatagrams::from(socket))?;
                            tokio::task::spawn_local(answer_names(
                                socket,
                                Rc::clone(&table),
                                Rc::clone(&line),
                            ));
                        }
                        Place::Listener { grant, tls } => {
                            let Some(service) = services.get(&grant).cloned() else { continue };
                            let listener = TcpListener::from_std(socket.into())?;
                            tokio::task::spawn_local(listen(
                                listener,
                                service,
                                tls,
                                Rc::clone(&line),
                                Arc::clone(&room),
                            ));
                        }
                    }
                }
            }
            ToGateway::Opened { number } => {
                let told = line.waiting.borrow_mut().remove(&number);
                if let (Some(told), Some(stream)) = (told, descriptors.into_iter().next()) {
                    let _ = told.send(Ok(stream));
                }
            }
            ToGateway::Refused { number, why } => {
                if let Some(told) = line.waiting.borrow_mut().remove(&number) {
                    let _ = told.send(Err(why));
                }
            }
            ToGateway::Setup(_) => {}
        }
    }
}

type Services = BTreeMap<Name, Service>;

/// What each grant takes; the authority's certificate, where TLS is spoken inside.
fn services(
    granted: &[Granted],
    lines: Vec<OwnedFd>,
) -> Result<(Services, Option<String>), Box<dyn std::error::Error>> {
    let mut lines = lines.into_iter();
    let is_http = |granted: &Granted| granted.grant.kind == Kind::Http;
    let authority = granted.iter().any(is_http).then(tls::Authority::make).transpose()?;
    let mut services = Services::new();
    for Granted { name, grant, .. } in granted {
        let service = match (&authority, grant.kind) {
            (Some(authority), Kind::Http) => {
                let line = lines.next().ok_or("the core gave no line to the vault")?;
                // By the vault's own copy of the configuration: what the core says of it has no say in where a secret goes.
                let http = provided(&line).map_err(|why| format!("grant {name}: {why}"))?;
                let acceptor = TlsAcceptor::from(authority.server(&http.grant.host)?);
                Service::Http { http: Rc::new(http), acceptor }
            }
            _ => Service::Tcp(Rc::new(grant.clone())),
        };
        services.insert(name.clone(), service);
    }
    Ok((services, authority.map(|authority| authority.certificate)))
}

fn provided(line: &OwnedFd) -> Result<Http, Box<dyn std::error::Error>> {
    let mut bytes = Zeroizing::new(vec![0; PACKET_BYTES_MAX]);
    let (provided, descriptors) =
        receive_into::<Provided>(line, &mut bytes, RecvFlags::empty())?.ok_or("the vault did not answer")?;
    let (grant, secret) = match provided {
        Provided::Secret { grant, secret } => (*grant, secret),
        Provided::Missing { why } => return Err(why.into()),
    };
    let mask = secret.as_ref().map(|secret| mask::Mask::of(secret)).unwrap_or_default();
    let secret = match (&grant.inject, secret) {
        (Some(inject), Some(secret)) => {
            let value = Zeroizing::new(inject.rendered(&secret).into_bytes());
            Some((HeaderName::from_bytes(inject.header.as_bytes())?, value))
        }
        _ => None,
    };
    let client = match (grant.upstream_tls, &grant.authority) {
        (UpstreamTls::Off, _) => None,
        (UpstreamTls::Verify, Some(own)) => Some(tls::client(own.as_bytes())?),
        (UpstreamTls::Verify, None) => {
            let file = descriptors.into_iter().next().ok_or("the host has no bundle of authorities")?;
            Some(tls::client(&whole(file)?)?)
        }
    };
    Ok(Http { grant, secret, mask, client })
}

/// A file from its beginning on. Every gateway has the same open file, so nobody's place in it is anybody's.
fn whole(file: OwnedFd) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let (file, mut bytes, mut piece) = (std::fs::File::from(file), Vec::new(), vec![0; 64 << 10]);
    loop {
        let count = file.read_at(&mut piece, bytes.len() as u64)?;
        if count == 0 || bytes.len() > BUNDLE_BYTES_MAX {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&piece[..count]);
    }
}

async fn answer_names(socket: UdpSocket, table: Rc<BTreeMap<String, [IpAddr; 2]>>, line: Rc<Line>) {
    let mut question = [0; names::QUESTION_BYTES_MAX];
    let mut told = BTreeSet::new();
    loop {
        let Ok((length, from)) = socket.recv_from(&mut question).await else { continue };
        let answered = names::answer(&question[..length], |name| table.get(name).copied());
        let Some(names::Answered { bytes, unknown }) = answered else { continue };
        let _ = socket.send_to(&bytes, from).await;
        // Whoever asks for ever more of them is recorded no further, and costs nobody else anything.
        if let Some(name) = unknown.filter(|name| told.len() < UNKNOWN_MAX && told.insert(name.clone())) {
            let _ = line.say(&FromGateway::Unknown { name }, None).await;
        }
    }
}

async fn listen(listener: TcpListener, service: Service, tls: bool, line: Rc<Line>, room: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Revoked; or out of descriptors, and then some will be closed.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(_) => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            }
        };
        let (service, line) = (service.clone(), Rc::clone(&line));
        tokio::task::spawn_local(async move {
            let host = service.grant().host.clone();
            if let Err(error) = attend(stream, service, tls, line).await {
                complain!("gateway: {host}: {error}");
            }
            drop(permit);
        });
    }
}

/// One connection of the workload's.
async fn attend(
    mut stream: TcpStream,
    service: Service,
    tls: bool,
    line: Rc<Line>,
) -> Result<(), Box<dyn std::error::Error>> {
    let workload = Rc::new(stream.as_fd().try_clone_to_owned()?);
    match service {
        Service::Tcp(grant) => {
            let Opened { stream: upstream, guard } = line.open(&grant, &workload).await?;
            let mut upstream = TcpStream::from_std(upstream.into())?;
            let _ = stream.set_nodelay(true);
            // Either side may end it; the core counts what went through.
            let _ =
                tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut upstream, COPY_BYTES, COPY_BYTES)
                    .await;
            drop(guard);
        }
        Service::Http { http, acceptor } if tls => {
            // A workload that does not speak TLS, or not with this authority, ends itself.
            let Ok(stream) = acceptor.accept(stream).await else { return Ok(()) };
            if stream.get_ref().1.server_name() != Some(http.grant.host.as_str()) {
                return Ok(());
            }
            let _ = http::serve(stream, workload, http, line).await;
        }
        Service::Http { http, .. } => drop(http::serve(stream, workload, http, line).await),
    }
    Ok(())
}
