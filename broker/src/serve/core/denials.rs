//! No, and how it is recorded: each of the first in a second, then only how many there were.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Asker, Core};
use crate::connection::{Connection, End};
use crate::protocol::{Denial, INTERFACE};
use crate::serve::audit::short;
use crate::wire::Breach;

/// Denials and breaches of one uid that are recorded one by one.
const A_SECOND: u32 = 20;

/// Denials and breaches of one uid.
pub(super) struct Denials {
    /// When the second began that counts.
    since: Instant,
    /// How many were recorded in it.
    recorded: u32,
    /// How many were not, since the last that was.
    folded: u64,
}

impl Denials {
    fn now() -> Denials {
        Denials { since: Instant::now(), recorded: 0, folded: 0 }
    }
}

impl Core {
    /// How many were not recorded since the last that was; nothing where this one is not either. Only repetition is folded
    /// together: the first of a second are recorded one by one, and who asks more often waits.
    async fn denial_to_record(&self, uid: u32) -> Option<u64> {
        let repeated = {
            let mut table = self.table();
            let denials = table.denials.entry(uid).or_insert_with(Denials::now);
            if denials.since.elapsed() >= Duration::from_secs(1) {
                (denials.since, denials.recorded) = (Instant::now(), 0);
            }
            if denials.recorded < A_SECOND {
                denials.recorded += 1;
                Some(std::mem::take(&mut denials.folded))
            } else {
                denials.folded += 1;
                None
            }
        };
        if repeated.is_none() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        repeated
    }

    /// Answers no.
    pub(super) async fn deny(
        &self,
        connection: &Connection,
        asker: &Asker,
        method: &str,
        denial: Denial,
    ) -> Result<(), End> {
        let Denial { code, message } = denial;
        self.metrics.denied(code);
        if let Some(repeated) = self.denial_to_record(asker.peer.uid).await {
            let mut event = asker.event("deny");
            event["method"] = method.into();
            event["code"] = json!(code);
            event["message"] = short(&message).into();
            event["repeated"] = repeated.into();
            self.audit.record(event).await;
        }
        connection.error(format!("{INTERFACE}.Denied"), json!({ "code": code, "message": message })).await
    }

    /// Notes that a peer broke the protocol, and was dropped.
    pub(super) async fn breach(&self, asker: &Asker, breach: &Breach) {
        self.metrics.breach();
        if let Some(repeated) = self.denial_to_record(asker.peer.uid).await {
            let mut event = asker.event("breach");
            event["why"] = short(&breach.to_string()).into();
            event["repeated"] = repeated.into();
            self.audit.record(event).await;
        }
    }
}
