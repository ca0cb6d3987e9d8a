//! Our device against the plain rust-vmm stack's: split rings whose sizes are powers of two, with a driver
//! that keeps the rules. What it asks for need not be possible.
//!
//! Both must agree exactly: in the status of each request, in all of the guest's memory, in what the
//! volumes were asked for and hold in the end, in the heads that come back, in whether the driver is
//! notified. Where they differ by convention ("Where it differs from our device" in docs/reference.md: the
//! used length, a transfer without data, the first notification) each is held to its own.
//!
//! Scripts are random. The first seed is printed; `BLUFF_TEST_SEED` chooses it, and each script has
//! the next one: what fails can be run again alone. `BLUFF_TEST_LONG=1` runs more of them.

mod pair;
mod recorder;
#[path = "../ring/mod.rs"]
mod ring;
mod script;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use bluff_reactor::Reactor;
use bluff_reference::spec::{feature, request_type};
use bluff_testing::{Chance, times};
use pair::{Choices, DATA, END, Memory, Pair, Piece, SEAM};
use recorder::Shape;
use script::{Allowed, Layout, Request};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status is before it is written.
const UNTOUCHED: u8 = 0xee;
/// Bytes of a request's header.
const HEADER: usize = 16;
/// Most descriptors in a table: SEG_MAX + 2 of our device.
const TABLE: usize = 256;

/// How often each kind of request got each status, for which alone a run that met nothing would pass.
#[derive(Default)]
struct Met {
    statuses: BTreeMap<(&'static str, u8), u64>,
    notified: u64,
    silent: u64,
    over_the_seam: u64,
    tables: u64,
    batches: u64,
    operations: u64,
}

fn name(kind: u32) -> &'static str {
    match kind {
        request_type::IN => "IN",
        request_type::OUT => "OUT",
        request_type::FLUSH => "FLUSH",
        request_type::GET_ID => "GET_ID",
        request_type::DISCARD => "DISCARD",
        request_type::WRITE_ZEROES => "WRITE_ZEROES",
        _ => "unknown",
    }
}

/// Room in the guest's memory, of which each batch begins anew.
struct Room(u64);

impl Room {
    /// `None` where there is no more.
    fn take(&mut self, len: u64, chance: &mut Chance) -> Option<u64> {
        let gap = if chance.percent(50) {
            0
        } else {
            chance.below(40)
        };
        let at = self.0 + gap;
        let end = at + len;
        (end <= END).then(|| {
            self.0 = end;
            at
        })
    }
}

/// Cuts `len` bytes into at most `most` pieces, some of which may be empty.
fn cuts(len: usize, most: usize, chance: &mut Chance) -> Vec<usize> {
    let pieces = match chance.below(20) {
        0 => 1 + chance.below(most as u64) as usize,
        1..6 => most.min(1 + chance.below(12) as usize),
        _ => most.min(1 + chance.below(3) as usize),
    };
    let mut at: Vec<usize> = (1..pieces)
        .map(|_| chance.below(len as u64 + 1) as usize)
        .collect();
    at.extend([0, len]);
    at.sort_unstable();
    at.windows(2).map(|w| w[1] - w[0]).collect()
}

/// A request that was put into the ring.
struct Placed {
    request: Request,
    status_at: u64,
}

