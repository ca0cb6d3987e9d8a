//! A message's payload and descriptors, checked field by field.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{InflightInfo, RegionInfo, Request};
use crate::Error;
use crate::framing::Message;
use crate::spec::{self, RawConfig, RawInflight, RawLog, RawRegion, RawRegions, RawSingleRegion};
use crate::spec::{RawVringAddr, RawVringState};

/// A message on its way to a request.
struct Parser {
    code: u32,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
    queues: u16,
}

impl Request {
    /// Parses a message for a device with `queues` queues. Descriptors of a message that is refused are
    /// closed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(message: Message, queues: u16) -> Result<Self, Error> {
        let code = message.header.request;
        if message.truncated {
            return Err(Error::Files {
                request: code,
                files: message.files.len() + 1,
            });
        }
        let known = FrontendReq::try_from(code).map_err(|_| Error::Unsupported(code))?;
        Parser {
            code,
            payload: message.payload,
            files: message.files,
            queues,
        }
        .request(known)
    }
}

impl Parser {
    fn request(mut self, known: FrontendReq) -> Result<Request, Error> {
        use FrontendReq as R;
        // First those whose number of descriptors the payload decides.
        match known {
            R::SET_MEM_TABLE => return self.mem_table(),
            R::SET_VRING_KICK => {
                let (index, file) = self.vring_file()?;
                return Ok(Request::SetVringKick { index, file });
            }
            R::SET_VRING_CALL => {
                let (index, file) = self.vring_file()?;
                return Ok(Request::SetVringCall { index, file });
            }
            R::SET_VRING_ERR => {
                let (index, file) = self.vring_file()?;
                return Ok(Request::SetVringErr { index, file });
            }
            R::REM_MEM_REG => {
                // "the back-end MAY accept messages with one file descriptor", to be closed at once.
                if self.files.len() > 1 {
                    return Err(self.bad_files());
                }
                return Ok(Request::RemMemReg(
                    self.body::<RawSingleRegion>()?.region.into(),
                ));
            }
            R::SET_LOG_BASE => {
                let raw: RawLog = self.body()?;
                return Ok(Request::SetLogBase {
                    size: raw.size.get(),
                    offset: raw.offset.get(),
                    file: self.file()?,
                });
            }
            R::SET_LOG_FD => {
                self.empty()?;
                self.file()?;
                return Ok(Request::SetLogFd);
            }
            R::SET_BACKEND_REQ_FD => {
                self.empty()?;
                return Ok(Request::SetBackendReqFd(self.file()?));
            }
            R::SET_INFLIGHT_FD => {
                let info = self.inflight()?;
                return Ok(Request::SetInflightFd(info, self.file()?));
            }
            R::ADD_MEM_REG => {
                let raw: RawSingleRegion = self.body()?;
                return Ok(Request::AddMemReg(raw.region.into(), self.file()?));
            }
            _ => {}
        }
        if !self.files.is_empty() {
            return Err(self.bad_files());
        }
        self.without_files(known)
    }

