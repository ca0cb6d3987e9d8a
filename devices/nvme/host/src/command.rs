//! Commands and completions (Base 2.1 §4.1, §4.2): 64 bytes that can be anything, and builders for those that mean something.

use std::fmt;

use crate::spec::{admin, io};

/// A submission queue entry: 16 little-endian words, of which none is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Command(pub [u32; 16]);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({:x?})", self.0)
    }
}

/// Where a command's data is (§4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointer {
    /// PSDT: 0 for PRPs, 1 for an SGL.
    pub psdt: u32,
    /// Two PRPs, or an SGL descriptor.
    pub words: [u64; 2],
}

impl Command {
    /// One with nothing but an opcode and a namespace.
    pub const fn new(opcode: u8, nsid: u32) -> Self {
        let mut words = [0; 16];
        words[0] = opcode as u32;
        words[1] = nsid;
        Self(words)
    }

    /// Sets dword `index`.
    #[must_use]
    pub const fn with(mut self, index: usize, value: u32) -> Self {
        self.0[index] = value;
        self
    }

    /// Sets dwords `index` and the next.
    #[must_use]
    pub const fn with64(self, index: usize, value: u64) -> Self {
        self.with(index, value as u32)
            .with(index + 1, (value >> 32) as u32)
    }

    /// Sets the data pointer.
    #[must_use]
    pub const fn data(self, pointer: Pointer) -> Self {
        let first = self.0[0] & !(3 << 14) | pointer.psdt << 14;
        self.with(0, first)
            .with64(6, pointer.words[0])
            .with64(8, pointer.words[1])
    }

    /// Sets the command identifier.
    #[must_use]
    pub const fn cid(self, cid: u16) -> Self {
        let first = self.0[0] & 0xffff | (cid as u32) << 16;
        self.with(0, first)
    }

    /// Its opcode.
    pub const fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    /// A command on a range of blocks: `blocks` is 1 to 65,536 (NVM §3.3: NLB is zero's-based).
    pub const fn blocks(opcode: u8, nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::new(opcode, nsid)
            .with64(10, slba)
            .with(12, blocks.wrapping_sub(1) & 0xffff)
    }

    /// Read.
    pub const fn read(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::blocks(io::READ, nsid, slba, blocks)
    }

    /// Write.
    pub const fn write(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::blocks(io::WRITE, nsid, slba, blocks)
    }

    /// Sets Force Unit Access.
    #[must_use]
    pub const fn fua(self) -> Self {
        self.with(12, self.0[12] | io::FUA)
    }

    /// Compare.
    pub const fn compare(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::blocks(io::COMPARE, nsid, slba, blocks)
    }

    /// Write Zeroes.
    pub const fn write_zeroes(nsid: u32, slba: u64, blocks: u32, deallocate: bool) -> Self {
        let command = Self::blocks(io::WRITE_ZEROES, nsid, slba, blocks);
        let deac = if deallocate { io::DEAC } else { 0 };
        command.with(12, command.0[12] | deac)
    }

    /// Verify.
    pub const fn verify(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::blocks(io::VERIFY, nsid, slba, blocks)
    }

    /// Flush; `u32::MAX` for all namespaces.
    pub const fn flush(nsid: u32) -> Self {
        Self::new(io::FLUSH, nsid)
    }

    /// Dataset Management of so many ranges (1 to 256), which are the data: [`dsm_ranges`].
    pub const fn deallocate(nsid: u32, ranges: u32) -> Self {
        Self::new(io::DATASET_MANAGEMENT, nsid)
            .with(10, ranges.wrapping_sub(1) & 0xff)
            .with(11, io::DEALLOCATE)
    }

    /// Copy to `slba` of so many ranges (1 to 256), which are the data: [`copy_ranges`], format 0.
    pub const fn copy(nsid: u32, slba: u64, ranges: u32) -> Self {
        Self::new(io::COPY, nsid)
            .with64(10, slba)
            .with(12, ranges.wrapping_sub(1) & 0xff)
    }

    /// Identify.
    pub const fn identify(cns: u8, nsid: u32) -> Self {
        Self::new(admin::IDENTIFY, nsid).with(10, cns as u32)
    }

    /// Get Log Page: `len` bytes, a multiple of 4, from `offset` on.
    pub const fn log_page(lid: u8, nsid: u32, offset: u64, len: u32) -> Self {
        let words = (len / 4).wrapping_sub(1);
        Self::new(admin::GET_LOG_PAGE, nsid)
            .with(10, lid as u32 | (words & 0xffff) << 16)
            .with(11, words >> 16)
            .with64(12, offset)
    }

    /// Get Features: the current value.
    pub const fn get_features(fid: u8, nsid: u32) -> Self {
        Self::new(admin::GET_FEATURES, nsid).with(10, fid as u32)
    }

    /// Set Features, not saved.
    pub const fn set_features(fid: u8, nsid: u32, value: u32) -> Self {
        Self::new(admin::SET_FEATURES, nsid)
            .with(10, fid as u32)
            .with(11, value)
    }

