//! What fuzz targets and property tests share: bytes as frames, judged by etherparse and by what must hold of any frame.

mod differential;

pub use differential::compare;

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::build::Writer;
use crate::checksum::{self, Verdict};
use crate::flow::{FlowHasher, FlowKey};
use crate::toeplitz::{HashTypes, Toeplitz};
use crate::tunnel::{Geneve, Options, Vxlan};
use crate::{Frame, L3, L4, Mac, Malformed, icmp, ndp, parse, parse_l2};

/// The first bytes of a frame, as virtio-net gives them.
const HEAD: usize = 256;

/// Bytes as a frame. The first one says how much of it is at hand.
pub fn packet_parse(data: &[u8]) {
    let Some((&at_hand, frame)) = data.split_first() else {
        return;
    };
    compare(frame);
    part_of_a_frame(frame, usize::from(at_hand));
    every_use(frame);
}

/// Bytes as a tunnel's datagram, without its UDP header. The first one says how much of it is at hand.
pub fn packet_tunnel(data: &[u8]) {
    let Some((&at_hand, payload)) = data.split_first() else {
        return;
    };
    let len = payload.len();
    let head = &payload[..len.min(usize::from(at_hand) + 1)];
    let vxlan = Vxlan::parse(payload, len);
    agree(vxlan, Vxlan::parse(head, len));
    let geneve = Geneve::parse(payload, len);
    agree(geneve, Geneve::parse(head, len));

    let mut room = [0; 8 + 252];
    if let Ok(vxlan) = vxlan {
        assert!(vxlan.inner == 8 && vxlan.inner + 14 <= len);
        let mut writer = Writer::new(&mut room);
        writer.vxlan(vxlan.vni).expect("room for a VXLAN header");
        let built = writer.written();
        assert_eq!(built[4..7], payload[4..7], "the VNI");
        inner(&payload[vxlan.inner..]);
    }
    if let Ok(geneve) = geneve {
        assert!(geneve.inner + 14 <= len);
        let options = &payload[8..geneve.inner];
        let mut writer = Writer::new(&mut room);
        writer
            .geneve(geneve.vni, options, geneve.control)
            .expect("options that were good");
        let built = writer.written();
        // All but what is reserved. No critical option, so no C bit, whatever the sender set.
        assert_eq!(built[0], payload[0]);
        assert_eq!(built[1], payload[1] & 0x80);
        assert_eq!(built[2..7], payload[2..7]);
        assert_eq!(built[8..], *options);
        let lens = Options::new(options).map(|option| 4 + option.expect("walked").data.len());
        assert_eq!(lens.sum::<usize>(), options.len());
        inner(&payload[geneve.inner..]);
    }
}

fn inner(frame: &[u8]) {
    let at_hand = &frame[..frame.len().min(HEAD)];
    // 14 bytes were promised; a tag may still be cut.
    assert_ne!(parse(at_hand, frame.len()).err(), Some(Malformed::Ethernet));
    every_use(frame);
}

/// With less at hand, either the same is said, or that it cannot be.
fn agree<T: PartialEq + core::fmt::Debug>(whole: Result<T, Malformed>, part: Result<T, Malformed>) {
    if part != Err(Malformed::Truncated) {
        assert_eq!(part, whole);
    }
    assert_ne!(whole.err(), Some(Malformed::Truncated), "all was at hand");
}

fn part_of_a_frame(frame: &[u8], at_hand: usize) {
    let len = frame.len();
    let head = &frame[..len.min(at_hand)];
    agree(parse_l2(frame, len), parse_l2(head, len));
    let (whole, part) = match (parse(frame, len), parse(head, len)) {
        (Ok(whole), Ok(part)) => (whole, part),
        (whole, part) => return agree(whole, part),
    };
    assert_ne!(whole.l4, L4::Malformed(Malformed::Truncated));
    assert_ne!(whole.l3, L3::Malformed(Malformed::Truncated));
    assert_eq!(whole.l2, part.l2);
    if part.l3 == L3::Malformed(Malformed::Truncated) {
        return;
    }
    if part.l4 == L4::Malformed(Malformed::Truncated) {
        // The fixed header of IP was there, so the packet's end was too.
        assert_eq!(part.l3_end(), whole.l3_end());
        return;
    }
    match (whole.l3, part.l3) {
        // A home address that is cut off is not found; nothing else may differ.
        (L3::Ipv6(mut a), L3::Ipv6(mut b)) => {
            (a.home, b.home) = (0, 0);
            assert_eq!(a, b);
        }
        (a, b) => assert_eq!(a, b),
    }
    assert_eq!(whole.l4, part.l4);
}

