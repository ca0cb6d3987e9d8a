//! Copies of frames, for whoever wants to see what passes a place.
//!
//! ```text
//!   reactors --> Tap (a flag while nobody looks) --> Capture: a bounded buffer of pcapng blocks --> a thread, a file
//! ```
//!
//! Reactors never wait for who reads: a frame that finds no room, or another reactor in the buffer, is counted and not kept. Memory is bounded by [`CaptureOptions::room`], twice where the
//! reader swaps the buffer for another one ([`Capture::take`]), which is all that it does with the buffer locked.

pub mod pcapng;
mod spec;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;

use crate::{Batch, Frame, HEADROOM, places};

/// Which way a frame goes, as the function sees it, or for a tunnel the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It is received.
    In,
    /// It is sent.
    Out,
}

/// What is kept.
#[derive(Clone, Copy, Debug)]
pub struct CaptureOptions {
    /// Bytes of each frame, from its first one.
    pub snaplen: u32,
    /// Frames that go this way; `None`: both.
    pub only: Option<Way>,
    /// So many frames, and no more.
    pub count: u64,
    /// Bytes that may wait for the reader.
    pub room: usize,
}

/// What was kept, and what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// Frames that were kept.
    pub kept: u64,
    /// Frames that there was no room for.
    pub missed: u64,
}

/// Frames that somebody wants to see.
pub struct Capture {
    options: CaptureOptions,
    /// One moment by both clocks: reactors have the monotonic one.
    start: (Instant, u64),
    kept: Mutex<Kept>,
    /// Frames that came while another reactor was at the buffer for too long.
    contended: AtomicU64,
    over: AtomicBool,
}

struct Kept {
    blocks: Vec<u8>,
    captured: Captured,
}

/// How often a reactor looks whether another has left the buffer, before it gives a frame up: a few hundred nanoseconds, which copying a frame takes. One that is not running any more is not waited for.
const LOOKS: u32 = 64;

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Capture {
    /// One that has nothing yet.
    pub fn new(options: CaptureOptions) -> Arc<Self> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall = wall.map_or(0, |since| since.as_nanos() as u64);
        Arc::new(Self {
            options,
            start: (Instant::now(), wall),
            kept: Mutex::new(Kept {
                blocks: Vec::with_capacity(options.room),
                captured: Captured::default(),
            }),
            contended: AtomicU64::new(0),
            over: AtomicBool::new(false),
        })
    }

    /// Nanoseconds since 1970.
    fn time(&self, now: Instant) -> u64 {
        let (start, wall) = self.start;
        wall + now.saturating_duration_since(start).as_nanos() as u64
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Kept>> {
        for _ in 0..LOOKS {
            match self.kept.try_lock() {
                Ok(kept) => return Some(kept),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
                Err(TryLockError::Poisoned(_)) => return None,
            }
        }
        None
    }

    fn see(
        &self,
        now: Instant,
        way: Way,
        batch: &Batch,
        which: u32,
        before: &mut dyn FnMut(&Frame, &mut [u8; HEADROOM]) -> usize,
    ) {
        let unwanted = self.options.only.is_some_and(|only| only != way);
        if unwanted || self.over.load(Ordering::Relaxed) {
            return;
        }
        let Some(mut kept) = self.try_lock() else {
            let n = u64::from(which.count_ones());
            self.contended.fetch_add(n, Ordering::Relaxed);
            return;
        };
        let Kept { blocks, captured } = &mut *kept;
        let time = self.time(now);
        for i in places(which) {
            if captured.kept == self.options.count {
                self.over.store(true, Ordering::Relaxed);
                break;
            }
            let mut outer = [0; HEADROOM];
            let n = before(&batch.frames()[i], &mut outer);
            let snaplen = self.options.snaplen as usize;
            match pcapng::frame(
                blocks,
                self.options.room,
                snaplen,
                time,
                way,
                &outer[..n],
                batch,
                i,
            ) {
                true => captured.kept += 1,
                false => captured.missed += 1,
            }
        }
    }

    /// Gives what was kept since the last time, as whole blocks, in exchange for a buffer whose contents are forgotten. With room in it, no reactor has to allocate.
    pub fn take(&self, blocks: &mut Vec<u8>) {
        blocks.clear();
        if let Ok(mut kept) = self.kept.lock() {
            std::mem::swap(&mut kept.blocks, blocks);
        }
    }

    /// What it has had.
    pub fn captured(&self) -> Captured {
        let mut captured = self.kept.lock().map_or(Captured::default(), |k| k.captured);
        captured.missed += self.contended.load(Ordering::Relaxed);
        captured
    }

    /// When it began and what the time is now, in nanoseconds since 1970.
    pub fn span(&self) -> (u64, u64) {
        (self.start.1, self.time(Instant::now()))
    }

    /// No more is wanted.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// No more comes: it was ended, or has had as many as were wanted.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
            || self
                .kept
                .lock()
                .is_ok_and(|k| k.captured.kept == self.options.count)
    }
}

/// A place that frames pass. While nobody looks it costs a flag's load.
#[derive(Default)]
pub struct Tap {
    on: AtomicBool,
    captures: ArcSwap<Vec<Arc<Capture>>>,
    /// Taken by whoever changes the list.
    editing: Mutex<()>,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tap({})", self.captures.load().len())
    }
}

impl Tap {
    /// Somebody looks.
    #[inline]
    pub fn is_on(&self) -> bool {
        // Relaxed: a frame more or less at the beginning and the end.
        self.on.load(Ordering::Relaxed)
    }

    /// Shows the frames of `batch` whose bits are set in `which`.
    #[cold]
    pub fn see(&self, now: Instant, way: Way, batch: &Batch, which: u32) {
        self.see_behind(now, way, batch, which, &mut |_, _| 0);
    }

    /// As [`Tap::see`], each behind the bytes that `before` writes for it.
    #[cold]
    pub fn see_behind(
        &self,
        now: Instant,
        way: Way,
        batch: &Batch,
        which: u32,
        before: &mut dyn FnMut(&Frame, &mut [u8; HEADROOM]) -> usize,
    ) {
        for capture in self.captures.load().iter() {
            capture.see(now, way, batch, which, before);
        }
    }

    /// Shows frames to `capture` from now on.
    pub fn attach(self: &Arc<Self>, capture: Arc<Capture>) -> Attached {
        self.edit(|captures| captures.push(capture.clone()));
        Attached {
            tap: Arc::downgrade(self),
            capture,
        }
    }

    fn edit(&self, what: impl FnOnce(&mut Vec<Arc<Capture>>)) {
        let _editing = self.editing.lock().expect("nothing panics with it");
        let mut captures = Vec::clone(&self.captures.load());
        what(&mut captures);
        let on = !captures.is_empty();
        self.captures.store(Arc::new(captures));
        self.on.store(on, Ordering::Relaxed);
    }
}

/// A capture at its place. Dropped, it sees no more.
#[derive(Debug)]
pub struct Attached {
    tap: Weak<Tap>,
    capture: Arc<Capture>,
}

impl Attached {
    /// What it has seen.
    pub fn capture(&self) -> &Arc<Capture> {
        &self.capture
    }

    /// No more comes, also as the place is no more.
    pub fn is_over(&self) -> bool {
        self.tap.strong_count() == 0 || self.capture.is_over()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(tap) = self.tap.upgrade() {
            tap.edit(|captures| captures.retain(|c| !Arc::ptr_eq(c, &self.capture)));
        }
    }
}

#[cfg(test)]
mod tests;
