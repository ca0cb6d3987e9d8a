//! `ram:?size=256MiB&block_size=512`: a volume in the memory of this process. It is empty at first
//! and gone with the process.
//!
//! ```text
//!   segments: [ first size | grown by | grown by ]   private anonymous memory, zeroes until written
//! ```
//!
//! Operations are done inside of `submit`, in order. Channels on several threads copy without a
//! lock: where two of them touch a block at the same time, each *byte* is that of one or the other,
//! and a larger unit is not promised (a disk promises a block, but no driver has two writes, or a
//! write and a read, of one block in flight and relies on it). What was completed on one channel and
//! then told to another thread is seen there whole.
//!
//! Memory is not reserved (`MAP_NORESERVE`): a volume larger than the machine's memory works until
//! it is written full, and then the kernel ends the process. Whoever configures it decides.
//!
//! Unsafe, because it copies between mapped memory and the host's buffers.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_memory::IoVec;

use crate::{
    BlockError, Cancel, Channel, Completion, DiscardLimits, Events, Geometry, Kind, Op,
    OpenContext, OpenError, Tag, Uri, UriError, Volume, VolumeEvent, ZeroLimits,
};

/// How many operations a channel takes between two polls.
const DEPTH: usize = 1024;
/// How many bytes it copies between two polls before it is busy; one operation is always taken, however large. Small,
/// because nothing of what is done shows before the poll: with a whole ring in one batch the driver waits for the
/// last copy to see the first completion, and neighbours on the reactor wait with it. Eight blocks of 4 KiB are
/// enough to spread the cost of a publication.
const BUDGET: u64 = 32 << 10;
/// Most bytes that one discard gives back: some milliseconds of the kernel's time.
const MAX_DISCARD: u64 = 64 << 20;
/// Most bytes of zeroes in one operation.
const MAX_ZEROES: u64 = 8 << 20;
/// Below this, zeroes are written even where pages could be given back: cheaper than the page
/// faults that follow.
const UNMAP_FROM: u64 = 64 << 10;

/// A piece of anonymous memory, unmapped when the last list that names it is gone.
#[derive(Debug)]
struct Segment {
    /// Its first byte on the volume.
    start: u64,
    len: u64,
    ptr: *mut u8,
}

// SAFETY: an address and a length; who uses the memory copies bytes that may change under it.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    fn new(start: u64, len: u64) -> std::io::Result<Self> {
        let bytes = usize::try_from(len).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self {
            start,
            len,
            ptr: ptr.cast(),
        })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no channel names it any more.
        unsafe { libc::munmap(self.ptr.cast(), self.len as usize) };
    }
}

type Segments = Arc<[Arc<Segment>]>;

#[derive(Debug)]
struct Shared {
    /// Published after the segments that hold it.
    size: AtomicU64,
    /// Counts the changes of `segments`.
    version: AtomicU64,
    segments: Mutex<Segments>,
}

impl Shared {
    fn segments(&self) -> Segments {
        self.segments
            .lock()
            .expect("nothing panics while it holds the segments")
            .clone()
    }
}

/// A volume in memory.
#[derive(Debug)]
pub struct Ram {
    shape: Geometry,
    shared: Arc<Shared>,
    /// One resize at a time.
    resizing: Mutex<()>,
    events: Events,
}

/// Opens `ram:?size=…&block_size=…`; the size must be given, blocks are of 512 bytes where nothing
/// is said.
///
/// # Errors
/// [`OpenError::Uri`]; [`OpenError::Storage`] where there are not that many addresses.
pub fn open(uri: Uri) -> Result<Arc<dyn Volume>, OpenError> {
    let (block_size, size) = parse(uri)?;
    let ram = Ram::new(block_size, size);
    Ok(Arc::new(ram.map_err(|source| OpenError::Storage {
        what: format!("cannot map {size} bytes of memory"),
        source,
    })?))
}

