//! What the workers of queues obey.
//!
//! It is made of the settings whenever these change. A worker looks at a number before it begins, and takes the new one where that has changed: so
//! nothing is locked for a frame.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bluff_net::{Offloads, RssHash, RssTable};
use bluff_packet::toeplitz::HashTypes;
use bluff_reactor::Waker;

use crate::settings::{Hashing, Settings, Steer};
use crate::spec::feature;

/// What follows from the settings.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) settings: Settings,
    /// What the driver takes of a frame undone.
    pub(crate) takes: Offloads,
    /// The hash that is reported with each frame.
    pub(crate) report: Option<Arc<RssHash>>,
    /// Where received frames go, where the driver says it by a table.
    pub(crate) table: Option<Arc<RssTable>>,
}

/// What the driver takes, of the bits of features or of `GUEST_OFFLOADS_SET`.
fn takes(offloads: u64) -> Offloads {
    let all = [
        (feature::GUEST_CSUM, Offloads::CSUM),
        (feature::GUEST_TSO4, Offloads::TSO4),
        (feature::GUEST_TSO6, Offloads::TSO6),
        (feature::GUEST_ECN, Offloads::ECN),
        (feature::GUEST_USO4, Offloads::USO4),
        (feature::GUEST_USO6, Offloads::USO6),
    ];
    let taken = all.into_iter().filter(|(bit, _)| offloads & bit != 0);
    let takes: Offloads = taken.map(|(_, it)| it).collect();
    // Segments come with checksums that have to be completed (§5.1.3.1).
    match takes.contains(Offloads::CSUM) {
        true => takes,
        false => Offloads::empty(),
    }
}

impl Settings {
    /// The hash that is reported: that of RSS while it is in force (§5.1.6.4.3).
    fn reported(&self) -> &Hashing {
        match &self.steer {
            Steer::Rss { hashing, .. } => hashing,
            Steer::Auto { .. } => &self.report,
        }
    }
}

impl Policy {
    /// Of these settings; what `before` had of it already is not made again.
    fn new(settings: Settings, before: Option<&Self>) -> Self {
        let hash = |hashing: &Hashing| {
            let known = before.and_then(|p| {
                let same = p.settings.reported() == hashing;
                p.report.as_ref().filter(|_| same).cloned()
            });
            known.unwrap_or_else(|| Arc::new(RssHash::new(&hashing.key, HashTypes(hashing.types))))
        };
        let report = settings.reported();
        let report = (report.types != 0).then(|| hash(report));
        let table = match &settings.steer {
            Steer::Auto { .. } => None,
            Steer::Rss {
                hashing,
                table,
                unclassified,
                ..
            } => {
                let known = before.filter(|p| p.settings.steer == settings.steer);
                let known = known.and_then(|p| p.table.clone());
                Some(known.unwrap_or_else(|| {
                    Arc::new(RssTable {
                        hash: report.clone().unwrap_or_else(|| hash(hashing)),
                        queues: table.clone(),
                        unclassified: *unclassified,
                    })
                }))
            }
        };
        Self {
            takes: takes(settings.offloads),
            report,
            table,
            settings,
        }
    }
}

/// The policy that is in force, and who is to be told of another.
#[derive(Debug)]
pub(crate) struct Board {
    now: Mutex<Arc<Policy>>,
    /// Counts policies.
    version: AtomicU64,
    /// By queue.
    wakers: Mutex<Vec<Option<Waker>>>,
}

impl Board {
    /// With the settings of a device of so many queues.
    pub(crate) fn new(settings: &Settings, queues: usize) -> Self {
        Self {
            now: Mutex::new(Arc::new(Policy::new(settings.clone(), None))),
            version: AtomicU64::new(0),
            wakers: Mutex::new(vec![None; queues]),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Policy>> {
        self.now.lock().expect("nothing panics with it")
    }

    /// Puts other settings in force, and wakes those who may have something to do at once; gives what is in force.
    pub(crate) fn post(&self, settings: &Settings) -> Arc<Policy> {
        let mut now = self.lock();
        if now.settings == *settings {
            return now.clone();
        }
        let before = now.clone();
        let next = Arc::new(Policy::new(settings.clone(), Some(&before)));
        *now = next.clone();
        // Release: who sees the number finds the policy.
        self.version.fetch_add(1, Ordering::Release);
        drop(now);
        let (old, new) = (&before.settings.coalescing, &next.settings.coalescing);
        let wakers = self.wakers.lock().expect("nothing panics with it");
        for (queue, waker) in wakers.iter().enumerate() {
            let receives = queue % 2 == 0;
            let offloads = receives && before.takes != next.takes;
            if let Some(waker) = waker
                && (offloads || old.get(queue) != new.get(queue))
            {
                waker.wake();
            }
        }
        next
    }

    /// The worker of a queue begins.
    pub(crate) fn follow(self: &Arc<Self>, queue: u16, waker: Waker) -> Follower {
        let mut wakers = self.wakers.lock().expect("nothing panics with it");
        if let Some(place) = wakers.get_mut(usize::from(queue)) {
            *place = Some(waker);
        }
        // The number first: a policy that comes in between is taken twice, and not never.
        let version = self.version.load(Ordering::Acquire);
        Follower {
            board: self.clone(),
            queue,
            version,
            policy: self.lock().clone(),
        }
    }
}

/// What one worker obeys.
#[derive(Debug)]
pub(crate) struct Follower {
    board: Arc<Board>,
    queue: u16,
    version: u64,
    policy: Arc<Policy>,
}

impl Follower {
    /// What is in force as far as it knows.
    #[inline]
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Takes the policy that is in force; says whether it is another.
    #[inline]
    pub(crate) fn refresh(&mut self) -> bool {
        let version = self.board.version.load(Ordering::Acquire);
        version != self.version && self.take(version)
    }

    #[cold]
    fn take(&mut self, version: u64) -> bool {
        (self.version, self.policy) = (version, self.board.lock().clone());
        true
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let Ok(mut wakers) = self.board.wakers.lock() else {
            return;
        };
        if let Some(place) = wakers.get_mut(usize::from(self.queue)) {
            *place = None;
        }
    }
}
