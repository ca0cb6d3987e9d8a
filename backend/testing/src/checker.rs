//! A judge of storage: knows every write and what of it was acknowledged, and so what a read may find.
//!
//! Each write of a block has a number of its own, from which every sector's content follows, checksum and all. A read
//! may find a write that is in flight, or one that was acknowledged and that no later one has surely replaced: a write
//! replaces those that had ended before it began, at the moment that it is acknowledged. So a write that was lost, one
//! that landed after it had been replaced, and one of another block are all found out. Concurrent writes may mix by
//! sectors, which is what a disk guarantees.

use std::collections::HashMap;

use crate::Chance;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"bluffblk");

/// Which request: a queue and a slot of it.
pub type Token = (u16, u16);

/// What one write leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    number: u64,
    zeroes: bool,
}

/// A write that may still be found.
#[derive(Clone, Copy, Debug)]
struct Write {
    content: Content,
    begun: u64,
    ended: Option<u64>,
}

#[derive(Debug)]
enum Pending {
    Read { block: u64, may: Vec<Content> },
    Write { block: u64, number: u64 },
    Flush,
}

/// What was done, and how it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Reads that came back.
    pub reads: u64,
    /// Writes that came back.
    pub writes: u64,
    /// Flushes that came back.
    pub flushes: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// Cut off by a reset or the end of a connection.
    pub abandoned: u64,
}

/// The judge of one volume. It panics where a device is wrong.
#[derive(Debug)]
pub struct Checker {
    blocks: Vec<Vec<Write>>,
    pending: HashMap<Token, Pending>,
    /// Counts submissions and completions.
    time: u64,
    /// What was done so far.
    pub tally: Tally,
}

impl Checker {
    /// Of a volume of so many blocks that reads as zeroes.
    pub fn new(blocks: u64) -> Self {
        let zeroes = Write {
            content: Content {
                number: 0,
                zeroes: true,
            },
            begun: 0,
            ended: Some(0),
        };
        Self {
            blocks: (0..blocks).map(|_| vec![zeroes]).collect(),
            pending: HashMap::new(),
            time: 0,
            tally: Tally::default(),
        }
    }

    /// How many blocks the volume has.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    fn now(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    fn pend(&mut self, token: Token, pending: Pending) {
        let before = self.pending.insert(token, pending);
        assert!(before.is_none(), "the guest uses a slot twice");
    }

    /// A read is about to be submitted.
    pub fn begin_read(&mut self, token: Token, block: u64) {
        let may = self.blocks[block as usize].iter();
        let may = may.map(|w| w.content).collect();
        self.pend(token, Pending::Read { block, may });
    }

    /// A write is about to be submitted; says what is to be written.
    pub fn begin_write(&mut self, token: Token, block: u64) -> Vec<u8> {
        let number = self.begin(token, block, false);
        content(block, number)
    }

    /// As [`Checker::begin_write`], of zeroes.
    pub fn begin_zeroes(&mut self, token: Token, block: u64) {
        self.begin(token, block, true);
    }

    fn begin(&mut self, token: Token, block: u64, zeroes: bool) -> u64 {
        let begun = self.now();
        let content = Content {
            number: begun,
            zeroes,
        };
        self.blocks[block as usize].push(Write {
            content,
            begun,
            ended: None,
        });
        for pending in self.pending.values_mut() {
            if let Pending::Read { block: of, may } = pending
                && *of == block
            {
                may.push(content);
            }
        }
        let number = content.number;
        self.pend(token, Pending::Write { block, number });
        number
    }

    /// A flush is about to be submitted.
    pub fn begin_flush(&mut self, token: Token) {
        self.pend(token, Pending::Flush);
    }

    /// A request came back; `data` is what lies in its buffer.
    pub fn end(&mut self, token: Token, ok: bool, data: impl FnOnce() -> Vec<u8>) {
        let pending = self.pending.remove(&token);
        let pending = pending.unwrap_or_else(|| panic!("{token:?} completes and is not in flight"));
        self.tally.errors += u64::from(!ok);
        match pending {
            Pending::Read { block, may } => {
                self.tally.reads += 1;
                if ok {
                    judge(block, &may, &data());
                }
            }
            Pending::Write { block, number } => {
                self.tally.writes += 1;
                self.written(block, number, ok);
            }
            Pending::Flush => self.tally.flushes += 1,
        }
    }

    fn written(&mut self, block: u64, number: u64, acknowledged: bool) {
        let now = self.now();
        let writes = &mut self.blocks[block as usize];
        let write = writes.iter_mut().find(|w| w.content.number == number);
        // One that a later one has replaced while it was in flight stays listed, as it has not ended.
        let write = write.expect("what is in flight is listed");
        write.ended = Some(now);
        let begun = write.begun;
        if acknowledged {
            writes.retain(|w| w.ended.is_none_or(|ended| ended >= begun));
        }
    }

    /// All that is in flight has ended, and nobody knows how: the device was reset, or its front end went away.
    pub fn abandon(&mut self) {
        let tokens: Vec<_> = self.pending.keys().copied().collect();
        for token in tokens {
            self.abandon_one(token);
        }
    }

    /// As [`Checker::abandon`], of one request: where others share the volume, and what is in flight of theirs is not cut off.
    pub fn abandon_one(&mut self, token: Token) {
        let pending = self.pending.remove(&token);
        let pending = pending.unwrap_or_else(|| panic!("{token:?} is not in flight"));
        self.tally.abandoned += 1;
        if let Pending::Write { block, number } = pending {
            self.written(block, number, false);
        }
    }

    /// How many requests have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }
}

