//! `REGION_READ`, `REGION_WRITE`, `REGION_WRITE_MULTI`.

use zerocopy::IntoBytes;
use zerocopy::native_endian::U64;

use super::{Answer, Later, Reply, Session};
use crate::capabilities::Agreed;
use crate::request::SmallWrite;
use crate::spec::{RawRegionAccess, command};
use crate::target::{Progress, Region, Target, Ticket, Written};
use crate::{Errno, Error};

/// A `REGION_WRITE_MULTI` whose writes are being done.
#[derive(Debug)]
pub(super) struct Writes {
    rest: std::vec::IntoIter<SmallWrite>,
    /// How many are done.
    done: u64,
}

impl Writes {
    fn reply(&self) -> Reply {
        Reply::of(&[U64::new(self.done).as_bytes()])
    }
}

fn head(region: u32, offset: u64, count: u32) -> RawRegionAccess {
    RawRegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}

impl<T: Target> Session<T> {
    /// Makes sure that a range lies inside of a region that may be used so.
    fn check_access(
        &self,
        region: u32,
        offset: u64,
        count: u64,
        allows: impl Fn(&Region) -> bool,
    ) -> Result<(), Error> {
        if count > u64::from(self.limits.max_data_xfer_size) {
            return Err(Error::TooMuch(count));
        }
        let info = self.region(region)?;
        let end = offset.checked_add(count);
        if end.is_none_or(|end| end > info.size) {
            return Err(Error::Region {
                region,
                offset,
                count,
            });
        }
        if !allows(&info) {
            return Err(Error::Permission(region));
        }
        Ok(())
    }

    pub(super) fn region_read(
        &mut self,
        region: u32,
        offset: u64,
        count: u32,
    ) -> Result<Reply, Error> {
        self.check_access(region, offset, count.into(), |r| r.read)?;
        let head = head(region, offset, count);
        let mut reply = Reply::of(&[head.as_bytes()]);
        reply.payload.resize(size_of_val(&head) + count as usize, 0);
        if count > 0 {
            let data = &mut reply.payload[size_of_val(&head)..];
            self.target
                .read(region, offset, data)
                .map_err(Error::Target)?;
        }
        Ok(reply)
    }

    /// Writes; the ticket of a write that is not over.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<Option<Ticket>, Error> {
        let ticket = self.ticket();
        let written = self.target.write(region, offset, data, ticket);
        Ok(match written.map_err(Error::Target)? {
            Written::Done => None,
            Written::Unsettled(progress) => {
                // The client answers nothing while it waits for this reply (QEMU), and no DMA is to be seen after it.
                self.dma.fail_where(Errno::CANCELED, |_, _| true);
                (progress == Progress::Pending).then_some(ticket)
            }
        })
    }

    pub(super) fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<Answer, Error> {
        self.check_access(region, offset, data.len() as u64, |r| r.write)?;
        let waits = match data.is_empty() {
            true => None,
            false => self.write(region, offset, data)?,
        };
        let head = head(region, offset, data.len() as u32);
        let reply = Reply::of(&[head.as_bytes()]);
        Ok(match waits {
            None => Answer::Now(reply),
            Some(ticket) => Answer::Later(ticket, Later::Reply(reply)),
        })
    }

    /// All are checked before the first is done. Where the function refuses one, the reply counts those before it; where it
    /// refuses the first, it says why.
    pub(super) fn write_multi(
        &mut self,
        agreed: &Agreed,
        writes: Vec<SmallWrite>,
    ) -> Result<Answer, Error> {
        if !agreed.write_multiple {
            return Err(Error::Unsupported(command::REGION_WRITE_MULTI));
        }
        for w in &writes {
            self.check_access(w.region, w.offset, w.len as u64, |r| r.write)?;
        }
        self.write_rest(Writes {
            rest: writes.into_iter(),
            done: 0,
        })
    }

    /// The write that was waited for is over.
    pub(super) fn settled(&mut self, mut writes: Writes) -> Result<Answer, Error> {
        writes.done += 1;
        self.write_rest(writes)
    }

    fn write_rest(&mut self, mut writes: Writes) -> Result<Answer, Error> {
        while let Some(w) = writes.rest.next() {
            match self.write(w.region, w.offset, &w.data[..w.len]) {
                Ok(None) => writes.done += 1,
                Ok(Some(ticket)) => return Ok(Answer::Later(ticket, Later::Writes(writes))),
                Err(error) if writes.done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Answer::Now(writes.reply()))
    }
}
