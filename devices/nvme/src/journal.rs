//! What of a controller outlives the process that serves it: a file that somebody else keeps a duplicate of.
//!
//! ```text
//!   page 0     what this is; the registers (two copies, and which is newer)
//!   then       by submission queue: how many commands were taken
//!   then       what the admin side stands on (two copies, as above): see `admin_worker::keep`
//!   then       by completion queue: how many completions were posted, and each command in flight
//! ```
//!
//! # What holds
//! The process can be killed between any two stores. Stores of a thread that is killed are visible to whoever comes later up to some point of its
//! program, and none behind that point, as to a signal handler of the thread: so only the compiler has to keep them in order. Each store that others hang
//! on, a *mark*, is between two compiler fences (C11 §7.17.4.2, `atomic_signal_fence`).
//!
//! *Taken once.* A command is written down, and then counted as taken. A command with a count that is not below the queue's was written and not counted: it was
//! taken all the same ([`QueueJournal::commands`]).
//!
//! *Completed once.* A completion is written down with its place, then posted, then counted, then its command is struck off. One whose place is not below the count
//! may have been posted or not, which the phase tag in the host's memory tells ([`crate::queue::CompletionQueue::post_unless_there`]): a host that forges it
//! deceives itself only.
//!
//! *All others are done again*, in the order in which they were taken. A command that was completed by its volume is posted before any that was completed later; so what is
//! done again was not completed when something else was, and the host had both outstanding.
//!
//! # Whose values
//! A process that serves a hostile host wrote them. They are checked as a host's are, by whoever goes on with them.
//!
//! Unsafe, because it is memory that is shared with processes before and after this one.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use bluff_memory::Mapping;
use bluff_pci::{Area, PAGE};

use crate::spec::{Command, Completion};

/// "BluffNVM".
const MAGIC: u64 = 0x4d56_4e66_6675_6c42;
const VERSION: u64 = 1;
/// Most commands in flight of one completion queue.
pub(crate) const COMMANDS: u32 = 1024;
/// Words of the registers.
pub(crate) const REGISTERS: usize = 6;

// Places in page 0, in words.
const SEQ: usize = 16;
const COPIES: [usize; 2] = [24, 40];
const ADMIN_SEQ: usize = 64;
const ADMIN_LEN: [usize; 2] = [65, 66];

/// Words of one queue's count, so that no two workers write to one line.
const COUNT: usize = 8;
/// Words of one command.
const ENTRY: usize = 16;
/// Words of a completion queue: a page, and its commands.
const QUEUE: usize = PAGE as usize / 8 + COMMANDS as usize * ENTRY;

// Words in a completion queue's page.
const POSTED: usize = 0;
const HEAD: usize = 1;
const USED: usize = 2;

// Words in a command's entry.
const NUMBER: usize = 0;
const TAKEN: usize = 1;
const SQ: usize = 2;
const PLACE: usize = 3;
const COMPLETION: usize = 4;
const COMMAND: usize = 8;

/// The place of a completion that was not posted.
const NOWHERE: u64 = u64::MAX;

/// Where things are, in words.
#[derive(Clone, Copy, Debug)]
struct Layout {
    counts: usize,
    admin: [usize; 2],
    /// Bytes of one copy of the admin side.
    admin_len: usize,
    queues: usize,
    /// All of it, in bytes.
    len: u64,
}

impl Layout {
    fn new(queues: u16) -> Self {
        let page = PAGE as usize;
        let counts = page;
        let admin = (counts + (usize::from(queues) + 1) * COUNT * 8).next_multiple_of(page);
        // What is bounded by itself (events, requests, commands under way), and the queues.
        let admin_len = ((128 << 10) + usize::from(queues) * 512).next_multiple_of(page);
        let first = admin + 2 * admin_len;
        Self {
            counts: counts / 8,
            admin: [admin / 8, (admin + admin_len) / 8],
            admin_len,
            queues: first / 8,
            len: (first + usize::from(queues) * QUEUE * 8) as u64,
        }
    }
}

