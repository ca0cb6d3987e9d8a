//! Captures, taken apart by the rules of the format alone. The card's tests have them read by tcpdump.

use std::time::Duration;

use bluff_memory::IoVec;

use super::pcapng::{LinkType, begin, end};
use super::*;
use crate::{Csum, Gso, GsoKind, HEAD, all_of};

fn options() -> CaptureOptions {
    CaptureOptions {
        snaplen: 1 << 18,
        only: None,
        count: u64::MAX,
        room: 1 << 20,
    }
}

fn batch_of(frames: &[&[u8]]) -> Batch {
    let mut batch = Batch::default();
    for frame in frames {
        batch.push(frame);
    }
    batch
}

/// A block: its kind and what stands in it. The file is taken apart by the rules alone.
fn blocks(mut file: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let mut blocks = Vec::new();
    while !file.is_empty() {
        let len = word(&file[4..]) as usize;
        assert!(len >= 12 && len.is_multiple_of(4));
        assert_eq!(word(&file[len - 4..]) as usize, len, "at both ends");
        blocks.push((word(file), file[8..len - 4].to_vec()));
        file = &file[len..];
    }
    blocks
}

/// Options: their codes and values.
fn options_of(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let half = |bytes: &[u8]| u16::from_le_bytes(bytes[..2].try_into().unwrap());
    let mut options = Vec::new();
    loop {
        let (code, len) = (half(bytes), usize::from(half(&bytes[2..])));
        if code == 0 {
            assert_eq!((len, bytes.len()), (0, 4), "the end is the end");
            return options;
        }
        options.push((code, bytes[4..4 + len].to_vec()));
        bytes = &bytes[4 + len.next_multiple_of(4)..];
    }
}

/// Flags and bytes of each packet.
fn packets(blocks: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let packet = |(kind, body): (u32, Vec<u8>)| {
        assert_eq!(kind, 6);
        let captured = u32::from_le_bytes(body[12..16].try_into().unwrap()) as usize;
        let options = options_of(&body[20 + captured.next_multiple_of(4)..]);
        assert_eq!(options[0].0, 2);
        let flags = u32::from_le_bytes(options[0].1[..].try_into().unwrap());
        (flags, body[20..20 + captured].to_vec())
    };
    self::blocks(blocks).into_iter().map(packet).collect()
}

fn taken(capture: &Capture) -> Vec<u8> {
    let mut blocks = Vec::new();
    capture.take(&mut blocks);
    blocks
}

#[test]
fn a_file_says_what_was_captured() {
    let capture = Capture::new(options());
    let tap = Arc::new(Tap::default());
    assert!(!tap.is_on());
    let attached = tap.attach(capture.clone());
    assert!(tap.is_on());
    let start = capture.span().0;
    let now = capture.start.0 + Duration::from_nanos(1_234_567_891);
    let long: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
    let mut batch = batch_of(&[b"one frame of 20 byte", b"not seen", &long[..HEAD]]);
    let rest = IoVec::new(long[HEAD..].as_ptr().cast_mut(), long.len() - HEAD);
    #[expect(unsafe_code, reason = "a test lends the rest of its frame")]
    // SAFETY: `long` outlives the batch.
    unsafe {
        batch.lend(&[rest]);
    }
    let offload = &mut batch.frames_mut()[2].offload;
    offload.csum = Csum::Partial {
        start: 34,
        offset: 16,
    };
    offload.gso = Some(Gso {
        kind: GsoKind::Tcp4,
        ecn: false,
        size: 1000,
        network: 14,
        transport: 34,
        headers: 54,
    });
    tap.see(now, Way::Out, &batch, 0b101);
    batch = batch_of(&[b"back"]);
    batch.frames_mut()[0].offload.csum = Csum::Valid;
    tap.see(now, Way::In, &batch, 1);
    drop(attached);
    assert!(!tap.is_on());
    tap.see(now, Way::In, &batch, 1);

    let mut file = begin("a test", "net0", LinkType::Ethernet, 1 << 18);
    let packets_at = file.len();
    file.extend(taken(&capture));
    let seen = packets(&file[packets_at..]);
    file.extend(end(capture.span(), capture.captured()));
    assert_eq!(
        seen,
        [
            (2, b"one frame of 20 byte".to_vec()),
            (2 | 1 << 9 | 1 << 11, long.clone()),
            (1 | 1 << 10, b"back".to_vec()),
        ]
    );
    let all = blocks(&file);
    let kinds: Vec<_> = all.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [0x0a0d_0d0a, 1, 6, 6, 6, 5]);
    assert_eq!(
        all[0].1[..8],
        [0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0],
        "version 1.0"
    );
    assert_eq!(options_of(&all[0].1[16..]), [(4, b"a test".to_vec())]);
    assert_eq!(
        all[1].1[..8],
        [1, 0, 0, 0, 0, 0, 4, 0],
        "Ethernet, and the most bytes"
    );
    let options = [(2, b"net0".to_vec()), (9, vec![9])];
    assert_eq!(options_of(&all[1].1[8..]), options);
    // Nanoseconds, the upper half first.
    let word = |at: usize| u64::from(u32::from_le_bytes(all[2].1[at..at + 4].try_into().unwrap()));
    assert_eq!(word(4) << 32 | word(8), start + 1_234_567_891);
    assert_eq!((word(0), word(12), word(16)), (0, 20, 20));
}

