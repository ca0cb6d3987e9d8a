//! Attack list A17 to A22: requests that lie. (A21 is in the program `alone`.)

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_testing::times;

use crate::rig::raw::{Attack, D, END, INDIRECT, KINDS, SEAM, TURNS, WRITE, bytes, d};
use crate::rig::{FINISH, ram};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Sends a chain; gives its used length, and its status.
fn send(a: &mut Attack, chain: &[D], status: u64) -> (u32, u8) {
    a.memory.write_u8(status, 0xff).unwrap();
    let id = a.raw.chain(chain);
    let (got, written) = a.back().expect("every request comes back");
    assert_eq!(got, id);
    (written, a.status(status))
}

/// As [`send`], for what must fail with `expect` and write nothing but its status.
fn fails(a: &mut Attack, chain: &[D], status: u64, expect: u8) -> u32 {
    a.memory.write_u8(status, 0xff).unwrap();
    let id = a.raw.chain(chain);
    let before = a.snapshot();
    let (got, written) = a.back().expect("every request comes back");
    assert_eq!((got, a.status(status)), (id, expect), "{chain:x?}");
    a.unchanged(&before, &[(status, 1)]);
    written
}

/// How many writable bytes were really written from the first one on must be what the device says, or
/// more: a driver hands that many out.
#[test]
fn a17_used_length_counts_only_what_was_written() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        let (c, status) = a.request(IN, 3, 4096);
        assert_eq!(send(&mut a, &c, status), (4097, OK));
        // Failed reads: nothing of the data is sure.
        let (c, status) = a.request(IN, u64::MAX / 512, 4096);
        assert_eq!(fails(&mut a, &c, status, IOERR), 0);
        // An identification in a buffer of any length.
        for (len, written) in [(4, 5), (19, 20), (20, 21), (21, 20), (4096, 20)] {
            let (mut c, status) = a.request(GET_ID, 0, 4096);
            c[1].len = len;
            assert_eq!(send(&mut a, &c, status), (written, OK), "{len}");
        }
        // Buffers that a request has no use for.
        let (c, status) = ranges(&a, ZEROES, &[(0, 1, 0)]);
        let extra = d(SEAM, 4096, WRITE);
        let id = a.raw.chain(&[c[0], c[1], extra, c[2]]);
        let before = a.snapshot();
        assert_eq!(a.back(), Some((id, 0)));
        assert_eq!(a.status(status), OK);
        a.unchanged(&before, &[(status, 1)]);
        // Requests that are unknown.
        for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x8000_0000, u32::MAX] {
            let (c, status) = a.request(kind, 0, 4096);
            assert_eq!(fails(&mut a, &c, status, UNSUPP), 0);
        }
        a.neighbour_lives();
    }
}

/// Every way to fail, far more often than the ring is long: a chain that is kept would be missed.
#[test]
fn a18_every_error_path_gives_the_chain_back() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 8);
        let (c, status) = a.request(IN, 0, 4096);
        let t = |len| d(SEAM, len, INDIRECT);
        let bad: Vec<Vec<D>> = vec![
            vec![d(END, 16, 0), c[1], c[2]],
            vec![c[0], d(END, 512, WRITE), c[2]],
            vec![c[0], c[1], d(0, 1, WRITE)],
            vec![c[2], c[0]],
            vec![c[0]],
            vec![c[2]],
            vec![d(c[0].addr, 15, 0), c[2]],
            vec![c[0], d(c[1].addr, 511, WRITE), c[2]],
            vec![c[0], c[2]],
            vec![d(c[0].addr, 0, 0), d(c[2].addr, 0, WRITE)],
            vec![t(0)],
            vec![t(15)],
            vec![d(END, 48, INDIRECT)],
            vec![t(48), c[2]],
        ];
        for _ in 0..times(20, 1000) {
            for chain in &bad {
                a.raw.memory.write_u8(status, 0xff).unwrap();
                let id = a.raw.chain(chain);
                let (got, written) = a.back().expect("every chain comes back");
                assert_eq!(got, id);
                assert!(written <= 1, "{chain:x?}");
                assert!(a.status(status) != OK);
            }
        }
        a.neighbour_lives();
        a.queue_lives();
        let stopped = a.stop(FINISH).expect("it ran");
        assert_eq!(stopped.in_flight, 0);
    }
}

