//! Too much at once, cancellation, channels that go in the middle of things.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_testing::Chance;

use crate::{BlockError, Cancel, Kind, Op, Tag, Volume};

use super::cases::{read, write};
use super::{Memory, Profile, Rig};

/// Far more operations than a channel takes: none is lost, none doubled.
pub(super) fn busy(profile: &Profile, volume: &Arc<dyn Volume>) {
    const OPS: u64 = 10_000;
    let block = u64::from(volume.geometry().block_size);
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    let random = &mut Chance::new(8);
    let bytes = random.bytes(block as usize);
    let from = Memory::holding(&bytes, random);
    let to = Memory::random(block as usize, random);
    let blocks = (4 << 20) / block;
    let ops: Vec<Op> = (0..OPS)
        .map(|i| {
            let at = i % blocks * block;
            match i % 50 {
                49 => Op::without_data(Tag(i), Kind::Flush, 0, 0),
                n if n % 2 == 0 => from.op(i, Kind::Write { fua: false }, at),
                _ => to.op(i, Kind::Read, at),
            }
        })
        .collect();
    let results = rig.run(&mut line, &ops);
    let tags: HashSet<u64> = results.iter().map(|c| c.tag.0).collect();
    assert_eq!(results.len() as u64, OPS);
    assert_eq!(tags.len() as u64, OPS, "each completed once");
    assert!(results.iter().all(|c| c.result.is_ok()));
    assert_eq!(line.in_flight(), 0);
    to.get();
    assert!(from.get() == bytes);
}

/// Cancels at every depth: each operation is completed once, and soon means the next poll.
pub(super) fn cancel(profile: &Profile, volume: &Arc<dyn Volume>) {
    let block = u64::from(volume.geometry().block_size);
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    assert_eq!(line.cancel(Tag(5)), Cancel::Unknown);
    let random = &mut Chance::new(9);
    for round in 0..40u64 {
        let memories: Vec<Memory> = (0..32)
            .map(|_| Memory::random(block as usize * 4, random))
            .collect();
        let ops: Vec<Op> = (0u64..)
            .zip(&memories)
            .map(|(i, m)| match (i + round) % 8 {
                7 => Op::without_data(Tag(i), Kind::Flush, 0, 0),
                n if n % 2 == 0 => m.op(i, Kind::Read, i * 4 * block),
                _ => m.op(i, Kind::Write { fua: i % 3 == 0 }, i * 4 * block),
            })
            .collect();
        let taken = line.submit(&ops);
        line.kick();
        if round % 2 == 0 {
            rig.step(Duration::ZERO);
        }
        let already: HashSet<Tag> = line.take().iter().map(|c| c.tag).collect();
        let mut soon = HashSet::new();
        for op in &ops[..taken] {
            if already.contains(&op.tag) {
                assert_eq!(line.cancel(op.tag), Cancel::Unknown);
                continue;
            }
            match line.cancel(op.tag) {
                Cancel::Soon => {
                    soon.insert(op.tag);
                }
                Cancel::Never => {}
                Cancel::Unknown => panic!("{:?} is in flight", op.tag),
            }
        }
        line.poll(Instant::now());
        let first = line.take();
        for tag in soon {
            assert!(
                first.iter().any(|c| c.tag == tag),
                "{tag:?} was to come soon"
            );
        }
        rig.wait(&mut line, usize::MAX);
        let rest = line.take();
        let tags: HashSet<Tag> = first.iter().chain(&rest).map(|c| c.tag).collect();
        let left = taken - already.len();
        assert_eq!(first.len() + rest.len(), left);
        assert_eq!(tags.len(), left, "each completed once");
        assert!(tags.is_disjoint(&already));
        for c in first.iter().chain(&rest) {
            assert!(
                matches!(c.result, Ok(()) | Err(BlockError::Cancelled)),
                "{c:?}"
            );
            assert_eq!(line.cancel(c.tag), Cancel::Unknown);
        }
    }
}

