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
pub(super) struct ByControl {
    subsystem: SubsystemKey,
    records: Records,
    teller: Teller,
    /// The subsystem has no functions any more. Once its last one has been told to be gone, control may have another made, so nothing is asked for after that.
    retired: Mutex<bool>,
}

impl fmt::Debug for ByControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ByControl").field(&self.subsystem).finish()
    }
}

impl ByControl {
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

impl FormatKeeper for ByControl {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use bluff_block::null::Null;
    use bluff_nvme::{Identity, NamespaceOptions, Subsystem, SubsystemOptions};

    use super::*;
    use crate::message::{Link, Numbered, ToData, pair};

    type Control = Link<Numbered<ToData>, Numbered<FromData>>;

    struct Rig {
        control: Control,
        records: Records,
        keeper: Arc<ByControl>,
        subsystem: Arc<Subsystem>,
        /// How the last format has ended.
        end: Arc<AtomicU8>,
    }

    const WAITS: u8 = 0;
    const KEPT: u8 = 1;
    const NOT_KEPT: u8 = 2;

    impl Rig {
        fn new() -> Self {
            let (ours, theirs) = pair().unwrap();
            let control = Control::new(ours);
            control.set_blocking(false).unwrap();
            let teller = Teller(Arc::new(Mutex::new(Link::new(theirs))));
            let records = Records::default();
            let keeper = Arc::new(ByControl::new(&key(), &records, &teller));
            let subsystem = Subsystem::new(SubsystemOptions {
                keeper: Some(keeper.clone()),
                ..SubsystemOptions::new("nqn.2026-11.example:s0")
            });
            let subsystem = subsystem.unwrap();
            let namespace = NamespaceOptions::new(Identity::hashed("disk0"));
            let volume = Arc::new(Null::new(512, 1 << 20));
            subsystem.add(volume, namespace).unwrap();
            Self {
                control,
                records,
                keeper,
                subsystem,
                end: Arc::default(),
            }
        }

        /// A format to 4096 bytes, as far as it gets.
        fn format(&self) {
            let formatting = self.subsystem.begin_format(0, &[1], 1, || ()).unwrap();
            self.end.store(WAITS, Ordering::Relaxed);
            let end = self.end.clone();
            formatting.finish(move |kept| {
                let end_of = kept.map_or(NOT_KEPT, |()| KEPT);
                end.store(end_of, Ordering::Relaxed);
            });
        }

        /// What control hears, by its number.
        fn hear(&mut self) -> Option<u64> {
            let (Numbered { number, message }, _) = self.control.receive().unwrap()?;
            assert_eq!(number, 0);
            let FromData::KeepFormats {
                subsystem,
                seq,
                formats,
            } = message
            else {
                panic!("{message:?}")
            };
            let format = NamespaceFormat {
                nsid: 1,
                block_size: 4096,
            };
            assert_eq!((subsystem, formats), (key(), vec![format]));
            Some(seq)
        }

        /// How the format has ended, whether the namespace is blocked, and the size of its blocks.
        fn state(&self) -> (u8, bool, u32) {
            let table = self.subsystem.allocated(0);
            let namespace = &table.iter().next().unwrap().namespace;
            (
                self.end.load(Ordering::Relaxed),
                namespace.is_blocked(),
                1 << namespace.lba_shift(),
            )
        }
    }

    fn key() -> SubsystemKey {
        SubsystemKey::Shared("s0".parse().unwrap())
    }

    #[test]
    fn control_is_asked_and_its_answer_holds() {
        for (error, end) in [
            (Some("no room"), (NOT_KEPT, false, 512)),
            (None, (KEPT, false, 4096)),
        ] {
            let mut rig = Rig::new();
            rig.format();
            assert_eq!(rig.state(), (WAITS, true, 512));
            let seq = rig.hear().unwrap();
            assert!(rig.records.are_awaited(&key()));
            let other = SubsystemKey::Own("s0".parse().unwrap());
            assert!(!rig.records.are_awaited(&other));
            rig.records.answered(seq + 1, None);
            assert_eq!(rig.state(), (WAITS, true, 512), "another's number");
            rig.records.answered(seq, error.map(str::to_owned));
            assert_eq!(rig.state(), end);
            assert!(!rig.records.are_awaited(&key()));
            assert_eq!(rig.hear(), None);
        }
    }

    #[test]
    fn a_subsystem_that_is_about_to_go_asks_for_nothing() {
        let mut rig = Rig::new();
        rig.keeper.retire();
        rig.format();
        assert_eq!(rig.state(), (NOT_KEPT, false, 512));
        assert_eq!(rig.hear(), None);
    }

    #[test]
    fn what_could_not_be_asked_for_is_not_recorded() {
        let rig = Rig::new();
        drop(rig.control);
        let rig = Rig {
            control: Control::new(pair().unwrap().0),
            ..rig
        };
        rig.format();
        assert_eq!(rig.state(), (NOT_KEPT, false, 512));
        assert!(!rig.records.are_awaited(&key()));
    }

    #[test]
    fn without_an_answer_nobody_may_use_it() {
        let mut rig = Rig::new();
        rig.format();
        assert!(rig.hear().is_some());
        rig.records.lock().by_number.clear();
        assert_eq!(rig.state(), (WAITS, true, 512));
        let again = rig.subsystem.begin_format(0, &[1], 1, || ());
        assert!(again.is_err());
    }
}
