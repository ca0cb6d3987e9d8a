//! A capture as pcapng (draft-ietf-opsawg-pcapng): one section, one interface. Times are nanoseconds since 1970.
//!
//! Written here, as packets are put down by reactors, in place and without an allocation of their own, which the crates for it do not do.

use zerocopy::{Immutable, IntoBytes};

use super::spec::{self, Block, Interface, Opt, Packet, Section, Statistics, Time, flags};
use super::{Captured, Way};
use crate::{Batch, Csum};

/// What a captured frame begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkType {
    /// `LINKTYPE_ETHERNET`.
    Ethernet,
    /// `LINKTYPE_RAW`: an IPv4 or IPv6 header.
    Ip,
}

impl LinkType {
    fn code(self) -> u16 {
        match self {
            Self::Ethernet => 1,
            Self::Ip => 101,
        }
    }
}

/// Bytes of a block beside what stands in it.
const AROUND: usize = size_of::<Block>() + 4;
/// Bytes of a packet's options: its flags, and their end.
const PACKET_OPTIONS: usize = 2 * size_of::<Opt>() + 4;

/// The blocks that a file begins with.
pub fn begin(application: &str, interface: &str, link: LinkType, snaplen: u32) -> Vec<u8> {
    let mut to = Vec::new();
    let section = Section {
        magic: spec::MAGIC.into(),
        major: 1.into(),
        minor: 0.into(),
        len: (-1).into(),
    };
    let options = [(spec::SHB_USERAPPL, application.as_bytes())];
    block(&mut to, spec::SECTION, &section, &options);
    let described = Interface {
        link_type: link.code().into(),
        reserved: 0.into(),
        snaplen: snaplen.into(),
    };
    let options = [
        (spec::IF_NAME, interface.as_bytes()),
        (spec::IF_TSRESOL, &[9]),
    ];
    block(&mut to, spec::INTERFACE, &described, &options);
    to
}

/// The block that it ends with: how much there was in its span of time, and how much is missing.
pub fn end((start, end): (u64, u64), captured: Captured) -> Vec<u8> {
    let mut to = Vec::new();
    let statistics = Statistics {
        interface: 0.into(),
        time: Time::new(end),
    };
    let (first, last) = (Time::new(start), Time::new(end));
    let seen = captured.kept + captured.missed;
    let options = [
        (spec::ISB_STARTTIME, first.as_bytes()),
        (spec::ISB_ENDTIME, last.as_bytes()),
        (spec::ISB_IFRECV, &seen.to_le_bytes()),
        (spec::ISB_IFDROP, &captured.missed.to_le_bytes()),
    ];
    block(&mut to, spec::STATISTICS, &statistics, &options);
    to
}

/// Adds the packet of frame `i` of `batch` behind `outer`, up to `snaplen` bytes of both; `false` where `to` would grow over `room`.
#[expect(clippy::too_many_arguments, reason = "two callers' worth of one line")]
pub(super) fn frame(
    to: &mut Vec<u8>,
    room: usize,
    snaplen: usize,
    time: u64,
    way: Way,
    outer: &[u8],
    batch: &Batch,
    i: usize,
) -> bool {
    let frame = &batch.frames()[i];
    let original = outer.len() + frame.len();
    let captured = original.min(snaplen);
    let whole = AROUND + size_of::<Packet>() + captured.next_multiple_of(4) + PACKET_OPTIONS;
    if to.len() + whole > room {
        return false;
    }
    // Once: what is not used of it takes no memory.
    to.reserve_exact(room - to.len());
    put(to, &head(spec::PACKET, whole));
    put(
        to,
        &Packet {
            interface: 0.into(),
            time: Time::new(time),
            captured: (captured as u32).into(),
            original: (original as u32).into(),
        },
    );
    let begin = to.len();
    to.extend_from_slice(&outer[..outer.len().min(captured)]);
    let filled = to.len();
    to.resize(begin + captured, 0);
    batch.copy_to(i, 0, &mut to[filled..]);
    to.resize(begin + captured.next_multiple_of(4), 0);
    let mut bits = match way {
        Way::In => flags::INBOUND,
        Way::Out => flags::OUTBOUND,
    };
    bits |= match frame.offload.csum {
        Csum::Unknown => 0,
        Csum::Valid => flags::CHECKSUM_VALID,
        Csum::Partial { .. } => flags::CHECKSUM_NOT_READY,
    };
    if frame.offload.gso.is_some() {
        bits |= flags::SEGMENTATION;
    }
    option(to, spec::EPB_FLAGS, &bits.to_le_bytes());
    option(to, spec::OPT_END, &[]);
    to.extend_from_slice(&(whole as u32).to_le_bytes());
    true
}

fn head(kind: u32, len: usize) -> Block {
    Block {
        kind: kind.into(),
        len: (len as u32).into(),
    }
}

fn put(to: &mut Vec<u8>, what: &(impl IntoBytes + Immutable)) {
    to.extend_from_slice(what.as_bytes());
}

fn option(to: &mut Vec<u8>, code: u16, value: &[u8]) {
    let len = value.len() as u16;
    put(
        to,
        &Opt {
            code: code.into(),
            len: len.into(),
        },
    );
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// A block of `body` and options, to an empty buffer or behind other blocks.
fn block(
    to: &mut Vec<u8>,
    kind: u32,
    body: &(impl IntoBytes + Immutable),
    options: &[(u16, &[u8])],
) {
    let begin = to.len();
    put(to, &head(kind, 0));
    put(to, body);
    for (code, value) in options {
        option(to, *code, value);
    }
    option(to, spec::OPT_END, &[]);
    let len = (to.len() - begin + 4) as u32;
    to.extend_from_slice(&len.to_le_bytes());
    to[begin + 4..begin + 8].copy_from_slice(&len.to_le_bytes());
}
