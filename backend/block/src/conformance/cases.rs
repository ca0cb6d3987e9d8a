//! Data, boundaries, order, discard, zeroes, size.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bluff_testing::Chance;

use crate::{BlockError, Kind, Op, Tag, Volume, VolumeEvent};

use super::{Line, Memory, Profile, Rig};

pub(super) type Case = fn(&Profile, &Arc<dyn Volume>);

/// The part of a volume that the cases work on, in bytes.
const AREA: u64 = 4 << 20;
const WRITE: Kind = Kind::Write { fua: false };

pub(super) fn shape(_: &Profile, volume: &Arc<dyn Volume>) {
    let g = volume.geometry();
    let block = u64::from(g.block_size);
    assert!([512, 4096].contains(&g.block_size));
    assert!(g.size.is_multiple_of(block));
    assert!(g.physical_block_size.is_power_of_two() && g.physical_block_size >= g.block_size);
    let transfer = u64::from(g.max_transfer);
    assert!(transfer >= 1 << 16 && transfer.is_multiple_of(block));
    if let Some(d) = g.discard {
        assert!(d.max > 0 && d.max.is_multiple_of(block));
        assert!(d.granularity >= g.block_size && d.granularity.is_multiple_of(g.block_size));
    }
    if let Some(z) = g.write_zeroes {
        assert!(z.max > 0 && z.max.is_multiple_of(block));
    }
    assert!(volume.max_channels() > 0);
}

/// Reads `len` bytes at `offset` with buffers of odd lengths.
pub(super) fn read(rig: &mut Rig, line: &mut Line, offset: u64, len: usize) -> Vec<u8> {
    let memory = Memory::random(len, &mut Chance::new(offset ^ len as u64));
    let result = rig.one(line, memory.op(77, Kind::Read, offset));
    assert_eq!(result, Ok(()), "read of {len} at {offset}");
    memory.get()
}

/// Writes `bytes` at `offset` with buffers of odd lengths.
pub(super) fn write(rig: &mut Rig, line: &mut Line, offset: u64, bytes: &[u8], fua: bool) {
    let memory = Memory::holding(bytes, &mut Chance::new(offset + 1));
    let result = rig.one(line, memory.op(78, Kind::Write { fua }, offset));
    assert_eq!(result, Ok(()), "write of {} at {offset}", bytes.len());
    assert!(memory.get() == bytes, "a write changed its buffers");
}

/// Random writes and reads at depth, against a model in memory.
pub(super) fn data(profile: &Profile, volume: &Arc<dyn Volume>) {
    let g = volume.geometry();
    let block = u64::from(g.block_size);
    let mut rig = Rig::new(profile.uring);
    let mut lines = [rig.open(&**volume)].into_iter().collect::<Vec<_>>();
    if volume.max_channels() > 1 {
        lines.push(rig.open(&**volume));
    }
    let random = &mut Chance::new(1);
    let mut model = random.bytes(AREA as usize);
    let piece = (AREA as usize).min(g.max_transfer as usize);
    for (i, part) in model.chunks(piece).enumerate() {
        write(&mut rig, &mut lines[0], (i * piece) as u64, part, false);
    }
    for round in 0..60 {
        // Operations of one batch never overlap: each has a lane of its own.
        let depth = [1, 2, 8, 32][round % 4];
        let lane = AREA / depth / block;
        let mut batch = Vec::new();
        for i in 0..depth {
            let most = lane.min(u64::from(g.max_transfer) / block);
            let blocks = match random.below(8) {
                0 => most,
                _ => 1 + random.below(most.min(64)),
            };
            let at = (i * lane + random.below(lane - blocks + 1)) * block;
            let range = at as usize..(at + blocks * block) as usize;
            let is_write = random.below(2) == 0;
            let memory = if is_write {
                let bytes = random.bytes(range.len());
                model[range.clone()].copy_from_slice(&bytes);
                Memory::holding(&bytes, random)
            } else {
                Memory::random(range.len(), random)
            };
            let fua = random.below(4) == 0;
            let kind = if is_write {
                Kind::Write { fua }
            } else {
                Kind::Read
            };
            batch.push((memory, kind, at, range));
        }
        let ops: Vec<Op> = (0u64..)
            .zip(&batch)
            .map(|(tag, (m, kind, at, _))| m.op(tag, *kind, *at))
            .collect();
        let n = lines.len();
        let results = rig.run(&mut lines[round % n], &ops);
        let mut tags: Vec<u64> = results.iter().map(|c| c.tag.0).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..depth).collect::<Vec<_>>(), "each completed once");
        assert!(results.iter().all(|c| c.result.is_ok()), "{results:?}");
        for (memory, kind, at, range) in &batch {
            if *kind == Kind::Read && profile.keeps_data {
                assert!(memory.get() == model[range.clone()], "read at {at}");
            } else {
                memory.get();
            }
        }
    }
    if profile.keeps_data {
        for at in (0..AREA).step_by(piece) {
            let len = piece.min((AREA - at) as usize);
            let got = read(&mut rig, &mut lines[0], at, len);
            assert!(got == model[at as usize..at as usize + len], "all at {at}");
        }
    }
}

