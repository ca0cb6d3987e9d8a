//! Formats that hosts ask for, and control records: until it has said so, they are no host's.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use bluff_nvme::{FormatKeeper, Kept, NotKept};

use super::Teller;
use crate::message::FromData;
use crate::spec::{NamespaceFormat, SubsystemKey};

/// What control was asked for and has not answered, of all subsystems.
///
/// Where it is dropped with something in it, namespaces stay blocked, as nobody knows what was recorded; the next data half is told.
#[derive(Clone, Debug, Default)]
pub(super) struct Records(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    by_number: BTreeMap<u64, (SubsystemKey, Kept)>,
}

impl Records {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().expect("counting does not panic")
    }

    /// Whether something of a subsystem is not answered.
    pub(super) fn are_awaited(&self, subsystem: &SubsystemKey) -> bool {
        let waiting = self.lock();
        let mut all = waiting.by_number.values();
        all.any(|(of, _)| of == subsystem)
    }

    /// Control has recorded what was asked for by this number, or certainly not.
    pub(super) fn answered(&self, number: u64, error: Option<String>) {
        // Not under the lock: controllers are told.
        let found = self.lock().by_number.remove(&number);
        match found {
            Some((_, kept)) => kept.answer(error.map_or(Ok(()), |_| Err(NotKept))),
            None => log::warn!("control has kept formats that nobody asked for"),
        }
    }
}

/// Asks control to keep the formats of a subsystem.
pub(super) struct Keeper {
    subsystem: SubsystemKey,
    records: Records,
    teller: Teller,
    /// The subsystem has no functions any more. Once its last one has been told to be gone, control may have another made, so nothing is asked for after that.
    retired: Mutex<bool>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keeper").field(&self.subsystem).finish()
    }
}

impl Keeper {
    pub(super) fn new(subsystem: &SubsystemKey, records: &Records, teller: &Teller) -> Self {
        Self {
            subsystem: subsystem.clone(),
            records: records.clone(),
            teller: teller.clone(),
            retired: Mutex::new(false),
        }
    }

    /// Asks for nothing from now on.
    pub(super) fn retire(&self) {
        *self.retired.lock().expect("asking does not panic") = true;
    }
}

impl FormatKeeper for Keeper {
    fn keep(&self, formats: &[bluff_nvme::NamespaceFormat], kept: Kept) {
        let retired = self.retired.lock().expect("asking does not panic");
        if *retired {
            drop(retired);
            return kept.answer(Err(NotKept));
        }
        let number = {
            let mut waiting = self.records.lock();
            waiting.next += 1;
            let number = waiting.next;
            let waits = (self.subsystem.clone(), kept);
            waiting.by_number.insert(number, waits);
            number
        };
        let format = |format: &bluff_nvme::NamespaceFormat| NamespaceFormat {
            nsid: format.nsid,
            block_size: format.block_size,
        };
        let message = FromData::KeepFormats {
            subsystem: self.subsystem.clone(),
            seq: number,
            formats: formats.iter().map(format).collect(),
        };
        let sent = self.teller.send(0, message, &[]);
        drop(retired);
        if let Err(error) = sent {
            // Control has not heard of it, and never will.
            self.records.answered(number, Some(error.to_string()));
        }
    }
}