/// Everything that can be asked of a frame.
fn every_use(bytes: &[u8]) {
    let head = &bytes[..bytes.len().min(HEAD)];
    let Ok(frame) = parse(head, bytes.len()) else {
        return;
    };
    if let (Some(l4), Some(end)) = (frame.l4_offset(), frame.l3_end()) {
        assert!(frame.l3_offset() < l4 && l4 <= end && end <= bytes.len());
    }
    let _ = ndp::parse(&frame, head);
    let hasher = FlowHasher::new(&[0x5a; FlowHasher::KEY_LEN]);
    let key = FlowKey::new(&frame);
    assert!(hasher.source_port(&key) >= FlowHasher::FIRST_PORT);
    let _ = Toeplitz::new(&[0x6d; 40]).frame(&frame, head, HashTypes::ALL);
    padding_changes_nothing(bytes, &frame);
    checksums(bytes, &frame);
    answers(bytes, &frame);
}

fn padding_changes_nothing(bytes: &[u8], frame: &Frame) {
    if frame.l3_end().is_none() || bytes.len() > 2048 {
        return;
    }
    let mut padded = [0x5a; 2048 + 300];
    padded[..bytes.len()].copy_from_slice(bytes);
    let head = &padded[..HEAD];
    let again = parse(head, bytes.len() + 300).expect("it was a frame before");
    if bytes.len() <= HEAD {
        assert_eq!(again, *frame);
    }
    assert_eq!(FlowKey::new(&again), FlowKey::new(frame));
}

fn checksums(bytes: &[u8], frame: &Frame) {
    let verdict = checksum::verify(frame, [bytes]);
    let (a, b) = bytes.split_at(bytes.len() / 3);
    assert_eq!(checksum::verify(frame, [a, &[], b]), verdict);
    let mut copy = [0; 2048];
    let Some(copy) = copy.get_mut(..bytes.len()) else {
        return;
    };
    copy.copy_from_slice(bytes);
    if !checksum::fill(frame, copy) {
        assert_eq!(verdict, Verdict::Unknown);
        return;
    }
    let head = &copy[..copy.len().min(HEAD)];
    let filled = parse(head, copy.len()).expect("it was a frame before");
    assert_eq!(checksum::verify(&filled, [&*copy]), Verdict::Good);
}

fn answers(bytes: &[u8], frame: &Frame) {
    let head = &bytes[..bytes.len().min(HEAD)];
    let mac = Mac([2, 0, 0, 0, 0, 0xfe]);
    let mut room = [0; 1400];
    let v4 = icmp::fragmentation_needed(
        &mut room,
        frame,
        head,
        mac,
        Ipv4Addr::new(10, 0, 0, 1),
        1400,
    );
    let len = match (v4, &frame.l3) {
        (Ok(len), _) => len,
        (Err(_), L3::Ipv6(_)) => {
            let from = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
            let Ok(len) = icmp::packet_too_big(&mut room, frame, head, mac, from, 1400) else {
                return;
            };
            len
        }
        _ => return,
    };
    assert!(len <= frame.l3_offset() + icmp::MAX_V6);
    let answer = parse(&room[..len], len).expect("we built it");
    assert_eq!(
        (answer.l2.dst(), answer.l2.tags),
        (frame.l2.src(), frame.l2.tags)
    );
    assert_eq!(checksum::verify(&answer, [&room[..len]]), Verdict::Good);
    assert!(icmp::may_answer(&answer).is_err(), "an answer to an answer");
}