/// The first block, the last one, and what is beyond.
pub(super) fn boundaries(profile: &Profile, volume: &Arc<dyn Volume>) {
    let g = volume.geometry();
    let block = u64::from(g.block_size);
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    let random = &mut Chance::new(2);
    for at in [0, g.size - block] {
        let bytes = random.bytes(block as usize);
        write(&mut rig, &mut line, at, &bytes, false);
        let got = read(&mut rig, &mut line, at, block as usize);
        assert!(!profile.keeps_data || got == bytes);
    }
    let bytes = random.bytes(block as usize * 2);
    write(&mut rig, &mut line, g.size - 2 * block, &bytes, true);
    // A submitter checks; what slips through (the volume was made smaller) is an error and nothing
    // else.
    let memory = Memory::holding(&bytes, random);
    for at in [g.size - block, g.size, g.size + block, u64::MAX - block + 1] {
        for kind in [Kind::Read, WRITE] {
            let got = rig.one(&mut line, memory.op(1, kind, at));
            assert_eq!(got, Err(BlockError::OutOfRange), "{kind:?} at {at}");
        }
    }
    let kinds = [
        g.discard.map(|_| Kind::Discard),
        g.write_zeroes.map(|_| Kind::WriteZeroes {
            unmap: true,
            fua: false,
        }),
    ];
    for kind in kinds.into_iter().flatten() {
        let got = rig.plain(&mut line, kind, g.size - block, 2 * block);
        assert_eq!(got, Err(BlockError::OutOfRange), "{kind:?}");
    }
    let got = read(&mut rig, &mut line, g.size - 2 * block, 2 * block as usize);
    assert!(!profile.keeps_data || got == bytes);
    assert_eq!(volume.geometry(), g, "nothing changed its shape");
}

/// A flush covers writes that were completed on another channel, and goes with others in flight.
pub(super) fn flush(profile: &Profile, volume: &Arc<dyn Volume>) {
    let block = volume.geometry().block_size as usize;
    let mut rig = Rig::new(profile.uring);
    let mut a = rig.open(&**volume);
    assert_eq!(rig.plain(&mut a, Kind::Flush, 0, 0), Ok(()));
    let random = &mut Chance::new(3);
    let bytes = random.bytes(16 * block);
    write(&mut rig, &mut a, 0, &bytes, false);
    if volume.max_channels() > 1 {
        let mut b = rig.open(&**volume);
        assert_eq!(rig.plain(&mut b, Kind::Flush, 0, 0), Ok(()));
        let got = read(&mut rig, &mut b, 0, bytes.len());
        assert!(!profile.keeps_data || got == bytes);
    }
    let memories: Vec<_> = (0..16)
        .map(|_| Memory::holding(&random.bytes(block), random))
        .collect();
    let mut ops: Vec<Op> = (0u64..)
        .zip(&memories)
        .map(|(i, m)| m.op(i, Kind::Write { fua: i % 3 == 0 }, i * block as u64))
        .collect();
    for i in 0..4 {
        ops.insert(
            i * 4,
            Op::without_data(Tag(100 + i as u64), Kind::Flush, 0, 0),
        );
    }
    let results = rig.run(&mut a, &ops);
    assert_eq!(results.len(), ops.len());
    assert!(results.iter().all(|c| c.result.is_ok()), "{results:?}");
    if profile.keeps_data {
        for (i, m) in memories.iter().enumerate() {
            assert!(read(&mut rig, &mut a, (i * block) as u64, block) == m.get());
        }
    }
}

