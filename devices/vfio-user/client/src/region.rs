//! Accesses to regions, and the reset.

use zerocopy::IntoBytes;

use crate::spec::{self, Access, command};
use crate::{Client, Error, Reply};

/// One write of several in a message ("Single Device Write Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which region.
    pub region: u32,
    /// From its beginning.
    pub offset: u64,
    /// Bytes: 1 to 8.
    pub count: u32,
    /// The first `count` of them are written.
    pub data: [u8; 8],
}

impl Client {
    /// Reads a region.
    ///
    /// # Errors
    /// As any command.
    pub fn region_read(&self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let raw = access(region, offset, to.len());
        let reply = self.ask(command::REGION_READ, &[raw.as_bytes()], &[])?;
        let data = echoed(&reply, &raw)?;
        if data.len() != to.len() {
            return Err(reply.wrong("its data is not as long as was asked for"));
        }
        to.copy_from_slice(data);
        Ok(())
    }

    /// Writes a region, and waits for the reply.
    ///
    /// # Errors
    /// As any command.
    pub fn region_write(&self, region: u32, offset: u64, from: &[u8]) -> Result<(), Error> {
        let raw = access(region, offset, from.len());
        let reply = self.ask(command::REGION_WRITE, &[raw.as_bytes(), from], &[])?;
        match echoed(&reply, &raw)? {
            [] => Ok(()),
            _ => Err(reply.wrong("it is too long")),
        }
    }

    /// Writes a region, and wants no reply.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn region_post(&self, region: u32, offset: u64, from: &[u8]) -> Result<(), Error> {
        let raw = access(region, offset, from.len());
        self.post(command::REGION_WRITE, &[raw.as_bytes(), from], &[])
    }

    /// Does several writes by one message; how many the server says that it did.
    ///
    /// # Errors
    /// As any command.
    pub fn region_write_multi(&self, writes: &[Write]) -> Result<u64, Error> {
        let reply = self.ask(command::REGION_WRITE_MULTI, &[&multi(writes)], &[])?;
        reply.no_files()?;
        match <[u8; 8]>::try_from(&reply.body[..]).map(u64::from_ne_bytes) {
            Ok(done) if done <= writes.len() as u64 => Ok(done),
            _ => Err(reply.wrong("its count makes no sense")),
        }
    }

    /// As [`Client::region_write_multi`], without a reply.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn region_post_multi(&self, writes: &[Write]) -> Result<(), Error> {
        self.post(command::REGION_WRITE_MULTI, &[&multi(writes)], &[])
    }

    /// Resets the device, and waits until that is over.
    ///
    /// # Errors
    /// As any command.
    pub fn reset(&self) -> Result<(), Error> {
        self.ask(command::DEVICE_RESET, &[], &[])?.empty()
    }

    /// Begins a reset, and does not wait.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn begin_reset(&self) -> Result<crate::Sent, Error> {
        self.send(command::DEVICE_RESET, &[], &[])
    }

    /// Reads a little-endian word, as PCI's are.
    ///
    /// # Errors
    /// As any command.
    pub fn read32(&self, region: u32, offset: u64) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        self.region_read(region, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads a little-endian double word.
    ///
    /// # Errors
    /// As any command.
    pub fn read64(&self, region: u32, offset: u64) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        self.region_read(region, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn access(region: u32, offset: u64, count: usize) -> Access {
    Access {
        offset: offset.into(),
        region: region.into(),
        count: (count as u32).into(),
    }
}

/// What follows the access, which has to be the one that was asked for.
fn echoed<'a>(reply: &'a Reply, asked: &Access) -> Result<&'a [u8], Error> {
    reply.no_files()?;
    let (raw, rest): (Access, _) = reply.head()?;
    if raw.as_bytes() != asked.as_bytes() {
        return Err(reply.wrong("it is of another access"));
    }
    Ok(rest)
}

fn multi(writes: &[Write]) -> Vec<u8> {
    let mut body = (writes.len() as u64).to_ne_bytes().to_vec();
    for write in writes {
        let raw = spec::MultiWrite {
            access: access(write.region, write.offset, write.count as usize),
            data: write.data,
        };
        body.extend_from_slice(raw.as_bytes());
    }
    body
}
