//! The Internet checksum (RFC 1071): over slices that come in pieces, updated in place (RFC 1624), and with pseudo headers.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::IpProto;
use crate::frame::{Fragment, Frame, L3, L4};
use crate::spec::Ipv4Header;

/// A sum of 16-bit words in one's complement, over pieces of any length.
///
/// Words are added in the machine's own byte order, which only turns the sum around (RFC 1071 §2 B).
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Folded sums of pieces: 48 bits are left to count them.
    sum: u64,
    /// An odd number of bytes was added: what comes next is the lower half of a word.
    odd: bool,
}

impl Sum {
    /// Nothing yet.
    #[inline]
    pub const fn new() -> Self {
        Self { sum: 0, odd: false }
    }

    /// Begins with the pseudo header of IPv4 (RFC 793 §3.1, RFC 768). `len` is that of transport header and payload.
    #[inline]
    pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, proto: IpProto, len: u16) -> Self {
        let mut sum = Self::new();
        sum.add(&src.octets());
        sum.add(&dst.octets());
        sum.add_word(u16::from(proto.0));
        sum.add_word(len);
        sum
    }

    /// Begins with the pseudo header of IPv6 (RFC 8200 §8.1).
    #[inline]
    pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, proto: IpProto, len: u32) -> Self {
        let mut sum = Self::new();
        sum.add(&src.octets());
        sum.add(&dst.octets());
        sum.add(&len.to_be_bytes());
        sum.add_word(u16::from(proto.0));
        sum
    }

    /// Adds the next bytes.
    #[inline]
    pub fn add(&mut self, bytes: &[u8]) {
        let piece = folded(bytes);
        self.sum += u64::from(if self.odd { piece.swap_bytes() } else { piece });
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// Adds the next two bytes, as a number.
    #[inline]
    pub fn add_word(&mut self, word: u16) {
        let word = word.to_be();
        self.sum += u64::from(if self.odd { word.swap_bytes() } else { word });
    }

    /// The sum without the complement: what virtio (1.3 §5.1.6.2) and Linux want in the checksum field of a packet whose checksum is to be completed, when only the pseudo header was added.
    #[inline]
    pub fn partial(self) -> u16 {
        u16::from_be(fold(self.sum))
    }

    /// The checksum. Over bytes that hold their own checksum it is 0, if that is right.
    #[inline]
    pub fn finish(self) -> u16 {
        !self.partial()
    }

    /// The checksum for UDP, where 0 would say that there is none: it is sent as 0xffff, which is equal to it (RFC 768).
    #[inline]
    pub fn finish_udp(self) -> u16 {
        match self.finish() {
            0 => 0xffff,
            sum => sum,
        }
    }
}

#[inline]
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The sum of one piece, in the machine's byte order. An odd last byte is the upper half of a word.
#[inline]
fn folded(bytes: &[u8]) -> u16 {
    // Words of 8 bytes with the carry brought round, in four lanes that do not wait for each other.
    #[inline(always)]
    fn carry(sum: u64, word: u64) -> u64 {
        let (sum, over) = sum.overflowing_add(word);
        // Cannot overflow: a sum that did is not the largest number.
        sum + u64::from(over)
    }
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut lanes = [0u64; 4];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = carry(*lane, u64::from_ne_bytes(*word));
        }
    }
    let [a, b, c, d] = lanes;
    let mut sum = carry(carry(a, b), carry(c, d));
    let (words, rest) = rest.as_chunks::<8>();
    for word in words {
        sum = carry(sum, u64::from_ne_bytes(*word));
    }
    let (half, rest) = rest.as_chunks::<4>();
    for word in half {
        sum = carry(sum, u64::from(u32::from_ne_bytes(*word)));
    }
    let (quarter, rest) = rest.as_chunks::<2>();
    for word in quarter {
        sum = carry(sum, u64::from(u16::from_ne_bytes(*word)));
    }
    if let [last] = rest {
        sum = carry(sum, u64::from(u16::from_ne_bytes([*last, 0])));
    }
    fold(sum)
}