/// Channels on several threads at once: what one wrote and told, the others see.
pub(super) fn threads(profile: &Profile, volume: &Arc<dyn Volume>) {
    let threads = volume.max_channels().min(3) as u64;
    let span = AREA / 4;
    std::thread::scope(|s| {
        let (tx, rx) = std::sync::mpsc::channel();
        for t in 0..threads {
            let tx = tx.clone();
            s.spawn(move || {
                let mut rig = Rig::new(profile.uring);
                let mut line = rig.open(&**volume);
                let random = &mut Chance::new(40 + t);
                for round in 0..20 {
                    let len = 4096 * (1 + random.below(16)) as usize;
                    let at = t * span + random.below((span - len as u64) / 4096) * 4096;
                    let bytes = random.bytes(len);
                    write(&mut rig, &mut line, at, &bytes, round % 4 == 0);
                    assert_eq!(rig.plain(&mut line, Kind::Flush, 0, 0), Ok(()));
                    if round == 19 {
                        let _ = tx.send((at, bytes));
                    }
                }
            });
        }
        drop(tx);
        let told: Vec<_> = rx.iter().collect();
        assert_eq!(told.len() as u64, threads);
        if volume.max_channels() as u64 > threads {
            let mut rig = Rig::new(profile.uring);
            let mut line = rig.open(&**volume);
            for (at, bytes) in told {
                let got = read(&mut rig, &mut line, at, bytes.len());
                assert!(!profile.keeps_data || got == bytes, "from another thread");
            }
        }
    });
}

/// Ranges of blocks to clear, for a discard or for zeroes.
fn ranges(block: u64, max: u64) -> Vec<(u64, u64)> {
    let random = &mut Chance::new(5);
    let mut all = vec![
        (0, block),
        (block, 64 << 10),
        (1 << 20, 1 << 20),
        (3 * block, 9 * block),
    ];
    all.extend((0..24).map(|_| {
        let len = (1 + random.below(300)) * block;
        (random.below((AREA - len) / block) * block, len)
    }));
    all.retain(|r| r.1 <= max && r.0 + r.1 <= AREA);
    all
}

fn clear(profile: &Profile, volume: &Arc<dyn Volume>, kinds: &[Kind], max: u64, zeroes: bool) {
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    let block = u64::from(volume.geometry().block_size);
    let random = &mut Chance::new(6);
    for (i, (at, len)) in ranges(block, max).into_iter().enumerate() {
        // A block before and one after, where there are any.
        let from = at.saturating_sub(block);
        let to = (at + len + block).min(AREA);
        let bytes = random.bytes((to - from) as usize);
        write(&mut rig, &mut line, from, &bytes, false);
        let kind = kinds[i % kinds.len()];
        assert_eq!(
            rig.plain(&mut line, kind, at, len),
            Ok(()),
            "{kind:?} {at}+{len}"
        );
        let got = read(&mut rig, &mut line, from, bytes.len());
        if profile.keeps_data {
            let (a, b) = ((at - from) as usize, (at + len - from) as usize);
            assert!(
                got[..a] == bytes[..a],
                "{kind:?} {at}+{len}: the block before"
            );
            assert!(
                got[b..] == bytes[b..],
                "{kind:?} {at}+{len}: the block after"
            );
            let cleared = got[a..b].iter().all(|&x| x == 0);
            assert!(!zeroes || cleared, "{kind:?} {at}+{len}: zeroes");
        }
        let again = random.bytes(len as usize);
        write(&mut rig, &mut line, at, &again, false);
        let got = read(&mut rig, &mut line, at, again.len());
        assert!(!profile.keeps_data || got == again, "written again");
    }
}

