//! The data half's life: when it is there, when it is lost, and whether another is worth starting.

use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use event_manager::{EventOps, Events};

use super::{Daemon, Phase, spawn};
use crate::registry::{FunctionState, NetworkState, VolumeState};
use crate::spec::{DataMode, Id};

/// How long one that closed its socket may take to end: it is about to, and the loop waits for it.
const LOST: Duration = Duration::from_millis(200);
/// A data half that fails sooner than this after it served everything has failed at it.
const HEALTHY: Duration = Duration::from_secs(1);
/// How many in a row may die in vain before the daemon gives up.
const VAIN: u32 = 5;

/// Whether data halves get anything done.
///
/// One has got something done when everything that there is was served again: volumes opened, functions attached,
/// sessions taken up. One that dies before that has died in vain, however it died. So has one that dies of itself (a crash,
/// a signal that a mistake raises) within [`HEALTHY`] after that: what killed it may be the first request that it looked at, and the next one
/// will look at it too. One that is killed from outside after that, by an operator or a test, is nobody's mistake, however
/// often it happens. More than [`VAIN`] in a row that died in vain end the daemon, for whoever watches it to see.
#[derive(Debug, Default)]
pub(super) struct Health {
    served: Option<Instant>,
    vain: u32,
}

impl Health {
    /// Everything is served.
    fn serves(&mut self, now: Instant) {
        self.served.get_or_insert(now);
    }

    /// One has died; whether another is worth starting.
    fn died(&mut self, killed: bool, now: Instant) -> bool {
        let in_vain = match self.served.take() {
            None => true,
            Some(since) => !killed && now.saturating_duration_since(since) < HEALTHY,
        };
        self.vain = if in_vain { self.vain + 1 } else { 0 };
        self.vain <= VAIN
    }
}

impl Daemon {
    /// Notes when the data half serves everything.
    pub(super) fn check_served(&mut self) {
        if self.reactors_unknown() {
            return;
        }
        let volumes = self.registry.volumes();
        let opening = volumes.values().any(|v| v.state == VolumeState::Opening);
        let networks = self.registry.networks();
        let connecting = networks.values().any(|n| n.state == NetworkState::Opening);
        let functions = self.registry.functions();
        let waits = functions.iter().any(|(id, function)| match function.state {
            FunctionState::Attaching => true,
            FunctionState::Waiting => self.registry.is_ready(&function.spec),
            FunctionState::Idle => self.fronts.is_handed(id),
            _ => false,
        });
        if !opening && !connecting && !waits {
            self.health.serves(Instant::now());
        }
    }

    /// The data half lives, and says that it cannot work. At the start that is for whoever started the daemon to see; later
    /// it counts as one that died.
    pub(super) fn give_up_data_half(&mut self, error: anyhow::Error, ops: &mut EventOps<'_>) {
        match self.phase {
            Phase::Starting => self.finish(Err(error.context("the data half"))),
            Phase::Ready | Phase::Draining(_) => self.lose_data_half(error, ops),
        }
    }

    pub(super) fn lose_data_half(&mut self, error: anyhow::Error, ops: &mut EventOps<'_>) {
        let Some(mut half) = self.half.take() else {
            return;
        };
        let was_killed = half.was_killed(LOST);
        let ended = half.end(Duration::ZERO).err();
        let ended = ended.unwrap_or_else(|| anyhow!("it ended"));
        let error = error.context(ended).context("the data half was lost");
        if matches!(self.phase, Phase::Draining(_)) || self.card.data == DataMode::Threads {
            return self.finish(Err(error));
        }
        if !self.health.died(was_killed, Instant::now()) {
            let said = format!(
                "{} data halves in a row died before they got anything done",
                VAIN + 1
            );
            return self.finish(Err(error.context(said)));
        }
        log::error!("{error:#}; starting another");
        self.restarts += 1;
        self.abandon_questions();
        let restarted = spawn(self.body, &self.options).and_then(|(link, half)| {
            // The old one is closed only once the loop has let go of it.
            ops.remove(Events::empty(&self.link))
                .context("the event loop")?;
            (self.link, self.half) = (link, Some(half));
            ops.add(self.link_events()).context("the event loop")
        });
        match restarted {
            Ok(()) => {
                self.reactors = 0;
                self.connect_at.clear();
                self.release_detaching();
                self.fronts.data_half_lost();
                self.registry.start_over();
                self.begin();
            }
            Err(error) => self.finish(Err(error)),
        }
    }

    /// What was being let go of went with the data half.
    fn release_detaching(&mut self) {
        let functions = self.registry.functions().iter();
        let is_detaching = |state: &FunctionState| matches!(state, FunctionState::Detaching { .. });
        let detaching = functions.filter(|(_, function)| is_detaching(&function.state));
        let detaching: Vec<Id> = detaching.map(|(id, _)| id.clone()).collect();
        detaching.iter().for_each(|id| self.release(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_of_one_that_serves_are_borne_for_ever() {
        let mut health = Health::default();
        let now = Instant::now();
        for _ in 0..1000 {
            health.serves(now);
            assert!(health.died(true, now));
        }
        health.serves(now);
        for _ in 0..1000 {
            health.serves(now);
            assert!(health.died(false, now + HEALTHY), "a crash now and then");
        }
    }

    #[test]
    fn deaths_in_vain_are_counted_until_one_gets_something_done() {
        let mut health = Health::default();
        let now = Instant::now();
        for round in 0..3 {
            for death in 0..VAIN {
                assert!(health.died(death % 2 == 0, now), "{round} {death}");
            }
            health.serves(now);
            assert!(health.died(true, now));
        }
        for _ in 0..VAIN {
            health.serves(now);
            assert!(health.died(false, now));
        }
        health.serves(now);
        assert!(!health.died(false, now), "each died of its first request");
    }
}
