//! What could not be opened, and when it is tried again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::spec::Id;

/// First and longest pause before something is tried again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What is to be tried again: when, unless that is under way, and the pause before that.
#[derive(Debug, Default)]
pub(super) struct Again(BTreeMap<Id, (Option<Instant>, Duration)>);

impl Again {
    /// It has failed, once more.
    pub fn failed(&mut self, id: &Id, now: Instant) {
        let pause = self.0.get(id).map_or(PAUSE.0, |(_, last)| *last * 2);
        let pause = pause.min(PAUSE.1);
        self.0.insert(id.clone(), (Some(now + pause), pause));
    }

    /// It is open.
    pub fn opened(&mut self, id: &Id) {
        self.0.remove(id);
    }

    /// What is to be tried now.
    pub fn due(&mut self, now: Instant) -> Vec<Id> {
        let due = self.0.iter_mut();
        let due = due.filter(|(_, (at, _))| at.is_some_and(|at| at <= now));
        due.map(|(id, (at, _))| {
            // The next time is known when it has failed again.
            *at = None;
            id.clone()
        })
        .collect()
    }

    /// When something is to be tried next.
    pub fn next(&self) -> Option<Instant> {
        self.0.values().filter_map(|(at, _)| *at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_it_is_open() {
        let (mut again, start) = (Again::default(), Instant::now());
        let id: Id = "x".parse().unwrap();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            again.failed(&id, start);
            pauses.push(again.next().unwrap() - start);
            assert!(again.due(start).is_empty());
            assert_eq!(again.due(start + PAUSE.1), std::slice::from_ref(&id));
            assert_eq!(again.next(), None, "it is under way");
        }
        assert_eq!(
            (pauses[0], pauses[1], pauses[7]),
            (PAUSE.0, 2 * PAUSE.0, PAUSE.1)
        );
        again.opened(&id);
        again.failed(&id, start);
        assert_eq!(again.next(), Some(start + PAUSE.0));
    }
}
