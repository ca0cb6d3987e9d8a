//! VXLAN (RFC 7348) and Geneve (RFC 8926): from a UDP datagram's payload to the VNI and the inner frame.

use crate::spec::{
    EthernetHeader, GENEVE_CRITICAL, GENEVE_O, GeneveHeader, GeneveOption, VXLAN_I, VxlanHeader,
};
use crate::window::Window;
use crate::{EtherType, Malformed, Vni};

/// A VXLAN packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The network.
    pub vni: Vni,
    /// Where the inner frame begins, counted from the UDP payload. At least 14 bytes are there.
    pub inner: usize,
}

impl Vxlan {
    /// Reads the header of a datagram. `head` begins its UDP payload, `len` is the payload's whole length in bytes: the UDP length less
    /// 8, not what the frame has left.
    ///
    /// Flags and fields that RFC 7348 §5 reserves are ignored, as it says; VXLAN-GPE is not told apart by them.
    ///
    /// # Errors
    /// [`Malformed::TunnelHeader`], [`Malformed::VxlanFlags`], [`Malformed::InnerFrame`], [`Malformed::Truncated`].
    #[inline]
    pub fn parse(head: &[u8], len: usize) -> Result<Self, Malformed> {
        let header: &VxlanHeader = Window::new(head, len).get(0, Malformed::TunnelHeader)?;
        if header.flags & VXLAN_I == 0 {
            return Err(Malformed::VxlanFlags);
        }
        Ok(Self {
            vni: Vni::of_word(header.vni.get()),
            inner: inner(VxlanHeader::LEN, len)?,
        })
    }
}

/// A Geneve packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geneve {
    /// The network.
    pub vni: Vni,
    /// A control packet: what is inside is for the tunnel's end, and must not reach a tenant (RFC 8926 §3.4).
    pub control: bool,
    /// Where the inner frame begins, counted from the UDP payload. At least 14 bytes are there.
    pub inner: usize,
}

impl Geneve {
    /// Reads the header of a datagram and passes its options. `head` and `len` as in [`Vxlan::parse`].
    ///
    /// No option is known here, so a critical one means that the packet must be dropped, whatever the header's C bit says (RFC 8926 §3.5).
    /// Others are passed over when their lengths add up.
    ///
    /// # Errors
    /// [`Malformed::TunnelHeader`], [`Malformed::GeneveVersion`], [`Malformed::GeneveProtocol`], [`Malformed::GeneveOptions`],
    /// [`Malformed::GeneveCritical`], [`Malformed::InnerFrame`], [`Malformed::Truncated`].
    #[inline]
    pub fn parse(head: &[u8], len: usize) -> Result<Self, Malformed> {
        let window = Window::new(head, len);
        let header: &GeneveHeader = window.get(0, Malformed::TunnelHeader)?;
        if header.version_len >> 6 != 0 {
            return Err(Malformed::GeneveVersion);
        }
        if EtherType(header.protocol.get()) != EtherType::ETHERNET {
            return Err(Malformed::GeneveProtocol);
        }
        let options = usize::from(header.version_len & 0x3f) * 4;
        if options > 0 {
            let bytes = window.bytes(GeneveHeader::LEN, options, Malformed::GeneveOptions)?;
            for option in Options(bytes) {
                if option?.is_critical() {
                    return Err(Malformed::GeneveCritical);
                }
            }
        }
        Ok(Self {
            vni: Vni::of_word(header.vni.get()),
            control: header.flags & GENEVE_O != 0,
            inner: inner(GeneveHeader::LEN + options, len)?,
        })
    }
}

#[inline(always)]
fn inner(at: usize, len: usize) -> Result<usize, Malformed> {
    if len
        .checked_sub(at)
        .is_none_or(|left| left < EthernetHeader::LEN)
    {
        return Err(Malformed::InnerFrame);
    }
    Ok(at)
}

/// One Geneve option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneveOptionRef<'a> {
    /// Who defines the type.
    pub class: u16,
    /// The type; its highest bit says that it is critical.
    pub kind: u8,
    /// Data: 0 to 124 bytes.
    pub data: &'a [u8],
}

