//! The cheap level of parsing: addresses, tags, ethertype. It is all that a switch needs.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::spec::{EthernetHeader, VlanTag};
use crate::window::Window;
use crate::{EtherType, Mac, Malformed};

/// A VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tag {
    /// [`EtherType::VLAN`] or [`EtherType::QINQ`].
    pub tpid: EtherType,
    /// Priority (3 bits), drop eligible (1), VLAN (12) (IEEE 802.1Q §9.6).
    pub tci: u16,
}

impl Tag {
    /// A customer's tag (802.1Q).
    pub const fn customer(tci: u16) -> Self {
        Self {
            tpid: EtherType::VLAN,
            tci,
        }
    }

    /// A service tag (802.1ad).
    pub const fn service(tci: u16) -> Self {
        Self {
            tpid: EtherType::QINQ,
            tci,
        }
    }

    /// The VLAN: 0 for a tag that only carries a priority.
    #[inline]
    pub const fn vlan(self) -> u16 {
        self.tci & 0xfff
    }
}

/// Up to two tags, the outer one first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tags {
    tags: [Tag; 2],
    count: u8,
}

impl Tags {
    /// No tag.
    pub const NONE: Self = Self {
        tags: [Tag {
            tpid: EtherType(0),
            tci: 0,
        }; 2],
        count: 0,
    };

    /// One tag.
    pub const fn one(tag: Tag) -> Self {
        let mut tags = Self::NONE;
        tags.tags[0] = tag;
        tags.count = 1;
        tags
    }

    /// Two.
    pub const fn two(outer: Tag, inner: Tag) -> Self {
        Self {
            tags: [outer, inner],
            count: 2,
        }
    }

    /// The tags, the outer one first.
    #[inline]
    pub fn as_slice(&self) -> &[Tag] {
        &self.tags[..usize::from(self.count)]
    }

    /// Bytes that they take in a frame.
    #[inline]
    pub const fn wire_len(&self) -> usize {
        self.count as usize * VlanTag::LEN
    }
}

/// A frame's addresses, as they lie in it. They are one piece, so that they are copied with two moves.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Macs {
    /// Destination.
    pub dst: Mac,
    /// Source. It may be a group's, which is for the caller to refuse.
    pub src: Mac,
}

/// What stands in front of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2 {
    /// Destination and source.
    pub macs: Macs,
    /// The first two tags.
    pub tags: Tags,
    /// What follows the tags. With a third tag it is that tag's TPID, and nothing behind it was looked at.
    pub ethertype: EtherType,
}

impl L2 {
    /// Destination.
    #[inline]
    pub const fn dst(&self) -> Mac {
        self.macs.dst
    }

    /// Source.
    #[inline]
    pub const fn src(&self) -> Mac {
        self.macs.src
    }

    /// Where the payload begins: 14, 18 or 22.
    #[inline]
    pub const fn header_len(&self) -> usize {
        EthernetHeader::LEN + self.tags.wire_len()
    }
}

/// Reads a frame's addresses, tags and ethertype.
///
/// `head` is the frame's first bytes, `len` the whole frame's length in bytes.
///
/// # Errors
/// [`Malformed::Ethernet`] for a frame of less than 14 bytes, [`Malformed::VlanTag`] for one that ends in a tag,
/// [`Malformed::Truncated`] where `head` ends before that does.
#[inline]
pub fn parse_l2(head: &[u8], len: usize) -> Result<L2, Malformed> {
    l2(&Window::new(head, len))
}

#[inline(always)]
pub(crate) fn l2(window: &Window<'_>) -> Result<L2, Malformed> {
    let header: &EthernetHeader = window.get(0, Malformed::Ethernet)?;
    let ethertype = EtherType(header.ethertype.get());
    // Each field is written once, where the result lies: copies of copies would cost more than all the rest.
    let (tags, ethertype) = if ethertype.is_vlan() {
        tags(window, ethertype)?
    } else {
        (Tags::NONE, ethertype)
    };
    Ok(L2 {
        macs: header.macs,
        tags,
        ethertype,
    })
}

#[inline]
pub(crate) fn tags(
    window: &Window<'_>,
    mut ethertype: EtherType,
) -> Result<(Tags, EtherType), Malformed> {
    let mut tags = Tags::NONE;
    for index in 0..tags.tags.len() {
        if !ethertype.is_vlan() {
            break;
        }
        let at = EthernetHeader::LEN + tags.wire_len();
        let tag: &VlanTag = window.get(at, Malformed::VlanTag)?;
        tags.tags[index] = Tag {
            tpid: ethertype,
            tci: tag.tci.get(),
        };
        tags.count += 1;
        ethertype = EtherType(tag.ethertype.get());
    }
    Ok((tags, ethertype))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(after: &[u16]) -> Vec<u8> {
        let mut frame = Vec::from([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        frame.extend(after.iter().flat_map(|word| word.to_be_bytes()));
        frame
    }

    fn parsed(after: &[u16]) -> Result<L2, Malformed> {
        let frame = frame(after);
        parse_l2(&frame, frame.len())
    }

    #[test]
    fn tags_are_taken_off_and_two_at_most() {
        let plain = parsed(&[0x0800]).unwrap();
        assert_eq!((plain.header_len(), plain.ethertype), (14, EtherType::IPV4));
        assert_eq!(plain.dst(), Mac([2, 0, 0, 0, 0, 2]));
        assert_eq!(plain.src(), Mac([2, 0, 0, 0, 0, 1]));
        assert!(plain.tags.as_slice().is_empty());

        let one = parsed(&[0x8100, 0xe007, 0x86dd]).unwrap();
        assert_eq!((one.header_len(), one.ethertype), (18, EtherType::IPV6));
        assert_eq!(one.tags, Tags::one(Tag::customer(0xe007)));
        assert_eq!(one.tags.as_slice()[0].vlan(), 7);

        let two = parsed(&[0x88a8, 9, 0x8100, 7, 0x0806]).unwrap();
        assert_eq!((two.header_len(), two.ethertype), (22, EtherType::ARP));
        assert_eq!(two.tags, Tags::two(Tag::service(9), Tag::customer(7)));

        let three = parsed(&[0x8100, 9, 0x8100, 7, 0x8100, 5, 0x0800]).unwrap();
        assert_eq!((three.header_len(), three.ethertype), (22, EtherType::VLAN));
        // The third may even be cut: nobody looks at it.
        assert!(parsed(&[0x8100, 9, 0x8100, 7, 0x8100]).is_ok());
    }

    #[test]
    fn a_cut_frame_is_told_from_a_cut_head() {
        let whole = frame(&[0x88a8, 9, 0x8100, 7, 0x0800]);
        for len in 0..whole.len() {
            let cut = &whole[..len];
            let end = parse_l2(cut, len).unwrap_err();
            let wanted = if len < 14 {
                Malformed::Ethernet
            } else {
                Malformed::VlanTag
            };
            assert_eq!(end, wanted, "{len}");
            assert_eq!(
                parse_l2(cut, whole.len()),
                Err(Malformed::Truncated),
                "{len}"
            );
            // What the head has beyond the frame does not count.
            assert_eq!(parse_l2(&whole, len), Err(wanted), "{len}");
        }
    }
}
