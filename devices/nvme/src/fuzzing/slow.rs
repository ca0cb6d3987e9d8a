//! A volume that finishes when it is told to, and remembers what it was asked for: without it nothing would ever be in flight.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Kind, Op, OpenContext, Tag, Volume,
};

/// Most operations that lie there: few, so that scripts meet a channel that is busy.
const DEPTH: usize = 8;

/// What is seen and set from outside.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    /// Operations wait while it is set.
    pub(crate) hold: AtomicBool,
    /// Nothing can be cancelled.
    pub(crate) stubborn: AtomicBool,
    /// What was accepted: kind, offset, length, number of buffers.
    pub(crate) asked: Mutex<Vec<(Kind, u64, u64, usize)>>,
    /// How many operations lie there.
    pub(crate) held: AtomicUsize,
    /// Every so many operation fails; 0: none does.
    pub(crate) fail: AtomicUsize,
    /// Somebody else has the volume.
    pub(crate) locked: AtomicBool,
    /// How often it is locked now.
    pub(crate) locks: AtomicUsize,
}

impl Desk {
    pub(crate) fn hold(&self, hold: bool) {
        self.hold.store(hold, Ordering::Relaxed);
    }

    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// What was accepted since the last time.
    pub(crate) fn take(&self) -> Vec<(Kind, u64, u64, usize)> {
        std::mem::take(&mut self.asked.lock().expect("nothing panics with it"))
    }
}

/// A volume around another one.
#[derive(Debug)]
pub(crate) struct Slow {
    pub(crate) inner: Arc<dyn Volume>,
    pub(crate) geometry: Geometry,
    pub(crate) desk: Arc<Desk>,
}

impl Volume for Slow {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.inner.geometry().size,
            ..self.geometry
        }
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(SlowChannel {
            inner: self.inner.open(context)?,
            desk: self.desk.clone(),
            count: 0,
            held: Vec::new(),
            done: Vec::new(),
        }))
    }

    fn lock(&self) -> Result<(), BlockError> {
        if self.desk.locked.load(Ordering::Relaxed) {
            return Err(BlockError::Locked);
        }
        self.desk.locks.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn unlock(&self) {
        self.desk.locks.fetch_sub(1, Ordering::Relaxed);
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.inner.resize(size)
    }

    fn events(&self) -> &Events {
        self.inner.events()
    }
}

struct SlowChannel {
    inner: Box<dyn Channel>,
    desk: Arc<Desk>,
    count: usize,
    held: Vec<Op>,
    done: Vec<Completion>,
}

impl Channel for SlowChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let n = ops.len().min(DEPTH - self.held.len());
        let mut asked = self.desk.asked.lock().expect("nothing panics with it");
        for op in &ops[..n] {
            let buffers = op.buffers.as_slice().len();
            assert!(!op.kind.has_data() || op.buffers.total() == op.len);
            asked.push((op.kind, op.offset, op.len, buffers));
            self.held.push(*op);
        }
        self.desk.held.fetch_add(n, Ordering::Relaxed);
        n
    }

    fn kick(&mut self) {}

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
        if self.desk.hold.load(Ordering::Relaxed) {
            return;
        }
        // The last one first: nobody may count on an order.
        while let Some(op) = self.held.pop() {
            self.desk.held.fetch_sub(1, Ordering::Relaxed);
            self.count += 1;
            let every = self.desk.fail.load(Ordering::Relaxed);
            if every > 0 && self.count.is_multiple_of(every) {
                done.push(Completion {
                    tag: op.tag,
                    result: Err(BlockError::Io),
                });
                continue;
            }
            // What the inner volume would not do, this one does in its place.
            op.check(&self.inner_shape())
                .expect("checked by the submitter");
            let taken = self.inner.submit(&[op]);
            assert_eq!(taken, 1, "nothing is in flight there");
            self.inner.poll(now, done);
        }
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let Some(i) = self.held.iter().position(|op| op.tag == tag) else {
            return Cancel::Unknown;
        };
        if self.desk.stubborn.load(Ordering::Relaxed) {
            return Cancel::Never;
        }
        self.held.remove(i);
        self.desk.held.fetch_sub(1, Ordering::Relaxed);
        self.done.push(Completion {
            tag,
            result: Err(BlockError::Cancelled),
        });
        Cancel::Soon
    }
}

impl SlowChannel {
    /// Every operation that the inner volume can do, of any size.
    fn inner_shape(&self) -> Geometry {
        Geometry {
            discard: Some(bluff_block::DiscardLimits {
                max: u64::MAX,
                granularity: 512,
            }),
            write_zeroes: Some(bluff_block::ZeroLimits {
                max: u64::MAX,
                unmap: true,
            }),
            max_transfer: u32::MAX,
            ..Geometry::new(512, !511)
        }
    }
}

impl Drop for SlowChannel {
    fn drop(&mut self) {
        self.desk.held.fetch_sub(self.held.len(), Ordering::Relaxed);
    }
}