/// The checksum of these bytes.
#[inline]
pub fn of(bytes: &[u8]) -> u16 {
    let mut sum = Sum::new();
    sum.add(bytes);
    sum.finish()
}

/// The checksum after a word of what it covers changed from `old` to `new` (RFC 1624 §3, equation 3). Where UDP's checksum was 0, there is none to update.
#[inline]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = !checksum as u64 + !old as u64 + new as u64;
    !fold(sum)
}

/// The same for two words: an IPv4 address, a sequence number.
#[inline]
pub const fn update_32(checksum: u16, old: u32, new: u32) -> u16 {
    let sum = !checksum as u64 + !old as u64 + new as u64;
    !fold(sum)
}

/// Whether the IPv4 header at the head's L3 is right; `None` where there is none, or not all of it is at hand.
#[inline]
pub fn ipv4_header_is_good(frame: &Frame, head: &[u8]) -> Option<bool> {
    let L3::Ipv4(ip) = &frame.l3 else {
        return None;
    };
    let at = frame.l3_offset();
    let header = head.get(at..at + usize::from(ip.header_len))?;
    Some(of(header) == 0)
}

/// Puts the checksum into an IPv4 header; `header` is all of it, options too. Less than 20 bytes are left alone.
#[inline]
pub fn fill_ipv4_header(header: &mut [u8]) {
    const AT: usize = core::mem::offset_of!(Ipv4Header, checksum);
    if header.len() < Ipv4Header::LEN {
        return;
    }
    header[AT..AT + 2].fill(0);
    let sum = of(header);
    header[AT..AT + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What a transport's checksum says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is right.
    Good,
    /// It is wrong, or the bytes end before the packet does.
    Bad,
    /// UDP over IPv4 without a checksum, which is legal; over IPv6 only for tunnels that allow it (RFC 6936 §5), which is for the caller to know.
    None,
    /// Cannot be told: no TCP, UDP or ICMP; a fragment; malformed; extension headers that change the addresses of the pseudo header.
    Unknown,
}

/// Where the checksum of the frame's transport is, and the sum that it begins with.
#[derive(Clone, Copy)]
struct Covered {
    /// From here on it covers, up to `end`.
    start: usize,
    end: usize,
    /// The field.
    field: usize,
    pseudo: Sum,
}

fn covered(frame: &Frame) -> Option<Covered> {
    let start = frame.l4_offset()?;
    let l3_end = frame.l3_end()?;
    if frame.fragment() != Fragment::No {
        return None;
    }
    let (proto, field, end) = match &frame.l4 {
        L4::Tcp(_) => (IpProto::TCP, 16, l3_end),
        L4::Udp(udp) => (IpProto::UDP, 6, start + usize::from(udp.len)),
        L4::Icmp(_) => (IpProto::ICMP, 2, l3_end),
        L4::Icmpv6(_) => (IpProto::ICMPV6, 2, l3_end),
        _ => return None,
    };
    // The parser saw that it lies in the packet, which has 65,535 bytes after the headers at most.
    let len = u16::try_from(end.checked_sub(start)?).ok()?;
    let pseudo = match &frame.l3 {
        L3::Ipv4(_) if proto == IpProto::ICMP => Sum::new(),
        L3::Ipv4(ip) => Sum::pseudo_v4(ip.src, ip.dst, proto, len),
        L3::Ipv6(ip) if ip.addresses_are_final() => {
            Sum::pseudo_v6(ip.src, ip.dst, proto, u32::from(len))
        }
        _ => return None,
    };
    Some(Covered {
        start,
        end,
        field: start + field,
        pseudo,
    })
}

/// Verifies the checksum of TCP, UDP, ICMP or ICMPv6. `pieces` are the whole frame's bytes, from its first one on, in order; what
/// comes after the packet is not looked at.
pub fn verify<'a>(frame: &Frame, pieces: impl IntoIterator<Item = &'a [u8]>) -> Verdict {
    let Some(Covered {
        start,
        end,
        pseudo: mut sum,
        ..
    }) = covered(frame)
    else {
        return Verdict::Unknown;
    };
    if matches!(&frame.l4, L4::Udp(udp) if udp.checksum == 0) {
        return Verdict::None;
    }
    // Where the piece begins in the frame.
    let mut at = 0usize;
    for piece in pieces {
        let from = start.saturating_sub(at).min(piece.len());
        let to = end.saturating_sub(at).min(piece.len());
        sum.add(&piece[from..to]);
        at = at.saturating_add(piece.len());
        if at >= end {
            break;
        }
    }
    if at >= end && sum.finish() == 0 {
        Verdict::Good
    } else {
        Verdict::Bad
    }
}

