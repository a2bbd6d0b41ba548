//! The vault's own store: one file of sealed records, one after the other; the last of a name is the one that holds. A record is its
//! length, a nonce and what AES-256-GCM made of it, bound to the place where it stands, so that none can be moved or taken out of the
//! middle. A torn record at the end, which a crash leaves, is written over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::SECRET_BYTES_MAX;
use crate::grant::Name;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
const LENGTH_BYTES: usize = 4;
const RECORD_BYTES_MAX: usize = 2 * SECRET_BYTES_MAX;

#[derive(Serialize, Deserialize)]
struct Record {
    name: Name,
    /// Nothing where it was removed.
    secret: Option<Zeroizing<String>>,
}

/// The store, open.
pub struct Store {
    file: File,
    key: LessSafeKey,
    end: u64,
    secrets: BTreeMap<Name, Zeroizing<String>>,
}

impl Store {
    /// Reads it. `key` is a file of [`KEY_BYTES`] bytes.
    ///
    /// # Errors
    /// Where the key is not its key, or a record was changed.
    pub fn open(file: OwnedFd, key: OwnedFd) -> io::Result<Store> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        File::from(key).read_exact(&mut *bytes)?;
        let key = UnboundKey::new(&AES_256_GCM, &*bytes).map_err(|_| io::Error::other("no key"))?;
        let mut store =
            Store { file: file.into(), key: LessSafeKey::new(key), end: 0, secrets: BTreeMap::new() };
        let length = store.file.metadata()?.len();
        while let Some(record) = store.read(length)? {
            match record.secret {
                Some(secret) => drop(store.secrets.insert(record.name, secret)),
                None => drop(store.secrets.remove(&record.name)),
            }
        }
        Ok(store)
    }

    /// The record at the end of what was read; nothing where there is no whole one.
    fn read(&mut self, length: u64) -> io::Result<Option<Record>> {
        let mut head = [0; LENGTH_BYTES];
        if self.end + LENGTH_BYTES as u64 > length {
            return Ok(None);
        }
        self.file.read_exact_at(&mut head, self.end)?;
        let size = u32::from_le_bytes(head) as usize;
        let begin = self.end + LENGTH_BYTES as u64;
        if size <= NONCE_LEN || size > RECORD_BYTES_MAX || begin + size as u64 > length {
            return Ok(None);
        }
        let mut sealed = Zeroizing::new(vec![0; size]);
        self.file.read_exact_at(&mut sealed, begin)?;
        let (nonce, text) = sealed.split_at_mut(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| io::Error::other("no nonce"))?;
        let broken = || io::Error::other("the store cannot be opened: another key, or it was changed");
        let place = Aad::from(self.end.to_le_bytes());
        let plain = self.key.open_in_place(nonce, place, text).map_err(|_| broken())?;
        let record = serde_json::from_slice(plain).map_err(|_| broken())?;
        self.end = begin + size as u64;
        Ok(Some(record))
    }

    /// A secret by name.
    pub fn get(&self, name: &Name) -> Option<Zeroizing<String>> {
        self.secrets.get(name).cloned()
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.secrets.keys()
    }

    /// Keeps a secret, durably; without one, forgets it.
    ///
    /// # Errors
    /// Where it cannot be written. Then nothing has changed.
    pub fn set(&mut self, name: &Name, secret: Option<Zeroizing<String>>) -> io::Result<()> {
        let record = Record { name: name.clone(), secret: secret.clone() };
        let mut text = Zeroizing::new(serde_json::to_vec(&record)?);
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("no randomness"))?;
        let place = Aad::from(self.end.to_le_bytes());
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), place, &mut *text)
            .map_err(|_| io::Error::other("it cannot be sealed"))?;
        let size = u32::try_from(NONCE_LEN + text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = [&size.to_le_bytes()[..], &nonce, &text].concat();
        self.file.set_len(self.end)?;
        self.file.write_all_at(&bytes, self.end)?;
        self.file.sync_data()?;
        self.end += bytes.len() as u64;
        match secret {
            Some(secret) => drop(self.secrets.insert(name.clone(), secret)),
            None => drop(self.secrets.remove(name)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> OwnedFd {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("store", flags).expect("memory"));
        file.write_all_at(bytes, 0).expect("it is ours");
        file.into()
    }

    fn copy(store: &Store) -> Vec<u8> {
        let mut bytes =
            vec![0; usize::try_from(store.file.metadata().expect("it is open").len()).expect("small")];
        store.file.read_exact_at(&mut bytes, 0).expect("it is open");
        bytes
    }

    fn open(bytes: &[u8], key: u8) -> io::Result<Store> {
        Store::open(file(bytes), file(&[key; KEY_BYTES]))
    }

    fn name(text: &str) -> Name {
        text.parse().expect("a name")
    }

    #[test]
    fn what_was_kept_is_found_again_and_only_with_the_key() {
        let mut store = open(&[], 1).expect("it is empty");
        let secret = |text: &str| Some(Zeroizing::new(text.to_owned()));
        for (at, value) in [("a", "one"), ("b", "two"), ("a", "three")] {
            store.set(&name(at), secret(value)).expect("it is kept");
        }
        store.set(&name("b"), None).expect("it is forgotten");
        let bytes = copy(&store);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(["one", "two", "three", "\"a\""].iter().all(|word| !text.contains(word)));
        let again = open(&bytes, 1).expect("it is whole");
        assert_eq!(again.get(&name("a")).as_deref().map(String::as_str), Some("three"));
        assert_eq!(again.names().collect::<Vec<_>>(), [&name("a")]);
        assert!(open(&bytes, 2).is_err(), "another key");
    }

    /// Cut off anywhere it is what it was some records ago; changed anywhere it is found, but for a length that hides the rest as
    /// a cut would.
    #[test]
    fn a_cut_store_is_an_older_one_and_a_changed_one_is_refused() {
        let mut store = open(&[], 1).expect("it is empty");
        for at in ["a", "b", "c"] {
            store.set(&name(at), Some(Zeroizing::new(at.repeat(9)))).expect("it is kept");
        }
        let bytes = copy(&store);
        for end in 0..bytes.len() {
            let mut cut = open(&bytes[..end], 1).expect("it is cut");
            assert!(cut.names().count() < 3, "{end}");
            cut.set(&name("d"), Some(Zeroizing::new("dd".into()))).expect("it goes on");
            assert!(open(&copy(&cut), 1).expect("it is whole").get(&name("d")).is_some(), "{end}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(open(&changed, 1).map_or(true, |store| store.names().count() < 3), "{at}");
        }
    }
}
