//! Rates: so much in a time, and so much at once.

use std::time::{Duration, Instant};

/// How much may pass. The unit (bits, frames) is its user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In a second; not 0.
    pub per_second: u64,
    /// At once, after a pause.
    pub burst: u64,
}

impl Rate {
    /// So much in a second, with a burst of `span` of it.
    pub fn new(per_second: u64, span: Duration) -> Self {
        let burst = u128::from(per_second) * span.as_nanos() / 1_000_000_000;
        Self {
            per_second: per_second.max(1),
            burst: u64::try_from(burst).unwrap_or(u64::MAX).max(1),
        }
    }
}

/// A bucket of tokens. It may be overdrawn once: what comes together is not torn apart, and is paid for before the next.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: Rate,
    /// What is in it, and what is owed, in units of a token's billionth.
    level: i128,
    filled: Instant,
}

/// Parts of a token: what one of them takes at one per second is a nanosecond.
const PARTS: i128 = 1_000_000_000;

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            level: i128::from(rate.burst) * PARTS,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        // A clock that stands still or steps back gives nothing.
        let span = now.saturating_duration_since(self.filled);
        if !span.is_zero() {
            let more = i128::from(self.rate.per_second).saturating_mul(span.as_nanos() as i128);
            let full = i128::from(self.rate.burst) * PARTS;
            self.level = self.level.saturating_add(more).min(full);
            self.filled = now;
        }
    }

    /// Whether something may pass now.
    ///
    /// # Errors
    /// When it may.
    pub fn ready(&mut self, now: Instant) -> Result<(), Instant> {
        self.fill(now);
        if self.level > 0 {
            return Ok(());
        }
        let missing = (1 - self.level).div_euclid(i128::from(self.rate.per_second)) + 1;
        let missing = u64::try_from(missing).unwrap_or(u64::MAX);
        // From when it was filled: that is now, or later by a clock that is ahead of this one.
        Err(self.filled.max(now) + Duration::from_nanos(missing))
    }

    /// Takes `n` out, whatever is in it.
    pub fn take(&mut self, n: u64) {
        self.level -= i128::from(n) * PARTS;
    }

    /// Takes `n` out where something may pass now, and says whether it did.
    pub fn admit(&mut self, now: Instant, n: u64) -> bool {
        let admitted = self.ready(now).is_ok();
        if admitted {
            self.take(n);
        }
        admitted
    }

    /// Another rate from now on. What is owed is still owed.
    pub fn set_rate(&mut self, rate: Rate, now: Instant) {
        self.fill(now);
        self.rate = rate;
        self.level = self.level.min(i128::from(rate.burst) * PARTS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Over any span, no more passes than its rate allows, the burst and one portion; and whoever waits as told passes.
        #[test]
        fn no_more_than_the_rate(
            per_second in 1u64..100_000_000_000,
            burst_us in 1u64..100_000,
            portions in prop::collection::vec((1u64..1_000_000, 0u64..1_000_000), 1..200),
        ) {
            let start = Instant::now();
            let rate = Rate::new(per_second, Duration::from_micros(burst_us));
            let mut bucket = Bucket::new(rate, start);
            let (mut now, mut passed, mut largest) = (start, 0u128, 0u64);
            for (n, wait) in portions {
                now += Duration::from_nanos(wait);
                if let Err(at) = bucket.ready(now) {
                    prop_assert!(at > now);
                    if let Some(before) = at.checked_sub(Duration::from_nanos(2)).filter(|b| *b > now) {
                        prop_assert!(bucket.clone().ready(before).is_err(), "not earlier");
                    }
                    now = at;
                    prop_assert!(bucket.ready(now).is_ok(), "as it said");
                }
                prop_assert!(bucket.admit(now, n));
                passed += u128::from(n);
                largest = largest.max(n);
                let span = (now - start).as_nanos();
                let allowed = u128::from(per_second) * span / 1_000_000_000 + u128::from(rate.burst);
                prop_assert!(passed <= allowed + u128::from(largest) + 1);
            }
        }
    }

    #[test]
    fn a_new_rate_forgives_nothing() {
        let start = Instant::now();
        let rate = Rate {
            per_second: 1000,
            burst: 10,
        };
        let mut bucket = Bucket::new(rate, start);
        assert!(bucket.admit(start, 1010));
        assert!(!bucket.admit(start, 1));
        bucket.set_rate(
            Rate {
                per_second: 100,
                burst: 10,
            },
            start,
        );
        assert!(!bucket.admit(start + Duration::from_secs(9), 1));
        assert!(bucket.admit(start + Duration::from_millis(10_010), 1));
        // A clock that steps back.
        assert!(!bucket.admit(start, 1));
    }
}
