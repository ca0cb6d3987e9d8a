//! A volume that never answers, until it is told to or cancelled; or that cannot be cancelled either.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Kind, Op, OpenContext, Tag, Volume,
};
use bluff_reactor::Waker;

/// What a test sees of the volume.
#[derive(Debug, Default)]
pub struct Desk {
    /// Operations that lie there.
    pub held: AtomicUsize,
    /// Operations that were ever accepted.
    pub accepted: AtomicUsize,
    open: AtomicBool,
    /// Operations at these offsets are done, while the others lie there.
    pub through: Mutex<Vec<u64>>,
    /// Nothing can be cancelled.
    pub stubborn: AtomicBool,
    /// How often that was said.
    pub refused: AtomicUsize,
    /// More than this many are not accepted; 0: any number.
    pub limit: AtomicUsize,
    wakers: Mutex<Vec<Waker>>,
}

impl Desk {
    /// Everything that lies there, and what comes, is done.
    pub fn release(&self) {
        self.open.store(true, Ordering::SeqCst);
        for waker in self.wakers.lock().unwrap().iter() {
            waker.wake();
        }
    }
}

/// A volume whose operations stall. `torn`: reads write the first half of their buffers at once.
#[derive(Debug)]
pub struct Stall {
    pub desk: Arc<Desk>,
    torn: bool,
    events: Events,
}

pub fn volume(torn: bool) -> Arc<dyn Volume> {
    desk(torn).0
}

pub fn desk(torn: bool) -> (Arc<dyn Volume>, Arc<Desk>) {
    let desk = Arc::new(Desk::default());
    let volume = Arc::new(Stall {
        desk: desk.clone(),
        torn,
        events: Events::default(),
    });
    (volume, desk)
}

/// What reads bring.
pub const FILL: u8 = 0xa5;

impl Volume for Stall {
    fn geometry(&self) -> Geometry {
        Geometry::new(512, 16 << 20)
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        self.desk.wakers.lock().unwrap().push(context.waker.clone());
        Ok(Box::new(Held {
            desk: self.desk.clone(),
            torn: self.torn,
            ops: Vec::new(),
            done: Vec::new(),
        }))
    }

    fn events(&self) -> &Events {
        &self.events
    }
}

struct Held {
    desk: Arc<Desk>,
    torn: bool,
    ops: Vec<Op>,
    done: Vec<Completion>,
}

impl Channel for Held {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let limit = match self.desk.limit.load(Ordering::SeqCst) {
            0 => usize::MAX,
            limit => limit - self.ops.len().min(limit),
        };
        let ops = &ops[..ops.len().min(limit)];
        for op in ops {
            if self.torn && op.kind == Kind::Read {
                let half = vec![FILL; op.len as usize / 2];
                op.buffers.copy_from(&half);
            }
            self.ops.push(*op);
        }
        self.desk.accepted.fetch_add(ops.len(), Ordering::SeqCst);
        self.desk.held.store(self.ops.len(), Ordering::SeqCst);
        ops.len()
    }

    fn kick(&mut self) {}

    fn poll(&mut self, _: Instant, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
        let open = self.desk.open.load(Ordering::SeqCst);
        let through = self.desk.through.lock().unwrap();
        // The last one first: nobody may count on an order.
        for i in (0..self.ops.len()).rev() {
            let op = self.ops[i];
            if !open && !through.contains(&op.offset) {
                continue;
            }
            self.ops.remove(i);
            if op.kind == Kind::Read {
                op.buffers.copy_from(&vec![FILL; op.len as usize]);
            }
            done.push(Completion {
                tag: op.tag,
                result: Ok(()),
            });
        }
        self.desk.held.store(self.ops.len(), Ordering::SeqCst);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let Some(i) = self.ops.iter().position(|op| op.tag == tag) else {
            return Cancel::Unknown;
        };
        if self.desk.stubborn.load(Ordering::SeqCst) {
            self.desk.refused.fetch_add(1, Ordering::SeqCst);
            return Cancel::Never;
        }
        let op = self.ops.swap_remove(i);
        self.desk.held.store(self.ops.len(), Ordering::SeqCst);
        self.done.push(Completion {
            tag: op.tag,
            result: Err(BlockError::Cancelled),
        });
        Cancel::Soon
    }
}
