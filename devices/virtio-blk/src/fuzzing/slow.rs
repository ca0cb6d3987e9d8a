//! A volume that finishes when the script says so: without it nothing would ever be in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Op, OpenContext, Tag, Volume,
};

/// Most operations that lie there: few, so that scripts meet a channel that is busy.
const DEPTH: usize = 8;

/// A volume around another one, whose operations wait while `hold` is set.
#[derive(Debug)]
pub(super) struct Slow {
    pub(super) inner: Arc<dyn Volume>,
    pub(super) hold: Arc<AtomicBool>,
}

impl Volume for Slow {
    fn geometry(&self) -> Geometry {
        // As if a flush had something to do, so that the device offers it.
        Geometry {
            volatile_cache: true,
            ..self.inner.geometry()
        }
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(SlowChannel {
            inner: self.inner.open(context)?,
            hold: self.hold.clone(),
            held: Vec::new(),
            done: Vec::new(),
        }))
    }

    fn events(&self) -> &Events {
        self.inner.events()
    }
}

struct SlowChannel {
    inner: Box<dyn Channel>,
    hold: Arc<AtomicBool>,
    held: Vec<Op>,
    done: Vec<Completion>,
}

impl Channel for SlowChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let n = ops.len().min(DEPTH - self.held.len());
        self.held.extend_from_slice(&ops[..n]);
        n
    }

    fn kick(&mut self) {}

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
        if self.hold.load(Ordering::Relaxed) {
            return;
        }
        // The last one first: nobody may count on an order.
        while let Some(op) = self.held.pop() {
            let taken = self.inner.submit(&[op]);
            assert_eq!(taken, 1, "nothing is in flight there");
            self.inner.poll(now, done);
        }
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let Some(i) = self.held.iter().position(|op| op.tag == tag) else {
            return Cancel::Unknown;
        };
        self.held.remove(i);
        self.done.push(Completion {
            tag,
            result: Err(BlockError::Cancelled),
        });
        Cancel::Soon
    }
}