    fn without_files(&self, known: FrontendReq) -> Result<Request, Error> {
        use FrontendReq as R;
        Ok(match known {
            R::GET_FEATURES => self.none(Request::GetFeatures)?,
            R::SET_OWNER => self.none(Request::SetOwner)?,
            R::RESET_OWNER => self.none(Request::ResetOwner)?,
            R::GET_PROTOCOL_FEATURES => self.none(Request::GetProtocolFeatures)?,
            R::GET_QUEUE_NUM => self.none(Request::GetQueueNum)?,
            R::RESET_DEVICE => self.none(Request::ResetDevice)?,
            R::GET_MAX_MEM_SLOTS => self.none(Request::GetMaxMemSlots)?,
            R::GET_STATUS => self.none(Request::GetStatus)?,
            R::SET_FEATURES => Request::SetFeatures(self.number()?),
            R::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.number()?),
            R::SET_STATUS => Request::SetStatus(self.small("device status")?),
            R::NET_SET_MTU => Request::NetSetMtu(self.small("MTU")?),
            R::SEND_RARP => {
                let bytes = self.number()?.to_ne_bytes();
                let mut mac = [0; 6];
                mac.copy_from_slice(&bytes[..6]);
                Request::SendRarp(mac)
            }
            R::SET_VRING_NUM => {
                let (index, num) = self.vring_state()?;
                let size = u16::try_from(num).ok().filter(|s| (1..=32768).contains(s));
                Request::SetVringNum {
                    index,
                    size: size.ok_or(value("vring size", num))?,
                }
            }
            R::SET_VRING_BASE => {
                let (index, base) = self.vring_state()?;
                Request::SetVringBase { index, base }
            }
            R::GET_VRING_BASE => Request::GetVringBase {
                index: self.vring_state()?.0,
            },
            R::SET_VRING_ENABLE => match self.vring_state()? {
                (index, on @ (0 | 1)) => Request::SetVringEnable { index, on: on == 1 },
                (_, other) => return Err(value("vring enable", other)),
            },
            R::SET_VRING_ADDR => self.vring_addr()?,
            R::GET_CONFIG | R::SET_CONFIG => self.config(known == R::SET_CONFIG)?,
            R::GET_INFLIGHT_FD => Request::GetInflightFd(self.inflight()?),
            _ => return Err(Error::Unsupported(self.code)),
        })
    }

    fn bad_length(&self) -> Error {
        Error::Length {
            request: self.code,
            len: self.payload.len(),
        }
    }

    fn bad_files(&self) -> Error {
        Error::Files {
            request: self.code,
            files: self.files.len(),
        }
    }

    fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<T, Error> {
        T::read_from_bytes(&self.payload).map_err(|_| self.bad_length())
    }

    fn empty(&self) -> Result<(), Error> {
        if self.payload.is_empty() {
            Ok(())
        } else {
            Err(self.bad_length())
        }
    }

    fn none(&self, request: Request) -> Result<Request, Error> {
        self.empty().map(|()| request)
    }

    fn number(&self) -> Result<u64, Error> {
        Ok(self.body::<zerocopy::native_endian::U64>()?.get())
    }

    fn small<T: TryFrom<u64>>(&self, field: &'static str) -> Result<T, Error> {
        let number = self.number()?;
        T::try_from(number).map_err(|_| value(field, number))
    }

    /// The one descriptor that a request takes.
    fn file(&mut self) -> Result<OwnedFd, Error> {
        match self.files.pop() {
            Some(file) if self.files.is_empty() => Ok(file),
            Some(file) => {
                self.files.push(file);
                Err(self.bad_files())
            }
            None => Err(self.bad_files()),
        }
    }

    fn index(&self, raw: u64) -> Result<u16, Error> {
        match u16::try_from(raw) {
            Ok(index) if index < self.queues => Ok(index),
            _ => Err(Error::Vring(raw)),
        }
    }

    fn vring_state(&self) -> Result<(u16, u32), Error> {
        let raw: RawVringState = self.body()?;
        Ok((self.index(raw.index.get().into())?, raw.num.get()))
    }

    fn vring_file(&mut self) -> Result<(u16, Option<OwnedFd>), Error> {
        let number = self.number()?;
        // Without the flag's bit, so that every other high bit makes an index that does not exist.
        let index = self.index(number & !spec::VRING_NO_FILE)?;
        debug_assert!(u64::from(index) <= spec::VRING_INDEX);
        if number & spec::VRING_NO_FILE == 0 {
            return Ok((index, Some(self.file()?)));
        }
        if !self.files.is_empty() {
            return Err(self.bad_files());
        }
        Ok((index, None))
    }

    fn vring_addr(&self) -> Result<Request, Error> {
        let raw: RawVringAddr = self.body()?;
        let index = self.index(raw.index.get().into())?;
        let flags = raw.flags.get();
        if flags & !spec::VRING_F_LOG != 0 {
            return Err(value("vring address flags", flags));
        }
        Ok(Request::SetVringAddr {
            index,
            log: (flags & spec::VRING_F_LOG != 0).then(|| raw.log.get()),
            desc: raw.descriptor.get(),
            avail: raw.available.get(),
            used: raw.used.get(),
        })
    }

    fn mem_table(self) -> Result<Request, Error> {
        let Ok((head, rest)) = RawRegions::read_from_prefix(&self.payload) else {
            return Err(self.bad_length());
        };
        let count = head.count.get();
        if !(1..=spec::MAX_REGIONS).contains(&count) {
            return Err(value("number of memory regions", count));
        }
        // User-Mode Linux sends room for two regions, whether it has two or one.
        let longest = spec::MAX_REGIONS as usize * size_of::<RawRegion>();
        let parsed = <[RawRegion]>::ref_from_prefix_with_elems(rest, count as usize);
        let Some((regions, _)) = parsed.ok().filter(|_| rest.len() <= longest) else {
            return Err(self.bad_length());
        };
        if self.files.len() != regions.len() {
            return Err(self.bad_files());
        }
        let infos: Vec<_> = regions.iter().map(|r| RegionInfo::from(*r)).collect();
        Ok(Request::SetMemTable(
            infos.into_iter().zip(self.files).collect(),
        ))
    }

    fn config(&self, set: bool) -> Result<Request, Error> {
        let Ok((raw, rest)) = RawConfig::read_from_prefix(&self.payload) else {
            return Err(self.bad_length());
        };
        let (offset, size, flags) = (raw.offset.get(), raw.size.get(), raw.flags.get());
        // The crate `vhost` numbers the two flags as bits, QEMU as values.
        if flags > 3 {
            return Err(value("configuration flags", flags));
        }
        if rest.len() != size as usize {
            return Err(self.bad_length());
        }
        if size == 0
            || offset
                .checked_add(size)
                .is_none_or(|e| e > spec::MAX_CONFIG)
        {
            return Err(value("configuration offset", offset));
        }
        Ok(if set {
            Request::SetConfig {
                offset,
                flags,
                bytes: rest.to_vec(),
            }
        } else {
            Request::GetConfig {
                offset,
                size,
                flags,
            }
        })
    }

    fn inflight(&self) -> Result<InflightInfo, Error> {
        let Ok((raw, rest)) = RawInflight::read_from_prefix(&self.payload) else {
            return Err(self.bad_length());
        };
        if !matches!(rest.len(), 0 | 4) {
            return Err(self.bad_length());
        }
        let (queues, queue_size) = (raw.queues.get(), raw.queue_size.get());
        if queues == 0 || queues > self.queues {
            return Err(value("number of in-flight queues", queues));
        }
        if queue_size == 0 || queue_size > 32768 {
            return Err(value("in-flight queue size", queue_size));
        }
        Ok(InflightInfo {
            size: raw.size.get(),
            offset: raw.offset.get(),
            queues,
            queue_size,
            wire_len: self.payload.len(),
        })
    }
}

