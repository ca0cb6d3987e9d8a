//! Congestion marks of the underlay, for who is inside of the tunnel (RFC 6040 §4.2, figure 4).
//!
//! On the way out the inner mark is copied to the outer header (§4.1, normal mode). The tenant's priorities (DSCP) and hops stay its own, both ways: a tunnel is one hop (RFC 2983 §3, the
//! pipe model).

use bluff_net::{Cause, Frame};
use bluff_packet::{L3, checksum, parse};

/// Not capable of marks.
const NOT_ECT: u8 = 0;
/// Capable, and marked as L4S marks it (RFC 9331).
const ECT_1: u8 = 1;
/// Capable.
const ECT_0: u8 = 2;
/// There was congestion.
const CE: u8 = 3;
const MARKS: u8 = 3;

/// What is made of the two marks; `None`: the frame is dropped.
fn combined(outer: u8, inner: u8) -> Option<u8> {
    match (outer & MARKS, inner & MARKS) {
        // There was congestion, and this is the only way to tell who would not understand a mark.
        (CE, NOT_ECT) => None,
        (CE, _) => Some(CE),
        (ECT_1, ECT_0) => Some(ECT_1),
        (_, inner) => Some(inner),
    }
}

/// Brings the mark of the outer header, its traffic class being `outer`, to the inner frame. Frames without IP have none.
///
/// # Errors
/// [`Cause::Congested`] where it cannot be told otherwise that there was congestion.
#[inline]
pub(crate) fn carry_over(frame: &mut Frame, outer: u8) -> Result<(), Cause> {
    match outer & MARKS {
        CE | ECT_1 => mark(frame, outer),
        _ => Ok(()),
    }
}

#[cold]
fn mark(frame: &mut Frame, outer: u8) -> Result<(), Cause> {
    let Ok(packet) = parse(frame.head(), frame.len()) else {
        // It is dropped for that, elsewhere.
        return Ok(());
    };
    let at = packet.l3_offset();
    let (before, shift) = match packet.l3 {
        L3::Ipv4(ip) => (ip.tos, 0),
        // The traffic class lies across the first two bytes (RFC 8200 §3).
        L3::Ipv6(ip) => (ip.traffic_class, 4),
        _ => return Ok(()),
    };
    let after = combined(outer, before).ok_or(Cause::Congested)?;
    let changed = (before ^ after) & MARKS;
    if changed == 0 {
        return Ok(());
    }
    let head = frame.head_mut();
    let word = |head: &[u8], at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let old = word(head, at);
    head[at + 1] ^= changed << shift;
    if shift == 0 {
        // The header was parsed, so it is all there.
        let sum = checksum::update(word(head, at + 10), old, word(head, at));
        head[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
    }
    frame.packet = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use bluff_net::Batch;
    use bluff_packet::checksum::ipv4_header_is_good;

    use super::*;

    /// By outer and inner mark, in the order of their numbers: RFC 6040 figure 4.
    const WANTED: [[Option<u8>; 4]; 4] = [
        [Some(0), Some(1), Some(2), Some(3)],
        [Some(0), Some(1), Some(1), Some(3)],
        [Some(0), Some(1), Some(2), Some(3)],
        [None, Some(3), Some(3), Some(3)],
    ];

    fn frame(v6: bool, tagged: bool, class: u8) -> Vec<u8> {
        let mut frame = vec![2; 12];
        if tagged {
            frame.extend([0x81, 0, 0, 7]);
        }
        if v6 {
            frame.extend([
                0x86,
                0xdd,
                0x60 | class >> 4,
                class << 4 | 0xa,
                0xbc,
                0xde,
                0,
                0,
                59,
                9,
            ]);
            frame.extend([0xfd; 32]);
        } else {
            frame.extend([8, 0]);
            let at = frame.len();
            frame.extend([
                0x45, class, 0, 20, 0, 9, 0x40, 0, 64, 99, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
            checksum::fill_ipv4_header(&mut frame[at..]);
        }
        frame
    }

    #[test]
    fn marks_are_combined_as_the_figure_says() {
        for outer in 0..4u8 {
            for inner in 0..4u8 {
                for (v6, tagged) in [(false, false), (false, true), (true, false), (true, true)] {
                    // Priorities stay, whatever the outer ones are.
                    let mut batch = Batch::default();
                    batch.push(&frame(v6, tagged, 0xb8 | inner));
                    let result = carry_over(&mut batch.frames_mut()[0], 0x28 | outer);
                    let wanted = WANTED[usize::from(outer)][usize::from(inner)];
                    assert_eq!(result.is_ok(), wanted.is_some(), "{outer} {inner}");
                    let Some(wanted) = wanted else { continue };
                    let head = batch.frames()[0].head();
                    assert_eq!(head, frame(v6, tagged, 0xb8 | wanted));
                    let packet = parse(head, head.len()).unwrap();
                    assert_ne!(ipv4_header_is_good(&packet, head), Some(false));
                }
            }
        }
    }

    #[test]
    fn frames_without_a_mark_are_left_alone() {
        let good = frame(false, false, 0);
        let mut no_ip = good.clone();
        no_ip[12] = 9;
        for bytes in [no_ip, good[..20].to_vec(), good[..13].to_vec(), vec![1]] {
            let mut batch = Batch::default();
            batch.push(&bytes);
            assert_eq!(carry_over(&mut batch.frames_mut()[0], CE), Ok(()));
            assert_eq!(batch.frames()[0].head(), bytes);
        }
    }
}