pub(super) fn discard(profile: &Profile, volume: &Arc<dyn Volume>) {
    if let Some(limits) = volume.geometry().discard {
        clear(profile, volume, &[Kind::Discard], limits.max, false);
    }
}

pub(super) fn zeroes(profile: &Profile, volume: &Arc<dyn Volume>) {
    if let Some(limits) = volume.geometry().write_zeroes {
        let kind = |unmap, fua| Kind::WriteZeroes { unmap, fua };
        let kinds = [
            kind(false, false),
            kind(true, false),
            kind(false, true),
            kind(true, true),
        ];
        clear(profile, volume, &kinds, limits.max, true);
    }
}

/// Larger, smaller, and as it was; what comes back is empty.
pub(super) fn resize(profile: &Profile, volume: &Arc<dyn Volume>) {
    let g = volume.geometry();
    if !profile.resizes {
        assert_eq!(volume.resize(g.size * 2), Err(BlockError::Unsupported));
        return;
    }
    let block = u64::from(g.block_size);
    let events = Arc::new(AtomicUsize::new(0));
    let count = events.clone();
    let listening = volume.events().subscribe(move |event| {
        assert_eq!(event, VolumeEvent::Resized);
        count.fetch_add(1, Ordering::SeqCst);
    });
    let mut rig = Rig::new(profile.uring);
    let mut line = rig.open(&**volume);
    for wrong in [0, g.size + 1, block / 2] {
        assert_eq!(volume.resize(wrong), Err(BlockError::Invalid), "{wrong}");
    }
    assert_eq!(events.load(Ordering::SeqCst), 0);
    let random = &mut Chance::new(7);
    let bytes = random.bytes(8 * block as usize);
    // Across the old end.
    let across = g.size - 4 * block;
    volume.resize(g.size + (1 << 20)).expect("larger");
    assert_eq!(volume.geometry().size, g.size + (1 << 20));
    assert_eq!(events.load(Ordering::SeqCst), 1);
    let fresh = read(&mut rig, &mut line, g.size, 1 << 16);
    assert!(
        !profile.keeps_data || fresh.iter().all(|&b| b == 0),
        "new part is empty"
    );
    write(&mut rig, &mut line, across, &bytes, true);
    let got = read(&mut rig, &mut line, across, bytes.len());
    assert!(!profile.keeps_data || got == bytes, "across the old end");
    volume.resize(g.size).expect("smaller");
    assert_eq!(events.load(Ordering::SeqCst), 2);
    let memory = Memory::random(bytes.len(), random);
    for kind in [Kind::Read, WRITE] {
        let got = rig.one(&mut line, memory.op(1, kind, across));
        assert_eq!(got, Err(BlockError::OutOfRange));
    }
    volume.resize(g.size + (1 << 20)).expect("larger again");
    let mut other = rig.open(&**volume);
    for line in [&mut line, &mut other] {
        let got = read(&mut rig, line, across, bytes.len());
        if profile.keeps_data {
            let half = bytes.len() / 2;
            assert!(got[..half] == bytes[..half], "what was kept");
            assert!(
                got[half..].iter().all(|&b| b == 0),
                "what was cut off is gone"
            );
        }
    }
    drop(listening);
    volume.resize(g.size).expect("as it was");
    assert_eq!(events.load(Ordering::SeqCst), 3, "a listener that has gone");
}
