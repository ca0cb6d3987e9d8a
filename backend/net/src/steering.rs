//! How the receive queue of a frame is found.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bluff_packet::toeplitz::{HashTypes, Rss, Toeplitz};
use bluff_packet::{Frame as Packet, L3};

use crate::Frame;

/// How the receive queue of a frame is found.
#[derive(Clone, Debug)]
pub enum Steering {
    /// By the hash of its flow, among the first so many queues.
    Spread(u16),
    /// The queue that the function itself sends the flow by, among the first so many; a flow of which it has sent nothing is spread.
    Learned(Arc<Flows>, u16),
    /// By a hash and a table that the function's driver has set.
    Table(Arc<RssTable>),
}

impl Steering {
    /// Whether it looks at frames: if not, all are for the first queue.
    #[inline]
    pub(crate) fn looks(&self) -> bool {
        !matches!(self, Self::Spread(..=1))
    }

    /// Whether it goes by [`Frame::hash`]. Whoever has frames for it sees to it that they have one.
    #[inline]
    pub fn by_flow(&self) -> bool {
        matches!(self, Self::Spread(n) | Self::Learned(_, n) if *n > 1)
    }

    /// The queue that `frame` is for. It need not be there.
    #[inline]
    pub fn queue(&self, frame: &Frame) -> u16 {
        match self {
            Self::Spread(n) => spread(frame.hash, *n),
            Self::Learned(flows, n) => match flows.queue(frame.hash) {
                Some(queue) if queue < *n => queue,
                _ => spread(frame.hash, *n),
            },
            Self::Table(table) => table.queue(frame),
        }
    }
}

/// By the upper bits: a multiplication in place of a division (Lemire).
#[inline(always)]
fn spread(hash: u32, n: u16) -> u16 {
    ((u64::from(hash) * u64::from(n)) >> 32) as u16
}

/// Flows that are remembered. One that comes later takes the place of another.
const FLOWS: usize = 4096;
/// The part of an entry that names a queue, and one more than it; 0: there is none.
const QUEUE: u32 = 0xff;

/// Which of a function's queues its flows are sent by. Its transmit queues write, whoever has frames for it reads, both without waiting; what is read
/// may be a moment old, and is good or bad luck for one frame only.
pub struct Flows(Box<[AtomicU32]>);

