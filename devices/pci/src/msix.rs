//! MSI-X (PCIe §6.1.4, §7.7.2): the table and the pending bits in a BAR, and the vectors that a device signals.
//!
//! A message to the host's memory is not what we send: the attachment's descriptor for the vector stands for it, and address
//! and data of an entry are kept only to be read back.
//!
//! # Who keeps the table
//! A VMM (QEMU, Cloud Hypervisor) traps the table, shows its guest one of its own, and says what it wants by descriptors
//! and masks. The entries here stay as after a reset, masked, though vectors are to be given. Another client
//! passes the host's writes on to us, and these masks have to be obeyed. We cannot know which of them
//! it is. So what counts is what was written: an entry's mask bit from the first write to its Vector Control
//! on, and Enable and Function Mask from the first write to Message Control on, since the last reset. Before that, a descriptor for the vector is what enables it. A host that passes its table
//! through has to write the entry before it uses it, since it reads as masked.

use std::sync::Arc;

use bluff_reactor::{Notice, Notifier};

use crate::events::Events;
use crate::line::{Kind, Line, reason};
use crate::seam::Interrupt;
use crate::spec::ENTRY;

/// An MSI-X vector of a function, for its device; clones are the same vector.
#[derive(Clone, Debug)]
pub struct Vector {
    line: Arc<Line<Notifier>>,
    index: u16,
    events: Events,
}

impl Vector {
    /// Signals it, on any thread. `None`: it is masked, and pending now; it will be given when nothing masks it.
    pub fn signal(&self) -> Option<Notice> {
        self.note(self.line.request())
    }

    /// What it was signalled for has been seen to. If it is pending it is so no longer, as otherwise the host would get a
    /// spurious interrupt when it unmasks the vector (PCIe §6.1.4.6).
    pub fn withdraw(&self) {
        self.line.withdraw();
    }

    /// Whether it is pending.
    pub fn is_pending(&self) -> bool {
        self.line.is_requested()
    }

    pub(crate) fn line(&self) -> &Line<Notifier> {
        &self.line
    }

    pub(crate) fn note(&self, notice: Option<Notice>) -> Option<Notice> {
        self.events.note(Interrupt::Msix(self.index), notice)
    }

    fn set(&self, why: u32, masked: bool) {
        self.note(self.line.set(why, masked));
    }
}

/// Vector Control of an entry: its offset, and its mask bit (PCIe §7.7.2.7).
const CONTROL: usize = 12;
const MASKED: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) bytes: [u8; ENTRY as usize],
    /// Whether its mask bit was written.
    pub(crate) told: bool,
}

impl Entry {
    /// Masked after a reset (PCIe §7.7.2.7); the rest is undefined then, and zero.
    const START: Self = {
        let mut bytes = [0; ENTRY as usize];
        bytes[CONTROL] = MASKED;
        Self { bytes, told: false }
    };

    /// One with these bytes. Of Vector Control all but the mask bit is reserved, and reads as zero.
    pub(crate) fn of(mut bytes: [u8; ENTRY as usize], told: bool) -> Self {
        bytes[CONTROL] &= MASKED;
        bytes[CONTROL + 1..].fill(0);
        Self { bytes, told }
    }

    fn is_masked(&self) -> bool {
        self.told && self.bytes[CONTROL] & MASKED != 0
    }
}

/// Where table and pending bits are, as offsets in their BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// BAR of the table.
    pub table_bar: u8,
    /// Its offset in bytes: a multiple of 8. It has 16 bytes a vector.
    pub table: u32,
    /// BAR of the pending bits.
    pub pending_bar: u8,
    /// Their offset in bytes: a multiple of 8. They have 8 bytes for each 64 vectors.
    pub pending: u32,
}

impl MsixPlace {
    /// Table and pending bits in one BAR, each beginning with a page of its own, from `offset` on; for `vectors` up to 2048 it takes
    /// 36 KiB at most.
    pub fn in_bar(bar: u8, offset: u32, vectors: u16) -> Self {
        let table = (u32::from(vectors) * ENTRY as u32).next_multiple_of(4096);
        Self {
            table_bar: bar,
            table: offset,
            pending_bar: bar,
            pending: offset + table,
        }
    }
}

