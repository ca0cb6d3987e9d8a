//! Memory that the device may use: shared as a file, or read and written by messages.

use std::os::fd::BorrowedFd;

use zerocopy::{FromBytes, IntoBytes};

use crate::spec::{self, DmaAccess, command, dma, errno};
use crate::{Client, Error, Message};

/// What answers the server's `DMA_READ` and `DMA_WRITE`. Which addresses it has, and what of them may be written, it knows
/// itself.
pub trait DmaMemory: Send + Sync {
    /// Reads `to.len()` bytes at an address.
    ///
    /// # Errors
    /// The errno that the server is told.
    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), u32>;

    /// Writes at an address.
    ///
    /// # Errors
    /// The errno that the server is told.
    fn write(&self, address: u64, from: &[u8]) -> Result<(), u32>;
}

/// Memory to be mapped.
#[derive(Clone, Copy, Debug)]
pub struct DmaMap<'a> {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// The device may read it.
    pub read: bool,
    /// The device may write it.
    pub write: bool,
    /// Without one only messages get there.
    pub file: Option<BorrowedFd<'a>>,
}

impl Client {
    /// Shares memory with the device ("VFIO_USER_DMA_MAP").
    ///
    /// # Errors
    /// [`Error::Refused`] and those of any command.
    pub fn dma_map(&self, map: DmaMap<'_>) -> Result<(), Error> {
        let raw = spec::Map {
            argsz: 32.into(),
            flags: (if map.read { dma::READABLE } else { 0 }
                | if map.write { dma::WRITABLE } else { 0 })
            .into(),
            offset: map.offset.into(),
            address: map.address.into(),
            size: map.size.into(),
        };
        let files: Vec<_> = map.file.into_iter().collect();
        let reply = self.ask(command::DMA_MAP, &[raw.as_bytes()], &files)?;
        reply.empty()
    }

    /// Takes memory back; when this returns the device uses it no more ("VFIO_USER_DMA_UNMAP").
    ///
    /// # Errors
    /// [`Error::Refused`] and those of any command.
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<(), Error> {
        let sent = self.begin_dma_unmap(address, size)?;
        self.end_dma_unmap(self.wait(sent)?, address, size)
    }

    /// Takes all memory back.
    ///
    /// # Errors
    /// As [`Client::dma_unmap`].
    pub fn dma_unmap_all(&self) -> Result<(), Error> {
        let raw = unmap(dma::UNMAP_ALL, 0, 0);
        let reply = self.ask(command::DMA_UNMAP, &[raw.as_bytes()], &[])?;
        self.end_dma_unmap(reply, 0, 0)
    }

    /// Asks for memory back, and does not wait.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn begin_dma_unmap(&self, address: u64, size: u64) -> Result<crate::Sent, Error> {
        let raw = unmap(0, address, size);
        self.send(command::DMA_UNMAP, &[raw.as_bytes()], &[])
    }

    fn end_dma_unmap(&self, reply: crate::Reply, address: u64, size: u64) -> Result<(), Error> {
        let (raw, rest): (spec::Unmap, _) = reply.head()?;
        if raw.address.get() != address || raw.size.get() != size || !rest.is_empty() {
            return Err(reply.wrong("it is not the range that was asked for"));
        }
        Ok(())
    }

    /// Answers a command of the server.
    pub(crate) fn answer(&self, message: &Message) -> Result<(), Error> {
        let result = match message.header.command.get() {
            command::DMA_READ => self.answer_read(&message.body),
            command::DMA_WRITE => self.answer_write(&message.body),
            _ => Err(errno::ENOTSUP),
        };
        if message.header.flags.get() & spec::flag::NO_REPLY != 0 {
            return Ok(());
        }
        let (flags, error, body) = match result {
            Ok(body) => (spec::flag::REPLY, 0, body),
            Err(errno) => (spec::flag::REPLY | spec::flag::ERROR, errno, Vec::new()),
        };
        let (id, command) = (message.header.id.get(), message.header.command.get());
        self.send_as(id, command, flags, error, &[&body], &[])
    }

    fn answer_read(&self, body: &[u8]) -> Result<Vec<u8>, u32> {
        let raw = DmaAccess::read_from_bytes(body).map_err(|_| errno::EINVAL)?;
        if raw.count.get() > self.options().max_transfer {
            return Err(errno::EINVAL);
        }
        let mut answer = raw.as_bytes().to_vec();
        let head = answer.len();
        answer.resize(head + raw.count.get() as usize, 0);
        let memory = self.dma_memory().ok_or(errno::EFAULT)?;
        memory.read(raw.address.get(), &mut answer[head..])?;
        Ok(answer)
    }

    fn answer_write(&self, body: &[u8]) -> Result<Vec<u8>, u32> {
        let (raw, data) = DmaAccess::read_from_prefix(body).map_err(|_| errno::EINVAL)?;
        if raw.count.get() != data.len() as u64 {
            return Err(errno::EINVAL);
        }
        let memory = self.dma_memory().ok_or(errno::EFAULT)?;
        memory.write(raw.address.get(), data)?;
        // The count has 4 bytes in the specification, and 8 where QEMU 11.1 answers.
        Ok(raw.as_bytes().to_vec())
    }
}

fn unmap(flags: u32, address: u64, size: u64) -> spec::Unmap {
    spec::Unmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    }
}