fn value(field: &'static str, value: impl Into<u64>) -> Error {
    Error::Value {
        field,
        value: value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing::Header;
    use crate::unix::sealed_memory;

    fn parse(code: FrontendReq, payload: &[u8], files: usize) -> Result<Request, Error> {
        let message = Message {
            header: Header {
                request: code.into(),
                need_reply: false,
                size: payload.len(),
            },
            payload: payload.to_vec(),
            files: (0..files)
                .map(|_| sealed_memory(c"x", 1).unwrap())
                .collect(),
            truncated: false,
        };
        Request::parse(message, 2)
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn vrings_beyond_the_device_are_refused_whatever_their_high_bits() {
        use FrontendReq as R;
        for index in [2u32, 3, 0x100, 0x1_0000, 0x8000_0001, u32::MAX] {
            for code in [
                R::SET_VRING_NUM,
                R::SET_VRING_BASE,
                R::GET_VRING_BASE,
                R::SET_VRING_ENABLE,
            ] {
                let got = parse(code, &words(&[index, 1]), 0);
                assert!(matches!(got, Err(Error::Vring(_))), "{code:?} {index:#x}");
            }
            let mut addr = words(&[index, 0]);
            addr.resize(40, 0);
            assert!(matches!(
                parse(R::SET_VRING_ADDR, &addr, 0),
                Err(Error::Vring(_))
            ));
        }
        for code in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
            for number in [2u64, 0xff, 0x102, 0x200, 1 << 32, u64::MAX] {
                let got = parse(code, &number.to_ne_bytes(), 1);
                assert!(matches!(got, Err(Error::Vring(_))), "{code:?} {number:#x}");
            }
            assert!(parse(code, &1u64.to_ne_bytes(), 1).is_ok());
            assert!(parse(code, &0x101u64.to_ne_bytes(), 0).is_ok());
            for (number, files) in [(0u64, 0), (0, 2), (0x100, 1)] {
                let got = parse(code, &number.to_ne_bytes(), files);
                assert!(matches!(got, Err(Error::Files { .. })));
            }
        }
    }

    #[test]
    fn memory_tables_may_have_room_but_no_missing_region() {
        let table = |count: u32, regions: usize| {
            let mut t = words(&[count, 0]);
            t.resize(8 + 32 * regions, 0);
            t
        };
        let code = FrontendReq::SET_MEM_TABLE;
        assert!(parse(code, &table(1, 1), 1).is_ok());
        assert!(parse(code, &table(1, 2), 1).is_ok(), "User-Mode Linux");
        assert!(parse(code, &table(8, 8), 8).is_ok());
        assert!(parse(code, &table(2, 1), 2).is_err());
        assert!(parse(code, &table(1, 9), 1).is_err());
        assert!(parse(code, &table(0, 0), 0).is_err());
        assert!(parse(code, &table(u32::MAX, 8), 8).is_err());
        assert!(parse(code, &table(2, 2), 1).is_err());
        assert!(parse(code, &table(1, 1), 2).is_err());
    }

    #[test]
    fn descriptors_on_requests_that_take_none_are_refused() {
        for code in 1..=50u32 {
            let Ok(code) = FrontendReq::try_from(code) else {
                continue;
            };
            for files in [2, 8] {
                // No request takes two descriptors, or eight without as many regions.
                for len in [0, 8, 12, 16, 20, 24, 40] {
                    assert!(parse(code, &vec![0; len], files).is_err(), "{code:?}");
                }
            }
        }
    }

    #[test]
    fn padding_of_the_in_flight_description_is_mirrored() {
        for len in [20, 24] {
            let mut payload = vec![0; len];
            payload[16] = 2;
            payload[18] = 128;
            let got = parse(FrontendReq::GET_INFLIGHT_FD, &payload, 0).unwrap();
            let Request::GetInflightFd(info) = got else {
                panic!("{got:?}")
            };
            assert_eq!((info.queues, info.queue_size), (2, 128));
            assert_eq!(info.to_wire(), payload);
        }
    }
}
