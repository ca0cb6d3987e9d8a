//! Attack list A1 to A10, A23, A24: rings that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::rig::raw::{Attack, D, END, INDIRECT, KINDS, NEXT, SEAM, TURNS, WRITE, bytes, d};
use crate::rig::{BASE, FINISH, addresses, stall};
use bluff_testing::times;
use bluff_virtio::{QueueSetup, VirtioDevice};

#[test]
fn a01_next_loop() {
    let mut a = Attack::new(false, 16);
    for length in 1..=16 {
        for i in 0..length {
            a.raw
                .descriptor(i, d(SEAM, 16, NEXT), if i + 1 < length { i + 1 } else { 0 });
        }
        a.raw.offer(0);
        let before = a.snapshot();
        a.refused(0, &before);
    }
}

#[test]
fn a01_packed_chain_without_an_end() {
    for size in [1, 7, 16] {
        let mut a = Attack::new(true, size);
        let chain = vec![d(SEAM, 16, 0); usize::from(size)];
        a.raw.packed_chain(&chain, 0, true);
        let before = a.snapshot();
        a.ends_broken(&before);
    }
}

#[test]
fn a01_next_outside_of_the_table() {
    for next in [16, 17, 0x7fff, 0xffff] {
        let mut a = Attack::new(false, 16);
        a.raw.descriptor(0, d(SEAM, 16, NEXT), next);
        a.raw.offer(0);
        let before = a.snapshot();
        a.refused(0, &before);
    }
}

#[test]
fn a01_long_indirect_chain() {
    for packed in KINDS {
        // SEG_MAX + 2 is served on a queue of any size, one more is not.
        let mut a = Attack::new(packed, 4);
        let (chain, status) = a.request(0, 0, 254 * 512);
        let mut long = vec![chain[0]];
        long.extend((0..254).map(|i| d(chain[1].addr + 512 * i, 512, WRITE)));
        long.push(chain[2]);
        let t = a.table(SEAM, &long);
        let id = a.raw.chain(&[t]);
        assert_eq!(a.back(), Some((id, 254 * 512 + 1)));
        assert_eq!(a.status(status), 0);
        long.insert(1, d(chain[1].addr, 1, WRITE));
        let t = a.table(SEAM, &long);
        let id = a.raw.chain(&[t]);
        let before = a.snapshot();
        a.refused(id, &before);
    }
}

#[test]
fn a02_zero_length_descriptor() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for addr in [0, SEAM, END, u64::MAX] {
            let (c, status) = a.request(0, 3, 1024);
            let zero = |flags| d(addr, 0, flags);
            let chain = [zero(0), c[0], zero(0), zero(WRITE), c[1], c[2], zero(WRITE)];
            let id = a.raw.chain(&chain);
            let before = a.snapshot();
            assert_eq!(a.back(), Some((id, 1025)), "an empty buffer is no harm");
            assert_eq!(a.status(status), 0);
            a.unchanged(&before, &[(c[1].addr, 1024), (status, 1)]);
            // Nothing but empty buffers.
            let id = a.raw.chain(&[zero(0), zero(WRITE)]);
            let before = a.snapshot();
            a.refused(id, &before);
        }
    }
}

