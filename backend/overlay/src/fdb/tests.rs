use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use bluff_testing::{Chance, times};
use proptest::prelude::*;

use super::*;

const LIMITS: FdbLimits = FdbLimits {
    total: 40,
    each: 16,
};

fn key(n: u64) -> Key {
    let [.., a, b, c, d] = n.to_be_bytes();
    Key::new([2, 0, a, b, c, d], (n % 3) as u16)
}

#[test]
fn keys_and_entries_survive_their_slots() {
    let key = Key::new([2, 0xaa, 3, 0xff, 5, 6], 4095);
    assert_eq!((key.mac(), key.vlan()), ([2, 0xaa, 3, 0xff, 5, 6], 4095));
    assert_eq!(format!("{key:?}"), "02:aa:03:ff:05:06.4095");
    assert_ne!(Key::new([0; 6], 0).0, 0);
    for place in [
        Place::Port(0),
        Place::Port(65_535),
        Place::Vtep(0),
        Place::Vtep(65_535),
    ] {
        for (fixed, seen) in [(false, 0), (true, u32::MAX)] {
            let entry = Entry { place, fixed, seen };
            assert_eq!(Entry::unpack(entry.pack()), Some(entry));
        }
    }
    assert_eq!(Entry::unpack(0), None);
}

/// What a database is asked to do.
#[derive(Clone, Debug)]
enum Step {
    See(u64, u16, u32),
    Fix(u64, u16),
    Age(u32),
    Leave(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..200u64, 0..4u16, 0..20u32).prop_map(|(k, p, t)| Step::See(k, p, t)),
        1 => (0..200u64, 0..4u16).prop_map(|(k, p)| Step::Fix(k, p)),
        1 => (0..20u32).prop_map(Step::Age),
        1 => (0..4u16).prop_map(Step::Leave),
    ];
    prop::collection::vec(step, 1..600)
}

fn place(n: u16) -> Place {
    match n {
        0 | 1 => Place::Port(n),
        _ => Place::Vtep(n),
    }
}

proptest! {
    #[test]
    fn as_a_plain_map_would(steps in steps(), seed: u64) {
        let fdb = Fdb::new(seed, LIMITS);
        let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
        for step in steps {
            match step {
                Step::See(k, p, seen) => {
                    let place = place(p);
                    let learnt = |place: Option<Place>| {
                        let of = |e: &&Entry| !e.fixed && place.is_none_or(|p| e.place == p);
                        model.values().filter(of).count()
                    };
                    let expected = match model.get(&k) {
                        Some(e) if e.place == place => Ok(()),
                        Some(e) if e.fixed => Err(Refused::Fixed),
                        before => {
                            let others = learnt(None) - usize::from(before.is_some());
                            let full = others >= LIMITS.total || learnt(Some(place)) >= LIMITS.each;
                            if full { Err(Refused::Full) } else { Ok(()) }
                        }
                    };
                    prop_assert_eq!(fdb.see(key(k), place, seen), expected);
                    if expected.is_ok() && !model.get(&k).is_some_and(|e| e.fixed) {
                        // Times do not go back where it stays.
                        let before = model.get(&k).filter(|e| e.place == place);
                        let seen = before.map_or(seen, |e| e.seen.max(seen));
                        model.insert(k, Entry { place, fixed: false, seen });
                    }
                }
                Step::Fix(k, p) => {
                    fdb.fix(key(k), place(p));
                    model.insert(k, Entry { place: place(p), fixed: true, seen: 0 });
                }
                Step::Age(tick) => {
                    let before = model.len();
                    model.retain(|_, e| e.fixed || i64::from(tick) - i64::from(e.seen) <= 5);
                    prop_assert_eq!(fdb.age(tick, 5), before - model.len());
                }
                Step::Leave(p) => {
                    let before = model.len();
                    model.retain(|_, e| e.place != place(p));
                    let forgotten = fdb.forget(|_, e| e.place == place(p));
                    prop_assert_eq!(forgotten, before - model.len());
                }
            }
            prop_assert_eq!(fdb.learnt(), model.values().filter(|e| !e.fixed).count());
        }
        for k in 0..200 {
            prop_assert_eq!(fdb.find(key(k)), model.get(&k).copied());
        }
        prop_assert_eq!(fdb.entries().len(), model.len());
    }
}

/// Addresses come and go for ever: the table is renewed, and does not grow.
#[test]
fn who_invents_addresses_does_not_fill_it() {
    let fdb = Fdb::new(
        1,
        FdbLimits {
            total: 1000,
            each: 1000,
        },
    );
    for tick in 0..200u32 {
        for n in 0..1000 {
            let key = key(u64::from(tick) * 1000 + n);
            assert_eq!(fdb.see(key, Place::Port(1), tick), Ok(()));
        }
        assert_eq!(
            fdb.see(key(u64::MAX), Place::Port(2), tick),
            Err(Refused::Full)
        );
        assert_eq!(fdb.age(tick + 1, 0), 1000);
    }
    assert_eq!(fdb.learnt(), 0);
    assert!(fdb.table.load().slots.len() <= 8192);
}