/// The journal of a controller.
#[derive(Debug)]
pub(crate) struct Journal {
    file: Arc<OwnedFd>,
    mapping: Mapping,
    layout: Layout,
    queues: u16,
}

impl Journal {
    /// An empty one, for so many pairs of I/O queues. What was not used takes no memory.
    ///
    /// # Errors
    /// Where there is no memory.
    pub(crate) fn new(queues: u16) -> io::Result<Arc<Self>> {
        let file = Area::new(0, Layout::new(queues).len)?.file;
        let this = Self::map(file, queues)?;
        for (at, word) in [MAGIC, VERSION, queues.into()].into_iter().enumerate() {
            this.mark(at, word);
        }
        Ok(Arc::new(this))
    }

    /// One that another process wrote.
    ///
    /// # Errors
    /// `InvalidData` where it is none, of another version, or for another number of queues.
    pub(crate) fn open(file: OwnedFd, queues: u16) -> io::Result<Arc<Self>> {
        let file = File::from(file);
        let len = file.metadata()?.len();
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        if len != Layout::new(queues).len {
            return Err(bad("the journal has another size"));
        }
        let this = Self::map(Arc::new(file.into()), queues)?;
        let found: [u64; 3] = std::array::from_fn(|at| this.word(at).load(Ordering::Relaxed));
        match found == [MAGIC, VERSION, queues.into()] {
            true => Ok(Arc::new(this)),
            false => Err(bad("no journal of this version")),
        }
    }

    fn map(file: Arc<OwnedFd>, queues: u16) -> io::Result<Self> {
        let layout = Layout::new(queues);
        let mapping = Mapping::new(file.try_clone()?, 0, layout.len);
        Ok(Self {
            mapping: mapping.map_err(io::Error::other)?,
            file,
            layout,
            queues,
        })
    }

    /// A duplicate of its file.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub(crate) fn file(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }

    #[inline(always)]
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!((at as u64) < self.layout.len / 8);
        // SAFETY: inside of the mapping, which `self` keeps, and aligned, as a mapping is to a page; others may have it too, and it is an atomic.
        unsafe { &*self.mapping.ptr().cast::<AtomicU64>().add(at) }
    }

    /// Stores what a mark makes valid.
    #[inline(always)]
    fn store(&self, at: usize, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            step();
            self.word(at + i).store(*word, Ordering::Relaxed);
        }
    }

    /// Stores what makes valid, or ends, all that was stored before.
    #[inline(always)]
    fn mark(&self, at: usize, word: u64) {
        step();
        compiler_fence(Ordering::SeqCst);
        self.word(at).store(word, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    fn load<const N: usize>(&self, at: usize) -> [u64; N] {
        std::array::from_fn(|i| self.word(at + i).load(Ordering::Relaxed))
    }

    /// The registers, where they were ever written down.
    pub(crate) fn registers(&self) -> Option<[u64; REGISTERS]> {
        let seq = self.word(SEQ).load(Ordering::Relaxed);
        (seq > 0).then(|| self.load(COPIES[(seq & 1) as usize]))
    }

    /// Writes the registers down. By one thread at a time.
    pub(crate) fn set_registers(&self, words: [u64; REGISTERS]) {
        let seq = self.word(SEQ).load(Ordering::Relaxed).wrapping_add(1);
        self.store(COPIES[(seq & 1) as usize], &words);
        self.mark(SEQ, seq);
    }

    /// What the admin side stands on, where that was ever written down.
    pub(crate) fn admin(&self) -> Option<Vec<u8>> {
        let seq = self.word(ADMIN_SEQ).load(Ordering::Relaxed);
        let copy = (seq & 1) as usize;
        let len = self.word(ADMIN_LEN[copy]).load(Ordering::Relaxed);
        let len = usize::try_from(len).ok();
        let len = len.filter(|len| seq > 0 && *len <= self.layout.admin_len)?;
        let words = (0..len.div_ceil(8)).map(|i| {
            let word = self.word(self.layout.admin[copy] + i);
            word.load(Ordering::Relaxed).to_le_bytes()
        });
        let mut bytes: Vec<u8> = words.flatten().collect();
        bytes.truncate(len);
        Some(bytes)
    }

    /// Writes down what the admin side stands on; `false`: there is no room for it. By one thread.
    #[must_use]
    pub(crate) fn set_admin(&self, bytes: &[u8]) -> bool {
        if bytes.len() > self.layout.admin_len {
            return false;
        }
        let seq = self.word(ADMIN_SEQ).load(Ordering::Relaxed).wrapping_add(1);
        let copy = (seq & 1) as usize;
        for (i, part) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            let word = u64::from_le_bytes(word);
            self.store(self.layout.admin[copy] + i, &[word]);
        }
        self.store(ADMIN_LEN[copy], &[bytes.len() as u64]);
        self.mark(ADMIN_SEQ, seq);
        true
    }

    /// The place of how many commands were taken from a submission queue.
    fn taken(&self, qid: u16) -> usize {
        assert!(qid <= self.queues);
        self.layout.counts + usize::from(qid) * COUNT
    }

    /// The part of a completion queue, 1 or more.
    pub(crate) fn queue(self: &Arc<Self>, qid: u16) -> QueueJournal {
        assert!((1..=self.queues).contains(&qid));
        QueueJournal {
            at: self.layout.queues + (usize::from(qid) - 1) * QUEUE,
            journal: self.clone(),
        }
    }
}

