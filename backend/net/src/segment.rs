//! What the next hop cannot do is done here: checksums are completed, and frames that stand for several are cut.
//!
//! Unsafe, because segments are lent what the whole frame was lent.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr};

use bluff_memory::IoVec;
use bluff_packet::IpProto;
use bluff_packet::checksum::{Sum, fill_ipv4_header};

use crate::{Batch, Csum, Frame, Gso, GsoKind, HEAD, Lent, Offload};

/// Bytes of lent memory that are summed at a time: copied first, as they can change.
const PORTION: usize = 2048;
/// TCP's flags in the 14th byte of its header (RFC 9293 §3.1).
const FIN: u8 = 1;
const PSH: u8 = 1 << 3;
const CWR: u8 = 1 << 7;

impl Batch {
    /// The sum of frame `i` from its byte `start` to its end.
    fn sum_from(&self, i: usize, start: usize) -> Sum {
        let head = self.frames()[i].head();
        let mut sum = Sum::new();
        sum.add(&head[start..]);
        let mut portion = [0; PORTION];
        for piece in self.tail(i) {
            let mut cursor = Cursor::new(std::slice::from_ref(piece));
            loop {
                let n = cursor.copy(&mut portion);
                if n == 0 {
                    break;
                }
                sum.add(&portion[..n]);
            }
        }
        sum
    }

    /// Cuts frame `i`, which has a [`Gso`], into the frames that it stands for. They are given in `out`, as many at a time as it holds, and
    /// are lent what this batch is lent. Their checksums are left to be completed.
    ///
    /// # Panics
    /// Where the headers that [`Gso`] names do not lie in the head, in their order.
    pub fn segment(&self, i: usize, out: &mut Batch, mut give: impl FnMut(Lent<'_>)) {
        let frame = &self.frames()[i];
        let gso = frame.offload.gso.expect("it stands for several");
        let (headers, size) = (usize::from(gso.headers), usize::from(gso.size));
        let count = gso.segments(frame.len());
        let (first, rest) = frame.head().split_at(headers);
        // What lies in the head goes first, and is only read.
        let rest = [IoVec::new(rest.as_ptr().cast_mut(), rest.len())];
        let (mut head, mut tail) = (Cursor::new(&rest), Cursor::new(self.tail(i)));
        let mut left = frame.len() - headers;
        out.clear();
        for k in 0..count {
            if out.is_full() {
                give(out.lent());
                out.clear();
            }
            let payload = size.min(left);
            left -= payload;
            let part = payload.min(HEAD.saturating_sub(headers));
            let segment = out.push_with(0, |room| {
                room[..headers].copy_from_slice(first);
                let to = &mut room[headers..headers + part];
                let n = head.copy(to);
                headers + n + tail.copy(&mut to[n..])
            });
            let segment = segment.expect("it has headers");
            segment.hash = frame.hash;
            write_headers(segment, &gso, k, count, payload);
            let mut rest = payload - part;
            while let Some(piece) = head.next(rest).or_else(|| tail.next(rest)) {
                rest -= piece.len();
                // SAFETY: a part of what this batch was lent, or of its own head, which is borrowed while `out` is used.
                unsafe { out.lend(&[piece]) };
            }
        }
        give(out.lent());
        out.clear();
    }
}

impl Lent<'_> {
    /// Completes the checksum of frame `i`, where that is left to be done. One that is to be cut first is left alone.
    ///
    /// # Panics
    /// Where the place of the checksum is not in the head: who says [`Csum::Partial`] has seen to that.
    pub fn complete_checksum(&mut self, i: usize) {
        let offload = &self.frames()[i].offload;
        let (None, Csum::Partial { start, offset }) = (offload.gso, offload.csum) else {
            return;
        };
        let sum = self.sum_from(i, usize::from(start));
        let at = usize::from(start) + usize::from(offset);
        let frame = &mut self.batch_mut().frames_mut()[i];
        // 0 would say of UDP that there is none; for the others both zeros are the same (RFC 768, RFC 1071).
        frame.head_mut()[at..at + 2].copy_from_slice(&sum.finish_udp().to_be_bytes());
        frame.offload.csum = Csum::Valid;
    }
}

/// Goes through pieces once, from the first byte to the last.
struct Cursor<'a> {
    pieces: &'a [IoVec],
    /// How much of the first piece is done.
    at: usize,
}

impl<'a> Cursor<'a> {
    /// What the pieces name stays readable as long as the cursor is used: they are what a batch was lent, or borrowed.
    fn new(pieces: &'a [IoVec]) -> Self {
        Self { pieces, at: 0 }
    }

    /// The next piece, of at most `len` bytes; `None` at the end, or where `len` is 0.
    fn next(&mut self, len: usize) -> Option<IoVec> {
        while let Some(piece) = self.pieces.first() {
            if self.at < piece.len() {
                if len == 0 {
                    return None;
                }
                let mut part = *piece;
                part.advance(self.at);
                part.truncate(len);
                self.at += part.len();
                return Some(part);
            }
            (self.pieces, self.at) = (&self.pieces[1..], 0);
        }
        None
    }

