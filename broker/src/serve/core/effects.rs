//! What was executed in a sandbox, by the names that callers gave it: a name is used once, and stands for its outcome ever after.
//! Names are a principal's own: what one that held the sandbox before has used means nothing to the next.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Duration, Instant};

use super::askers::Principal;
use crate::protocol::{Code, Denial, Running};

/// The longest name, in bytes, and how many a sandbox remembers.
const NAME_BYTES_MAX: usize = 128;
const EFFECTS_MAX: usize = 100_000;

/// Those of one sandbox.
#[derive(Default)]
pub(super) struct Effects {
    table: Mutex<Table>,
    /// When the last one was asked for, or ended.
    last: Mutex<Option<Instant>>,
}

/// By name and by number.
#[derive(Default)]
struct Table {
    by_name: BTreeMap<Key, Effect>,
    names: BTreeMap<u32, Key>,
}

type Key = (Principal, String);

/// What was asked for under one name.
struct Effect {
    number: u32,
    /// The outcome, once there is one.
    outcome: watch::Sender<Option<Value>>,
}

/// One that was asked for.
pub(super) struct Asked {
    pub number: u32,
    /// What there is of an outcome.
    pub heard: watch::Receiver<Option<Value>>,
    /// Nobody has used its name before.
    pub is_new: bool,
}

impl Table {
    fn insert(&mut self, key: Key, number: u32) -> watch::Receiver<Option<Value>> {
        let (outcome, heard) = watch::channel(None);
        self.names.insert(number, key.clone());
        self.by_name.insert(key, Effect { number, outcome });
        heard
    }
}

impl Effects {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) -> Instant {
        let now = Instant::now();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        now
    }

    /// Returns when none has been asked for or was under way for as long.
    pub async fn idle_for(&self, span: Duration) {
        let mut since = self.touch();
        loop {
            tokio::time::sleep_until(since + span).await;
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(since);
            if !self.running().is_empty() {
                since = self.touch();
            } else if last > since {
                since = last;
            } else {
                return;
            }
        }
    }

    /// What the record says of them.
    pub fn follow(&self, event: &Value) {
        let mut table = self.table();
        let name = event["effect"].as_str().unwrap_or_default();
        let number = event["number"].as_u64().and_then(|number| u32::try_from(number).ok());
        match (event["kind"].as_str(), number) {
            (Some("execute"), Some(number)) => {
                drop(table.insert((Principal::of(event), name.to_owned()), number));
            }
            (Some("executed"), Some(number)) => {
                let key = table.names.get(&number).cloned();
                if let Some(effect) = key.and_then(|key| table.by_name.get(&key)) {
                    effect.outcome.send_replace(Some(event["outcome"].clone()));
                }
            }
            _ => {}
        }
    }

    /// The effect of that name.
    pub fn ask(&self, who: Principal, name: &str) -> Result<Asked, Denial> {
        self.touch();
        let mut table = self.table();
        let key = (who, name.to_owned());
        if let Some(effect) = table.by_name.get(&key) {
            return Ok(Asked { number: effect.number, heard: effect.outcome.subscribe(), is_new: false });
        }
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) {
            let message = format!("an effect's name has 1 to {NAME_BYTES_MAX} bytes");
            return Err(Denial::new(Code::NotNarrower, message));
        }
        if table.by_name.len() >= EFFECTS_MAX {
            let message = format!("{EFFECTS_MAX} commands were run in this sandbox already");
            return Err(Denial::new(Code::TooMany, message));
        }
        let number = table.names.last_key_value().map_or(0, |(last, _)| *last) + 1;
        let heard = table.insert(key, number);
        Ok(Asked { number, heard, is_new: true })
    }

    /// It was not begun.
    pub fn forget(&self, number: u32) {
        let mut table = self.table();
        if let Some(key) = table.names.remove(&number) {
            table.by_name.remove(&key);
        }
    }

    /// Notes how one ended; its name, where that was not known.
    pub fn ended(&self, number: u32, outcome: &Value) -> Option<String> {
        self.touch();
        let table = self.table();
        let key = table.names.get(&number)?;
        let before = table.by_name.get(key)?.outcome.send_replace(Some(outcome.clone()));
        before.is_none().then(|| key.1.clone())
    }

    /// Nothing will be heard of any of them: whoever waits is told.
    pub fn end(&self) {
        *self.table() = Table::default();
    }

    /// What has been begun and has not ended.
    pub fn running(&self) -> Vec<Running> {
        let table = self.table();
        let under_way = table.by_name.iter().filter(|(_, effect)| effect.outcome.borrow().is_none());
        under_way.map(|((_, name), _)| Running { effect: name.clone() }).collect()
    }

    /// The number of one that `who` has begun.
    pub fn number_of(&self, who: Principal, name: &str) -> Option<u32> {
        self.table().by_name.get(&(who, name.to_owned())).map(|effect| effect.number)
    }
}
