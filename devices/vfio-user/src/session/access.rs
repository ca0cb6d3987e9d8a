//! `REGION_READ`, `REGION_WRITE`, `REGION_WRITE_MULTI`.

use zerocopy::IntoBytes;
use zerocopy::native_endian::U64;

use super::{Reply, Session};
use crate::Error;
use crate::capabilities::Agreed;
use crate::request::SmallWrite;
use crate::spec::{RawRegionAccess, command};
use crate::target::{Region, Target};

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

    pub(super) fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<Reply, Error> {
        self.check_access(region, offset, data.len() as u64, |r| r.write)?;
        if !data.is_empty() {
            self.target
                .write(region, offset, data)
                .map_err(Error::Target)?;
        }
        Ok(Reply::of(&[
            head(region, offset, data.len() as u32).as_bytes()
        ]))
    }

    /// All are checked before the first is done. Where the function refuses one, the reply counts those before it; where it
    /// refuses the first, it says why.
    pub(super) fn write_multi(
        &mut self,
        agreed: &Agreed,
        writes: &[SmallWrite],
    ) -> Result<Reply, Error> {
        if !agreed.write_multiple {
            return Err(Error::Unsupported(command::REGION_WRITE_MULTI));
        }
        for w in writes {
            self.check_access(w.region, w.offset, w.len as u64, |r| r.write)?;
        }
        let mut done = 0u64;
        for w in writes {
            match self.target.write(w.region, w.offset, &w.data[..w.len]) {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(Error::Target(errno)),
                Err(_) => break,
            }
        }
        Ok(Reply::of(&[U64::new(done).as_bytes()]))
    }
}
