//! A gateway: one for each sandbox that has grants. It speaks with the workload, holds only this sandbox's secrets, and has no network
//! but the sockets that it was handed: those that listen inside, and connections that the core made.

mod door;
mod http;
mod judge;
mod line;
mod mask;
mod names;
mod tls;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, TcpStream as StdStream, UdpSocket as StdDatagrams};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hyper::header::HeaderName;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

use super::inner::{PACKET_BYTES_MAX, receive, receive_into};
use super::vault::Provided;
use crate::grant::{Grant, GrantId, Host, Kind, Narrowing, UpstreamTls};
use crate::say::complain;
use http::{Http, Keys};
use line::{Failure, Given, Line, Opened};
pub use line::{FromGateway, Granted, Place, ToGateway};

/// Connections of one workload that are served at the same time; others wait.
const CONNECTIONS_MAX: usize = 1024;
/// Names that nobody granted, that the core is told of.
const UNKNOWN_MAX: usize = 64;
/// The longest bundle of authorities.
const BUNDLE_BYTES_MAX: usize = 8 << 20;
const COPY_BYTES: usize = 128 << 10;

/// What is done with a connection on a grant.
#[derive(Clone)]
enum Service {
    Tcp { id: GrantId, grant: Rc<Grant> },
    Http { http: Rc<Http>, acceptor: TlsAcceptor },
}

impl Service {
    fn grant(&self) -> &Grant {
        match self {
            Service::Tcp { grant, .. } => grant,
            Service::Http { http, .. } => &http.grant,
        }
    }

    /// The same, of a grant that was derived from this one.
    fn narrowed(&self, id: GrantId, grant: Grant) -> Service {
        match self {
            Service::Tcp { .. } => Service::Tcp { id, grant: Rc::new(grant) },
            Service::Http { http, acceptor } => {
                let http = Http { id, grant, keys: Rc::clone(&http.keys) };
                Service::Http { http: Rc::new(http), acceptor: acceptor.clone() }
            }
        }
    }
}

/// What all of a gateway's tasks share.
struct Gateway {
    line: Rc<Line>,
    services: RefCell<Services>,
    room: Arc<Semaphore>,
}

impl Gateway {
    /// A private connection on `grant`, for whoever asked at a door: the other end of what is served here.
    async fn open(self: &Rc<Self>, grant: &GrantId) -> Result<OwnedFd, Failure> {
        let service = self.services.borrow().get(grant).cloned().ok_or("it is not granted")?;
        let permit = Arc::clone(&self.room).acquire_owned().await?;
        let (near, far, guard) = self.line.pair(grant).await?;
        let near = StdUnixStream::from(near);
        near.set_nonblocking(true)?;
        let near = UnixStream::from_std(near)?;
        let line = Rc::clone(&self.line);
        tokio::task::spawn_local(async move {
            finish(near, service, false, line).await;
            drop((guard, permit));
        });
        Ok(far)
    }

    /// Takes a door that the core has made; who is at it may ask for `grants`.
    fn take_door(
        self: &Rc<Self>,
        number: u64,
        near: OwnedFd,
        grants: Vec<GrantId>,
        derived: Option<(GrantId, Narrowing)>,
    ) -> Result<(), Failure> {
        if let (Some((parent, by)), [id]) = (derived, grants.as_slice()) {
            let mut services = self.services.borrow_mut();
            let parents = services.get(&parent).ok_or("what it is derived from is not there")?;
            let narrowed = parents.grant().narrowed(&parent, &by)?;
            let service = parents.narrowed(id.clone(), narrowed);
            services.insert(id.clone(), service);
        }
        tokio::task::spawn_local(door::serve(Rc::clone(self), number, near, grants));
        Ok(())
    }

    /// What was derived for a door alone ends with it.
    fn forget(&self, grants: &[GrantId]) {
        if let [id] = grants
            && !id.is_root()
        {
            self.services.borrow_mut().remove(id);
        }
    }

    /// Takes what goes into a grant from here on; connections that are there use it with their next request.
    fn renew(&self, name: &GrantId, line: &OwnedFd) -> Result<(), Failure> {
        let (_, renewed) = provided(line)?;
        if let Some(Service::Http { http, .. }) = self.services.borrow().get(name) {
            http.keys.replace(Rc::new(renewed));
        }
        Ok(())
    }

