//! Sandboxes that were made before anybody asked, for who brings no workspace and wants no tighter limits. Each is one caller's
//! and used once, like any other; it has only been made earlier.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};
use sandbox::PolicyName;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::{Core, Table, hear_supervisor};
use crate::library::Policies;
use crate::protocol::{Limits, Run, Sandbox, Streams};
use crate::say::complain;
use crate::serve::inner::{FromSupervisor, Kind, Start, ToLauncher, ToSupervisor, packets, send};

/// What the words of a command may have together, so that one packet holds them.
const WORDS_BYTES_MAX: usize = 64 << 10;
/// After a run there may be another at once: what it took is made anew when that is over.
const PAUSE: Duration = Duration::from_millis(5);

/// One that waits to be somebody's.
pub(super) struct Warm {
    id: String,
    channel: UnixStream,
    /// The hash of the policy that it was made under.
    policy: String,
}

impl Table {
    fn ready(&self, policy: &PolicyName) -> usize {
        self.pool.get(policy).map_or(0, Vec::len)
    }
}

impl Warm {
    /// Its name, before it is somebody's and after.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether nothing has become of it: there is nothing to read.
    fn is_there(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        rustix::net::recv(&self.channel, &mut [0; 1][..], flags) == Err(rustix::io::Errno::WOULDBLOCK)
    }
}

impl Core {
    /// Makes what is missing, one after the other.
    pub(super) fn fill_pool(self: &Arc<Self>) {
        for (policy, wanted) in &self.config.pool.warm {
            let wanted = usize::from(*wanted);
            {
                let mut table = self.table();
                if table.ready(policy) >= wanted || !table.making.insert(policy.clone()) {
                    continue;
                }
            }
            let (core, policy) = (Arc::clone(self), policy.clone());
            tokio::spawn(async move {
                tokio::time::sleep(PAUSE).await;
                while core.table().ready(&policy) < wanted {
                    match core.warm_up(&policy).await {
                        Ok(warm) => core.table().pool.entry(policy.clone()).or_default().push(warm),
                        Err(why) => {
                            complain!("no sandbox can be made ahead under policy {}: {why}", policy.as_str());
                            // What is in the way now may not be there then.
                            tokio::time::sleep(Duration::from_secs(60)).await;
                        }
                    }
                }
                core.table().making.remove(&policy);
            });
        }
    }

    async fn warm_up(&self, policy: &PolicyName) -> Result<Warm, String> {
        let run = Run {
            policy: policy.as_str().to_owned(),
            command: vec!["(none)".to_owned()],
            environment: Vec::new(),
            path: String::new(),
            streams: Streams::default(),
            workspace: None,
            limits: None,
            grants: Vec::new(),
        };
        let sandbox = self.sandbox(&run, 0, None);
        let id = sandbox.id.clone();
        let start = Start { sandbox, run, kind: Kind::Warm, asker: None, listen: None };
        let channel = self.start(start, &[]).await.and_then(packets).map_err(|error| error.to_string())?;
        match hear_supervisor(&channel).await {
            FromSupervisor::Ready { policy, .. } => Ok(Warm { id, channel, policy }),
            ended => {
                let _ = self.tell(&ToLauncher::Forget { id }, &[]).await;
                Err(match ended {
                    FromSupervisor::Denied { denial } => denial.message,
                    FromSupervisor::NotStarted { message, .. } => message,
                    _ => "it ended".to_owned(),
                })
            }
        }
    }

    /// One that is as what `run` asks for, if there is one.
    pub(super) async fn take_warm(self: &Arc<Self>, run: &Run) -> Option<Warm> {
        let plain = Limits::default() == *run.limits.as_ref().unwrap_or(&Limits::default());
        let words = run.command.iter().map(String::len).sum::<usize>()
            + run.environment.iter().map(|variable| variable.value.len() + 256).sum::<usize>()
            + run.path.len();
        if run.workspace.is_some() || !run.grants.is_empty() || !plain || words > WORDS_BYTES_MAX {
            return None;
        }
        let policy: PolicyName = run.policy.parse().ok()?;
        let warm = self.table().pool.get_mut(&policy).and_then(Vec::pop);
        self.fill_pool();
        let warm = warm?;
        // The administrator may have changed the policy since.
        let now = Policies::of_host().load(policy.as_str()).map(|policy| policy.hash());
        if now.is_ok_and(|now| now == warm.policy) && warm.is_there() {
            return Some(warm);
        }
        self.end_warm(&warm.id).await;
        None
    }

    /// Ends one that nobody will have.
    pub(super) async fn end_warm(&self, id: &str) {
        let _ = self.tell(&ToLauncher::End { id: id.to_owned() }, &[]).await;
        let _ = self.tell(&ToLauncher::Forget { id: id.to_owned() }, &[]).await;
    }

    /// Makes it the one of `sandbox`, which has its name.
    pub(super) async fn assign(
        &self,
        warm: Warm,
        sandbox: Sandbox,
        kind: Kind,
        cores_handle: Option<BorrowedFd<'_>>,
        first: &ToSupervisor,
        given: &[BorrowedFd<'_>],
    ) -> io::Result<UnixStream> {
        let handle: Vec<_> = cores_handle.into_iter().collect();
        let say = || send(&warm.channel, first, given, SendFlags::DONTWAIT);
        let assigned = match self.tell(&ToLauncher::Assign { sandbox, kind }, &handle).await {
            Ok(()) => warm.channel.async_io(Interest::WRITABLE, say).await,
            failed => failed,
        };
        if let Err(error) = assigned {
            // What was asked of it is longer than a packet, say: nobody else will have it.
            self.end_warm(&warm.id).await;
            return Err(error);
        }
        Ok(warm.channel)
    }
}
