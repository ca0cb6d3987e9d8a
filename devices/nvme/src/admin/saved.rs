//! The admin side as one value, from which another process goes on.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::events::Events;
use super::features::{Features, SavedFeatures};
use super::logs::ChangedNamespaces;
use super::{Admin, ErrorLog};
use crate::health::{SavedCounters, SavedSettings};
use crate::queues::{CreateCq, CreateSq};
use crate::subsystem::SubsystemEvent;

/// What an admin side stands on, but for its queues. The entries of the error log are left out: their count stays.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    granted: (u16, u16),
    has_cache: bool,
    features: SavedFeatures,
    settings: SavedSettings,
    counters: SavedCounters,
    events: Events,
    changed: ChangedNamespaces,
    ana_changes: u64,
    /// The namespaces that the host knows of: NSID, blocks, log2 of a block.
    namespaces: Vec<(u32, u64, u8)>,
}

impl Admin {
    fn known(&self) -> Vec<(u32, u64, u8)> {
        let known = self.table.iter();
        known.map(|n| (n.nsid(), n.blocks(), n.shift())).collect()
    }

    /// As [`Admin::restore`] takes it.
    pub fn save(&self, now: Instant) -> Saved {
        Saved {
            granted: self.queues.granted(),
            has_cache: self.has_cache,
            features: self.features.save(now),
            settings: self.settings.save(),
            counters: self.counters.save(now),
            events: self.events.clone(),
            changed: self.changed.clone(),
            ana_changes: self.ana_changes,
            namespaces: self.known(),
        }
    }

    /// Goes on with a run that another process began, with these queues and pages of `page` bytes. The host hears of namespaces that have changed meanwhile. `false`: it cannot
    /// be, and a reset has to come next.
    #[must_use]
    pub fn restore(
        &mut self,
        saved: &Saved,
        cqs: &[CreateCq],
        sqs: &[CreateSq],
        page: u64,
        now: Instant,
    ) -> bool {
        if !self.queues.restore(saved.granted, cqs, sqs, page) {
            return false;
        }
        self.page = page;
        self.has_cache = saved.has_cache;
        self.features = Features::restored(&saved.features, now);
        self.settings.restore(&saved.settings);
        self.counters.restore(&saved.counters);
        self.errors = ErrorLog::default();
        self.events = saved.events.clone();
        self.changed = saved.changed.clone();
        self.ana_changes = saved.ana_changes;
        self.aborts = 0;
        let (before, now) = (&saved.namespaces, self.known());
        let gone = before.iter().filter(|n| !now.contains(n));
        let new = now.iter().filter(|n| !before.contains(n));
        let mut changed: Vec<u32> = gone.chain(new).map(|n| n.0).collect();
        changed.sort_unstable();
        changed.dedup();
        for nsid in changed {
            self.handle_event(&SubsystemEvent::NamespaceChanged(nsid));
        }
        let requests = usize::from(self.options.event_requests_z) + 1;
        self.events.is_bounded(requests)
    }
}
