//! What was executed in a sandbox, by the names that callers gave it: a name is used once, and stands for its outcome ever after.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use crate::protocol::{Code, Denial, Running};

/// The longest name, in bytes, and how many a sandbox remembers.
const NAME_BYTES_MAX: usize = 128;
const EFFECTS_MAX: usize = 100_000;

/// Those of one sandbox.
#[derive(Default)]
pub(super) struct Effects(Mutex<Table>);

/// By name and by number.
#[derive(Default)]
struct Table {
    by_name: BTreeMap<String, Effect>,
    names: BTreeMap<u32, String>,
}

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
    fn insert(&mut self, name: &str, number: u32) -> watch::Receiver<Option<Value>> {
        let (outcome, heard) = watch::channel(None);
        self.names.insert(number, name.to_owned());
        self.by_name.insert(name.to_owned(), Effect { number, outcome });
        heard
    }
}

impl Effects {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the record says of them.
    pub fn follow(&self, event: &Value) {
        let mut table = self.table();
        let name = event["effect"].as_str().unwrap_or_default();
        let number = event["number"].as_u64().and_then(|number| u32::try_from(number).ok());
        match (event["kind"].as_str(), number) {
            (Some("execute"), Some(number)) => drop(table.insert(name, number)),
            (Some("executed"), _) => {
                if let Some(effect) = table.by_name.get(name) {
                    effect.outcome.send_replace(Some(event["outcome"].clone()));
                }
            }
            _ => {}
        }
    }

    /// The effect of that name.
    pub fn ask(&self, name: &str) -> Result<Asked, Denial> {
        let mut table = self.table();
        if let Some(effect) = table.by_name.get(name) {
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
        let heard = table.insert(name, number);
        Ok(Asked { number, heard, is_new: true })
    }

    /// It was not begun.
    pub fn forget(&self, name: &str) {
        let mut table = self.table();
        if let Some(effect) = table.by_name.remove(name) {
            table.names.remove(&effect.number);
        }
    }

    /// Notes how one ended; its name, where that was not known.
    pub fn ended(&self, number: u32, outcome: &Value) -> Option<String> {
        let table = self.table();
        let name = table.names.get(&number)?;
        let before = table.by_name.get(name)?.outcome.send_replace(Some(outcome.clone()));
        before.is_none().then(|| name.clone())
    }

    /// Nothing will be heard of any of them: whoever waits is told.
    pub fn end(&self) {
        *self.table() = Table::default();
    }

    /// What has been begun and has not ended.
    pub fn running(&self) -> Vec<Running> {
        let table = self.table();
        let under_way = table.by_name.iter().filter(|(_, effect)| effect.outcome.borrow().is_none());
        under_way.map(|(name, _)| Running { effect: name.clone() }).collect()
    }

    pub fn number_of(&self, name: &str) -> Option<u32> {
        self.table().by_name.get(name).map(|effect| effect.number)
    }
}