#[test]
fn a03_buffer_over_two_regions() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        let data: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 253) as u8).collect();
        // Data over the seam: our addresses on both sides do not adjoin.
        for skip in [1, 512, 2048, 4095] {
            let (mut c, status) = a.request(1, 8, 4096);
            c[1].addr = SEAM - skip;
            a.memory.write(c[1].addr, &data).unwrap();
            let id = a.raw.chain(&c);
            assert_eq!(a.back(), Some((id, 1)));
            assert_eq!(a.status(status), 0);
            let (mut c, status) = a.request(0, 8, 4096);
            c[1].addr = SEAM - skip;
            a.memory.write(c[1].addr, &[0; 4096]).unwrap();
            let id = a.raw.chain(&c);
            let before = a.snapshot();
            assert_eq!(a.back(), Some((id, 4097)));
            a.unchanged(&before, &[(c[1].addr, 4096), (status, 1)]);
            let mut got = vec![0; 4096];
            a.memory.read(c[1].addr, &mut got).unwrap();
            assert_eq!(got, data);
        }
        // The header, and a table in the middle of a descriptor.
        let (c, status) = a.request(0, 8, 512);
        a.header(SEAM - 5, 0, 8);
        let t = a.table(SEAM - 24, &[d(SEAM - 4096, 16, 0), c[1], c[2]]);
        a.header(SEAM - 4096, 0, 8);
        let id = a.raw.chain(&[t]);
        assert_eq!(a.back(), Some((id, 513)));
        assert_eq!(a.status(status), 0);
        let (c, status) = a.request(0, 8, 512);
        a.header(SEAM - 5, 0, 8);
        let id = a.raw.chain(&[d(SEAM - 5, 16, 0), c[1], c[2]]);
        assert_eq!(a.back(), Some((id, 513)));
        assert_eq!(a.status(status), 0);
        a.neighbour_lives();
    }
}

#[test]
fn a03_buffer_past_the_end() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for (addr, len) in [
            (END - 1, 2),
            (END - 512, 1024),
            (END, 1),
            (0, 1),
            (0, 4096),
            (BASE - 1, 2),
            (BASE - 4096, 8192),
        ] {
            for flags in [0, WRITE] {
                // A driver with memory that we were not given is told so, and does not take the chain for served.
                let (mut c, status) = a.request(u32::from(flags == 0), 0, 512);
                c[1] = d(addr, len, flags);
                let id = a.raw.chain(&c);
                let before = a.snapshot();
                a.failed(id, status, &before);
            }
        }
    }
}

#[test]
fn a04_length_wraps() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for (addr, len) in [
            (u64::MAX, 1),
            (u64::MAX, 2),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 1024),
            (u64::MAX - 0xffff_fffe, u32::MAX),
            (BASE, u32::MAX),
            (END - 1, u32::MAX),
            (u64::from(u32::MAX), u32::MAX),
        ] {
            for flags in [0, WRITE, INDIRECT] {
                let (mut c, status) = a.request(u32::from(flags == 0), 0, 512);
                c[1] = d(addr, len, flags);
                if flags == INDIRECT {
                    let id = a.raw.chain(&[d(addr, len & !15, INDIRECT)]);
                    let before = a.snapshot();
                    a.refused(id, &before);
                } else {
                    let id = a.raw.chain(&c);
                    let before = a.snapshot();
                    a.failed(id, status, &before);
                }
            }
        }
    }
}

/// Runs `flip` on another thread while requests with `chain` are offered: each is served or given back.
fn raced(a: &mut Attack, chain: &[D], offered: &[(u64, u64)], flip: impl Fn(u64) + Send + 'static) {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let flipper = std::thread::spawn(move || {
        let mut i = 0;
        while !flag.load(Ordering::Relaxed) {
            flip(i);
            i += 1;
        }
    });
    let before = a.snapshot();
    for _ in 0..times(2_000, 200_000) {
        let id = a.raw.chain(chain);
        let (got, written) = a.back().expect("served, or given back");
        assert_eq!(got, id);
        // A chain may name its data again and again, as long as it ends. (In a packed ring the length comes
        // back in the place that is being overwritten.)
        let most = 256 * offered[0].1 as u32 + 1;
        assert!(a.raw.packed || written <= most, "{written}");
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    a.unchanged(&before, offered);
    assert!(!a.broken());
    a.neighbour_lives();
}

#[test]
fn a05_indirect_length_flips() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 1);
        let (c, status) = a.request(0, 3, 512);
        let t = a.table(END - 48, &c);
        let (memory, at) = (a.memory.clone(), a.raw.desc + 8);
        // The table ends where memory ends: a longer one, or one that is no table, must be refused.
        let lens = [48, 1 << 20, 40, 0, 48, u32::MAX, 64];
        let offered = [
            (c[1].addr, 512),
            (status, 1),
            (a.raw.desc, 16),
            (a.raw.driver, 8),
        ];
        raced(&mut a, &[t], &offered, move |i| {
            memory.write_u32(at, lens[i as usize % lens.len()]).unwrap();
        });
    }
}

