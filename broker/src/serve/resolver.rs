//! The resolver: names of hosts to addresses, and nothing else. It reads what name servers say, and holds no secret; whether an address
//! may be connected to, the core decides.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Hosts, Resolver, TokioResolver};
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::inner::{packets, receive, send};
use super::roles::{Answer, Ask, ToRole};
use crate::grant::Host;
use crate::say::complain;

/// More addresses of one name are of no use.
const ADDRESSES_MAX: usize = 16;
/// As in resolv.conf(5).
const SERVERS_MAX: usize = 3;

/// Where the host says what it knows of names, and how much of each is read.
const NAMES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];
const NAMES_BYTES_MAX: u64 = 64 << 10;

/// What the host knows of names, and since when: the launcher reads it, since the resolver has no file.
#[derive(Default)]
pub struct Names {
    since: [Option<SystemTime>; 2],
    servers: String,
    hosts: String,
}

impl Names {
    /// What stands there now, if that is something else.
    pub fn changed(&self) -> Option<Names> {
        let of = |path: &str| std::fs::metadata(path).and_then(|found| found.modified()).ok();
        let since = NAMES.map(of);
        if since == self.since {
            return None;
        }
        let [servers, hosts] = NAMES.map(|path| {
            let mut text = String::new();
            let read = File::open(path).and_then(|file| file.take(NAMES_BYTES_MAX).read_to_string(&mut text));
            read.map(|_| text).unwrap_or_default()
        });
        Some(Names { since, servers, hosts })
    }

    /// As the resolver is told of it.
    pub fn told(&self) -> ToRole {
        ToRole::Names { servers: self.servers.clone(), hosts: self.hosts.clone() }
    }
}

type Known = Option<Rc<TokioResolver>>;

/// Its life, confined already: it ends with its launcher.
pub fn live(launcher: OwnedFd) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(launcher))
}

async fn serve(launcher: OwnedFd) -> io::Result<()> {
    let launcher = packets(launcher)?;
    let (tell, known) = watch::channel(None);
    loop {
        let hear = || receive::<ToRole>(&launcher, RecvFlags::DONTWAIT);
        match launcher.async_io(Interest::READABLE, hear).await? {
            Some((ToRole::Core, descriptors)) => {
                for core in descriptors {
                    tokio::task::spawn_local(answer_all(Rc::new(packets(core)?), known.clone()));
                }
            }
            Some((ToRole::Names { servers, hosts }, _)) => {
                let made = resolver(&servers, &hosts).map(Rc::new);
                tell.send_replace(made.map_err(|error| complain!("resolver: {error}")).ok());
            }
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

/// As the host's own files have it (resolv.conf(5), hosts(5)); but a name is a whole name, whatever is searched there.
fn resolver(servers: &str, hosts: &str) -> Result<TokioResolver, Box<dyn std::error::Error>> {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
    let servers: Vec<_> =
        servers.lines().filter_map(server).take(SERVERS_MAX).map(NameServerConfig::udp_and_tcp).collect();
    if servers.is_empty() {
        return Err("/etc/resolv.conf names no server".into());
    }
    let config = ResolverConfig::from_parts(None, Vec::new(), servers);
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    // The file is given, not opened.
    options.use_hosts_file = ResolveHosts::Never;
    // All that a name stands for is looked at.
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    let mut resolver = builder.build()?;
    let mut own = Hosts::default();
    own.read_hosts_conf(hosts.as_bytes())?;
    resolver.set_hosts(Arc::new(own));
    Ok(resolver)
}

async fn answer_all(core: Rc<UnixStream>, known: watch::Receiver<Known>) {
    let hear = || receive::<(u64, Ask)>(&*core, RecvFlags::DONTWAIT);
    while let Ok(Some(((number, ask), _))) = core.async_io(Interest::READABLE, hear).await {
        let (core, known) = (Rc::clone(&core), known.borrow().clone());
        tokio::task::spawn_local(async move {
            let answer = match ask {
                Ask::Resolve(host) => match look_up(known, &host).await {
                    Ok(addresses) => Answer::Addresses(addresses),
                    Err(why) => Answer::Failed(format!("{host}: {why}")),
                },
                _ => Answer::Here,
            };
            let say = || send(&*core, &(number, &answer), &[], SendFlags::DONTWAIT);
            let _ = core.async_io(Interest::WRITABLE, say).await;
        });
    }
}

async fn look_up(known: Known, host: &Host) -> Result<Vec<IpAddr>, String> {
    let known = known.ok_or("no name server is known; see /etc/resolv.conf")?;
    // With the dot no list of domains is searched.
    let found = known.lookup_ip(format!("{host}.")).await.map_err(|error| error.to_string())?;
    Ok(found.iter().take(ADDRESSES_MAX).collect())
}
