//! What a controller counts, for its host (SMART / Health Information) and for an operator; and what the host has set for its workers.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::controller::Core;
use crate::counters::QueueCounters;

/// Sums of [`QueueCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// As in [`QueueCounters`].
    pub reads: u64,
    /// As in [`QueueCounters`].
    pub writes: u64,
    /// As in [`QueueCounters`].
    pub bytes_read: u64,
    /// As in [`QueueCounters`].
    pub bytes_written: u64,
    /// As in [`QueueCounters`].
    pub flushes: u64,
    /// As in [`QueueCounters`].
    pub discards: u64,
    /// As in [`QueueCounters`].
    pub media_errors: u64,
    /// As in [`QueueCounters`].
    pub errors: u64,
}

impl Totals {
    fn add(&mut self, q: &QueueCounters) {
        let add = |sum: &mut u64, cell: &AtomicU64| {
            *sum = sum.wrapping_add(cell.load(Ordering::Relaxed));
        };
        add(&mut self.reads, &q.reads);
        add(&mut self.writes, &q.writes);
        add(&mut self.bytes_read, &q.bytes_read);
        add(&mut self.bytes_written, &q.bytes_written);
        add(&mut self.flushes, &q.flushes);
        add(&mut self.discards, &q.discards);
        add(&mut self.media_errors, &q.media_errors);
        add(&mut self.errors, &q.errors);
    }
}

/// Counters of a controller. They outlive its resets.
#[derive(Debug)]
pub struct Counters {
    since: Instant,
    /// Seconds before that, in other processes.
    earlier: AtomicU64,
    queues: Mutex<Queues>,
    /// Microseconds with I/O commands in flight, as far as workers have added them up.
    pub busy_us: AtomicU64,
    /// Until when they have: microseconds after `since`.
    busy_until: AtomicU64,
    /// Entries of the error log, ever.
    pub error_entries: AtomicU64,
    /// How often it was powered on: attached to a host.
    pub power_cycles: AtomicU64,
    /// How often its host went without a shutdown.
    pub unsafe_shutdowns: AtomicU64,
    /// The card's temperature in kelvins, where it is known; 0: it is not.
    pub kelvins: AtomicU16,
    /// Available spare of the storage in percent, and where it becomes too little.
    pub spare: AtomicU8,
    /// As above.
    pub spare_threshold: AtomicU8,
    /// Whose they are.
    controller: OnceLock<Weak<Core>>,
}

#[derive(Debug, Default)]
struct Queues {
    /// By the identifier of their submission queue.
    running: Vec<(u16, Arc<QueueCounters>)>,
    /// Of workers that have gone.
    ended: Totals,
}

impl Counters {
    /// All zero, powered on once, now.
    pub fn new(now: Instant) -> Self {
        Self {
            since: now,
            earlier: AtomicU64::new(0),
            queues: Mutex::default(),
            busy_us: AtomicU64::new(0),
            busy_until: AtomicU64::new(0),
            error_entries: AtomicU64::new(0),
            power_cycles: AtomicU64::new(1),
            unsafe_shutdowns: AtomicU64::new(0),
            kelvins: AtomicU16::new(0),
            spare: AtomicU8::new(100),
            spare_threshold: AtomicU8::new(0),
            controller: OnceLock::new(),
        }
    }

    /// Whom [`Counters::health_changed`] tells.
    pub(crate) fn belong_to(&self, controller: Weak<Core>) {
        let _ = self.controller.set(controller);
    }

    /// The temperature or the spare is another: where that is a warning the host hears of it now, and not with its next admin command.
    pub fn health_changed(&self) {
        if let Some(core) = self.controller.get().and_then(Weak::upgrade) {
            core.admin.wake();
        }
    }

    /// Counters for a new submission queue. They are part of the sums for ever; whoever writes them drops them at its end.
    pub fn queue(&self, qid: u16) -> Arc<QueueCounters> {
        let counters = Arc::new(QueueCounters::default());
        let queues = &mut *self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = &mut queues.ended;
        queues.running.retain(|(_, q)| {
            let runs = Arc::strong_count(q) > 1;
            if !runs {
                ended.add(q);
            }
            runs
        });
        queues.running.push((qid, counters.clone()));
        counters
    }

    /// The sums over all workers, those that have ended among them.
    pub fn totals(&self) -> Totals {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let mut totals = queues.ended;
        queues.running.iter().for_each(|(_, q)| totals.add(q));
        totals
    }