#[test]
fn a19_length_no_multiple_of_a_sector() {
    for packed in KINDS {
        for (volume, block) in [("size=16MiB", 512), ("size=16MiB&block_size=4096", 4096u32)] {
            let mut a = Attack::on(packed, 16, ram(volume));
            for len in [1, 511, 513, block - 1, block + 1, block / 2 + 1] {
                for kind in [IN, OUT] {
                    let (mut c, status) = a.request(kind, 0, 8192);
                    c[1].len = len;
                    fails(&mut a, &c, status, IOERR);
                }
            }
            // No data at all.
            for kind in [IN, OUT] {
                let (c, status) = a.request(kind, 0, 512);
                fails(&mut a, &[c[0], c[2]], status, IOERR);
            }
            if block == 4096 {
                let (c, status) = a.request(IN, 1, 4096);
                fails(&mut a, &c, status, IOERR);
            }
            a.neighbour_lives();
        }
    }
}

#[test]
fn a19_sector_overflow() {
    const SECTORS: u64 = (16 << 20) / 512;
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for sector in [
            SECTORS,
            SECTORS - 1,
            SECTORS + 1,
            u64::MAX,
            u64::MAX / 512,
            u64::MAX / 512 + 1,
            1 << 55,
            (1 << 55) - 2,
            1 << 63,
        ] {
            for kind in [IN, OUT] {
                let (c, status) = a.request(kind, sector, 1024);
                fails(&mut a, &c, status, IOERR);
            }
            for kind in [DISCARD, ZEROES] {
                let (c, status) = ranges(&a, kind, &[(sector, 2, 0)]);
                fails(&mut a, &c, status, IOERR);
            }
        }
        // The last two sectors.
        let (c, status) = a.request(IN, SECTORS - 2, 1024);
        assert_eq!(send(&mut a, &c, status), (1025, OK));
        a.neighbour_lives();
    }
}

/// A request with ranges.
fn ranges(a: &Attack, kind: u32, list: &[(u64, u32, u32)]) -> ([D; 3], u64) {
    let (mut c, status) = a.request(kind, 0, 16 * list.len() as u32);
    c[1].flags = 0;
    for (i, (sector, sectors, flags)) in list.iter().enumerate() {
        let at = c[1].addr + 16 * i as u64;
        a.memory.write_u64(at, *sector).unwrap();
        a.memory.write_u32(at + 8, *sectors).unwrap();
        a.memory.write_u32(at + 12, *flags).unwrap();
    }
    (c, status)
}

#[test]
fn a19_ranges_that_lie() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        // All right or none done: the second range is wrong.
        let (c, status) = a.request(OUT, 0, 512);
        a.memory.write(c[1].addr, &[7; 512]).unwrap();
        assert_eq!(send(&mut a, &c, status), (1, OK));
        for (second, expect) in [
            ((u64::MAX, 1, 0), IOERR),
            ((0, u32::MAX, 0), IOERR),
            ((0, 1, 2), UNSUPP),
            ((0, 1, u32::MAX), UNSUPP),
        ] {
            let (c, status) = ranges(&a, ZEROES, &[(0, 1, 0), second]);
            fails(&mut a, &c, status, expect);
        }
        let (c, status) = ranges(&a, DISCARD, &[(0, 1, 1)]);
        fails(&mut a, &c, status, UNSUPP);
        let (c, status) = ranges(&a, ZEROES, &[(0, 1, 0); 17]);
        fails(&mut a, &c, status, IOERR);
        for len in [0, 1, 15, 17, 24] {
            let (mut c, status) = ranges(&a, ZEROES, &[(0, 1, 0); 2]);
            c[1].len = len;
            fails(&mut a, &c, status, IOERR);
        }
        let (c, status) = a.request(IN, 0, 512);
        assert_eq!(send(&mut a, &c, status), (513, OK));
        let mut got = [0; 512];
        a.memory.read(c[1].addr, &mut got).unwrap();
        assert_eq!(got, [7; 512], "none was done");
        a.neighbour_lives();
    }
}

#[test]
fn a19_header_writable_or_short() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for kind in [IN, OUT, FLUSH, GET_ID] {
            let (c, status) = a.request(kind, 0, 512);
            // A header that the device would have to write.
            let head = D {
                flags: WRITE,
                ..c[0]
            };
            let data = D {
                flags: WRITE,
                ..c[1]
            };
            fails(&mut a, &[head, data, c[2]], status, IOERR);
            // Shorter than a header.
            for len in [1, 8, 15] {
                let head = D { len, ..c[0] };
                fails(&mut a, &[head, c[2]], status, IOERR);
            }
        }
        // In any number of pieces it is served (§2.7.4: no assumption about framing).
        let (c, status) = a.request(IN, 0, 512);
        let at = c[0].addr;
        let split = [d(at, 3, 0), d(at + 3, 1, 0), d(at + 4, 12, 0)];
        let data = d(c[1].addr, 100, WRITE);
        // The status is the last byte of whatever is writable.
        let rest = d(c[1].addr + 100, 412, WRITE);
        let chain = [split[0], split[1], split[2], data, rest, c[2]];
        assert_eq!(send(&mut a, &chain, status), (513, OK));
        let (mut c, _) = a.request(IN, 0, 513);
        c[1].len = 513;
        let status = c[1].addr + 512;
        assert_eq!(send(&mut a, &c[..2], status), (513, OK));
        a.neighbour_lives();
    }
}

