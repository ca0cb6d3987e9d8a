//! A volume in memory whose operations see each other whole, also from several reactors. [`Ram`] alone copies without a lock, so a read beside a write of the
//! same block may find a part of it, which a judge of single sectors does not let pass.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_block::ram::Ram;
use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Op, OpenContext, Tag, Volume,
};

/// The volume.
#[derive(Debug)]
pub struct Whole {
    inner: Ram,
    lock: Arc<Mutex<()>>,
    cached: bool,
}

impl Whole {
    /// As [`Ram::new`].
    pub fn new(block: u32, size: u64) -> Self {
        Self {
            inner: Ram::new(block, size).unwrap(),
            lock: Arc::default(),
            cached: false,
        }
    }

    /// One that says that it has a volatile cache.
    pub fn with_cache(block: u32, size: u64) -> Self {
        Self {
            cached: true,
            ..Self::new(block, size)
        }
    }
}

impl Volume for Whole {
    fn geometry(&self) -> Geometry {
        let mut geometry = self.inner.geometry();
        geometry.volatile_cache = self.cached;
        geometry
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(Locked {
            inner: self.inner.open(context)?,
            lock: self.lock.clone(),
        }))
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.inner.resize(size)
    }

    fn events(&self) -> &Events {
        self.inner.events()
    }
}

struct Locked {
    inner: Box<dyn Channel>,
    lock: Arc<Mutex<()>>,
}

impl Channel for Locked {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let _one = self.lock.lock().unwrap();
        self.inner.submit(ops)
    }

    fn kick(&mut self) {
        let _one = self.lock.lock().unwrap();
        self.inner.kick();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let _one = self.lock.lock().unwrap();
        self.inner.poll(now, done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        self.inner.cancel(tag)
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }
}
