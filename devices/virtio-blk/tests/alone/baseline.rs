//! What attackers leave behind, and what they take: nothing.

use bluff_testing::times;

use crate::alone;
use crate::rig::raw::{Attack, END, INDIRECT, KINDS, REGION, SEAM, TURNS, WRITE, d};
use crate::rig::{BASE, FINISH};

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|l| l.contains("memfd")).count()
}

/// Files and mappings are as before when attackers have come and gone.
#[test]
fn files_and_memory_return_to_their_baseline() {
    let _alone = alone();
    let round = |packed| {
        let mut a = Attack::new(packed, 16);
        // A bad chain, then a broken ring.
        a.raw.chain(&[d(END, 1, 0)]);
        assert!(a.back().is_some());
        match packed {
            true => a.raw.packed_chain(&[d(END, 1, 0); 16], 3, true),
            false => a.raw.set_avail(999),
        }
        a.turns(TURNS);
        assert!(a.broken());
        a.stop(FINISH);
    };
    round(false);
    round(true);
    let before = (entries("/proc/self/fd"), mappings());
    for i in 0..times(20, 1000) {
        round(i % 2 == 0);
    }
    assert_eq!((entries("/proc/self/fd"), mappings()), before);
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let field = statm.split(' ').nth(1).unwrap();
    field.parse::<u64>().unwrap() * 4096
}

/// Attack list A21.
#[test]
fn a21_a_huge_request_allocates_nothing() {
    let _alone = alone();
    for packed in KINDS {
        let mut a = Attack::new(packed, 16384);
        // All of memory, as often as a descriptor can be named.
        let huge = d(BASE, (2 * REGION) as u32, WRITE);
        let (c, status) = a.request(0, 0, 512);
        let mut chain = vec![c[0]];
        chain.resize(16000, huge);
        chain.push(c[2]);
        let id = a.raw.chain(&chain);
        let before = resident();
        assert_eq!(a.back(), Some((id, 0)), "given back as it was");
        assert_eq!(a.status(status), 0xff);
        // Fewer, but more than a request may be long.
        let id = a.raw.chain(&chain[15900..]);
        let (got, _) = a.back().unwrap();
        assert_eq!(got, id);
        let mut chain = vec![c[0]];
        chain.resize(100, huge);
        chain.push(c[2]);
        let id = a.raw.chain(&chain);
        let (got, _) = a.back().unwrap();
        assert_eq!((got, a.status(status)), (id, 1), "an error");
        // A table of the greatest length that there is.
        let id = a.raw.chain(&[d(SEAM, 1 << 20, INDIRECT)]);
        let (got, written) = a.back().unwrap();
        assert_eq!((got, written), (id, 0));
        let grown = resident().saturating_sub(before);
        assert!(grown < 16 << 20, "{grown} bytes more");
        a.neighbour_lives();
    }
}
