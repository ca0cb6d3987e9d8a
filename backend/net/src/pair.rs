//! Ports without a network: two that are joined, one that is joined to itself, one that leads nowhere.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bluff_reactor::Context;

use crate::outlet::all_of;
use crate::{Attributes, Cause, Counters, Lane, Lent, NetError, Offloads, Port, Receivers};

/// What joined ports carry.
const ATTRIBUTES: Attributes = Attributes {
    mtu: 65_535,
    takes: Offloads::all(),
    link: true,
};

/// One end of a wire. What is sent into it comes out of the other.
#[derive(Debug)]
pub struct Pair {
    /// Who receives at this end.
    here: Arc<End>,
    there: Arc<End>,
}

#[derive(Debug, Default)]
struct End {
    receivers: Mutex<Option<Arc<Receivers>>>,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Receivers>>> {
        self.receivers.lock().expect("nothing panics with it")
    }
}

impl Pair {
    /// Both ends of a wire.
    pub fn new() -> (Self, Self) {
        let (a, b) = (Arc::<End>::default(), Arc::<End>::default());
        let first = Self {
            here: a.clone(),
            there: b.clone(),
        };
        (first, Self { here: b, there: a })
    }

    /// A port whose frames come back to it.
    pub fn loopback() -> Self {
        let end = Arc::<End>::default();
        Self {
            here: end.clone(),
            there: end,
        }
    }
}

impl Port for Pair {
    fn attributes(&self) -> Attributes {
        ATTRIBUTES
    }

    fn open(&self, _: &mut Context<'_>, _: u16) -> Result<Box<dyn Lane>, NetError> {
        Ok(Box::new(Wire {
            there: self.there.clone(),
            counters: Arc::default(),
        }))
    }

    fn set_receivers(&self, receivers: Arc<Receivers>) {
        *self.here.lock() = Some(receivers);
    }
}

struct Wire {
    there: Arc<End>,
    counters: Arc<Counters>,
}

impl Lane for Wire {
    fn send(&mut self, _: Instant, batch: Lent<'_>) {
        let receivers = self.there.lock().clone();
        let sent = &self.counters.sent;
        let Some(receivers) = receivers else {
            return sent.drops.add(Cause::LinkDown, batch.frames().len() as u64);
        };
        receivers.deliver(&batch, all_of(&batch), |which, result| match result {
            Ok(()) => {
                let lens = which
                    .iter()
                    .map(|i| batch.frames()[usize::from(*i)].len() as u64);
                sent.passed(which.len() as u64, lens.sum());
            }
            Err(cause) => sent.drops.add(cause, which.len() as u64),
        });
    }
}

/// A port that leads nowhere: what is sent is gone, and nothing comes.
#[derive(Debug, Default)]
pub struct Null;

impl Port for Null {
    fn attributes(&self) -> Attributes {
        ATTRIBUTES
    }

    fn open(&self, _: &mut Context<'_>, _: u16) -> Result<Box<dyn Lane>, NetError> {
        Ok(Box::new(Hole))
    }

    fn set_receivers(&self, _: Arc<Receivers>) {}
}

struct Hole;

impl Lane for Hole {
    fn send(&mut self, _: Instant, _: Lent<'_>) {}
}