    /// Abort.
    pub const fn abort(sq: u16, cid: u16) -> Self {
        Self::new(admin::ABORT, 0).with(10, sq as u32 | (cid as u32) << 16)
    }

    /// Format NVM: LBA format and secure erase setting (0: none, 1: user data, 2: cryptographic).
    pub const fn format(nsid: u32, lba_format: u8, erase: u8) -> Self {
        Self::new(admin::FORMAT, nsid).with(10, lba_format as u32 & 0xf | (erase as u32 & 7) << 9)
    }

    /// Create I/O Completion Queue: contiguous, `entries` 2 to 65,536.
    pub const fn create_cq(id: u16, entries: u32, at: u64, vector: Option<u16>) -> Self {
        let (enabled, vector) = match vector {
            Some(vector) => (2, vector),
            None => (0, 0),
        };
        Self::new(admin::CREATE_CQ, 0)
            .with64(6, at)
            .with(10, id as u32 | entries.wrapping_sub(1) << 16)
            .with(11, 1 | enabled | (vector as u32) << 16)
    }

    /// Create I/O Submission Queue: contiguous, of medium priority.
    pub const fn create_sq(id: u16, entries: u32, at: u64, cq: u16) -> Self {
        Self::new(admin::CREATE_SQ, 0)
            .with64(6, at)
            .with(10, id as u32 | entries.wrapping_sub(1) << 16)
            .with(11, 1 | 2 << 1 | (cq as u32) << 16)
    }

    /// Delete I/O Completion Queue.
    pub const fn delete_cq(id: u16) -> Self {
        Self::new(admin::DELETE_CQ, 0).with(10, id as u32)
    }

    /// Delete I/O Submission Queue.
    pub const fn delete_sq(id: u16) -> Self {
        Self::new(admin::DELETE_SQ, 0).with(10, id as u32)
    }

    /// Doorbell Buffer Config: a page of shadow doorbells, a page of event indices.
    pub const fn doorbell_buffers(shadow: u64, events: u64) -> Self {
        Self::new(admin::DOORBELL_BUFFER, 0)
            .with64(6, shadow)
            .with64(8, events)
    }
}

/// The data of [`Command::deallocate`]: first block and count of each range (NVM §3.3.3, figure "Range Definition").
pub fn dsm_ranges(ranges: &[(u64, u32)]) -> Vec<u8> {
    let entry = |(slba, blocks): &(u64, u32)| {
        let mut entry = [0; 16];
        entry[4..8].copy_from_slice(&blocks.to_le_bytes());
        entry[8..].copy_from_slice(&slba.to_le_bytes());
        entry
    };
    ranges.iter().flat_map(entry).collect()
}

/// The data of [`Command::copy`]: first block and count (1 to 65,536) of each source range (NVM §3.3.2, descriptor format 0).
pub fn copy_ranges(ranges: &[(u64, u32)]) -> Vec<u8> {
    let entry = |(slba, blocks): &(u64, u32)| {
        let mut entry = [0; 32];
        entry[8..16].copy_from_slice(&slba.to_le_bytes());
        entry[16..18].copy_from_slice(&(blocks.wrapping_sub(1) as u16).to_le_bytes());
        entry
    };
    ranges.iter().flat_map(entry).collect()
}

/// How a command ended (§4.2.3): status code type and code.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status {
    /// Status code type.
    pub kind: u8,
    /// Status code.
    pub code: u8,
}

impl Status {
    /// Of a type and a code.
    pub const fn new(kind: u8, code: u8) -> Self {
        Self { kind, code }
    }

    /// Whether the command was done.
    pub const fn is_ok(self) -> bool {
        self.kind == 0 && self.code == 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({:x}/{:02x})", self.kind, self.code)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status type {:#x}, code {:#04x}", self.kind, self.code)
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Dwords 0 and 1, which belong to the command.
    pub result: u64,
    /// How far the submission queue was fetched.
    pub sq_head: u16,
    /// Which submission queue.
    pub sq: u16,
    /// Which command.
    pub cid: u16,
    /// How it ended.
    pub status: Status,
    /// Command Retry Delay.
    pub retry_delay: u8,
    /// More: the error log has more of it.
    pub more: bool,
    /// Do Not Retry.
    pub do_not_retry: bool,
}

impl Completion {
    pub(crate) fn new(result: u64, dw2: u32, dw3: u32) -> Self {
        let field = dw3 >> 17;
        Self {
            result,
            sq_head: dw2 as u16,
            sq: (dw2 >> 16) as u16,
            cid: dw3 as u16,
            status: Status::new((field >> 8 & 7) as u8, field as u8),
            retry_delay: (field >> 11 & 3) as u8,
            more: field >> 13 & 1 != 0,
            do_not_retry: field >> 14 & 1 != 0,
        }
    }

    /// Dword 0 of the result.
    pub fn dw0(&self) -> u32 {
        self.result as u32
    }
}