#[test]
fn what_there_is_no_room_for_is_counted() {
    // A frame of 100 bytes takes 144: six of them.
    let room = 6 * 144 + 143;
    let capture = Capture::new(CaptureOptions { room, ..options() });
    let tap = Arc::new(Tap::default());
    let attached = tap.attach(capture.clone());
    let batch = batch_of(&[&[7; 100][..]; 8]);
    let now = Instant::now();
    tap.see(now, Way::In, &batch, all_of(&batch));
    tap.see(now, Way::In, &batch, all_of(&batch));
    assert_eq!(
        capture.captured(),
        Captured {
            kept: 6,
            missed: 10
        }
    );
    // Once it was read there is room again.
    let mut buffer = taken(&capture);
    assert_eq!(packets(&buffer).len(), 6);
    tap.see(now, Way::In, &batch, 1);
    capture.take(&mut buffer);
    assert_eq!(packets(&buffer).len(), 1);
    let statistics = end(capture.span(), capture.captured());
    let [(5, body)] = &blocks(&statistics)[..] else {
        panic!("one block of statistics")
    };
    let options = options_of(&body[12..]);
    let number = |code| {
        let (_, value) = options.iter().find(|(c, _)| *c == code).unwrap();
        u64::from_le_bytes(value[..].try_into().unwrap())
    };
    assert_eq!(
        (number(4), number(5)),
        (17, 10),
        "seen, and dropped of them"
    );
    drop(attached);
}

/// Somebody holds the buffer and does not run: frames are counted, and nobody waits for it.
#[test]
fn reactors_do_not_wait_for_each_other() {
    let capture = Capture::new(options());
    let tap = Arc::new(Tap::default());
    let _attached = tap.attach(capture.clone());
    let batch = batch_of(&[&b"frame"[..]; 3]);
    let held = capture.kept.lock().unwrap();
    tap.see(Instant::now(), Way::In, &batch, 0b11);
    drop(held);
    tap.see(Instant::now(), Way::In, &batch, 0b100);
    assert_eq!(capture.captured(), Captured { kept: 1, missed: 2 });
}

#[test]
fn what_is_not_wanted_is_not_kept() {
    let tap = Arc::new(Tap::default());
    let short = Capture::new(CaptureOptions {
        snaplen: 5,
        only: Some(Way::In),
        count: 3,
        ..options()
    });
    let attached = tap.attach(short.clone());
    let other = tap.attach(Capture::new(options()));
    let batch = batch_of(&[b"twelve bytes", b"two"]);
    let now = Instant::now();
    tap.see(now, Way::Out, &batch, 0b11);
    let mut outer = |_: &Frame, room: &mut [u8; HEADROOM]| {
        room[..3].copy_from_slice(b"out");
        3
    };
    tap.see_behind(now, Way::In, &batch, 0b11, &mut outer);
    assert!(!attached.is_over());
    tap.see(now, Way::In, &batch, 0b11);
    assert!(attached.is_over(), "three are enough");
    tap.see(now, Way::In, &batch, 0b11);
    let blocks = taken(&short);
    let bytes: Vec<_> = packets(&blocks).into_iter().map(|p| p.1).collect();
    assert_eq!(bytes, [&b"outtw"[..], b"outtw", b"twelv"]);
    let original = |(_, body): (u32, Vec<u8>)| body[16];
    let lens: Vec<_> = self::blocks(&blocks).into_iter().map(original).collect();
    assert_eq!(lens, [15, 6, 12], "how long they were");
    assert_eq!(short.captured(), Captured { kept: 3, missed: 0 });
    assert_eq!(other.capture().captured().kept, 8);
    // The other one still looks. With the place it ends too.
    drop(attached);
    assert!(tap.is_on() && !other.is_over());
    drop(tap);
    assert!(other.is_over());
}
