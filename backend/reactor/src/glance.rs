//! Looking less often where each look is a system call.

/// For an actor that can find out only by a system call whether something has come, and whose descriptor is registered: after a look that found
/// nothing it looks in one of [`Glance::EVERY`] turns, until it is told.
///
/// A turn without work takes some tens of nanoseconds, and a system call that finds nothing some hundreds. An actor that is polled and makes one in
/// each turn has its reactor do little else.
#[derive(Debug, Default)]
pub struct Glance(u8);

impl Glance {
    /// Turns for each look, while nothing comes.
    pub const EVERY: u8 = 16;

    /// Something may have come: [`Actor::event`](crate::Actor::event).
    #[inline]
    pub fn told(&mut self) {
        self.0 = 0;
    }

    /// Whether to look in this turn.
    #[inline]
    pub fn is_due(&mut self) -> bool {
        let due = self.0 == 0;
        self.0 = self.0.saturating_sub(1);
        due
    }

    /// The look found nothing.
    #[inline]
    pub fn found_nothing(&mut self) {
        self.0 = Self::EVERY - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_turn_while_something_comes_and_some_turns_otherwise() {
        let mut glance = Glance::default();
        assert!(glance.is_due() && glance.is_due());
        for _ in 0..3 {
            glance.found_nothing();
            let turns = (0..Glance::EVERY).map(|_| glance.is_due());
            let turns: Vec<_> = turns.collect();
            assert_eq!(turns.iter().filter(|due| **due).count(), 1);
            assert_eq!(turns.last(), Some(&true));
        }
        glance.found_nothing();
        glance.told();
        assert!(glance.is_due() && glance.is_due());
    }
}
