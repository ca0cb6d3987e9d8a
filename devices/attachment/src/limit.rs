//! At most so many log lines in a while, as a front end can cause them at will.

use std::fmt::Display;
use std::time::{Duration, Instant};

const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

/// Counts log lines.
#[derive(Debug, Default)]
pub struct Limit {
    window: Option<Instant>,
    lines: u32,
}

impl Limit {
    /// Whether a line may be logged now; then also how many were not since the last one.
    pub fn allows(&mut self, now: Instant) -> Option<u32> {
        if self
            .window
            .is_none_or(|w| now.saturating_duration_since(w) >= WINDOW)
        {
            let missed = self.lines.saturating_sub(LINES);
            *self = Self {
                window: Some(now),
                lines: 1,
            };
            return Some(missed);
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= LINES).then_some(0)
    }

    /// Logs a line about `name` as a warning, if that is allowed now.
    pub fn warn(&mut self, now: Instant, name: impl Display, line: impl Display) {
        match self.allows(now) {
            None => {}
            Some(0) => log::warn!("{name}: {line}"),
            Some(n) => log::warn!("{name}: {line} ({n} lines were left out)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_logged_is_counted() {
        let mut limit = Limit::default();
        let start = Instant::now();
        let logged = (0..100).filter(|_| limit.allows(start).is_some()).count();
        assert_eq!(logged, 10);
        assert_eq!(limit.allows(start + WINDOW), Some(90));
        assert_eq!(limit.allows(start + WINDOW), Some(0));
    }
}
