//! A session as one value, from which another process goes on.
//!
//! ```text
//!   socket --peek--> Session: effects --> Recorder: what it stands on now --> Commit --> Keeper: record, consume, reply
//!                                                                                          |
//!   Session::resume: memory, interrupts, masks, the function's state <---- Record, descriptors
//! ```
//! Descriptors are named by keys and go beside it. All regions that share a mapping share a descriptor: a client that maps by the
//! page has tens of thousands of regions, and the process has not so many descriptors.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use bluff_attachment::keeper::{Commit, Descriptors, Key};
use serde::{Deserialize, Serialize};

use crate::capabilities::Agreed;
use crate::function::PciTarget;
use crate::{Error, Mapping, Outgoing, Session};

const VERSION: u32 = 1;

/// Of a message that has not come as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Partial {
    pub(crate) bytes: Vec<u8>,
    pub(crate) files: Vec<Key>,
    pub(crate) truncated: bool,
}

/// Everything that a session stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The number of the last step.
    pub(crate) seq: u64,
    pub(crate) next_key: Key,
    /// `None` before the version was said.
    pub(crate) agreed: Option<Agreed>,
    /// The mappings, and the descriptors of their files.
    pub(crate) mappings: Vec<(Mapping, Option<Key>)>,
    /// Descriptors of interrupts: type, number, and which.
    pub(crate) interrupts: Vec<(u32, u32, Key)>,
    /// Interrupts that the client has masked: type and number.
    pub(crate) masked: Vec<(u32, u32)>,
    /// The function's own state.
    pub(crate) function: Vec<u8>,
    pub(crate) partial: Partial,
}

impl Record {
    /// As bytes, for whoever keeps it.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain numbers and lists")
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`Error::Recorded`] where they are not of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let record: Self =
            serde_json::from_slice(bytes).map_err(|_| Error::Recorded("it cannot be read"))?;
        match record.version {
            VERSION => Ok(record),
            _ => Err(Error::Recorded("another version")),
        }
    }

    /// The descriptors that it names.
    pub fn keys(&self) -> BTreeSet<Key> {
        let mappings = self.mappings.iter().filter_map(|(_, key)| *key);
        let interrupts = self.interrupts.iter().map(|(.., key)| *key);
        let partial = self.partial.files.iter().copied();
        mappings.chain(interrupts).chain(partial).collect()
    }
}

/// What a descriptor is of, so that the same one is recorded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// A mapping, by its serial.
    Mapping(u64),
    /// An interrupt, by the serial of its descriptor.
    Interrupt(u64),
    /// A message that is not whole: which, and the place among its descriptors.
    Partial(u64, usize),
}

/// What the keeper of one connection has.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    seq: u64,
    next_key: Key,
    held: BTreeSet<Key>,
    keys: BTreeMap<Source, Key>,
    /// How many messages were whole.
    messages: u64,
}

impl Recorder {
    /// The number of the last step.
    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    /// That of the next connection. Steps are numbered through, so that a late word of the keeper is not taken for another.
    pub(crate) fn next(&self) -> Self {
        Self {
            seq: self.seq,
            next_key: self.next_key,
            ..Self::default()
        }
    }

    /// That of a session that was taken up.
    pub(crate) fn resumed(record: &Record, session: &Session<PciTarget>) -> Self {
        let mut keys = BTreeMap::new();
        let mut note = |source, key| {
            keys.insert(source, key);
        };
        for (mapping, key) in &record.mappings {
            if let Some((source, _)) = session.target().file_of(mapping)
                && let Some(key) = key
            {
                note(source, *key);
            }
        }
        let found: BTreeMap<_, _> = (session.target().interrupts())
            .map(|(index, vector, source, _)| ((index, vector), source))
            .collect();
        for (index, vector, key) in &record.interrupts {
            if let Some(source) = found.get(&(*index, *vector)) {
                note(*source, *key);
            }
        }
        for (place, key) in record.partial.files.iter().enumerate() {
            note(Source::Partial(0, place), *key);
        }
        Self {
            seq: record.seq,
            next_key: record.next_key,
            held: record.keys(),
            keys,
            messages: 0,
        }
    }

    /// The next step: the session is as it is now, `consume` bytes of its socket are done, and `reply` is to be sent.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub(crate) fn commit(
        &mut self,
        session: &Session<PciTarget>,
        consume: usize,
        reply: Option<Outgoing>,
    ) -> io::Result<Commit> {
        self.seq += 1;
        if !session.is_within_message() {
            self.messages += 1;
        }
        let mut now = BTreeMap::new();
        let mut files = Vec::new();
        let mut key = |source: Source, file: BorrowedFd<'_>| -> io::Result<Key> {
            if let Some(key) = now.get(&source) {
                return Ok(*key);
            }
            let key = match self.keys.get(&source) {
                Some(key) => *key,
                None => {
                    self.next_key += 1;
                    files.push((self.next_key, file.try_clone_to_owned()?));
                    self.next_key
                }
            };
            now.insert(source, key);
            Ok(key)
        };
        let target = session.target();
        let mut mappings = Vec::new();
        for mapping in session.mappings() {
            let file = target.file_of(mapping);
            let key = file.map(|(source, file)| key(source, file)).transpose()?;
            mappings.push((*mapping, key));
        }
        let mut interrupts = Vec::new();
        for (index, vector, source, file) in target.interrupts() {
            interrupts.push((index, vector, key(source, file)?));
        }
        let (bytes, partial, truncated) = session.partial();
        let mut keys = Vec::new();
        for (place, file) in partial.iter().enumerate() {
            keys.push(key(Source::Partial(self.messages, place), file.as_fd())?);
        }
        self.keys = now;
        let record = Record {
            version: VERSION,
            seq: self.seq,
            next_key: self.next_key,
            agreed: session.agreed(),
            mappings,
            interrupts,
            masked: target.masked().collect(),
            function: target.function().save(),
            partial: Partial {
                bytes: bytes.to_vec(),
                files: keys,
                truncated,
            },
        };
        let used = record.keys();
        let dropped = self.held.difference(&used).copied().collect();
        self.held = used;
        let (reply, reply_files) = match reply {
            None => (Vec::new(), Vec::new()),
            Some(message) => {
                let files = message.files.iter().map(|f| f.try_clone());
                (message.bytes, files.collect::<io::Result<_>>()?)
            }
        };
        Ok(Commit {
            seq: self.seq,
            state: record.to_bytes(),
            files,
            dropped,
            consume,
            reply,
            reply_files,
        })
    }
}

/// A duplicate of a descriptor that a record names.
pub(crate) fn duplicate(files: &Descriptors, key: Key) -> Result<std::os::fd::OwnedFd, Error> {
    let file = files
        .get(&key)
        .ok_or(Error::Recorded("a descriptor is missing"))?;
    file.try_clone()
        .map_err(|_| Error::Recorded("no descriptors are left"))
}
