//! What has to come of memory commands, found out naively: every address range is compared with every other.

use zerocopy::FromBytes;

use crate::spec::{RawDmaMap, RawDmaUnmap, command};
use crate::{Errno, Mapping};

use super::{PAGE, strict};

/// What the reply has to be.
pub(super) enum Outcome {
    /// Just this.
    Exactly(Option<Errno>),
    /// One or the other.
    Any,
}

impl Outcome {
    pub(super) fn check(&self, command: u16, errno: Option<i32>) {
        if let Self::Exactly(want) = self {
            assert_eq!(errno, want.map(Errno::get), "reply to command {command}");
        }
    }
}

#[derive(Default)]
pub(super) struct Model {
    versed: bool,
    mapped: Vec<Mapping>,
}

/// A range of pages: its first and last address, of many more bits than an address.
fn range(address: u64, size: u64) -> Option<(u128, u128)> {
    let end = u128::from(address) + u128::from(size);
    let sound = size > 0 && (address | size).is_multiple_of(PAGE) && end <= 1 << 64;
    sound.then(|| (address.into(), end - 1))
}

fn touches(a: (u128, u128), b: (u128, u128)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

fn of(m: &Mapping) -> (u128, u128) {
    range(m.address, m.size).expect("pages")
}

impl Model {
    pub(super) fn mappings(&self) -> Vec<Mapping> {
        let mut all = self.mapped.clone();
        all.sort_by_key(|m| m.address);
        all
    }

    pub(super) fn command(&mut self, command: u16, payload: &[u8], files: usize) -> Outcome {
        if !self.versed {
            self.versed = command == command::VERSION;
            return Outcome::Any;
        }
        Outcome::Exactly(match command {
            command::VERSION => Some(Errno::INVAL),
            command::DMA_MAP => self.map(payload, files).err(),
            command::DMA_UNMAP => self.unmap(payload, files).err(),
            0 | 11 | 12 | 14 | 16.. => Some(Errno::NOTSUP),
            _ => return Outcome::Any,
        })
    }

    fn map(&mut self, payload: &[u8], files: usize) -> Result<(), Errno> {
        let raw = RawDmaMap::read_from_bytes(payload).map_err(|_| Errno::INVAL)?;
        let new = Mapping {
            address: raw.address.get(),
            size: raw.size.get(),
            offset: raw.offset.get(),
            read: raw.flags.get() & 1 != 0,
            write: raw.flags.get() & 2 != 0,
            file: files == 1,
        };
        let pages = range(new.address, new.size);
        let end = u128::from(new.offset) + u128::from(new.size);
        let in_file = new.offset.is_multiple_of(PAGE) && end < 1 << 63;
        if files > 1 || raw.argsz.get() < 32 || !(1..4).contains(&raw.flags.get()) {
            return Err(Errno::INVAL);
        }
        let pages = pages.ok_or(Errno::INVAL)?;
        if new.file && !in_file {
            return Err(Errno::INVAL);
        }
        if self.mapped.iter().any(|m| touches(of(m), pages)) {
            return Err(Errno::EXIST);
        }
        let with_file = self.mapped.iter().chain([&new]).filter(|m| m.file);
        let bytes: u128 = with_file.map(|m| u128::from(m.size)).sum();
        if self.mapped.len() == 8 || new.file && bytes > 1 << 30 {
            return Err(Errno::NOSPC);
        }
        if strict::refuses(&new) {
            return Err(strict::REFUSAL);
        }
        self.mapped.push(new);
        Ok(())
    }

    fn unmap(&mut self, payload: &[u8], files: usize) -> Result<(), Errno> {
        if files > 0 {
            return Err(Errno::INVAL);
        }
        let (raw, more) = RawDmaUnmap::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        let (flags, address, size) = (raw.flags.get(), raw.address.get(), raw.size.get());
        if flags & 1 != 0 {
            return Err(Errno::NOTSUP);
        }
        if !more.is_empty() || raw.argsz.get() < 24 || flags & !2 != 0 {
            return Err(Errno::INVAL);
        }
        if flags == 2 {
            if address != 0 || size != 0 {
                return Err(Errno::INVAL);
            }
            self.mapped.clear();
            return Ok(());
        }
        let pages = range(address, size).ok_or(Errno::INVAL)?;
        let inside = |m: &Mapping| of(m).0 >= pages.0 && of(m).1 <= pages.1;
        if self
            .mapped
            .iter()
            .any(|m| touches(of(m), pages) && !inside(m))
        {
            return Err(Errno::INVAL);
        }
        self.mapped.retain(|m| !inside(m));
        Ok(())
    }
}
