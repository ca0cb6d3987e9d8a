//! What a client says and hears, in bytes: what is the same with a socket and without one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use bluff_vfio_user::spec::{self, command, flag, irq, region};
pub use zerocopy::IntoBytes;
use zerocopy::{FromBytes, Immutable, KnownLayout};

pub const PAGE: u64 = 4096;
pub const EINVAL: i32 = 22;

/// As QEMU 11.1.3 sends it.
pub const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

/// A reply, or a command of the server.
#[derive(Debug)]
pub struct Reply {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    /// 0 for success.
    pub errno: i32,
    pub body: Vec<u8>,
    pub files: Vec<Arc<OwnedFd>>,
}

impl Reply {
    pub fn new(raw: spec::RawHeader, body: &[u8], files: Vec<Arc<OwnedFd>>) -> Self {
        assert_eq!(raw.size.get() as usize, spec::HEADER_LEN + body.len());
        let failed = raw.flags.get() & flag::ERROR != 0;
        assert_eq!(failed, raw.error.get() != 0);
        assert!(!failed || body.is_empty() && files.is_empty());
        Self {
            id: raw.id.get(),
            command: raw.command.get(),
            flags: raw.flags.get(),
            errno: raw.error.get() as i32,
            body: body.to_vec(),
            files,
        }
    }

    /// Asserts that it is the reply to this command.
    pub fn answers(&self, id: u16, command: u16) {
        assert_eq!((self.id, self.command), (id, command));
        assert_eq!(self.flags & flag::TYPE, flag::REPLY);
    }

    /// The payload as a structure, and what follows it.
    pub fn read<T: FromBytes + KnownLayout + Immutable>(&self) -> (T, &[u8]) {
        assert_eq!(self.errno, 0);
        T::read_from_prefix(&self.body).unwrap()
    }
}

pub fn version(text: &str) -> Vec<u8> {
    [&[0; 4], text.as_bytes(), &[0]].concat()
}

pub fn map(address: u64, size: u64, flags: u32) -> Vec<u8> {
    map_at(address, size, flags, 0)
}

pub fn map_at(address: u64, size: u64, flags: u32, offset: u64) -> Vec<u8> {
    let raw = spec::RawDmaMap {
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: address.into(),
        size: size.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn unmap(address: u64, size: u64, flags: u32) -> Vec<u8> {
    let raw = spec::RawDmaUnmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let raw = spec::RawRegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    [&access(region, offset, data.len() as u32), data].concat()
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.as_bytes().to_vec()
}

/// One of the writes of a REGION_WRITE_MULTI.
pub fn small(region: u32, offset: u64, count: u32, data: u64) -> Vec<u8> {
    [&access(region, offset, count), data.as_bytes()].concat()
}

pub fn multi(writes: &[Vec<u8>]) -> Vec<u8> {
    [(writes.len() as u64).as_bytes().to_vec(), writes.concat()].concat()
}