#[test]
fn a19_no_status_byte() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        for kind in [OUT, FLUSH, GET_ID, DISCARD, ZEROES, 99] {
            let (mut c, _) = a.request(kind, 0, 512);
            c[1].flags = 0;
            let id = a.raw.chain(&c[..2]);
            let before = a.snapshot();
            a.refused(id, &before);
        }
    }
}

/// The header is another one in every other read of it: what was checked is what is done.
#[test]
fn a20_request_changed_after_it_was_parsed() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        // The volume's first block must never be written: no header that was offered says so in whole.
        let (c, status) = a.request(OUT, 0, 512);
        let (header, data) = (c[0].addr, c[1].addr);
        a.memory.write(data, &[9; 512]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, memory) = (stop.clone(), a.memory.clone());
        let flipper = std::thread::spawn(move || {
            let mut i = 0u64;
            while !flag.load(Ordering::Relaxed) {
                // Inside of the volume, and far outside of it; requests of all kinds; never sector 0.
                let sector = [8, u64::MAX, 1 << 55, 16, 1 << 40][i as usize % 5];
                memory.write_u64(header + 8, sector).unwrap();
                memory
                    .write_u32(header, [OUT, IN, FLUSH, 77][i as usize / 5 % 4])
                    .unwrap();
                i += 1;
            }
        });
        a.memory.write_u64(header + 8, 8).unwrap();
        let before = a.snapshot();
        for _ in 0..times(5_000, 500_000) {
            let id = a.raw.chain(&c);
            let (got, written) = a.back().expect("every request comes back");
            assert_eq!(got, id);
            assert!(written <= 1, "nothing but the status is writable");
            assert!([OK, IOERR, UNSUPP].contains(&a.status(status)));
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
        let offered = [
            (status, 1),
            (header, 16),
            (a.raw.desc, 256),
            (a.raw.driver, 38),
        ];
        a.unchanged(&before, &offered);
        let (c, status) = a.request(IN, 0, 512);
        assert_eq!(send(&mut a, &c, status), (513, OK));
        let mut got = [1; 512];
        a.memory.read(c[1].addr, &mut got).unwrap();
        assert_eq!(got, [0; 512], "sector 0 was never asked for");
        a.neighbour_lives();
    }
}

/// The first request of a batch overwrites the second one's header, table, descriptors, or the ring.
#[test]
fn a22_a_batch_that_changes_itself() {
    for packed in KINDS {
        // Everything that the ring and its requests consist of, as the target of a read.
        for target in 0..5 {
            let mut a = Attack::new(packed, 8);
            // What will be read: descriptors that point at memory's end, and sectors that do not exist.
            let (c, status) = a.request(OUT, 0, 4096);
            let poison: Vec<u8> = bytes(d(END - 1, u32::MAX, INDIRECT | 3), 0xffff).repeat(256);
            a.memory.write(c[1].addr, &poison).unwrap();
            assert_eq!(send(&mut a, &c, status), (1, OK));

            let (second, second_status) = a.request(IN, 8, 512);
            let table = a.table(SEAM, &second);
            let (mut first, first_status) = a.request(IN, 0, 4096);
            let len = (u32::from(a.raw.size) * 16).next_multiple_of(512);
            (first[1].addr, first[1].len) = match target {
                0 => (second[0].addr, 512),
                1 => (SEAM, 512),
                2 => (a.raw.desc, len),
                3 => (a.raw.driver, 512),
                _ => (a.raw.device, 512),
            };
            a.raw.chain(&first);
            a.raw.chain(&[table]);
            let before = a.snapshot();
            a.turns(TURNS);
            // Whatever the ring has become: nothing else was written, and nobody else is concerned.
            let offered = [
                (first[1].addr, u64::from(first[1].len)),
                (first_status, 1),
                (second[1].addr, 512),
                (second_status, 1),
                (a.raw.device, 6 + 8 * u64::from(a.raw.size)),
            ];
            a.unchanged(&before, &offered);
            a.neighbour_lives();
            a.stop(FINISH);
            a.neighbour_lives();
        }
    }
}