impl Default for Flows {
    fn default() -> Self {
        Self((0..FLOWS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl fmt::Debug for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flows").finish_non_exhaustive()
    }
}

impl Flows {
    #[inline]
    fn cell(&self, hash: u32) -> &AtomicU32 {
        &self.0[hash as usize % FLOWS]
    }

    /// A frame of the flow with this [`Frame::hash`] was sent by a queue, below 255. Nothing is learnt of a frame without a hash.
    #[inline]
    pub fn learn(&self, hash: u32, queue: u16) {
        debug_assert!(u32::from(queue) < QUEUE);
        // The bits that are left out are those that found the cell.
        let entry = hash & !QUEUE | (u32::from(queue) + 1) & QUEUE;
        let cell = self.cell(hash);
        // Relaxed: the entry is all that there is. It is not written where it is right already, so that a flow costs its queue no line of the cache.
        if hash != 0 && cell.load(Ordering::Relaxed) != entry {
            cell.store(entry, Ordering::Relaxed);
        }
    }

    /// The queue that a flow was last sent by.
    #[inline]
    pub fn queue(&self, hash: u32) -> Option<u16> {
        let entry = self.cell(hash).load(Ordering::Relaxed);
        let known = entry & !QUEUE == hash & !QUEUE && entry & QUEUE != 0;
        known.then(|| (entry & QUEUE) as u16 - 1)
    }
}

/// A hash that a driver has asked for (virtio 1.3 §5.1.6.4.3).
#[derive(Debug)]
pub struct RssHash {
    toeplitz: Toeplitz,
    types: HashTypes,
}

impl RssHash {
    /// Over frames of these types. Making it costs microseconds.
    pub fn new(key: &[u8], types: HashTypes) -> Self {
        Self {
            toeplitz: Toeplitz::new(key),
            types,
        }
    }

    /// The hash of a frame as it is now; `None` where no type fits it.
    #[inline]
    pub fn of(&self, frame: &Frame) -> Option<Rss> {
        match &frame.packet {
            Some(packet) if !has_places(packet) => {
                self.toeplitz.frame(packet, frame.head(), self.types)
            }
            // A tag may have come or gone since it was read, and with it the places of addresses in extension headers.
            _ => {
                let packet = bluff_packet::parse(frame.head(), frame.len()).ok()?;
                self.toeplitz.frame(&packet, frame.head(), self.types)
            }
        }
    }
}

/// Whether it may have addresses that are named by their places.
#[inline]
fn has_places(packet: &Packet) -> bool {
    matches!(&packet.l3, L3::Ipv6(ip) if !ip.extensions.is_none())
}

/// Receive side scaling as a driver has set it (virtio 1.3 §5.1.6.5.7.1).
#[derive(Debug)]
pub struct RssTable {
    /// The hash.
    pub hash: Arc<RssHash>,
    /// Receive queues, from 0, by the lower bits of the hash. Its length is a power of two.
    pub queues: Box<[u16]>,
    /// The queue of frames without a hash.
    pub unclassified: u16,
}

impl RssTable {
    #[inline]
    fn queue(&self, frame: &Frame) -> u16 {
        let Some(rss) = self.hash.of(frame) else {
            return self.unclassified;
        };
        let at = rss.value as usize & self.queues.len().wrapping_sub(1);
        self.queues.get(at).copied().unwrap_or(self.unclassified)
    }
}

#[cfg(test)]
mod tests {
    use bluff_packet::parse;

    use super::*;
    use crate::Batch;

    #[test]
    fn flows_are_learnt_and_forgotten() {
        let flows = Flows::default();
        assert_eq!(flows.queue(7), None);
        flows.learn(7, 3);
        flows.learn(0x8000_0007, 127);
        // The second has taken the place of the first.
        assert_eq!(
            (flows.queue(7), flows.queue(0x8000_0007)),
            (None, Some(127))
        );
        flows.learn(7, 0);
        assert_eq!((flows.queue(7), flows.queue(0x8000_0007)), (Some(0), None));
        // Without a hash nothing is known.
        flows.learn(0, 2);
        assert_eq!(flows.queue(0), None);
    }

    fn queue(steering: &Steering, hash: u32) -> u16 {
        let mut batch = Batch::default();
        batch.push(&[1; 60]).unwrap().hash = hash;
        steering.queue(&batch.frames()[0])
    }

    #[test]
    fn what_is_not_learnt_is_spread() {
        let flows = Arc::new(Flows::default());
        flows.learn(0xffff_0001, 0);
        flows.learn(0x0000_0002, 5);
        let learned = |n| Steering::Learned(flows.clone(), n);
        assert_eq!(queue(&learned(6), 0xffff_0001), 0);
        assert_eq!(queue(&learned(6), 0x0000_0002), 5);
        // Of those that are used now.
        assert_eq!(queue(&learned(5), 0x0000_0002), 0);
        assert_eq!(queue(&learned(4), 0xffff_0003), 3);
        assert_eq!(queue(&Steering::Spread(4), 0xffff_0001), 3);
    }

    /// The example of an IPv6 address pair and its TCP ports from Microsoft's "Verifying the RSS Hash Calculation", behind a tag.
    #[test]
    fn tables_go_by_the_hash_of_the_frame_as_it_is() {
        const KEY: [u8; 40] = [
            0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3,
            0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3,
            0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
        ];
        let (src, dst) = ("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1");
        let mut bytes = vec![2; 12];
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20 + 24, 60, 9]);
        for address in [src, dst] {
            bytes.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
        }
        // Destination options with a home address (RFC 6275 §6.3), which is the one that counts where it is asked for.
        bytes.extend([6, 2, 1, 2, 0, 0, 201, 16]);
        bytes.extend([0xfd; 16]);
        bytes.extend(2794u16.to_be_bytes());
        bytes.extend(1766u16.to_be_bytes());
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0, 9, 0, 0, 0, 0]);
        let table = |types| RssTable {
            hash: Arc::new(RssHash::new(&KEY, types)),
            queues: (0..128).collect(),
            unclassified: 200,
        };
        let mut batch = Batch::default();
        batch.push(&bytes);
        let frame = &mut batch.frames_mut()[0];
        frame.packet = parse(frame.head(), frame.len()).ok();
        let plain = Steering::Table(Arc::new(table(HashTypes::TCPV6)));
        assert_eq!(plain.queue(frame), 0x3d);
        let home = Steering::Table(Arc::new(table(HashTypes::TCP_EX)));
        let wanted = {
            let mut input = vec![0xfd; 16];
            input.extend(dst.parse::<std::net::Ipv6Addr>().unwrap().octets());
            input.extend([0x0a, 0xea, 0x06, 0xe6]);
            (Toeplitz::new(&KEY).hash(&input) & 127) as u16
        };
        assert_eq!(home.queue(frame), wanted);
        frame.insert(12, &[0x81, 0, 0, 7]);
        assert_eq!((plain.queue(frame), home.queue(frame)), (0x3d, wanted));
        let none = Steering::Table(Arc::new(table(HashTypes::UDPV4)));
        assert_eq!(none.queue(frame), 200);
    }
}
