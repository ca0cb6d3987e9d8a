//! Data of commands, described by PRPs (Base 2.1 §4.3.1) or SGLs (§4.3.2).

use std::sync::Arc;

use bluff_virtio_driver::MemoryError;

use crate::spec::sgl;
use crate::{HostMemory, Pages, Pointer};

/// Bytes in the host's memory, with the lists that describe them. A controller must not use it any more when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    pages: Pages,
    /// Where the data begins in the first page.
    offset: u64,
    len: u64,
    /// Lists that a command points to.
    lists: Vec<Pages>,
}

impl Buffer {
    /// `len` bytes in pages that adjoin.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn new(memory: &Arc<HostMemory>, len: u64) -> Result<Self, MemoryError> {
        Ok(Self::of(memory.alloc(len)?, 0, len))
    }

    /// `len` bytes in pages of which none follows the one before, from `offset` of the first one on.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn scattered(memory: &Arc<HostMemory>, offset: u64, len: u64) -> Result<Self, MemoryError> {
        assert!(offset < memory.page(), "an offset in a page");
        let pages = memory.alloc_scattered(offset + len)?;
        Ok(Self::of(pages, offset, len))
    }

    /// One that holds these bytes.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn holding(memory: &Arc<HostMemory>, bytes: &[u8]) -> Result<Self, MemoryError> {
        let this = Self::new(memory, bytes.len() as u64)?;
        this.write(bytes);
        Ok(this)
    }

    fn of(pages: Pages, offset: u64, len: u64) -> Self {
        Self {
            pages,
            offset,
            len,
            lists: Vec::new(),
        }
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Its pages.
    pub fn pages(&self) -> &[u64] {
        self.pages.list()
    }

    /// Address and bytes of each piece, none over the end of a page.
    fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        let page = self.pages.memory().page();
        let mut left = self.len;
        self.pages
            .list()
            .iter()
            .enumerate()
            .map_while(move |(i, at)| {
                let offset = if i == 0 { self.offset } else { 0 };
                let len = left.min(page - offset);
                left -= len;
                (len > 0).then_some((at + offset, len))
            })
    }

    /// Writes `bytes` at its beginning.
    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() as u64 <= self.len, "no more than it holds");
        let mut rest = bytes;
        for (at, len) in self.pieces() {
            let now = rest.split_off(..rest.len().min(len as usize));
            let now = now.expect("no more than there is");
            let memory = self.pages.memory().memory();
            memory.write(at, now).expect("its own pages");
        }
    }

    /// All of its bytes.
    pub fn read(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len as usize);
        for (at, len) in self.pieces() {
            let begin = bytes.len();
            bytes.resize(begin + len as usize, 0);
            let memory = self.pages.memory().memory();
            memory.read(at, &mut bytes[begin..]).expect("its own pages");
        }
        bytes
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        self.write(&vec![byte; self.len as usize]);
    }

    /// Describes it by PRPs; lists begin at the beginning of a page.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn prp(&mut self) -> Result<Pointer, MemoryError> {
        self.prp_with_list_at(0)
    }

    /// Describes it by PRPs. The first list begins `offset` bytes into its page, a multiple of 8.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn prp_with_list_at(&mut self, offset: u64) -> Result<Pointer, MemoryError> {
        let memory = self.pages.memory().clone();
        assert!(
            offset.is_multiple_of(8) && offset < memory.page(),
            "PRP entries"
        );
        let entries: Vec<u64> = self.pieces().map(|(at, _)| at).collect();
        let (first, second) = match entries[..] {
            [] => (self.pages.address(), 0),
            [one] => (one, 0),
            [one, two] => (one, two),
            [one, ref rest @ ..] => (one, self.prp_lists(&memory, rest, offset)?),
        };
        Ok(Pointer {
            psdt: 0,
            words: [first, second],
        })
    }

    /// Writes the lists; where the first one begins.
    fn prp_lists(
        &mut self,
        memory: &Arc<HostMemory>,
        mut entries: &[u64],
        offset: u64,
    ) -> Result<u64, MemoryError> {
        let mut page = memory.alloc(1)?;
        let first = page.address() + offset;
        let mut at = offset as usize;
        loop {
            let span = page.span();
            let room = (span.len() - at) / 8;
            // "If there is more than fits, the last entry points to the next list."
            let (now, rest) = match entries.len() <= room {
                true => (entries, &[][..]),
                false => entries.split_at(room - 1),
            };
            for (i, entry) in now.iter().enumerate() {
                span.write_u64(at + 8 * i, *entry);
            }
            if rest.is_empty() {
                self.lists.push(page);
                return Ok(first);
            }
            let next = memory.alloc(1)?;
            span.write_u64(at + 8 * now.len(), next.address());
            self.lists.push(std::mem::replace(&mut page, next));
            (entries, at) = (rest, 0);
        }
    }

    /// Describes it by an SGL: data blocks of at most `piece` bytes, in segments of at most `segment` descriptors. A single
    /// one is in the command itself.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn sgl(&mut self, piece: u64, segment: usize) -> Result<Pointer, MemoryError> {
        assert!(piece > 0 && segment > 1, "something has to go into each");
        let cut = |(at, len): (u64, u64)| {
            let offsets = (0..len).step_by(piece as usize);
            offsets.map(move |o| descriptor(at + o, piece.min(len - o), sgl::DATA))
        };
        let mut blocks: Vec<[u64; 2]> = self.pieces().flat_map(cut).collect();
        if self.len == 0 {
            blocks.push(descriptor(self.pages.address(), 0, sgl::DATA));
        }
        let words = match blocks[..] {
            [one] => one,
            _ => self.segments(&blocks, segment)?,
        };
        Ok(Pointer { psdt: 1, words })
    }

    /// Writes segments, the last one first, since each ends with a descriptor of the next; the first one's descriptor.
    fn segments(&mut self, blocks: &[[u64; 2]], most: usize) -> Result<[u64; 2], MemoryError> {
        let memory = self.pages.memory().clone();
        let mut chunks = Vec::new();
        let mut rest = blocks;
        while rest.len() > most {
            let (now, after) = rest.split_at(most - 1);
            chunks.push(now);
            rest = after;
        }
        chunks.push(rest);
        let mut next: Option<[u64; 2]> = None;
        for chunk in chunks.iter().rev() {
            let count = chunk.len() + usize::from(next.is_some());
            let pages = memory.alloc(16 * count as u64)?;
            let span = pages.span();
            for (i, words) in chunk.iter().chain(&next).enumerate() {
                span.write_u64_pair(16 * i, words[0], words[1]);
            }
            let kind = match next {
                None => sgl::LAST_SEGMENT,
                Some(_) => sgl::SEGMENT,
            };
            next = Some(descriptor(pages.address(), 16 * count as u64, kind));
            self.lists.push(pages);
        }
        Ok(next.expect("at least one chunk"))
    }

    /// Forgets the lists of descriptions that no command uses any more.
    pub fn drop_lists(&mut self) {
        self.lists.clear();
    }
}

/// An SGL descriptor.
fn descriptor(at: u64, len: u64, kind: u8) -> [u64; 2] {
    [at, len | u64::from(kind) << 56]
}
