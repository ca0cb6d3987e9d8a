//! What the workers of a device share.

use std::sync::{Arc, Mutex};

use bluff_net::{Counters, Outlet, Port, Receivers, Steering};

/// What the workers of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) port: Arc<dyn Port>,
    counters: Vec<Arc<Counters>>,
    /// By pair: where its receive queue is reached, while it takes frames.
    outlets: Mutex<Vec<Option<Outlet>>>,
}

impl Shared {
    pub(crate) fn new(port: Arc<dyn Port>, pairs: u16) -> Self {
        Self {
            port,
            counters: (0..pairs).map(|_| Arc::default()).collect(),
            outlets: Mutex::new((0..pairs).map(|_| None).collect()),
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
        let mut outlets = self.outlets.lock().expect("nothing panics with it");
        let place = &mut outlets[usize::from(pair)];
        if *place == outlet {
            return;
        }
        *place = outlet;
        // A driver uses its first queues (§5.1.6.5.5).
        let served = outlets.iter().take_while(|o| o.is_some()).count();
        self.port.set_receivers(Arc::new(Receivers {
            queues: outlets.clone(),
            steering: Steering::Spread((served as u16).max(1)),
        }));
    }
}