/// What [`open`] reads in the URI: the block size and the size, in bytes.
///
/// # Errors
/// [`UriError`] where something does not fit.
pub fn parse(mut uri: Uri) -> Result<(u32, u64), UriError> {
    if !uri.path().is_empty() {
        return Err(UriError::Path("a ram volume has no path"));
    }
    let (size, block_size) = uri.take_shape()?;
    uri.finish(&["size", "block_size"])?;
    let size = size.ok_or(UriError::Value {
        name: "size".into(),
        why: "a ram volume needs one, such as 1GiB".into(),
    })?;
    Ok((block_size.unwrap_or(512), size))
}

impl Ram {
    /// A volume of `size` bytes, a multiple of `block_size`.
    ///
    /// # Errors
    /// What the kernel says where it cannot map that much.
    pub fn new(block_size: u32, size: u64) -> std::io::Result<Self> {
        let mut shape = Geometry::new(block_size, size);
        shape.volatile_cache = false;
        shape.discard = Some(DiscardLimits {
            max: MAX_DISCARD,
            granularity: 4096,
        });
        shape.write_zeroes = Some(ZeroLimits {
            max: MAX_ZEROES,
            unmap: true,
        });
        let shared = Arc::new(Shared {
            size: AtomicU64::new(size),
            version: AtomicU64::new(0),
            segments: Mutex::new(Arc::new([Arc::new(Segment::new(0, size)?)])),
        });
        Ok(Self {
            shape,
            shared,
            resizing: Mutex::default(),
            events: Events::default(),
        })
    }
}

impl Volume for Ram {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.shared.size.load(Ordering::Acquire),
            ..self.shape
        }
    }

    fn open(&self, _context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        // Before the segments: what is seen twice is only fetched twice.
        let version = self.shared.version.load(Ordering::Acquire);
        Ok(Box::new(RamChannel {
            shared: self.shared.clone(),
            version,
            segments: self.shared.segments(),
            done: Vec::with_capacity(DEPTH),
            copied: 0,
        }))
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        if size == 0 || !size.is_multiple_of(u64::from(self.shape.block_size)) {
            return Err(BlockError::Invalid);
        }
        let _one = self.resizing.lock().expect("a resize does not panic");
        let old = self.shared.size.load(Ordering::Acquire);
        let segments = self.shared.segments();
        let held = segments.last().map_or(0, |s| s.start + s.len);
        if size < old {
            // Nothing that is submitted from now on reaches the tail.
            self.shared.size.store(size, Ordering::Release);
        }
        // The tail reads as zeroes when it comes back. It is cleared now to give the memory back,
        // and again when it grows, for a write that was under way just now.
        zero(&segments, old.min(size), held - old.min(size), true);
        if size > held {
            let more = Segment::new(held, size - held).map_err(|_| BlockError::NoSpace)?;
            let all = segments.iter().cloned().chain([Arc::new(more)]).collect();
            *self
                .shared
                .segments
                .lock()
                .expect("nothing panics while it holds the segments") = all;
            self.shared.version.fetch_add(1, Ordering::Release);
        }
        self.shared.size.store(size, Ordering::Release);
        self.events.emit(VolumeEvent::Resized);
        Ok(())
    }

    fn events(&self) -> &Events {
        &self.events
    }
}

/// Calls `f` with the pieces of memory that hold `len` bytes of the volume from `offset` on.
#[inline]
fn pieces(segments: &[Arc<Segment>], offset: u64, len: u64, mut f: impl FnMut(*mut u8, usize)) {
    let (mut at, mut left) = (offset, len);
    for s in segments {
        if left == 0 {
            return;
        }
        let skip = at - s.start;
        if skip < s.len {
            let n = left.min(s.len - skip);
            f(s.ptr.wrapping_add(skip as usize), n as usize);
            at += n;
            left -= n;
        }
    }
    assert_eq!(left, 0, "inside of the volume");
}