    /// The submission queues that run, by identifier.
    pub fn running(&self) -> Vec<(u16, Arc<QueueCounters>)> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let running = queues.running.iter();
        running
            .filter(|(_, q)| Arc::strong_count(q) > 1)
            .cloned()
            .collect()
    }

    /// The function was reset as by its power; `safe`: the host had shut it down before.
    pub(crate) fn power_cycled(&self, safe: bool) {
        self.power_cycles.fetch_add(1, Ordering::Relaxed);
        self.unsafe_shutdowns
            .fetch_add(u64::from(!safe), Ordering::Relaxed);
    }

    /// A worker had commands in flight from then until then. What others have said of that time is not counted twice; so workers that stay busy say so from
    /// time to time.
    pub(crate) fn was_busy(&self, from: Instant, until: Instant) {
        let us = |at: Instant| at.saturating_duration_since(self.since).as_micros() as u64;
        let (from, until) = (us(from), us(until));
        let counted = self.busy_until.fetch_max(until, Ordering::Relaxed);
        let more = until.saturating_sub(from.max(counted));
        if more > 0 {
            self.busy_us.fetch_add(more, Ordering::Relaxed);
        }
    }

    fn seconds(&self, now: Instant) -> u64 {
        let here = now.saturating_duration_since(self.since).as_secs();
        self.earlier.load(Ordering::Relaxed).saturating_add(here)
    }

    /// Whole hours since it was made.
    pub fn hours(&self, now: Instant) -> u64 {
        self.seconds(now) / 3600
    }

    /// As [`Counters::restore`] takes it.
    pub(crate) fn save(&self, now: Instant) -> SavedCounters {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        SavedCounters {
            seconds: self.seconds(now),
            totals: self.totals(),
            busy_us: get(&self.busy_us),
            error_entries: get(&self.error_entries),
            power_cycles: get(&self.power_cycles),
            unsafe_shutdowns: get(&self.unsafe_shutdowns),
        }
    }

    /// Goes on with what another process has counted.
    pub(crate) fn restore(&self, saved: &SavedCounters) {
        let set = |cell: &AtomicU64, value| cell.store(value, Ordering::Relaxed);
        set(&self.earlier, saved.seconds);
        set(&self.busy_us, saved.busy_us);
        set(&self.error_entries, saved.error_entries);
        set(&self.power_cycles, saved.power_cycles);
        set(&self.unsafe_shutdowns, saved.unsafe_shutdowns);
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.ended = saved.totals;
    }
}

/// [`Counters`] for another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedCounters {
    seconds: u64,
    totals: Totals,
    busy_us: u64,
    error_entries: u64,
    power_cycles: u64,
    unsafe_shutdowns: u64,
}

/// What a host has set by features, for the workers. The admin side writes it, workers read it (relaxed: each value is for itself, and holds for the commands that
/// a worker takes after the Set Features command was completed, as the host's next doorbell comes after that).
#[derive(Debug)]
pub(crate) struct Settings {
    /// Writes may stay in a volatile cache. Where false, each write is done as if FUA were set.
    pub write_cache: AtomicBool,
    /// Aggregation threshold (bits 7:0, zero's based) and time (bits 15:8, 100 µs), for I/O completion queues; 0: an interrupt for each batch.
    pub coalescing: AtomicU16,
    /// Coalescing does not hold for these vectors, by number.
    pub uncoalesced: Box<[AtomicBool]>,
    /// Arbitration: bits 2:0 are the burst, as a power of two; 7: no limit.
    pub arbitration: AtomicU32,
}

impl Settings {
    /// As after a reset; the cache is off until it is known that there is one.
    pub fn new(vectors: u16) -> Self {
        Self {
            write_cache: AtomicBool::new(false),
            coalescing: AtomicU16::new(0),
            uncoalesced: (0..vectors).map(|_| AtomicBool::new(false)).collect(),
            arbitration: AtomicU32::new(7),
        }
    }

    /// As after a reset.
    pub fn reset(&self, write_cache: bool) {
        self.write_cache.store(write_cache, Ordering::Relaxed);
        self.coalescing.store(0, Ordering::Relaxed);
        self.arbitration.store(7, Ordering::Relaxed);
        for vector in &self.uncoalesced {
            vector.store(false, Ordering::Relaxed);
        }
    }

    /// As [`Settings::restore`] takes it.
    pub fn save(&self) -> SavedSettings {
        let vectors = (0..).zip(&self.uncoalesced);
        let off = vectors.filter(|(_, off)| off.load(Ordering::Relaxed));
        SavedSettings {
            write_cache: self.write_cache.load(Ordering::Relaxed),
            coalescing: self.coalescing.load(Ordering::Relaxed),
            uncoalesced: off.map(|(vector, _)| vector).collect(),
            arbitration: self.arbitration.load(Ordering::Relaxed),
        }
    }

    /// What a host has set in another process.
    pub fn restore(&self, saved: &SavedSettings) {
        self.reset(saved.write_cache);
        self.coalescing.store(saved.coalescing, Ordering::Relaxed);
        self.arbitration.store(saved.arbitration, Ordering::Relaxed);
        for vector in &saved.uncoalesced {
            if let Some(off) = self.uncoalesced.get(usize::from(*vector)) {
                off.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// [`Settings`] for another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedSettings {
    write_cache: bool,
    coalescing: u16,
    uncoalesced: Vec<u16>,
    arbitration: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::add;

    #[test]
    fn time_is_busy_once_however_many_are() {
        let begin = Instant::now();
        let counters = Counters::new(begin);
        let at = |ms| begin + std::time::Duration::from_millis(ms);
        // Two that overlap, one inside of them, a gap, and one more.
        for (from, until) in [(1, 4), (2, 6), (3, 5), (10, 12)] {
            counters.was_busy(at(from), at(until));
        }
        assert_eq!(counters.busy_us.load(Ordering::Relaxed), 5000 + 2000);
    }

    #[test]
    fn what_a_worker_counted_stays_when_it_has_gone() {
        let counters = Counters::new(Instant::now());
        for n in 1..=5 {
            let queue = counters.queue(1);
            add(&queue.reads, n);
            add(&queue.media_errors, 1);
        }
        let running = counters.queue(1);
        add(&running.bytes_written, 4096);
        let totals = Totals {
            reads: 15,
            media_errors: 5,
            bytes_written: 4096,
            ..Totals::default()
        };
        assert_eq!(counters.totals(), totals);
        assert_eq!(counters.queues.lock().unwrap().running.len(), 1, "folded");
        assert_eq!(counters.running().len(), 1);
    }
}
