//! A volume in memory that keeps a list of what it was asked for.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Kind, Op, OpenContext, Tag, Uri,
    Volume,
};

/// An operation, without where its data lies.
pub type Asked = (Kind, u64, u64);

#[derive(Debug)]
pub struct Recorder {
    ram: Arc<dyn Volume>,
    shape: Shape,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// What a script's volume is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub block_size: u32,
    pub size: u64,
    /// Whether writes are lost where they are not flushed: then there is FLUSH, and a choice of the mode.
    pub volatile: bool,
    pub read_only: bool,
}

impl Recorder {
    pub fn new(shape: Shape) -> Self {
        let Shape {
            block_size, size, ..
        } = shape;
        let uri = format!("ram:?size={size}&block_size={block_size}");
        let ram = bluff_block::ram::open(Uri::parse(&uri).unwrap()).unwrap();
        Self {
            ram,
            shape,
            asked: Arc::default(),
        }
    }

    /// The memory below, where nothing is recorded.
    pub fn ram(&self) -> &dyn Volume {
        &*self.ram
    }

    /// What it was asked for since it was looked at last, in that order.
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Volume for Recorder {
    fn geometry(&self) -> Geometry {
        Geometry {
            volatile_cache: self.shape.volatile,
            read_only: self.shape.read_only,
            ..self.ram.geometry()
        }
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(Recording {
            inner: self.ram.open(context)?,
            volatile: self.shape.volatile,
            asked: self.asked.clone(),
        }))
    }

    fn events(&self) -> &Events {
        self.ram.events()
    }
}

struct Recording {
    inner: Box<dyn Channel>,
    volatile: bool,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Channel for Recording {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let n = self.inner.submit(ops);
        // Where nothing is volatile, asking for stable writes says nothing.
        let plain = |kind| match kind {
            Kind::Write { fua } => Kind::Write {
                fua: fua && self.volatile,
            },
            Kind::WriteZeroes { unmap, fua } => Kind::WriteZeroes {
                unmap,
                fua: fua && self.volatile,
            },
            other => other,
        };
        let taken = ops[..n]
            .iter()
            .map(|op| (plain(op.kind), op.offset, op.len));
        self.asked.lock().unwrap().extend(taken);
        n
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.inner.poll(now, done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        self.inner.cancel(tag)
    }
}
