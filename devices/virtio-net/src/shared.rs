//! What the workers of a device share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bluff_net::{Counters, Flows, Outlet, Port, Receivers, RssTable, Steering};

use crate::policy::Board;
use crate::settings::{Settings, Steer};

/// What the workers of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) port: Arc<dyn Port>,
    counters: Vec<Arc<Counters>>,
    /// The cable is plugged in.
    pub(crate) link: Arc<AtomicBool>,
    /// What the driver has set.
    pub(crate) board: Arc<Board>,
    ways: Mutex<Ways>,
    /// Which pair a flow belongs to, where there are several.
    flows: Option<Arc<Flows>>,
    /// That is looked at, and so has to be learnt.
    learns: AtomicBool,
}

/// Where frames for the device go.
#[derive(Debug)]
struct Ways {
    /// By pair: where its receive queue is reached, while it takes frames.
    outlets: Vec<Option<Outlet>>,
    wish: Wish,
}

/// What the driver has said of receive queues.
#[derive(Debug)]
enum Wish {
    /// Nothing here: a front end knows it, and starts those that are used.
    Started,
    /// The first so many are used.
    First(u16),
    /// A table says it.
    Table(Arc<RssTable>),
}

impl Shared {
    pub(crate) fn new(port: Arc<dyn Port>, pairs: u16, settings: &Settings) -> Self {
        Self {
            port,
            counters: (0..pairs).map(|_| Arc::default()).collect(),
            link: Arc::new(AtomicBool::new(true)),
            board: Arc::new(Board::new(settings, 2 * usize::from(pairs))),
            ways: Mutex::new(Ways {
                outlets: (0..pairs).map(|_| None).collect(),
                wish: Wish::Started,
            }),
            flows: (pairs > 1).then(Arc::default),
            learns: AtomicBool::new(false),
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

    /// These settings are in force. `steers`: they say which receive queues are used.
    pub(crate) fn obey(&self, settings: &Settings, steers: bool) {
        let policy = self.board.post(settings);
        let wish = match (&settings.steer, &policy.table) {
            _ if !steers => Wish::Started,
            (Steer::Rss { .. }, Some(table)) => Wish::Table(table.clone()),
            (
                Steer::Rss {
                    transmit: pairs, ..
                }
                | Steer::Auto { pairs },
                _,
            ) => Wish::First(*pairs),
        };
        self.change(|ways| ways.wish = wish);
    }

    /// The flows of frames that are sent, where these have to be learnt.
    #[inline]
    pub(crate) fn learning(&self) -> Option<&Flows> {
        match self.learns.load(Ordering::Relaxed) {
            true => self.flows.as_deref(),
            false => None,
        }
    }

    fn change(&self, what: impl FnOnce(&mut Ways)) {
        let mut ways = self.ways.lock().expect("nothing panics with it");
        what(&mut ways);
        // A driver uses its first queues (§5.1.6.5.5).
        let served = ways.outlets.iter().take_while(|o| o.is_some()).count() as u16;
        let first = |n: u16| match &self.flows {
            Some(flows) if n > 1 => Steering::Learned(flows.clone(), n),
            _ => Steering::Spread(1),
        };
        let steering = match &ways.wish {
            Wish::Started => first(served),
            Wish::First(pairs) => first(served.min(*pairs)),
            Wish::Table(table) => Steering::Table(table.clone()),
        };
        let learns = matches!(steering, Steering::Learned(..));
        self.learns.store(learns, Ordering::Relaxed);
        self.port.set_receivers(Arc::new(Receivers {
            queues: ways.outlets.clone(),
            steering,
        }));
    }
}