#[test]
fn a06_indirect_next_flips() {
    let mut a = Attack::new(false, 4);
    let (c, status) = a.request(0, 3, 512);
    let t = a.table(SEAM, &c);
    let memory = a.memory.clone();
    let nexts = [1, 2, 3, 0, 0xffff, 1, 4096];
    let offered = [
        (c[1].addr, 512),
        (status, 1),
        (SEAM, 48),
        (a.raw.desc, 64),
        (a.raw.driver, 32),
    ];
    raced(&mut a, &[t], &offered, move |i| {
        memory
            .write_u16(SEAM + 14, nexts[i as usize % nexts.len()])
            .unwrap();
        memory
            .write_u16(SEAM + 16 + 14, nexts[i as usize / 3 % nexts.len()])
            .unwrap();
    });
}

#[test]
fn a06_indirect_next_out_of_the_table() {
    let mut a = Attack::new(false, 16);
    for next in [3, 4, 0x7fff, 0xffff] {
        let (c, _) = a.request(0, 3, 512);
        let t = a.table(SEAM, &c);
        a.memory.write_u16(SEAM + 16 + 14, next).unwrap();
        let id = a.raw.chain(&[t]);
        let before = a.snapshot();
        a.refused(id, &before);
    }
    // In a circle inside of the table.
    let (c, _) = a.request(0, 3, 512);
    let t = a.table(SEAM, &[c[0], c[0], c[0]]);
    a.memory
        .write(SEAM + 32, &bytes(d(c[0].addr, 16, NEXT), 0))
        .unwrap();
    let id = a.raw.chain(&[t]);
    let before = a.snapshot();
    a.refused(id, &before);
}

#[test]
fn a06_table_of_any_size() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 4);
        for segments in [1, 3, 4, 5, 60, 101] {
            let (c, status) = a.request(0, 3, 512 * segments);
            let mut chain = vec![c[0]];
            chain.extend((0..segments).map(|i| d(c[1].addr + 512 * u64::from(i), 512, WRITE)));
            chain.push(c[2]);
            let t = a.table(SEAM + 16 * u64::from(segments), &chain);
            let id = a.raw.chain(&[t]);
            assert_eq!(a.back(), Some((id, 512 * segments + 1)));
            assert_eq!(a.status(status), 0);
        }
        a.neighbour_lives();
    }
    // Split: a chain may leave most of its table out, and go through it in any order.
    let mut a = Attack::new(false, 4);
    let (c, status) = a.request(0, 3, 512);
    let at = SEAM;
    for (i, x, next) in [(0, c[0], 4999), (4999, c[1], 7), (7, c[2], 0)] {
        let flags = x.flags | if next == 0 { 0 } else { NEXT };
        a.memory
            .write(at + 16 * i, &bytes(D { flags, ..x }, next))
            .unwrap();
    }
    let id = a.raw.chain(&[d(at, 16 * 5000, INDIRECT)]);
    assert_eq!(a.back(), Some((id, 513)));
    assert_eq!(a.status(status), 0);
}

#[test]
fn a07_indirect_where_it_may_not_be() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        // Inside of a table.
        let (c, _) = a.request(0, 3, 512);
        let inner = a.table(SEAM, &c);
        let outer = a.table(SEAM + 4096, &[c[0], inner]);
        let id = a.raw.chain(&[outer]);
        let before = a.snapshot();
        a.refused(id, &before);
        // A table that names itself.
        let itself = a.table(SEAM, &[d(SEAM, 16, INDIRECT)]);
        let id = a.raw.chain(&[itself]);
        let before = a.snapshot();
        a.refused(id, &before);
        // With a next descriptor (a raw chain sets NEXT on all but the last).
        let t = a.table(SEAM, &c);
        let id = a.raw.chain(&[t, c[2]]);
        let before = a.snapshot();
        a.refused(id, &before);
        // Lengths that are no tables.
        for len in [0, 1, 15, 17, 24, 16 * 65537, !15] {
            let id = a.raw.chain(&[d(SEAM, len, INDIRECT)]);
            let before = a.snapshot();
            a.refused(id, &before);
        }
    }
}

