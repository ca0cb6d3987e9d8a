//! What attackers leave behind: nothing. Alone in its process, so that it can count.

mod rig;

use rig::raw::{Attack, END, TURNS, d};
use rig::{FINISH, times};

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