/// Bytes of the pending bits of so many vectors.
pub(crate) fn pending_len(vectors: u16) -> u64 {
    u64::from(vectors).div_ceil(64) * 8
}

/// What a part of a BAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Table,
    Pending,
}

#[derive(Debug)]
pub(crate) struct Msix {
    place: MsixPlace,
    entries: Vec<Entry>,
    vectors: Vec<Vector>,
}

impl Msix {
    pub(crate) fn new(place: MsixPlace, vectors: u16, events: &Events) -> Self {
        let vector = |index| Vector {
            line: Arc::new(Line::new(Kind::Edge)),
            index,
            events: events.clone(),
        };
        Self {
            place,
            entries: vec![Entry::START; usize::from(vectors)],
            vectors: (0..vectors).map(vector).collect(),
        }
    }

    pub(crate) fn vectors(&self) -> &[Vector] {
        &self.vectors
    }

    /// A reason that is the same for all vectors.
    pub(crate) fn set_all(&self, why: u32, masked: bool) {
        for vector in &self.vectors {
            vector.set(why, masked);
        }
    }

    /// The table is as after a reset. Requests go with the end of it.
    pub(crate) fn reset(&mut self) {
        self.entries.fill(Entry::START);
        self.set_all(reason::ENTRY, false);
    }

    /// The part that an access falls on, and the offset in it. As accesses are naturally aligned, of 8 bytes at most, and
    /// both parts of whole quadwords, none falls on two.
    fn part(&self, bar: u8, offset: u64) -> Option<(Part, u64)> {
        let n = self.vectors.len() as u16;
        let at = |start: u32, len| offset.checked_sub(u64::from(start)).filter(|o| *o < len);
        if bar == self.place.table_bar
            && let Some(at) = at(self.place.table, u64::from(n) * ENTRY)
        {
            return Some((Part::Table, at));
        }
        if bar == self.place.pending_bar
            && let Some(at) = at(self.place.pending, pending_len(n))
        {
            return Some((Part::Pending, at));
        }
        None
    }

    /// Reads, if it is here that an access falls on. Of other widths than 4 and 8 bytes (undefined by PCIe §7.7.2) it is
    /// all ones.
    pub(crate) fn read(&self, bar: u8, offset: u64, to: &mut [u8]) -> bool {
        let Some((part, at)) = self.part(bar, offset) else {
            return false;
        };
        match part {
            _ if to.len() < 4 => to.fill(0xff),
            Part::Table => {
                let (entry, skip) = ((at / ENTRY) as usize, (at % ENTRY) as usize);
                to.copy_from_slice(&self.entries[entry].bytes[skip..][..to.len()]);
            }
            Part::Pending => {
                let first = (at / 8 * 64) as usize;
                let bits = self.vectors[first..].iter().take(64).enumerate();
                let word = bits.fold(0u64, |word, (i, v)| word | u64::from(v.is_pending()) << i);
                to.copy_from_slice(&word.to_le_bytes()[(at % 8) as usize..][..to.len()]);
            }
        }
        true
    }

    /// Writes, if it is here that an access falls on. Of other widths it is dropped; and so is what is written to the pending bits (undefined
    /// by PCIe §7.7.2).
    pub(crate) fn write(&mut self, bar: u8, offset: u64, from: &[u8]) -> bool {
        let Some((part, at)) = self.part(bar, offset) else {
            return false;
        };
        if from.len() < 4 || part == Part::Pending {
            return true;
        }
        let (index, skip) = ((at / ENTRY) as usize, (at % ENTRY) as usize);
        let entry = &mut self.entries[index];
        entry.bytes[skip..][..from.len()].copy_from_slice(from);
        if skip + from.len() > CONTROL {
            *entry = Entry::of(entry.bytes, true);
            self.apply(index);
        }
        true
    }

    fn apply(&self, index: usize) {
        self.vectors[index].set(reason::ENTRY, self.entries[index].is_masked());
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn load(&mut self, entries: Vec<Entry>) {
        self.entries = entries;
        (0..self.entries.len()).for_each(|index| self.apply(index));
    }
}