/// A command that was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InFlight {
    /// Where it is written down: below [`COMMANDS`].
    pub(crate) index: u32,
    /// Which of all commands it is.
    pub(crate) number: u64,
    /// Its submission queue. Not checked.
    pub(crate) sq: u16,
    /// Which one of that queue.
    pub(crate) taken: u64,
    /// It.
    pub(crate) command: Command,
    /// How far it is.
    pub(crate) stage: Stage,
}

/// How far a command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It is not completed.
    Begun,
    /// It is, and nothing was posted.
    Completed(Completion),
    /// It is, and may have been posted as that one of its completion queue.
    Posting(u64, Completion),
}

/// What is written down of a completion queue, and of the commands of its submission queues.
#[derive(Clone, Debug)]
pub(crate) struct QueueJournal {
    journal: Arc<Journal>,
    at: usize,
}

impl QueueJournal {
    #[inline(always)]
    fn word(&self, at: usize) -> &AtomicU64 {
        self.journal.word(self.at + at)
    }

    #[inline(always)]
    fn mark(&self, at: usize, word: u64) {
        self.journal.mark(self.at + at, word);
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> usize {
        assert!(index < COMMANDS);
        PAGE as usize / 8 + index as usize * ENTRY
    }

    /// The queue begins: nothing was posted, and nothing is in flight.
    pub(crate) fn begin(&self) {
        let used = self.word(USED).load(Ordering::Relaxed).min(COMMANDS.into());
        for index in 0..used {
            self.strike(index as u32);
        }
        for at in [POSTED, HEAD] {
            self.mark(at, 0);
        }
    }

    /// One of its submission queues begins.
    pub(crate) fn begin_sq(&self, qid: u16) {
        self.journal.mark(self.journal.taken(qid), 0);
    }

    /// A command is taken, the `taken`-th of submission queue `sq` (from 0).
    #[inline]
    pub(crate) fn take(&self, index: u32, number: u64, sq: u16, taken: u64, command: &Command) {
        let used = self.word(USED);
        if u64::from(index) >= used.load(Ordering::Relaxed) {
            self.mark(USED, u64::from(index) + 1);
        }
        let at = self.entry(index);
        let words: [u64; 8] = zerocopy::transmute!(*command);
        self.journal.store(self.at + at + COMMAND, &words);
        self.journal
            .store(self.at + at + TAKEN, &[taken, sq.into(), 0]);
        // From here on it is in flight.
        self.mark(at + NUMBER, number.wrapping_add(1));
        self.journal
            .mark(self.journal.taken(sq), taken.wrapping_add(1));
    }

    /// A command's completion is about to be posted, as the `place`-th of the queue (from 0). Its phase tag is that of the place.
    #[inline]
    pub(crate) fn complete(&self, index: u32, place: u64, completion: &Completion) {
        let at = self.entry(index);
        let words: [u64; 2] = zerocopy::transmute!(*completion);
        self.journal.store(self.at + at + COMPLETION, &words);
        self.mark(at + PLACE, place.wrapping_add(1));
        step();
    }

    /// So many were posted.
    #[inline]
    pub(crate) fn set_posted(&self, posted: u64) {
        self.mark(POSTED, posted);
    }

    /// A completion could not be posted.
    pub(crate) fn unpost(&self, index: u32) {
        let at = self.entry(index);
        self.mark(at + PLACE, NOWHERE);
    }

    /// A command is not in flight any more.
    #[inline]
    pub(crate) fn strike(&self, index: u32) {
        let at = self.entry(index);
        self.mark(at + NUMBER, 0);
    }

    /// The host has read so far.
    #[inline]
    pub(crate) fn set_head(&self, head: u16) {
        self.mark(HEAD, head.into());
    }

    /// How many were posted, and how far the host has read.
    pub(crate) fn position(&self) -> (u64, u16) {
        // The head first: it is never ahead of what was posted.
        let head = self.word(HEAD).load(Ordering::Relaxed) as u16;
        (self.word(POSTED).load(Ordering::Relaxed), head)
    }

    /// How many commands were taken from submission queue `sq`, one of this queue's. What was written and not counted is counted now, as it may be struck off soon.
    pub(crate) fn count_taken(&self, sq: u16) -> u64 {
        let at = self.journal.taken(sq);
        let counted = self.journal.word(at).load(Ordering::Relaxed);
        let commands = self.commands();
        let written = commands.iter().filter(|c| c.sq == sq);
        let written = written.map(|c| c.taken.saturating_add(1)).max();
        let taken = counted.max(written.unwrap_or(0));
        self.journal.mark(at, taken);
        taken
    }

    /// What is in flight, in the order in which it was taken.
    pub(crate) fn commands(&self) -> Vec<InFlight> {
        let used = self.word(USED).load(Ordering::Relaxed).min(COMMANDS.into());
        let mut found = Vec::new();
        for index in 0..used as u32 {
            let at = self.entry(index);
            let Some(number) = self
                .word(at + NUMBER)
                .load(Ordering::Relaxed)
                .checked_sub(1)
            else {
                continue;
            };
            let words: [u64; 8] = self.journal.load(self.at + at + COMMAND);
            let place = self.word(at + PLACE).load(Ordering::Relaxed);
            let completion: [u64; 2] = self.journal.load(self.at + at + COMPLETION);
            let completion: Completion = zerocopy::transmute!(completion);
            let stage = match place {
                0 => Stage::Begun,
                NOWHERE => Stage::Completed(completion),
                place => Stage::Posting(place - 1, completion),
            };
            found.push(InFlight {
                index,
                number,
                sq: self.word(at + SQ).load(Ordering::Relaxed) as u16,
                taken: self.word(at + TAKEN).load(Ordering::Relaxed),
                command: zerocopy::transmute!(words),
                stage,
            });
        }
        found.sort_by_key(|c| c.number);
        found
    }
}

/// Where a test has the process die.
#[cfg(not(test))]
#[inline(always)]
fn step() {}

#[cfg(test)]
pub(crate) use death::step;

#[cfg(test)]
pub(crate) mod death {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// That of a process.
    pub(crate) struct Killed;

    /// This thread dies before the store of this number from now on. Says how many were left to the last one that was asked for.
    pub(crate) fn after(stores: Option<u64>) -> Option<u64> {
        LEFT.replace(stores)
    }

    /// Another store.
    pub(crate) fn step() {
        match LEFT.get() {
            None => {}
            Some(0) => {
                LEFT.set(None);
                // Not a panic that is to be told.
                std::panic::resume_unwind(Box::new(Killed));
            }
            Some(left) => LEFT.set(Some(left - 1)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