/// A write that was cancelled never lands over a newer one, on whichever channel that is.
pub(super) fn late_writes(profile: &Profile, volume: &Arc<dyn Volume>) {
    let block = volume.geometry().block_size as usize;
    let mut rig = Rig::new(profile.uring);
    let mut a = rig.open(&**volume);
    let mut b = (volume.max_channels() > 1).then(|| rig.open(&**volume));
    let random = &mut Chance::new(10);
    for round in 0..60u64 {
        let len = block * (1 + random.below(32) as usize);
        let at = random.below(16) * block as u64;
        let old = Memory::holding(&vec![0xee; len], random);
        a.submit(&[old.op(
            1,
            Kind::Write {
                fua: round % 2 == 0,
            },
            at,
        )]);
        a.kick();
        a.cancel(Tag(1));
        rig.wait(&mut a, usize::MAX);
        assert_eq!(a.take().len(), 1);
        // Nobody reads it any more.
        old.set(&vec![0xdd; len]);
        let new = random.bytes(len);
        let line = match &mut b {
            Some(b) if round % 3 == 0 => b,
            _ => &mut a,
        };
        write(&mut rig, line, at, &new, false);
        assert_eq!(rig.plain(line, Kind::Flush, 0, 0), Ok(()));
        let got = read(&mut rig, line, at, len);
        let differs = (0..len).find(|&i| got[i] != new[i]);
        if let Some(i) = differs.filter(|_| profile.keeps_data) {
            panic!("round {round}: byte {i} of {len} is {:#x}", got[i]);
        }
    }
}

/// A channel that goes with operations in flight: their memory is not touched afterwards, and what
/// is written next stays.
pub(super) fn dropped(profile: &Profile, volume: &Arc<dyn Volume>) {
    let block = volume.geometry().block_size as usize;
    let mut rig = Rig::new(profile.uring);
    let random = &mut Chance::new(11);
    let mark = vec![0x5a; block * 8];
    let mut memories = Vec::new();
    let mut stays = rig.open(&**volume);
    for round in 0..20 {
        if volume.max_channels() < 2 {
            return;
        }
        let mut line = rig.open(&**volume);
        let these: Vec<Memory> = (0..16).map(|_| Memory::random(block * 8, random)).collect();
        let ops: Vec<Op> = (0u64..)
            .zip(&these)
            .map(|(i, m)| {
                let kind = [Kind::Read, Kind::Write { fua: false }][i as usize % 2];
                m.op(i, kind, i * 8 * block as u64)
            })
            .collect();
        line.submit(&ops);
        if round % 4 != 0 {
            line.kick();
        }
        line.abandon();
        for m in &these {
            m.set(&mark);
        }
        memories.extend(these);
        let new = random.bytes(block * 128);
        write(&mut rig, &mut stays, 0, &new, false);
        let got = read(&mut rig, &mut stays, 0, new.len());
        assert!(!profile.keeps_data || got == new, "round {round}");
        assert_eq!(rig.plain(&mut stays, Kind::Flush, 0, 0), Ok(()));
    }
    assert!(
        memories.iter().all(|m| m.get() == mark),
        "touched after the drop"
    );
}

/// No answer to anything, and yet nobody hangs.
pub(super) fn silent(profile: &Profile, volume: &Arc<dyn Volume>) {
    let block = volume.geometry().block_size as usize;
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    let random = &mut Chance::new(12);
    let mark = vec![0x5a; block];
    let memories: Vec<Memory> = (0..64).map(|_| Memory::holding(&mark, random)).collect();
    let ops: Vec<Op> = (0u64..)
        .zip(&memories)
        .map(|(i, m)| match i % 4 {
            0 => m.op(i, Kind::Read, i * block as u64),
            3 => Op::without_data(Tag(i), Kind::Flush, 0, 0),
            _ => m.op(i, Kind::Write { fua: i % 4 == 1 }, i * block as u64),
        })
        .collect();
    let start = Instant::now();
    assert_eq!(line.submit(&ops), 64);
    line.kick();
    rig.step(Duration::from_millis(20));
    line.poll(Instant::now());
    assert!(line.take().is_empty(), "it does not answer");
    for op in &ops[..32] {
        assert_eq!(line.cancel(op.tag), Cancel::Soon);
    }
    assert_eq!(line.poll(Instant::now()), 32);
    for c in line.take() {
        assert_eq!(c.result, Err(BlockError::Cancelled));
        assert!(c.tag.0 < 32);
    }
    line.abandon();
    rig.step(Duration::from_millis(20));
    assert!(
        memories.iter().all(|m| m.get() == mark),
        "a buffer was touched"
    );
    assert!(start.elapsed() < Duration::from_secs(2), "nobody waited");
}
