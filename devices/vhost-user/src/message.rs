//! From a message's bytes to a request whose fields are checked.
//!
//! After [`Request::parse`] there are no raw bytes: every vring exists, every count fits, and each
//! request has exactly the descriptors that it takes. What depends on the session's state is checked
//! by the [`plan`](crate::plan).

mod parse;

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::{self, RawInflight, RawRegion, RawRegions};

/// A memory region without its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address of its first byte.
    pub guest: u64,
    /// Bytes; not checked here.
    pub size: u64,
    /// The front end's address of its first byte.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
}

impl From<RawRegion> for RegionInfo {
    fn from(raw: RawRegion) -> Self {
        Self {
            guest: raw.guest.get(),
            size: raw.size.get(),
            user: raw.user.get(),
            offset: raw.offset.get(),
        }
    }
}

/// What an in-flight region looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightInfo {
    /// Bytes of the region.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Queues, 1 up to what the device has.
    pub queues: u16,
    /// Descriptors of a queue, 1 to 32768.
    pub queue_size: u16,
    /// How long the payload was. C's padding makes it 24 bytes, the specification's fields 20; the reply
    /// has to be as long.
    pub wire_len: usize,
}

impl InflightInfo {
    /// The payload of a reply.
    pub fn to_wire(self) -> Vec<u8> {
        let raw = RawInflight {
            size: self.size.into(),
            offset: self.offset.into(),
            queues: self.queues.into(),
            queue_size: self.queue_size.into(),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(self.wire_len, 0);
        bytes
    }
}

/// A request of the front end (vhost-user, "Front-end message types").
#[derive(Debug)]
#[allow(missing_docs)] // The names and fields are the protocol's.
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionInfo, OwnedFd)>),
    SetLogBase {
        size: u64,
        offset: u64,
        file: OwnedFd,
    },
    /// The descriptor is closed: it would announce that the log has changed, which front ends that
    /// read the log at their own pace do not wait for.
    SetLogFd,
    SetVringNum {
        index: u16,
        size: u16,
    },
    SetVringAddr {
        index: u16,
        /// Guest address of the used ring, where writes to it are to be logged.
        log: Option<u64>,
        desc: u64,
        avail: u64,
        used: u64,
    },
    SetVringBase {
        index: u16,
        base: u32,
    },
    GetVringBase {
        index: u16,
    },
    SetVringKick {
        index: u16,
        file: Option<OwnedFd>,
    },
    SetVringCall {
        index: u16,
        file: Option<OwnedFd>,
    },
    SetVringErr {
        index: u16,
        file: Option<OwnedFd>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u16,
        on: bool,
    },
    SendRarp([u8; 6]),
    NetSetMtu(u16),
    SetBackendReqFd(OwnedFd),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd(InflightInfo),
    SetInflightFd(InflightInfo, OwnedFd),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionInfo, OwnedFd),
    RemMemReg(RegionInfo),
    SetStatus(u8),
    GetStatus,
}

/// How many descriptors a request with this payload should have.
pub(crate) fn files_wanted(request: u32, payload: &[u8]) -> usize {
    use FrontendReq as R;
    match FrontendReq::try_from(request) {
        Ok(R::SET_MEM_TABLE) => RawRegions::read_from_prefix(payload).map_or(0, |(head, _)| {
            head.count.get().min(spec::MAX_REGIONS) as usize
        }),
        Ok(R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR) => {
            zerocopy::native_endian::U64::read_from_prefix(payload)
                .map_or(0, |(n, _)| usize::from(n.get() & spec::VRING_NO_FILE == 0))
        }
        Ok(
            R::SET_LOG_BASE
            | R::SET_LOG_FD
            | R::SET_BACKEND_REQ_FD
            | R::SET_INFLIGHT_FD
            | R::ADD_MEM_REG,
        ) => 1,
        _ => 0,
    }
}