/// A reactor notes an address's time in a table that is being renewed: the address lives as long as any.
#[test]
fn times_are_not_lost_when_the_table_is_renewed() {
    let (one, here) = (key(1), Place::Port(1));
    let limits = FdbLimits {
        total: 1000,
        each: 1000,
    };
    let seen = |fdb: &Fdb| fdb.find(one).map(|e| e.seen);
    // It is noted between the copy and its publication.
    let fdb = Fdb::new(3, limits);
    fdb.see(one, here, 0).unwrap();
    let old = fdb.table.load_full();
    let (copy, _) = old.renewed();
    fdb.see(one, here, 299).unwrap();
    fdb.publish(&old, copy);
    assert_eq!((seen(&fdb), fdb.age(301, 300)), (Some(299), 0));
    // It is noted by a reactor that found the address in the old table, after the new one was published.
    let fdb = Fdb::new(3, limits);
    fdb.see(one, here, 0).unwrap();
    let old = fdb.table.load_full();
    for n in 2..1000 {
        fdb.see(key(n), here, 300).unwrap();
    }
    assert!(!Arc::ptr_eq(&old, &fdb.table.load_full()), "renewed");
    fdb.refresh(old, one, here, 299);
    assert_eq!((seen(&fdb), fdb.age(301, 300)), (Some(299), 0));
    // What moved, or was fixed, meanwhile is not touched.
    let old = fdb.table.load_full();
    fdb.see(one, Place::Port(2), 300).unwrap();
    fdb.refresh(old.clone(), one, here, 305);
    assert_eq!(seen(&fdb), Some(300));
    fdb.fix(one, here);
    fdb.refresh(old.clone(), one, here, 306);
    assert_eq!(seen(&fdb), Some(0));
    // Nor does it come back once it is forgotten.
    fdb.forget(|_, _| true);
    fdb.refresh(old, one, here, 307);
    assert_eq!(seen(&fdb), None);
}

/// Reactors' clocks differ: who is behind does not make an address older.
#[test]
fn times_do_not_go_back() {
    let fdb = Fdb::new(4, LIMITS);
    for tick in [10, 11, 9, 0] {
        fdb.see(key(1), Place::Port(1), tick).unwrap();
    }
    assert_eq!(fdb.find(key(1)).unwrap().seen, 11);
    // They wrap.
    fdb.see(key(2), Place::Port(1), u32::MAX).unwrap();
    fdb.see(key(2), Place::Port(1), 1).unwrap();
    assert_eq!(fdb.find(key(2)).unwrap().seen, 1);
    assert_eq!(fdb.age(5, 3), 1, "the second; the first is far ahead");
}

/// All stations are seen in every tick while addresses come and go, so that tables are renewed: none of them is forgotten.
#[test]
fn who_is_seen_in_each_tick_is_not_forgotten() {
    let limits = FdbLimits {
        total: 5000,
        each: 5000,
    };
    let fdb = Fdb::new(5, limits);
    let stations = 20;
    let (tick, over) = (std::sync::atomic::AtomicU32::new(0), AtomicBool::new(false));
    for n in 0..stations {
        fdb.see(key(n), Place::Port(1), 0).unwrap();
    }
    let done = [const { std::sync::atomic::AtomicU32::new(0) }; 2];
    std::thread::scope(|s| {
        for mine in &done {
            let (fdb, tick, over) = (&fdb, &tick, &over);
            s.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let now = tick.load(Ordering::Relaxed);
                    for n in 0..stations {
                        let _ = fdb.see(key(n), Place::Port(1), now);
                    }
                    mine.store(now, Ordering::Release);
                }
            });
        }
        for now in 1..times(50, 5000) as u32 {
            tick.store(now, Ordering::Relaxed);
            // Others fill tables, and are forgotten.
            for n in 0..400 {
                let other = u64::from(now) * 1000 + 100 + n;
                let _ = fdb.see(key(other), Place::Port(2), now);
            }
            while done.iter().any(|d| d.load(Ordering::Acquire) < now) {
                std::thread::yield_now();
            }
            for n in 0..stations {
                let found = fdb.find(key(n)).map(|e| e.seen);
                assert_eq!(found, Some(now), "{n}");
            }
            fdb.forget(|_, e| e.place == Place::Port(2));
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// Readers never see an address where it has not been, while tables are renewed under them.
#[test]
fn readers_beside_writers() {
    let fdb = Fdb::new(
        2,
        FdbLimits {
            total: 600,
            each: 600,
        },
    );
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        for seed in 0..2 {
            let (fdb, over) = (&fdb, &over);
            s.spawn(move || {
                let mut chance = Chance::new(seed);
                while !over.load(Ordering::Relaxed) {
                    let n = chance.below(2000);
                    if let Some(entry) = fdb.find(key(n)) {
                        assert_eq!(entry.place, Place::Port(n as u16), "{n}");
                        let _ = fdb.see(key(n), entry.place, chance.below(100) as u32);
                    }
                }
            });
        }
        let mut chance = Chance::new(9);
        for _ in 0..times(20_000, 2_000_000) {
            let n = chance.below(2000);
            let _ = fdb.see(key(n), Place::Port(n as u16), 0);
            if chance.percent(1) {
                let from = chance.below(2000) as u16;
                fdb.forget(|_, e| matches!(e.place, Place::Port(p) if p.wrapping_sub(from) < 300));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let all = fdb.entries();
    assert_eq!(all.len(), fdb.learnt());
    fdb.forget(|_, _| true);
    assert_eq!(fdb.learnt(), 0);
}