    /// Copies the next bytes, as far as both reach; says how many.
    fn copy(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(part) = self.next(to.len() - done) {
            // SAFETY: readable (see `new`), and `to` is borrowed, so they do not overlap; it has so many bytes left.
            unsafe {
                std::ptr::copy_nonoverlapping(part.ptr(), to[done..].as_mut_ptr(), part.len());
            }
            done += part.len();
        }
        done
    }
}

/// Makes headers of the whole frame those of its segment `k`, with so many bytes of payload.
fn write_headers(frame: &mut Frame, gso: &Gso, k: usize, count: usize, payload: usize) {
    let (network, transport) = (usize::from(gso.network), usize::from(gso.transport));
    let headers = usize::from(gso.headers);
    let head = frame.head_mut();
    // Of a frame whose IP packet fits into its lengths, so do the segments'.
    let ip_len = headers - network + payload;
    let len = (headers - transport + payload) as u16;
    let proto = match gso.kind {
        GsoKind::Tcp4 | GsoKind::Tcp6 => IpProto::TCP,
        GsoKind::Udp => IpProto::UDP,
    };
    let ip = &mut head[network..transport];
    let pseudo = match ip[0] >> 4 {
        4 => {
            ip[2..4].copy_from_slice(&(ip_len as u16).to_be_bytes());
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(k as u16);
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            fill_ipv4_header(ip);
            let address =
                |at: usize| Ipv4Addr::from(*ip[at..].first_chunk::<4>().expect("a whole header"));
            Sum::pseudo_v4(address(12), address(16), proto, len)
        }
        _ => {
            ip[4..6].copy_from_slice(&((ip_len - 40) as u16).to_be_bytes());
            let address =
                |at: usize| Ipv6Addr::from(*ip[at..].first_chunk::<16>().expect("a whole header"));
            Sum::pseudo_v6(address(8), address(24), proto, u32::from(len))
        }
    };
    let header = &mut head[transport..headers];
    let offset = match proto {
        IpProto::TCP => {
            let number = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            // Modulo 2^32 (RFC 9293 §3.4).
            let number = number.wrapping_add((k * usize::from(gso.size)) as u32);
            header[4..8].copy_from_slice(&number.to_be_bytes());
            if k + 1 < count {
                header[13] &= !(FIN | PSH);
            }
            if k > 0 {
                // The sender has reduced its window once (RFC 3168 §6.1.2).
                header[13] &= !CWR;
            }
            16
        }
        _ => {
            header[4..6].copy_from_slice(&len.to_be_bytes());
            6
        }
    };
    header[offset..offset + 2].copy_from_slice(&pseudo.partial().to_be_bytes());
    frame.offload = Offload {
        csum: Csum::Partial {
            start: gso.transport,
            offset: offset as u16,
        },
        gso: None,
    };
}

#[cfg(test)]
mod tests {
    use bluff_packet::checksum::{Verdict, verify};
    use bluff_packet::{L3, L4, parse};
    use proptest::prelude::*;

    use super::*;
    use crate::MAX_FRAME;

