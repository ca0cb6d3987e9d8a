//! Configuration space (virtio 1.3 §5.1.4).

use bluff_packet::toeplitz::HashTypes;
use zerocopy::little_endian::{U16, U32};

use crate::control::RSS_TABLE;
use crate::settings::Mac;
use crate::spec::{ANNOUNCE, Config, LINK_UP};

/// Speed and duplex are not known.
pub const SPEED_UNKNOWN: u32 = u32::MAX;
const DUPLEX_FULL: u8 = 1;
const DUPLEX_UNKNOWN: u8 = 0xff;

/// What configuration space shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The device's address.
    pub mac: Mac,
    /// The link is up.
    pub link: bool,
    /// The driver is asked to announce itself.
    pub announce: bool,
    /// Pairs of queues.
    pub pairs: u16,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// Mbit/s, or [`SPEED_UNKNOWN`].
    pub speed: u32,
}

/// What is to be seen.
pub fn config(shown: &Shown) -> Config {
    let flag = |on: bool, bit: u16| if on { bit } else { 0 };
    let status = flag(shown.link, LINK_UP) | flag(shown.announce, ANNOUNCE);
    // Without a link there is no speed either.
    let speed = if shown.link {
        shown.speed
    } else {
        SPEED_UNKNOWN
    };
    Config {
        mac: shown.mac,
        status: U16::new(status),
        max_virtqueue_pairs: U16::new(shown.pairs),
        mtu: U16::new(shown.mtu),
        speed: U32::new(speed),
        duplex: match speed {
            SPEED_UNKNOWN => DUPLEX_UNKNOWN,
            _ => DUPLEX_FULL,
        },
        rss_max_key_size: 40,
        rss_max_indirection_table_length: U16::new(RSS_TABLE as u16),
        supported_hash_types: U32::new(HashTypes::ALL.0),
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn bytes_as_the_specification_has_them() {
        let shown = Shown {
            mac: [2, 1, 2, 3, 4, 5],
            link: true,
            announce: true,
            pairs: 4,
            mtu: 1450,
            speed: 25_000,
        };
        let wanted = [
            2, 1, 2, 3, 4, 5, 3, 0, 4, 0, 0xaa, 5, 0xa8, 0x61, 0, 0, 1, 40, 128, 0, 0xff, 1, 0, 0,
        ];
        assert_eq!(config(&shown).as_bytes(), wanted);
        let down = Shown {
            link: false,
            announce: false,
            ..shown
        };
        let bytes = config(&down);
        assert_eq!(bytes.as_bytes()[6..8], [0, 0]);
        assert_eq!(bytes.as_bytes()[12..17], [0xff; 5]);
    }
}
