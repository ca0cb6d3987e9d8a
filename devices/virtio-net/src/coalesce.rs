//! When a driver is told of what was used (virtio 1.3 §5.1.6.5.6).

use std::time::{Duration, Instant};

use crate::settings::Coalescing;

/// A timer is set no further ahead, as it cannot be taken back: a driver that changes its mind all the time would leave any number of them.
const AHEAD: Duration = Duration::from_millis(10);

/// What was used of one queue, and not told yet.
#[derive(Debug)]
pub(crate) struct Coalescer {
    limits: Coalescing,
    /// Entries of the ring: when so many were used, its driver may have nothing left to wait with.
    size: u32,
    frames: u32,
    chains: u32,
    /// When the first of them was used.
    since: Option<Instant>,
    /// When the next timer comes.
    timer: Option<Instant>,
}

impl Coalescer {
    /// Of a ring of so many entries.
    pub(crate) fn new(limits: Coalescing, size: u16) -> Self {
        Self {
            limits,
            size: size.into(),
            frames: 0,
            chains: 0,
            since: None,
            timer: None,
        }
    }

    /// Whether anything is put off. With either limit 0 nothing is.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.limits.max_packets > 1 && self.limits.max_usecs > 0
    }

    /// Other limits are in force. What was counted counts on, and [`Coalescer::is_due`] says what follows.
    pub(crate) fn set(&mut self, limits: Coalescing) {
        self.limits = limits;
    }

    /// So many frames in so many chains were used; says whether the driver is to be told now.
    #[inline]
    pub(crate) fn count(
        &mut self,
        frames: u32,
        chains: u32,
        now: impl FnOnce() -> Instant,
    ) -> bool {
        self.frames = self.frames.saturating_add(frames);
        self.chains = self.chains.saturating_add(chains);
        if self.since.is_none() {
            self.since = Some(now());
        }
        self.is_full()
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.frames >= self.limits.max_packets || self.chains >= self.size
    }

    fn until(&self) -> Option<Instant> {
        let span = Duration::from_micros(self.limits.max_usecs.into());
        self.since.map(|since| since + span)
    }

    /// Something was used that the driver was not told of.
    #[inline]
    pub(crate) fn is_pending(&self) -> bool {
        self.since.is_some()
    }

    /// Whether the driver is to be told of it.
    #[inline]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.until()
            .is_some_and(|until| !self.is_on() || self.is_full() || now >= until)
    }

    /// The driver was told, or does not want to be: the next count begins with the next frame.
    #[inline]
    pub(crate) fn told(&mut self) {
        (self.frames, self.chains, self.since) = (0, 0, None);
    }

    /// Whether a timer is wanted that is not there.
    #[inline]
    pub(crate) fn wants_timer(&self) -> bool {
        let late = |until| self.timer.is_none_or(|timer| timer > until);
        self.until().is_some_and(late)
    }

    /// When a timer is to be set, if one is: it counts as set.
    #[inline]
    pub(crate) fn timer(&mut self, now: Instant) -> Option<Instant> {
        let at = self.until()?.min(now + AHEAD);
        if self.timer.is_some_and(|timer| timer <= at) {
            return None;
        }
        self.timer = Some(at);
        Some(at)
    }

    /// A timer has come.
    pub(crate) fn timer_came(&mut self) {
        self.timer = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_packets: u32, max_usecs: u32) -> Coalescing {
        Coalescing {
            max_packets,
            max_usecs,
        }
    }

    #[test]
    fn the_first_limit_that_is_reached_counts() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut c = Coalescer::new(limits(4, 100), 256);
        assert!(c.is_on() && !c.is_due(at(1_000_000)), "nothing was used");
        assert!(!c.count(1, 1, || at(10)) && !c.count(2, 2, || at(60)));
        assert!(!c.is_due(at(109)) && c.is_due(at(110)), "since the first");
        assert!(c.count(1, 1, || at(70)), "the fourth");
        c.told();
        assert!(!c.is_pending() && !c.is_due(at(1000)));
        // A ring has no more than its entries.
        let mut c = Coalescer::new(limits(u32::MAX, u32::MAX), 8);
        assert!(!c.count(1, 7, || at(0)) && c.count(1, 1, || at(0)));
    }

    #[test]
    fn other_limits_count_at_once() {
        let start = Instant::now();
        for (new, due) in [
            (limits(3, 100), true),
            (limits(0, 100), true),
            (limits(9, 0), true),
            (limits(9, 5), true),
            (limits(9, 7), false),
        ] {
            let mut c = Coalescer::new(limits(8, 100), 256);
            assert!(!c.count(3, 3, || start));
            c.set(new);
            assert_eq!(c.is_due(start + Duration::from_micros(6)), due, "{new:?}");
        }
    }

    #[test]
    fn timers_are_few_and_near() {
        let start = Instant::now();
        let mut c = Coalescer::new(limits(100, u32::MAX), 256);
        assert!(!c.wants_timer() && c.timer(start).is_none());
        c.count(1, 1, || start);
        assert!(c.wants_timer());
        let first = c.timer(start).unwrap();
        assert_eq!(first, start + AHEAD);
        assert!(
            !c.wants_timer() && c.timer(start).is_none(),
            "one is enough"
        );
        c.timer_came();
        assert!(c.wants_timer());
        assert_eq!(c.timer(first), Some(first + AHEAD));
        // A nearer one.
        c.set(limits(100, 50));
        assert!(c.wants_timer());
        assert_eq!(c.timer(start), Some(start + Duration::from_micros(50)));
    }
}