impl GeneveOptionRef<'_> {
    /// Whether a receiver that does not know it must drop the packet.
    #[inline]
    pub const fn is_critical(&self) -> bool {
        self.kind & GENEVE_CRITICAL != 0
    }
}

/// Walks Geneve options, which have to fill their bytes exactly (RFC 8926 §3.5). Ends after the first error.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a>(&'a [u8]);

impl<'a> Options<'a> {
    /// All options of a header, without the header.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<GeneveOptionRef<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let all = core::mem::take(&mut self.0);
        if all.is_empty() {
            return None;
        }
        let Ok((header, rest)) = <GeneveOption as zerocopy::FromBytes>::ref_from_prefix(all) else {
            return Some(Err(Malformed::GeneveOptions));
        };
        let len = usize::from(header.len & 0x1f) * 4;
        let Some((data, rest)) = rest.split_at_checked(len) else {
            return Some(Err(Malformed::GeneveOptions));
        };
        self.0 = rest;
        Some(Ok(GeneveOptionRef {
            class: header.class.get(),
            kind: header.kind,
            data,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vxlan_asks_for_the_flag_and_ignores_what_is_reserved() {
        let mut packet = [0u8; 22];
        assert_eq!(Vxlan::parse(&packet, 22), Err(Malformed::VxlanFlags));
        packet[..8].copy_from_slice(&[0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
        let wanted = Vxlan {
            vni: Vni::new(0x12_3456).unwrap(),
            inner: 8,
        };
        assert_eq!(Vxlan::parse(&packet, 22), Ok(wanted));
        packet[..8].copy_from_slice(&[0xff, 1, 2, 3, 0x12, 0x34, 0x56, 0xff]);
        assert_eq!(Vxlan::parse(&packet, 22), Ok(wanted));
        packet[0] = 0xf7;
        assert_eq!(Vxlan::parse(&packet, 22), Err(Malformed::VxlanFlags));
    }

    #[test]
    fn geneve_tells_control_packets_and_refuses_other_versions_and_contents() {
        let mut packet = [0u8; 22];
        packet[..8].copy_from_slice(&[0, 0x80, 0x65, 0x58, 0, 0, 7, 0xff]);
        let geneve = Geneve::parse(&packet, 22).unwrap();
        assert_eq!(
            (geneve.vni.get(), geneve.control, geneve.inner),
            (7, true, 8)
        );
        packet[1] = 0x3f;
        assert!(!Geneve::parse(&packet, 22).unwrap().control);
        packet[0] = 0x40;
        assert_eq!(Geneve::parse(&packet, 22), Err(Malformed::GeneveVersion));
        packet[0] = 0;
        packet[2..4].copy_from_slice(&[0x08, 0x00]);
        assert_eq!(Geneve::parse(&packet, 22), Err(Malformed::GeneveProtocol));
    }

    #[test]
    fn geneve_passes_options_over_but_not_critical_ones() {
        // Two options: one without data, one with eight bytes.
        let mut packet = [0u8; 8 + 16 + 14];
        packet[..8].copy_from_slice(&[4, 0, 0x65, 0x58, 0, 0, 7, 0]);
        packet[8..12].copy_from_slice(&[0x01, 0x02, 0x7f, 0xe0]);
        packet[12..16].copy_from_slice(&[0x01, 0x03, 0x05, 0x02]);
        let len = packet.len();
        assert_eq!(Geneve::parse(&packet, len).unwrap().inner, 24);
        let mut options = Options::new(&packet[8..24]);
        let first = options.next().unwrap().unwrap();
        assert_eq!(
            (first.class, first.kind, first.data.len()),
            (0x0102, 0x7f, 0)
        );
        assert_eq!(options.next().unwrap().unwrap().data.len(), 8);
        assert_eq!(options.next(), None);
        // Critical without the header's C bit is critical all the same.
        packet[14] |= 0x80;
        assert_eq!(Geneve::parse(&packet, len), Err(Malformed::GeneveCritical));
    }
}