/// A split chain may begin with direct descriptors and end with a table (§2.7.5.3.2).
#[test]
fn a07_direct_then_indirect_is_served() {
    let mut a = Attack::new(false, 16);
    let (c, status) = a.request(0, 3, 512);
    let t = a.table(SEAM, &c[1..]);
    let id = a.raw.chain(&[c[0], t]);
    assert_eq!(a.back(), Some((id, 513)));
    assert_eq!(a.status(status), 0);
    // A packed one may not (§2.8.7).
    let mut a = Attack::new(true, 16);
    let (c, _) = a.request(0, 3, 512);
    let t = a.table(SEAM, &c[1..]);
    let id = a.raw.chain(&[c[0], t]);
    let before = a.snapshot();
    a.refused(id, &before);
}

#[test]
fn a08_head_past_the_queue() {
    for head in [16, 17, 0x7fff, 0x8000, 0xffff] {
        let mut a = Attack::new(false, 16);
        a.raw.offer(head);
        let before = a.snapshot();
        a.ends_broken(&before);
    }
}

/// A packed ring's buffer ID is the driver's choice (§2.8.6): any number is served.
#[test]
fn a08_any_buffer_id_is_served() {
    let mut a = Attack::new(true, 16);
    for id in [16, 17, 0x7fff, 0x8000, 0xffff] {
        let (c, status) = a.request(0, 3, 512);
        a.raw.packed_chain(&c, id, false);
        assert_eq!(a.back(), Some((id, 513)));
        assert_eq!(a.status(status), 0);
    }
}

#[test]
fn a09_available_index_jumps() {
    for jump in [17, 18, 0x7fff, 0x8000, 0xffff] {
        let mut a = Attack::new(false, 16);
        let before = a.snapshot();
        let at = a.raw.driver + 2;
        a.raw.set_avail(jump);
        assert_eq!(a.memory.read_u16(at).unwrap(), jump);
        assert_eq!(a.back(), None);
        a.unchanged(&before, &[(at, 2)]);
        let before = a.snapshot();
        a.ends_broken(&before);
    }
}

#[test]
fn a09_a_full_ring_is_not_empty() {
    for packed in KINDS {
        for size in [1u16, 2, 16, 1024, 32768] {
            let mut a = Attack::new(packed, size.min(1024));
            let size = a.raw.size;
            // One table for each slot; all at once.
            for round in 0..3 {
                let (c, _) = a.request(0, 3, 512);
                let t = a.table(SEAM, &c);
                let ids: Vec<u16> = (0..size).map(|_| a.raw.chain(&[t])).collect();
                for id in ids {
                    let mut turns = 0;
                    let used = loop {
                        if let Some(used) = a.back() {
                            break used;
                        }
                        turns += 1;
                        assert!(turns < 8, "round {round}: the ring reads as empty");
                    };
                    assert_eq!(used, (id, 513));
                }
            }
            a.neighbour_lives();
        }
    }
}

