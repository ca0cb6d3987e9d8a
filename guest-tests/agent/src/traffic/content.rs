//! Bytes that follow from a number, and their checksum.

/// An endless stream of bytes (xorshift64*, Vigna 2016): no two streams, and no two places of one, look alike.
pub struct Content(u64);

impl Content {
    /// The stream of this number.
    pub fn new(number: u64) -> Self {
        // Never zero, which the generator would stay at; far apart for neighbours.
        Self((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Its next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

/// 64-bit FNV-1a of a stream of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(pub u64);

impl Checksum {
    /// Of nothing yet.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// With more bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_tells_a_changed_and_a_moved_byte() {
        let mut bytes = [0; 100];
        Content::new(7).fill(&mut bytes);
        let sum = |bytes: &[u8]| {
            let mut sum = Checksum::EMPTY;
            sum.add(bytes);
            sum
        };
        let right = sum(&bytes);
        let mut changed = bytes;
        changed[99] ^= 1;
        assert_ne!(sum(&changed), right);
        changed = bytes;
        changed.swap(3, 40);
        assert_ne!(sum(&changed), right);
        assert_ne!(sum(&bytes[..99]), right);
    }

    #[test]
    fn streams_differ() {
        let of = |number| {
            let mut bytes = [0; 16];
            Content::new(number).fill(&mut bytes);
            bytes
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert_ne!(of(0)[..8], of(0)[8..]);
    }
}