/// Makes a range read as zeroes; `unmap` gives whole pages back.
fn zero(segments: &[Arc<Segment>], offset: u64, len: u64, unmap: bool) {
    pieces(segments, offset, len, |ptr, len| {
        let page = page_size();
        let head = ptr.align_offset(page).min(len);
        let whole = (len - head) / page * page;
        let clear = |from: usize, n: usize| {
            // SAFETY: inside of the segment, which the caller holds; no borrow exists anywhere.
            unsafe { std::ptr::write_bytes(ptr.add(from), 0, n) };
        };
        // SAFETY: whole pages inside of a private anonymous mapping, which then reads as zeroes.
        let given_back = unmap
            && whole > 0
            && unsafe { libc::madvise(ptr.add(head).cast(), whole, libc::MADV_DONTNEED) } == 0;
        if given_back {
            clear(0, head);
            clear(head + whole, len - head - whole);
        } else {
            clear(0, len);
        }
    });
}

fn page_size() -> usize {
    // SAFETY: no memory is involved.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

struct RamChannel {
    shared: Arc<Shared>,
    version: u64,
    segments: Segments,
    /// Never longer than the capacity that it was made with.
    done: Vec<Completion>,
    /// Bytes copied since the last poll.
    copied: u64,
}

impl RamChannel {
    #[cold]
    fn refresh(&mut self) {
        self.version = self.shared.version.load(Ordering::Acquire);
        self.segments = self.shared.segments();
    }

    /// Copies between the volume and the buffers, as far as both reach.
    #[inline]
    fn copy(&self, op: &Op, to_volume: bool) {
        let buffers = op.buffers.as_slice();
        let mut at = op.offset;
        let end = op.offset + op.len;
        for v in buffers {
            let len = (v.len() as u64).min(end - at);
            let mut v: IoVec = *v;
            pieces(&self.segments, at, len, |ptr, n| {
                // SAFETY: `ptr` is inside of a segment that self holds, the buffer is mapped
                // (contract of `Buffers`); they are different memory, and nobody borrows either.
                unsafe {
                    if to_volume {
                        std::ptr::copy_nonoverlapping(v.ptr(), ptr, n);
                    } else {
                        std::ptr::copy_nonoverlapping(ptr, v.ptr(), n);
                    }
                }
                v.advance(n);
            });
            at += len;
        }
    }

    #[inline]
    fn run(&mut self, op: &Op, size: u64) -> Result<(), BlockError> {
        // The rest was checked by the submitter; the size may have changed since, and a wrong
        // address would be ours.
        match op.offset.checked_add(op.len) {
            Some(end) if end <= size => {}
            _ if op.kind == Kind::Flush => return Ok(()),
            _ => return Err(BlockError::OutOfRange),
        }
        self.copied += op.len;
        match op.kind {
            Kind::Read => self.copy(op, false),
            Kind::Write { .. } => self.copy(op, true),
            Kind::Flush => {}
            Kind::Discard => {
                // Only whole pages: the rest may keep what it has.
                let page = page_size() as u64;
                let start = op.offset.next_multiple_of(page);
                let end = (op.offset + op.len) / page * page;
                if start < end {
                    zero(&self.segments, start, end - start, true);
                }
            }
            Kind::WriteZeroes { unmap, .. } => {
                let unmap = unmap && op.len >= UNMAP_FROM;
                zero(&self.segments, op.offset, op.len, unmap);
            }
        }
        Ok(())
    }
}

impl Channel for RamChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let size = self.shared.size.load(Ordering::Acquire);
        if self.shared.version.load(Ordering::Relaxed) != self.version {
            self.refresh();
        }
        let mut n = 0;
        for op in ops {
            if self.done.len() == DEPTH || self.copied >= BUDGET {
                break;
            }
            let result = self.run(op, size);
            self.done.push(Completion {
                tag: op.tag,
                result,
            });
            n += 1;
        }
        n
    }

    fn kick(&mut self) {}

    fn poll(&mut self, _now: Instant, done: &mut Vec<Completion>) {
        self.copied = 0;
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