/// Puts a request into memory and its chain into the ring; `None` where there is no room.
fn place(
    pair: &mut Pair<'_>,
    request: Request,
    free: &mut Vec<u16>,
    room: &mut Room,
    chance: &mut Chance,
    met: &mut Met,
) -> Option<(u16, Placed)> {
    let before = match request.layout {
        Layout::Direct => 0,
        Layout::Table { before, .. } => usize::from(before),
    };
    let most = match request.layout {
        Layout::Direct => free.len(),
        // Readable and writable bytes have at least a descriptor each.
        Layout::Table { .. } if free.len() > before => TABLE,
        Layout::Table { .. } => 0,
    };
    if most < 2 {
        return None;
    }
    let mut pieces = Vec::new();
    let readable = cuts(request.readable.len(), most / 2, chance);
    let mut data = &request.readable[..];
    for len in readable {
        let at = room.take(len as u64, chance)?;
        let (now, later) = data.split_at(len);
        pair.write(at, now);
        data = later;
        pieces.push(Piece::data(at, len as u32, false));
    }
    let mut status_at = 0;
    for len in cuts(request.writable as usize + 1, most / 2, chance) {
        let at = room.take(len as u64, chance)?;
        // What is not written stays as it is.
        pair.write(at, &vec![UNTOUCHED; len]);
        if len > 0 {
            status_at = at + len as u64 - 1;
        }
        pieces.push(Piece::data(at, len as u32, true));
    }
    met.over_the_seam += pieces
        .iter()
        .filter(|p| p.addr < SEAM && p.addr + u64::from(p.len) > SEAM)
        .count() as u64;
    if let Layout::Table { spare, .. } = request.layout {
        let direct = before.min(pieces.len() - 1);
        let listed = pieces.split_off(direct);
        let entries = (listed.len() + usize::from(spare)).min(TABLE);
        let at = room.take(16 * entries as u64, chance)?;
        // A table begins with its first entry; the others may lie anywhere in it.
        let mut order: Vec<u16> = (1..entries as u16).collect();
        chance.shuffle(&mut order);
        order.insert(0, 0);
        for (i, piece) in listed.iter().enumerate() {
            let next = (i + 1 < listed.len()).then(|| order[i + 1]);
            pair.descriptor(at, order[i], *piece, next);
        }
        pieces.push(Piece::table(at, entries));
        met.tables += 1;
    }
    let slots: Vec<u16> = free.drain(free.len() - pieces.len()..).collect();
    for (i, piece) in pieces.iter().enumerate() {
        pair.descriptor(pair::BASE, slots[i], *piece, slots.get(i + 1).copied());
    }
    Some((slots[0], Placed { request, status_at }))
}

/// The used lengths of a request, each by its own rule.
fn judge(placed: &Placed, ours: u32, theirs: u32, status: u8) {
    let request = &placed.request;
    assert!(
        matches!(status, OK | IOERR | UNSUPP),
        "{status:#x}: {request:?}"
    );
    let written = if status == OK { request.filled } else { 0 };
    // The reference counts the status in any case, and we where what stands before it was written.
    let all = written == request.writable;
    assert_eq!(theirs, written + 1, "status {status}: {request:?}");
    assert_eq!(
        ours,
        written + u32::from(all),
        "status {status}: {request:?}"
    );
}

fn script(seed: u64, reactor: &mut Reactor, memories: &[Memory; 2], met: &mut Met) {
    let chance = &mut Chance::new(seed);
    let block_size = chance.one_of(&[512, 512, 4096]);
    let shape = Shape {
        block_size,
        size: 256 << 10,
        volatile: chance.percent(60),
        read_only: chance.percent(10),
    };
    let queue_size = 1u16 << chance.below(9);
    let choices = Choices {
        shape,
        queue_size,
        index: match chance.below(3) {
            0 => 0,
            1 => chance.one_of(&[0xfff8, 0xffff]),
            _ => chance.word() as u16,
        },
        event_idx: chance.percent(50),
        // Chains have two descriptors at least.
        indirect: queue_size < 2 || chance.percent(70),
        flush: chance.percent(80),
        config_wce: chance.percent(60),
    };
    let mut pair = Pair::new(reactor, memories, choices, chance);
    let has = |bit: u64| pair.features & bit != 0;
    let allowed = Allowed {
        shape,
        flush: has(feature::FLUSH),
        ranges: has(feature::DISCARD | feature::WRITE_ZEROES),
        indirect: choices.indirect,
    };
    let (event_idx, mode) = (has(feature::EVENT_IDX), has(feature::CONFIG_WCE));
    if mode {
        // Rings begin anywhere here. Ours takes that for a driver that was there before it, which may have any
        // mode in mind until it says.
        pair.set_writeback(allowed.flush);
    }
    for _ in 0..1 + chance.below(6) {
        if chance.percent(15) {
            pair.restart();
        }
        if mode && chance.percent(30) {
            // Write-back is for who can flush.
            pair.set_writeback(allowed.flush && chance.percent(50));
        }
        batch(
            &mut pair,
            &allowed,
            choices.queue_size,
            event_idx,
            chance,
            met,
        );
    }
    pair.same_contents();
    pair.stop();
}