/// Computes the checksum of TCP, UDP, ICMP or ICMPv6 and puts it into `bytes`, which hold the whole frame. What stood in the field does not matter.
///
/// Gives whether it did: `false` where [`verify`] would say [`Verdict::Unknown`], or the bytes end before the packet does.
pub fn fill(frame: &Frame, bytes: &mut [u8]) -> bool {
    let Some(covered) = covered(frame) else {
        return false;
    };
    let Some(packet) = bytes.get_mut(covered.start..covered.end) else {
        return false;
    };
    let field = covered.field - covered.start;
    packet[field..field + 2].fill(0);
    let mut sum = covered.pseudo;
    sum.add(packet);
    let value = match frame.l4 {
        L4::Udp(_) => sum.finish_udp(),
        _ => sum.finish(),
    };
    packet[field..field + 2].copy_from_slice(&value.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071 says it, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for word in bytes.chunks(2) {
            let low = word.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([word[0], low]));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071() {
        // §3: the sum of these is ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(of(&bytes), !0xddf2);
        assert_eq!(of(&[]), 0xffff);
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // §4: the result is 0, not 0xffff.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn full_words_do_not_lose_a_carry() {
        for len in [0, 1, 2, 31, 32, 33, 64, 65_550] {
            let bytes = vec![0xff; len];
            assert_eq!(of(&bytes), naive(&bytes), "{len}");
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_ones() {
        let mut sum = Sum::new();
        sum.add_word(0xffff);
        assert_eq!((sum.finish(), sum.finish_udp()), (0, 0xffff));
        sum.add_word(1);
        assert_eq!(sum.finish(), sum.finish_udp());
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_add_up(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            cuts in prop::collection::vec(0usize..40, 0..20),
        ) {
            let mut sum = Sum::new();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                sum.add(piece);
                rest = after;
            }
            sum.add(rest);
            prop_assert_eq!(sum.finish(), naive(&bytes));
            prop_assert_eq!(of(&bytes), naive(&bytes));
        }

        #[test]
        fn an_update_is_what_a_new_sum_would_be(
            mut bytes in prop::collection::vec(any::<u8>(), 8..80),
            at in any::<prop::sample::Index>(),
            new in any::<[u8; 4]>(),
        ) {
            // Never all zero, as no header is: then both zeros would be right.
            bytes[0] |= 1;
            let before = of(&bytes);
            let at = 2 + at.index((bytes.len() - 4) / 2) * 2;
            let old: [u8; 4] = bytes[at..].first_chunk().copied().unwrap_or_default();
            let old_16 = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            bytes[at..at + 2].copy_from_slice(&new[..2]);
            let new_16 = u16::from_be_bytes([new[0], new[1]]);
            prop_assert_eq!(update(before, old_16, new_16), of(&bytes));
            if at + 4 <= bytes.len() {
                bytes[at..at + 4].copy_from_slice(&new);
                let (old, new) = (u32::from_be_bytes(old), u32::from_be_bytes(new));
                prop_assert_eq!(update_32(before, old, new), of(&bytes));
            }
        }

        #[test]
        fn words_after_an_odd_byte_are_turned(words in prop::collection::vec(any::<u16>(), 0..20)) {
            let mut sum = Sum::new();
            let mut bytes = vec![7u8];
            sum.add(&bytes);
            for word in words {
                sum.add_word(word);
                bytes.extend(word.to_be_bytes());
            }
            prop_assert_eq!(sum.finish(), naive(&bytes));
        }
    }
}
