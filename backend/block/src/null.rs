//! `null:?size=1TiB&block_size=512`: a volume without storage, to measure everything else with.
//!
//! Writes are forgotten, and reads leave the buffers as they are (what SPDK's null bdev and QEMU's
//! null-co do too): a guest gets its own bytes back, never those of somebody else. For that the
//! device in front must not hand out buffers of its own that a read was to fill.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::{
    BlockError, Cancel, Channel, Completion, DiscardLimits, Events, Geometry, Kind, Op,
    OpenContext, OpenError, Tag, Uri, UriError, Volume, VolumeEvent, ZeroLimits,
};

/// How many operations a channel takes between two polls.
const DEPTH: usize = 4096;

/// A volume of nothing.
#[derive(Debug)]
pub struct Null {
    shape: Geometry,
    size: Arc<AtomicU64>,
    events: Events,
}

/// Opens `null:?size=…&block_size=…`; left out: 1 TiB in blocks of 512 bytes.
///
/// # Errors
/// [`OpenError::Uri`].
pub fn open(uri: Uri) -> Result<Arc<dyn Volume>, OpenError> {
    let (block_size, size) = parse(uri)?;
    Ok(Arc::new(Null::new(block_size, size)))
}

/// What [`open`] reads in the URI: the block size and the size, in bytes.
///
/// # Errors
/// [`UriError`] where something does not fit.
pub fn parse(mut uri: Uri) -> Result<(u32, u64), UriError> {
    if !uri.path().is_empty() {
        return Err(UriError::Path("a null volume has no path"));
    }
    let (size, block_size) = uri.take_shape()?;
    uri.finish(&["size", "block_size"])?;
    Ok((block_size.unwrap_or(512), size.unwrap_or(1 << 40)))
}

impl Null {
    /// A null volume of `size` bytes in blocks of `block_size`.
    pub fn new(block_size: u32, size: u64) -> Self {
        let mut shape = Geometry::new(block_size, size);
        shape.volatile_cache = false;
        shape.discard = Some(DiscardLimits {
            max: 1 << 40,
            granularity: block_size,
        });
        shape.write_zeroes = Some(ZeroLimits {
            max: 1 << 40,
            unmap: true,
        });
        Self {
            shape,
            size: Arc::new(AtomicU64::new(size)),
            events: Events::default(),
        }
    }
}

impl Volume for Null {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::Acquire),
            ..self.shape
        }
    }

    fn open(&self, _context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(NullChannel {
            size: self.size.clone(),
            done: Vec::with_capacity(DEPTH),
        }))
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        if size == 0 || !size.is_multiple_of(u64::from(self.shape.block_size)) {
            return Err(BlockError::Invalid);
        }
        self.size.store(size, Ordering::Release);
        self.events.emit(VolumeEvent::Resized);
        Ok(())
    }

    fn events(&self) -> &Events {
        &self.events
    }
}

struct NullChannel {
    size: Arc<AtomicU64>,
    /// Never longer than the capacity that it was made with.
    done: Vec<Completion>,
}

impl Channel for NullChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let size = self.size.load(Ordering::Acquire);
        let n = ops.len().min(DEPTH - self.done.len());
        self.done.extend(ops[..n].iter().map(|op| Completion {
            tag: op.tag,
            // The rest was checked by the submitter; the size may have changed since.
            result: if op.kind == Kind::Flush || op.offset.saturating_add(op.len) <= size {
                Ok(())
            } else {
                Err(BlockError::OutOfRange)
            },
        }));
        n
    }

    fn kick(&mut self) {}

    fn poll(&mut self, _now: Instant, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        if self.done.iter().any(|c| c.tag == tag) {
            Cancel::Soon
        } else {
            Cancel::Unknown
        }
    }
}
