//! The volume: what is done on control threads.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bluff_block::{
    BlockError, Channel, Events, Geometry, OpenContext, OpenError, Volume, VolumeEvent,
};

use crate::FileOptions;
use crate::channel::FileChannel;
use crate::engine::Threads;
use crate::lock::{self, Refused};
use crate::probe;
use crate::storage::Storage;

/// A volume on a regular file or a block device.
#[derive(Debug)]
pub struct FileVolume {
    path: PathBuf,
    storage: Arc<Storage>,
    threads: Arc<Threads>,
    /// Whether it was made smaller, so that writes under way may have made the file longer again.
    cut: Mutex<bool>,
    events: Events,
}

impl FileVolume {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// As [`crate::open`].
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self, OpenError> {
        let found = probe::open(path, options)?;
        log::info!(
            "{}: {} bytes in blocks of {}, {}",
            path.display(),
            found.geometry.size,
            found.geometry.block_size,
            match (found.memory, found.direct) {
                (true, _) => "in memory",
                (_, true) => "O_DIRECT",
                _ => "page cache",
            }
        );
        Ok(Self {
            path: path.into(),
            storage: Arc::new(Storage::new(found)),
            threads: Arc::default(),
            cut: Mutex::default(),
            events: Events::default(),
        })
    }

    /// Whether it goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.storage.direct
    }

    fn set_len(&self, size: u64) -> Result<(), BlockError> {
        let mut cut = self.cut.lock().expect("a resize does not panic");
        let file = &self.storage.file;
        let old = self.storage.size.load(Ordering::Acquire);
        if size < old {
            // Nothing that is submitted from now on reaches the tail.
            self.storage.size.store(size, Ordering::Release);
            *cut = true;
        } else if *cut {
            // What was in flight then may have written beyond the end.
            file.set_len(old)?;
            *cut = false;
        }
        file.set_len(size)?;
        self.storage.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Volume for FileVolume {
    fn geometry(&self) -> Geometry {
        self.storage.geometry()
    }

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        let channel = FileChannel::new(self.storage.clone(), self.threads.clone(), context)?;
        Ok(Box::new(channel))
    }

    fn lock(&self) -> Result<(), BlockError> {
        let mut state = self.storage.lock_state();
        if !state.held {
            let read_only = self.storage.geometry().read_only;
            let taken = lock::take(&self.storage.file, read_only);
            let failed = match &taken {
                Err(Refused::System(e)) => e.raw_os_error(),
                _ => None,
            };
            let news = state.is_news(failed);
            taken.map_err(|e| match e {
                Refused::Held => BlockError::Locked,
                Refused::System(e) => {
                    if news {
                        log::error!("{}: cannot be locked: {e}", self.path.display());
                    }
                    BlockError::Unavailable
                }
            })?;
            state.held = true;
        }
        state.holders += 1;
        Ok(())
    }

    fn unlock(&self) {
        let mut state = self.storage.lock_state();
        assert!(state.holders > 0, "an unlock for each lock");
        state.holders -= 1;
        self.storage.settle_lock(&mut state);
    }

    /// A regular file is made longer or shorter. A block device has the size that it has: to resize
    /// it to that size takes notice of it.
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        let g = self.storage.geometry();
        if size == 0 || !size.is_multiple_of(u64::from(g.block_size)) {
            return Err(BlockError::Invalid);
        }
        if self.storage.device {
            let there = probe::device_size(&self.storage.file)?;
            if size > there {
                return Err(BlockError::Unsupported);
            }
            self.storage.size.store(size, Ordering::Release);
        } else if g.read_only {
            // Somebody else may have made it longer.
            let there = self.storage.file.metadata()?.len();
            if size > there {
                return Err(BlockError::ReadOnly);
            }
            self.storage.size.store(size, Ordering::Release);
        } else {
            self.set_len(size)?;
        }
        self.events.emit(VolumeEvent::Resized);
        Ok(())
    }

    fn events(&self) -> &Events {
        &self.events
    }
}
