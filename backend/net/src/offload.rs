//! What is left to do on a frame.

use bitflags::bitflags;

bitflags! {
    /// What a receiver of frames can be left to do, or a sender may leave.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Offloads: u8 {
        /// Checksums of TCP and UDP.
        const CSUM = 1;
        /// Segmentation of TCP over IPv4.
        const TSO4 = 1 << 1;
        /// Segmentation of TCP over IPv6.
        const TSO6 = 1 << 2;
        /// Segmentation of TCP with congestion notification: CWR on the first segment alone.
        const ECN = 1 << 3;
        /// Segmentation of UDP into datagrams, over IPv4.
        const USO4 = 1 << 4;
        /// Segmentation of UDP into datagrams, over IPv6.
        const USO6 = 1 << 5;
    }
}

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Csum {
    /// Nothing: it is in the frame, right or wrong.
    #[default]
    Unknown,
    /// It is right, or nobody could have changed the frame since it was.
    Valid,
    /// It has to be completed (virtio 1.3 §5.1.6.2, `NEEDS_CSUM`): the sum over everything from `start` goes to `start + offset`, where the
    /// pseudo header's sum lies already.
    Partial {
        /// From the frame's first byte.
        start: u16,
        /// From `start`.
        offset: u16,
    },
}

/// How a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4 or IPv6: each segment is a datagram.
    Udp,
}

/// A frame that stands for several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// How it is to be cut.
    pub kind: GsoKind,
    /// CWR belongs to the first segment alone (TCP).
    pub ecn: bool,
    /// Bytes of payload in each segment but the last: never 0.
    pub size: u16,
    /// Where the IP header begins, from the frame's first byte.
    pub network: u16,
    /// Where the header of TCP or UDP begins, from the frame's first byte.
    pub transport: u16,
    /// Bytes of headers that each segment begins with, from the frame's first byte. They lie in the frame's head.
    pub headers: u16,
}

impl Gso {
    /// How many segments a frame of `len` bytes stands for.
    pub fn segments(&self, len: usize) -> usize {
        let payload = len.saturating_sub(usize::from(self.headers));
        payload.div_ceil(usize::from(self.size)).max(1)
    }
}

/// What is left to do on a frame. A frame with [`Gso`] has [`Csum::Partial`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Its checksum.
    pub csum: Csum,
    /// Whether it is to be cut.
    pub gso: Option<Gso>,
}

impl Offload {
    /// What somebody must be able to do who is given this frame (of IPv4, or else IPv6) as it is.
    pub fn needs(&self, ipv4: bool) -> Offloads {
        let mut needs = match self.csum {
            Csum::Partial { .. } => Offloads::CSUM,
            Csum::Unknown | Csum::Valid => Offloads::empty(),
        };
        if let Some(gso) = self.gso {
            needs |= match (gso.kind, ipv4) {
                (GsoKind::Tcp4, _) => Offloads::TSO4,
                (GsoKind::Tcp6, _) => Offloads::TSO6,
                (GsoKind::Udp, true) => Offloads::USO4,
                (GsoKind::Udp, false) => Offloads::USO6,
            };
            if gso.ecn {
                needs |= Offloads::ECN;
            }
        }
        needs
    }
}
