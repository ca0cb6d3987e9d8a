//! Volumes on files and block devices: `file:/path?size=&block_size=&direct=auto|on|off&read_only=on|off`.
//!
//! ```text
//!   FileVolume ---- Storage: the file, what it can do, abandoned writes, the lock
//!       |               ^
//!   FileChannel --------+--- inline: tmpfs, and what the page cache has (RWF_NOWAIT)
//!       |
//!     Engine --- the reactor's io_uring | threads, where there is none
//!       |
//!     Arena: bounce buffers, all that the kernel ever holds of an operation
//! ```
//!
//! - **Memory.** What is done inline goes straight between the file and the host's memory. Whatever
//!   the kernel may hold for longer goes through a bounce buffer: an operation in the kernel cannot
//!   be taken back, and a host's memory must be revocable within a bound. So cancelling always ends
//!   the operation at once; the buffer stays with the channel until the kernel lets go. A write
//!   that was given up so may still land, and until it has, everything that touches its range
//!   waits, on every channel of the volume, and the lock is kept. What a process that was killed
//!   left in the kernel ends with it, before its lock is free.
//! - **O_DIRECT** (`direct=auto`): always on block devices, as another host that has the device too would not see our
//!   page cache; on files wherever the file system has it and blocks are no smaller than its unit. On tmpfs there is nothing to go around; it is read and written inline, so where its pages
//!   have been swapped out the reactor waits for them.
//! - **Flush** is `fdatasync`, one at a time for the whole volume; flushes that come meanwhile share the next one. Linux
//!   reports a lost write once, so after a flush that failed every later one fails too, until the volume is opened again. FUA is `RWF_DSYNC` with O_DIRECT, and a
//!   write and a flush without.
//! - **Size.** What is left over after the last whole block cannot be reached. A file that another
//!   program changes in size is not noticed until [`bluff_block::Volume::resize`]; until then what is
//!   beyond its end fails.
//! - **Lock.** Taken from other processes as QEMU does it. Giving it up does not empty the page cache: who takes it on
//!   this host shares the cache, and with `direct=off` another host must not be next.
//!
//! Not implemented: image formats, zoned devices, atomic writes of more than a block.

mod abandoned;
mod arena;
mod channel;
mod engine;
mod flushes;
mod lock;
mod probe;
mod slot;
mod storage;
mod volume;

use std::path::PathBuf;
use std::sync::Arc;

use bluff_block::{OpenError, Uri, UriError, Volume};

pub use volume::FileVolume;

/// Whether the page cache is gone around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Direct {
    /// On block devices; on files where the file system and the block size allow it.
    #[default]
    Auto,
    /// Always; opening fails where it cannot be.
    On,
    /// Never.
    Off,
}

/// How a file is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Size in bytes that a file is made with where it is missing. One that is there keeps its own, as it
    /// may have been resized since.
    pub size: Option<u64>,
    /// 512 or 4096; left out, the smallest that the storage allows.
    pub block_size: Option<u32>,
    /// Whether the page cache is gone around.
    pub direct: Direct,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Opens `file:/path?…`.
///
/// # Errors
/// [`OpenError::Uri`] for a wrong URI, [`OpenError::Storage`] where the file cannot be opened or made,
/// [`OpenError::Shape`] where it is not as the URI says.
pub fn open(uri: Uri) -> Result<Arc<dyn Volume>, OpenError> {
    let (path, options) = parse(uri)?;
    Ok(Arc::new(FileVolume::open(&path, &options)?))
}

/// What [`open`] reads in the URI. Nothing is opened.
///
/// # Errors
/// [`UriError`] where something does not fit.
pub fn parse(mut uri: Uri) -> Result<(PathBuf, FileOptions), UriError> {
    let path = PathBuf::from(uri.path());
    if !path.is_absolute() {
        return Err(UriError::Path(
            "a file volume needs an absolute path, as in file:/srv/disk.raw",
        ));
    }
    let (size, block_size) = uri.take_shape()?;
    let direct = uri.take_as("direct", |v| match v {
        "auto" => Ok(Direct::Auto),
        "on" => Ok(Direct::On),
        "off" => Ok(Direct::Off),
        _ => Err(format!("{v:?} is not auto, on or off")),
    })?;
    let read_only = uri.take_as("read_only", |v| match v {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{v:?} is not on or off")),
    })?;
    uri.finish(&["size", "block_size", "direct", "read_only"])?;
    let options = FileOptions {
        size,
        block_size,
        direct: direct.unwrap_or_default(),
        read_only: read_only.unwrap_or(false),
    };
    Ok((path, options))
}