    /// A whole frame: Ethernet, perhaps a tag, IP, and TCP with options or UDP.
    fn frame(v6: bool, tcp: bool, tagged: bool, options: usize, payload: usize) -> (Vec<u8>, Gso) {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if tagged {
            bytes.extend([0x81, 0, 0, 7]);
        }
        bytes.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        let network = bytes.len();
        let transport_len = if tcp { 20 + 4 * options } else { 8 } + payload;
        let proto = if tcp { 6 } else { 17 };
        if v6 {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((transport_len as u16).to_be_bytes());
            bytes.extend([proto, 64]);
            bytes.extend([0xfd; 32]);
        } else {
            bytes.extend([0x45, 0]);
            bytes.extend((transport_len as u16 + 20).to_be_bytes());
            bytes.extend([
                0xff, 0xfe, 0x40, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
        }
        let transport = bytes.len();
        if tcp {
            bytes.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9]);
            bytes.extend([
                (5 + options as u8) << 4,
                CWR | FIN | PSH | 0x10,
                1,
                0,
                0,
                0,
                0,
                0,
            ]);
            bytes.extend(vec![1; 4 * options]);
        } else {
            bytes.extend([0x12, 0x34, 0, 53]);
            bytes.extend((transport_len as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        let headers = bytes.len();
        bytes.extend((0..payload).map(|i| (i * 7 + i / 256) as u8));
        let gso = Gso {
            kind: match (tcp, v6) {
                (true, false) => GsoKind::Tcp4,
                (true, true) => GsoKind::Tcp6,
                (false, _) => GsoKind::Udp,
            },
            ecn: false,
            size: 1,
            network: network as u16,
            transport: transport as u16,
            headers: headers as u16,
        };
        (bytes, gso)
    }

    fn batch(bytes: &[u8]) -> Batch {
        let mut batch = Batch::default();
        let head = bytes.len().min(HEAD);
        batch.push(&bytes[..head]);
        let (a, b) = bytes[head..].split_at((bytes.len() - head) / 2);
        let name = |s: &[u8]| IoVec::new(s.as_ptr().cast_mut(), s.len());
        // SAFETY: the callers keep the bytes.
        unsafe { batch.lend(&[name(a), name(b)]) };
        batch
    }

    fn whole(batch: &Batch, i: usize) -> Vec<u8> {
        let mut bytes = vec![0; batch.frames()[i].len()];
        assert_eq!(batch.copy_to(i, 0, &mut bytes), bytes.len());
        bytes
    }

    proptest! {
        /// What is cut is what a sender would have sent frame by frame.
        #[test]
        fn segments_carry_all_of_it_once(
            (v6, tcp, tagged) in any::<(bool, bool, bool)>(),
            options in 0usize..=10,
            payload in prop_oneof![0usize..3000, 0usize..65_400],
            size in prop_oneof![1usize..300, 1usize..9000],
            gap in any::<bool>(),
        ) {
            let (bytes, mut gso) = frame(v6, tcp, tagged, options, payload);
            gso.size = size as u16;
            prop_assert!(bytes.len() <= MAX_FRAME);
            let mut from = batch(&bytes);
            if gap {
                // A head that has grown.
                from.frames_mut()[0].insert(12, &[0x81, 0, 0, 7]);
                let place = |at: &mut u16| *at += 4;
                place(&mut gso.network);
                place(&mut gso.transport);
                place(&mut gso.headers);
            }
            let bytes = whole(&from, 0);
            from.frames_mut()[0].offload.gso = Some(gso);
            from.frames_mut()[0].hash = 77;
            let (mut out, mut all, mut k) = (Batch::default(), Vec::new(), 0usize);
            let count = gso.segments(bytes.len());
            from.segment(0, &mut out, |mut out| {
                for i in 0..out.frames().len() {
                    assert!(out.frames()[i].hash == 77 && out.frames()[i].offload.gso.is_none());
                    out.complete_checksum(i);
                    assert_eq!(out.frames()[i].offload.csum, Csum::Valid);
                    let one = whole(&out, i);
                    let parsed = parse(&one[..one.len().min(HEAD)], one.len()).unwrap();
                    assert_eq!(parsed.l3_end(), Some(one.len()), "its lengths");
                    assert_eq!(verify(&parsed, [&one[..]]), Verdict::Good);
                    if let L3::Ipv4(_) = parsed.l3 {
                        let good = bluff_packet::checksum::ipv4_header_is_good(&parsed, &one);
                        assert_eq!(good, Some(true));
                        let id = u16::from_be_bytes([one[gso.network as usize + 4], one[gso.network as usize + 5]]);
                        assert_eq!(id, 0xfffeu16.wrapping_add(k as u16));
                    }
                    match parsed.l4 {
                        L4::Tcp(tcp) => {
                            let at = gso.transport as usize + 4;
                            let number = u32::from_be_bytes(*one[at..].first_chunk().unwrap());
                            assert_eq!(number, 0xffff_fff0u32.wrapping_add((k * size) as u32));
                            let last = k + 1 == count;
                            assert_eq!(tcp.flags & (FIN | PSH), if last { FIN | PSH } else { 0 });
                            assert_eq!(tcp.flags & CWR != 0, k == 0);
                        }
                        L4::Udp(udp) => assert_eq!(usize::from(udp.len), one.len() - gso.transport as usize),
                        other => panic!("{other:?}"),
                    }
                    let body = &one[gso.headers as usize..];
                    assert!(body.len() == size || k + 1 == count);
                    all.extend_from_slice(body);
                    k += 1;
                }
            });
            prop_assert_eq!(k, count);
            prop_assert!(all == bytes[gso.headers as usize..]);
        }

        /// A checksum that was begun as virtio has it is completed.
        #[test]
        fn checksums_are_completed(
            (v6, tcp, tagged) in any::<(bool, bool, bool)>(),
            options in 0usize..=10,
            payload in 0usize..9000,
        ) {
            let (mut bytes, gso) = frame(v6, tcp, tagged, options, payload);
            let at = usize::from(gso.transport);
            let len = (bytes.len() - at) as u16;
            let offset = if tcp { 16 } else { 6 };
            let pseudo = match v6 {
                true => Sum::pseudo_v6([0xfd; 16].into(), [0xfd; 16].into(), if tcp { IpProto::TCP } else { IpProto::UDP }, len.into()),
                false => Sum::pseudo_v4([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), if tcp { IpProto::TCP } else { IpProto::UDP }, len),
            };
            bytes[at + offset..at + offset + 2].copy_from_slice(&pseudo.partial().to_be_bytes());
            let mut batch = batch(&bytes);
            batch.frames_mut()[0].offload.csum = Csum::Partial { start: gso.transport, offset: offset as u16 };
            batch.lent().complete_checksum(0);
            let one = whole(&batch, 0);
            let parsed = parse(&one[..one.len().min(HEAD)], one.len()).unwrap();
            prop_assert_eq!(verify(&parsed, [&one[..]]), Verdict::Good);
        }
    }
}