/// Holds a block that was read against what it may be.
fn judge(block: u64, may: &[Content], data: &[u8]) {
    for (i, sector) in data.chunks(SECTOR).enumerate() {
        let is = |c: &Content| match c.zeroes {
            true => sector.iter().all(|b| *b == 0),
            false => sector == sector_content(block, i as u64, c.number),
        };
        if !may.iter().any(is) {
            let word = |i: usize| u64::from_le_bytes(sector[i * 8..][..8].try_into().unwrap());
            panic!(
                "sector {i} of block {block}: {:#x} of block {}, sector {}, number {} is read, where only {may:?} may be",
                word(0),
                word(1),
                word(2),
                word(3),
            );
        }
    }
}

fn content(block: u64, number: u64) -> Vec<u8> {
    let sectors = (0..(BLOCK / SECTOR) as u64).map(|i| sector_content(block, i, number));
    sectors.collect::<Vec<_>>().concat()
}

/// What a write leaves in one sector: who it is, then words that follow from that, which are its checksum too.
fn sector_content(block: u64, sector: u64, number: u64) -> Vec<u8> {
    let mut chance = Chance::new(number ^ (block << 20) ^ (sector << 52));
    let head = [MAGIC, block, sector, number];
    let words = head
        .into_iter()
        .chain(std::iter::repeat_with(|| chance.word()));
    words
        .take(SECTOR / 8)
        .flat_map(|w| w.to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Token = (0, 0);
    const B: Token = (0, 1);
    const R: Token = (0, 2);

    fn reads(checker: &mut Checker, block: u64, data: &[u8]) -> bool {
        checker.begin_read(R, block);
        let judged = std::panic::AssertUnwindSafe(|| checker.end(R, true, || data.to_vec()));
        std::panic::catch_unwind(judged).is_ok()
    }

    #[test]
    fn the_checker_finds_what_is_lost_old_torn_or_misplaced() {
        let zeroes = vec![0; BLOCK];
        let mut c = Checker::new(4);
        assert!(reads(&mut c, 1, &zeroes));
        let first = c.begin_write(A, 1);
        assert!(reads(&mut c, 1, &zeroes) && reads(&mut c, 1, &first));
        c.end(A, true, Vec::new);
        assert!(reads(&mut c, 1, &first));
        assert!(!reads(&mut c, 1, &zeroes), "lost");
        assert!(!reads(&mut c, 2, &first), "misplaced");
        let second = c.begin_write(A, 1);
        let third = c.begin_write(B, 1);
        c.end(B, true, Vec::new);
        assert!(reads(&mut c, 1, &second) && reads(&mut c, 1, &third));
        assert!(!reads(&mut c, 1, &first), "replaced");
        c.end(A, true, Vec::new);
        let mixed = [&second[..SECTOR], &third[SECTOR..]].concat();
        assert!(reads(&mut c, 1, &mixed), "they were concurrent");
        let mut torn = third.clone();
        torn[700] ^= 1;
        assert!(!reads(&mut c, 1, &torn));
        c.begin_zeroes(A, 1);
        c.end(A, true, Vec::new);
        assert!(reads(&mut c, 1, &zeroes) && !reads(&mut c, 1, &third));
    }

    #[test]
    fn the_checker_lets_go_of_what_was_cut_off_only_when_it_is_replaced() {
        let mut c = Checker::new(1);
        let cut = c.begin_write(A, 0);
        c.abandon();
        assert!(reads(&mut c, 0, &cut) && reads(&mut c, 0, &[0; BLOCK]));
        let next = c.begin_write(A, 0);
        c.end(A, true, Vec::new);
        assert!(reads(&mut c, 0, &next));
        assert!(!reads(&mut c, 0, &cut), "it landed late");
        let failed = c.begin_write(A, 0);
        c.end(A, false, Vec::new);
        assert!(reads(&mut c, 0, &next) && reads(&mut c, 0, &failed));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            c.end(A, true, Vec::new);
        }));
        assert!(caught.is_err(), "completed twice");
    }
}