    /// Takes sockets that listen inside.
    fn listen(&self, table: &Rc<Names>, places: Vec<Place>, sockets: Vec<OwnedFd>) -> io::Result<()> {
        for (place, socket) in places.into_iter().zip(sockets) {
            let line = Rc::clone(&self.line);
            match place {
                Place::Names => {
                    let socket = UdpSocket::from_std(StdDatagrams::from(socket))?;
                    tokio::task::spawn_local(answer_names(socket, Rc::clone(table), line));
                }
                Place::Listener { grant, tls } => {
                    let service = self.services.borrow().get(&GrantId::from(&grant)).cloned();
                    let Some(service) = service else { continue };
                    let listener = TcpListener::from_std(socket.into())?;
                    tokio::task::spawn_local(listen(listener, service, tls, line, Arc::clone(&self.room)));
                }
            }
        }
        Ok(())
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
    let line = Line::new(core)?;
    let (services, authority) = match services(&setup, lines) {
        Ok(made) => made,
        Err(error) => {
            let why = error.to_string();
            return line.say(&FromGateway::Unfit { why }, None).await;
        }
    };
    line.say(&FromGateway::Ready { authority }, None).await?;
    let table: Rc<Names> =
        Rc::new(setup.iter().map(|granted| (granted.grant.host.to_string(), granted.addresses)).collect());
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let gateway = Rc::new(Gateway { line, services: RefCell::new(services), room });
    // Without a core nothing is forwarded.
    while let Some((message, descriptors)) = gateway.line.hear().await? {
        match message {
            ToGateway::Listen(places) => gateway.listen(&table, places, descriptors)?,
            ToGateway::Opened { number } => {
                gateway.line.answer(number, Ok(Given { descriptors, grant: None }))
            }
            ToGateway::Refused { number, why } => gateway.line.answer(number, Err(why)),
            ToGateway::Door { number, grants, derived, answers } => {
                let mut ends = descriptors.into_iter();
                let Some(near) = ends.next() else { continue };
                let grant = grants.first().cloned();
                let taken = gateway.take_door(number, near, grants, derived);
                let given = taken.map(|()| Given { descriptors: ends.collect(), grant });
                if let Some(asked) = answers {
                    gateway.line.answer(asked, given.map_err(|error| error.to_string()));
                }
            }
            ToGateway::Renew(name) => {
                let line = descriptors.into_iter().next().ok_or_else(|| io::Error::other("no line"))?;
                let grant = GrantId::from(&name);
                if let Err(error) = gateway.renew(&grant, &line) {
                    // What was taken back is used no longer.
                    complain!("gateway: {name}: {error}");
                    gateway.line.say(&FromGateway::Drop { grant }, None).await?;
                }
            }
            ToGateway::Setup(_) => {}
        }
    }
    Ok(())
}

type Names = BTreeMap<String, [IpAddr; 2]>;
type Services = BTreeMap<GrantId, Service>;

/// What each grant takes; the authority's certificate, where TLS is spoken inside.
fn services(granted: &[Granted], lines: Vec<OwnedFd>) -> Result<(Services, Option<String>), Failure> {
    let mut lines = lines.into_iter();
    let is_http = |granted: &Granted| granted.grant.kind == Kind::Http;
    let authority = granted.iter().any(is_http).then(tls::Authority::make).transpose()?;
    let mut services = Services::new();
    for Granted { name, grant, .. } in granted {
        let id = GrantId::from(name);
        let service = match (&authority, grant.kind) {
            (Some(authority), Kind::Http) => {
                let line = lines.next().ok_or("the core gave no line to the vault")?;
                // By the vault's own copy of the configuration: what the core says of it has no say in where a secret goes.
                let (grant, keys) = provided(&line).map_err(|why| format!("grant {name}: {why}"))?;
                let acceptor = TlsAcceptor::from(authority.server(&grant.host)?);
                let keys = Rc::new(RefCell::new(Rc::new(keys)));
                Service::Http { http: Rc::new(Http { id: id.clone(), grant, keys }), acceptor }
            }
            _ => Service::Tcp { id: id.clone(), grant: Rc::new(grant.clone()) },
        };
        services.insert(id, service);
    }
    Ok((services, authority.map(|authority| authority.certificate)))
}

/// What the vault says of a grant, and what goes into it.
fn provided(line: &OwnedFd) -> Result<(Grant, Keys), Failure> {
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
    Ok((grant, Keys { secret, mask, client }))
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

async fn answer_names(socket: UdpSocket, table: Rc<Names>, line: Rc<Line>) {
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
        let _ = stream.set_nodelay(true);
        tokio::task::spawn_local(async move {
            finish(stream, service, tls, line).await;
            drop(permit);
        });
    }
}

/// Serves one connection to its end.
async fn finish(stream: impl Connection, service: Service, tls: bool, line: Rc<Line>) {
    let host = service.grant().host.clone();
    if let Err(error) = attend(stream, service, tls, line).await {
        complain_of(&host, &*error);
    }
}

/// What a workload can have said as often as it likes is said so many times.
fn complain_of(host: &Host, error: &dyn std::error::Error) {
    const TIMES: u32 = 100;
    static SAID: AtomicU32 = AtomicU32::new(0);
    match SAID.fetch_add(1, Ordering::Relaxed) {
        0..TIMES => complain!("gateway: {host}: {error}"),
        TIMES => complain!("gateway: nothing more is said of this sandbox's connections"),
        _ => {}
    }
}

/// Of whatever family.
trait Connection: AsyncRead + AsyncWrite + AsFd + Unpin {}
impl<T: AsyncRead + AsyncWrite + AsFd + Unpin> Connection for T {}

/// One connection of the workload's.
async fn attend(
    mut stream: impl Connection,
    service: Service,
    tls: bool,
    line: Rc<Line>,
) -> Result<(), Failure> {
    let workload = Rc::new(stream.as_fd().try_clone_to_owned()?);
    match service {
        Service::Tcp { id, .. } => {
            let Opened { stream: upstream, guard } = line.open(&id, &workload).await?;
            let mut upstream = TcpStream::from_std(StdStream::from(upstream))?;
            // Either side may end it; the core counts what went through.
            let _ =
                tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut upstream, COPY_BYTES, COPY_BYTES)
                    .await;
            drop(guard);
        }
        Service::Http { http, acceptor } if tls => {
            // A workload that does not speak TLS, or not with this authority, ends itself.
            let accepted = tokio::time::timeout(http::HEAD_TIME_MAX, acceptor.accept(stream)).await;
            let Ok(Ok(stream)) = accepted else { return Ok(()) };
            if stream.get_ref().1.server_name() != Some(http.grant.host.as_str()) {
                return Ok(());
            }
            let _ = http::serve(stream, workload, http, line).await;
        }
        Service::Http { http, .. } => drop(http::serve(stream, workload, http, line).await),
    }
    Ok(())
}