fn batch(
    pair: &mut Pair<'_>,
    allowed: &Allowed,
    queue_size: u16,
    event_idx: bool,
    chance: &mut Chance,
    met: &mut Met,
) {
    let mut free: Vec<u16> = (0..queue_size).collect();
    chance.shuffle(&mut free);
    let mut room = Room(match chance.below(3) {
        0 => DATA,
        1 => DATA + chance.below(1000),
        _ => SEAM - chance.below(20_000),
    });
    let mut placed = BTreeMap::new();
    let most = match chance.below(4) {
        0 => u64::MAX,
        _ => 1 + chance.below(10),
    };
    while (placed.len() as u64) < most {
        let request = allowed.request(chance);
        let Some((head, request)) = place(pair, request, &mut free, &mut room, chance, met) else {
            break;
        };
        pair.driver(|ring| ring.offer(head));
        placed.insert(head, request);
    }
    if placed.is_empty() {
        return;
    }
    let count = placed.len() as u16;
    let wish = if event_idx {
        let after = chance.below(u64::from(count) + 2) as u16;
        pair.driver(|ring| ring.set_used_event(after));
        after
    } else {
        let silent = chance.percent(40);
        pair.driver(|ring| ring.set_no_interrupt(silent));
        u16::from(silent)
    };
    let certain = pair.notifies();
    let [(ours, notified), (theirs, theirs_notified)] = pair.serve(count);
    let heads = |used: &BTreeMap<u16, u32>| used.keys().copied().collect::<Vec<_>>();
    assert_eq!(heads(&ours), heads(&theirs));
    assert_eq!(heads(&ours), placed.keys().copied().collect::<Vec<_>>());
    let expected = theirs_notified || certain;
    assert_eq!(
        notified, expected,
        "{count} chains, event index: {event_idx}, {wish}"
    );
    *(if notified {
        &mut met.notified
    } else {
        &mut met.silent
    }) += 1;
    for (head, placed) in &placed {
        let request = &placed.request;
        let [mut status, theirs_status] = pair.bytes(placed.status_at);
        let transfer = matches!(request.kind, request_type::IN | request_type::OUT);
        let data = request.writable as usize + request.readable.len().saturating_sub(HEADER);
        if transfer && data == 0 && theirs_status == OK {
            // Nothing to do for the one, an error for the other.
            assert_eq!(status, IOERR, "{request:?}");
            pair.write(placed.status_at, &[OK]);
            status = OK;
        }
        assert_eq!(status, theirs_status, "{request:?}");
        judge(placed, ours[head], theirs[head], status);
        *met.statuses
            .entry((name(request.kind), status))
            .or_default() += 1;
    }
    pair.same_memory();
    met.operations += pair.same_operations() as u64;
    met.batches += 1;
}

/// Names the script that fails.
struct Tell(u64);

impl Drop for Tell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "BLUFF_TEST_SEED={} begins with the script that failed",
                self.0
            );
        }
    }
}

#[test]
fn well_formed_scripts_agree_exactly() {
    let scripts = times(2000, 100_000);
    let first = match std::env::var("BLUFF_TEST_SEED") {
        Ok(seed) => seed.parse().expect("BLUFF_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one(std::process::id()),
    };
    println!("the first of {scripts} seeds is {first}");
    let start = Instant::now();
    let mut reactor = pair::reactor();
    let memories = [Memory::new(), Memory::new()];
    let mut met = Met::default();
    for i in 0..scripts {
        let seed = first.wrapping_add(i);
        let _tell = Tell(seed);
        script(seed, &mut reactor, &memories, &mut met);
    }
    println!(
        "{} batches, {} operations, {} tables, {} buffers over the seam, {} notified, {} not, in {:?}",
        met.batches,
        met.operations,
        met.tables,
        met.over_the_seam,
        met.notified,
        met.silent,
        start.elapsed()
    );
    for ((kind, status), count) in &met.statuses {
        println!("{kind:>12} {status} {count}");
    }
    let expected = [
        ("IN", &[OK, IOERR][..]),
        ("OUT", &[OK, IOERR]),
        ("FLUSH", &[OK, IOERR]),
        ("GET_ID", &[OK, IOERR]),
        ("DISCARD", &[OK, IOERR, UNSUPP]),
        ("WRITE_ZEROES", &[OK, IOERR, UNSUPP]),
        ("unknown", &[IOERR, UNSUPP]),
    ];
    let expected: Vec<_> = expected
        .iter()
        .flat_map(|(kind, statuses)| statuses.iter().map(|s| (*kind, *s)))
        .collect();
    let found: Vec<_> = met.statuses.keys().copied().collect();
    let mut sorted = expected.clone();
    sorted.sort_unstable();
    assert_eq!(
        found, sorted,
        "each kind of request, with each answer that it can have"
    );
    let counts = [
        met.operations,
        met.tables,
        met.over_the_seam,
        met.notified,
        met.silent,
    ];
    assert!(counts.iter().all(|n| *n > 100), "{counts:?}");
}