#[test]
fn a10_same_head_twice() {
    // Twice in one batch, and again while the first is in flight.
    let mut a = Attack::on(false, 16, stall::volume(false));
    let (c, _) = a.request(0, 3, 512);
    let head = a.raw.chain(&c);
    a.raw.offer(head);
    assert_eq!(a.back(), None);
    assert!(a.broken());

    let mut a = Attack::on(false, 16, stall::volume(false));
    let (c, _) = a.request(0, 3, 512);
    let head = a.raw.chain(&c);
    a.turns(TURNS);
    assert!(!a.broken());
    a.raw.offer(head);
    let before = a.snapshot();
    assert_eq!(a.back(), None);
    assert!(a.broken());
    a.unchanged(&before, &[(a.raw.driver, 40)]);

    // Packed: the same buffer ID.
    let mut a = Attack::on(true, 16, stall::volume(false));
    let (c, _) = a.request(0, 3, 512);
    a.raw.packed_chain(&c, 5, false);
    a.turns(TURNS);
    assert!(!a.broken());
    a.raw.packed_chain(&c, 5, false);
    let before = a.snapshot();
    assert_eq!(a.back(), None);
    assert!(a.broken());
    a.unchanged(&before, &[]);
}

#[test]
fn a10_the_same_head_again_after_it_was_used_is_served() {
    let mut a = Attack::new(false, 16);
    let (c, _) = a.request(0, 3, 512);
    let head = a.raw.chain(&c);
    for _ in 0..100 {
        assert_eq!(a.back(), Some((head, 513)));
        a.raw.offer(head);
    }
    a.neighbour_lives();
}

/// A ring that always has more: its neighbour on the same reactor is served within the same turns.
#[test]
fn a23_endless_producer() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 256);
        let (c, _) = a.request(0, 0, 128 << 10);
        let t = a.table(SEAM, &c);
        let mut served = 0;
        for _ in 0..times(50, 2000) {
            // Whatever was used is offered again before every turn of the neighbour.
            for _ in 0..4 {
                while a.raw.used().is_some() {
                    served += 1;
                }
                while served + 256 > a.raw.offered {
                    a.raw.chain(&[t]);
                }
                a.turns(1);
            }
            a.neighbour_lives();
        }
        assert!(served > 100, "the producer is served too");
    }
}

/// The geometry of a queue is what it was started with.
#[test]
fn a24_geometry_is_fixed_at_start() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        a.queue_lives();
        for size in [1, 8, 32, 0xffff] {
            let setup = QueueSetup {
                size,
                addresses: addresses([SEAM, SEAM + 4096, SEAM + 8192]),
                ..a.setup()
            };
            assert!(a.device.start_queue(setup).is_err());
            a.queue_lives();
        }
        a.neighbour_lives();
    }
}

/// Sizes and addresses that are not allowed never start.
#[test]
fn a24_bad_geometry_never_starts() {
    let bad: [(bool, u16, u64, u64, u64); 12] = [
        (false, 0, SEAM, SEAM + 4096, SEAM + 8192),
        (false, 3, SEAM, SEAM + 4096, SEAM + 8192),
        (false, 40000, SEAM, SEAM + 4096, SEAM + 8192),
        (false, 16, SEAM + 8, SEAM + 4096, SEAM + 8192),
        (false, 16, SEAM, SEAM + 4097, SEAM + 8192),
        (false, 16, SEAM, SEAM + 4096, SEAM + 8194),
        (false, 16, SEAM - 16, SEAM + 4096, SEAM + 8192),
        (false, 16, SEAM, END - 16, SEAM + 8192),
        (false, 16, SEAM, SEAM + 4096, u64::MAX - 3),
        (true, 0, SEAM, SEAM + 4096, SEAM + 8192),
        (true, 32769, SEAM, SEAM + 4096, SEAM + 8192),
        (true, 16, SEAM, SEAM + 4098, SEAM + 8192),
    ];
    for (packed, size, desc, driver, device) in bad {
        let mut a = Attack::new(packed, 16);
        a.stop(FINISH);
        let before = a.snapshot();
        let setup = QueueSetup {
            size,
            addresses: addresses([desc, driver, device]),
            ..a.setup()
        };
        a.device.start_queue(setup).unwrap();
        a.turns(TURNS);
        assert!(
            a.broken(),
            "{packed} {size} {desc:#x} {driver:#x} {device:#x}"
        );
        a.unchanged(&before, &[]);
        assert_eq!(a.stop(FINISH), None);
        a.neighbour_lives();
    }
}
