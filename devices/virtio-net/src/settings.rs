//! What a driver has set by the control queue, and what follows for a received frame.

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Addresses of each kind that the filter keeps. More are allowed: then all of that kind are received.
pub const MAC_TABLE: usize = 64;

/// What is received beside the device's own address and its table (virtio 1.3 §5.1.6.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxMode {
    /// Everything.
    pub promisc: bool,
    /// All multicasts.
    pub allmulti: bool,
    /// All unicasts.
    pub alluni: bool,
    /// No multicast, but broadcasts.
    pub nomulti: bool,
    /// No unicast.
    pub nouni: bool,
    /// No broadcast.
    pub nobcast: bool,
}

/// One bit for each VLAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlans([u64; 64]);

impl Vlans {
    /// All, or none.
    pub fn new(all: bool) -> Self {
        Self([if all { u64::MAX } else { 0 }; 64])
    }

    /// Whether frames of this VLAN (0 to 4095) are received.
    #[inline]
    pub fn has(&self, vlan: u16) -> bool {
        self.0[usize::from(vlan >> 6) & 63] >> (vlan & 63) & 1 != 0
    }

    /// A bit for each, the lowest one first.
    pub(crate) fn words(&self) -> &[u64; 64] {
        &self.0
    }

    pub(crate) fn of(words: [u64; 64]) -> Self {
        Self(words)
    }

    pub(crate) fn set(&mut self, vlan: u16, on: bool) {
        let (word, bit) = (&mut self.0[usize::from(vlan >> 6) & 63], 1 << (vlan & 63));
        *word = if on { *word | bit } else { *word & !bit };
    }
}

/// When a queue's driver is notified (§5.1.6.5.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalescing {
    /// After so many frames; 0 and 1: after each.
    pub max_packets: u32,
    /// So many microseconds after the first at the latest; 0: after each frame.
    pub max_usecs: u32,
}

/// Which hash is computed, and reported (§5.1.6.5.7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashing {
    /// Types, of [`HashTypes`](bluff_packet::toeplitz::HashTypes).
    pub types: u32,
    /// The key of the Toeplitz hash; bytes that the driver did not give are 0.
    pub key: [u8; 40],
}

impl Hashing {
    /// No hash.
    pub const NONE: Self = Self {
        types: 0,
        key: [0; 40],
    };
}

/// How the receive queue of a frame is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steer {
    /// As the device likes, among the first so many (§5.1.6.5.5).
    Auto {
        /// At least 1.
        pairs: u16,
    },
    /// By hash and table (§5.1.6.5.7.1).
    Rss {
        /// The hash.
        hashing: Hashing,
        /// Receive queues, from 0; its length is a power of two.
        table: Box<[u16]>,
        /// The queue of frames without a hash.
        unclassified: u16,
        /// Transmit queues that are used.
        transmit: u16,
    },
}

/// What a driver has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The device's address.
    pub mac: Mac,
    /// What is received beside it.
    pub mode: RxMode,
    /// Unicast addresses that are received; `None`: all are, there were too many.
    pub unicast: Option<Vec<Mac>>,
    /// Multicast addresses that are received; `None`: all are.
    pub multicast: Option<Vec<Mac>>,
    /// VLANs that are received.
    pub vlans: Vlans,
    /// What the driver takes: the bits of `GUEST_*` features.
    pub offloads: u64,
    /// Queues.
    pub steer: Steer,
    /// The hash that is reported where there is no RSS.
    pub report: Hashing,
    /// What receive queues and transmit queues begin with.
    pub coalescing_first: [Coalescing; 2],
    /// By queue, as they are numbered.
    pub coalescing: Box<[Coalescing]>,
}

impl Settings {
    /// Whether the driver wants a frame for `to`, of the VLAN that its tag says.
    #[inline]
    pub fn wants(&self, to: &Mac, vlan: Option<u16>) -> bool {
        let mode = &self.mode;
        if mode.promisc {
            return true;
        }
        if let Some(vlan) = vlan
            && !self.vlans.has(vlan)
        {
            return false;
        }
        if to[0] & 1 == 0 {
            !mode.nouni
                && (*to == self.mac
                    || mode.alluni
                    || self.unicast.as_ref().is_none_or(|t| t.contains(to)))
        } else if *to == [0xff; 6] {
            !mode.nobcast
        } else {
            !mode.nomulti
                && (mode.allmulti || self.multicast.as_ref().is_none_or(|t| t.contains(to)))
        }
    }

    /// As [`Settings::wants`], of a frame's first bytes. One without a whole Ethernet header is wanted by nobody.
    #[inline]
    pub fn wants_frame(&self, head: &[u8]) -> bool {
        let Some((to, rest)) = head.split_first_chunk() else {
            return false;
        };
        let vlan = match rest.get(6..10) {
            Some(&[0x81, 0, a, b]) => Some(u16::from_be_bytes([a, b]) & 0xfff),
            _ => None,
        };
        self.wants(to, vlan)
    }

    /// How many transmit queues are used.
    pub fn transmit(&self) -> u16 {
        match &self.steer {
            Steer::Auto { pairs } => *pairs,
            Steer::Rss { transmit, .. } => *transmit,
        }
    }
}
