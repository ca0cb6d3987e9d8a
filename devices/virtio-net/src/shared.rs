//! What the workers of a device share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use bluff_net::{Counters, Outlet, Port, Receivers, Steering};

/// What the workers of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) port: Arc<dyn Port>,
    counters: Vec<Arc<Counters>>,
    /// The cable is plugged in.
    pub(crate) link: Arc<AtomicBool>,
    ways: Mutex<Ways>,
}

/// Where frames for the device go.
#[derive(Debug)]
struct Ways {
    /// By pair: where its receive queue is reached, while it takes frames.
    outlets: Vec<Option<Outlet>>,
    /// How many pairs the driver uses, where it has said so.
    used: Option<u16>,
}

impl Shared {
    pub(crate) fn new(port: Arc<dyn Port>, pairs: u16) -> Self {
        Self {
            port,
            counters: (0..pairs).map(|_| Arc::default()).collect(),
            link: Arc::new(AtomicBool::new(true)),
            ways: Mutex::new(Ways {
                outlets: (0..pairs).map(|_| None).collect(),
                used: None,
            }),
        }
    }

    /// What a pair counts. Its two queues write different halves of it.
    pub(crate) fn counters(&self, pair: u16) -> Arc<Counters> {
        self.counters[usize::from(pair)].clone()
    }

    pub(crate) fn all_counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }

    /// A receive queue takes frames from now on, or does not any more.
    pub(crate) fn set_outlet(&self, pair: u16, outlet: Option<Outlet>) {
        self.change(|ways| ways.outlets[usize::from(pair)] = outlet);
    }

    /// The driver uses so many pairs; `None`: all that are started.
    pub(crate) fn set_used(&self, used: Option<u16>) {
        self.change(|ways| ways.used = used);
    }

    fn change(&self, what: impl FnOnce(&mut Ways)) {
        let mut ways = self.ways.lock().expect("nothing panics with it");
        what(&mut ways);
        // A driver uses its first queues (§5.1.6.5.5).
        let served = ways.outlets.iter().take_while(|o| o.is_some()).count() as u16;
        let used = ways.used.unwrap_or(served);
        self.port.set_receivers(Arc::new(Receivers {
            queues: ways.outlets.clone(),
            steering: Steering::Spread(served.min(used).max(1)),
        }));
    }
}
