//! Opens a file or block device and finds out what it can do.
//!
//! Unsafe, because it calls `ioctl` and reads with O_DIRECT.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use bluff_block::{DiscardLimits, Geometry, OpenError, ZeroLimits};

use crate::arena::{Mapping, UNIT};
use crate::{Direct, FileOptions};

/// Most bytes in one discard or one operation of zeroes.
const MAX_CLEAR: u64 = 1 << 30;

/// What was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) file: File,
    /// The same file opened a second time, for flushes, where `file` has O_DIRECT.
    pub(crate) sync: Option<File>,
    pub(crate) geometry: Geometry,
    /// A block device, not a regular file.
    pub(crate) device: bool,
    /// Opened with O_DIRECT.
    pub(crate) direct: bool,
    /// In memory: everything is done inline.
    pub(crate) memory: bool,
}

fn open_file(path: &Path, wanted: &FileOptions, flags: i32, create: bool) -> io::Result<File> {
    // Not to hang on a pipe, which is refused later.
    let file = OpenOptions::new()
        .read(true)
        .write(!wanted.read_only)
        .create_new(create)
        .mode(0o600)
        .custom_flags(flags | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)?;
    // An io_uring of an older kernel would answer EAGAIN where it could wait.
    // SAFETY: the descriptor is open; no memory is involved.
    unsafe {
        let now = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        if now < 0 || libc::fcntl(file.as_raw_fd(), libc::F_SETFL, now & !libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(file)
}

fn error<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> OpenError + use<'a> {
    move |source| OpenError::Storage {
        what: format!("{what} {}", path.display()),
        source,
    }
}

/// Opens `path`; makes it where it is missing and a size is given.
pub(crate) fn open(path: &Path, wanted: &FileOptions) -> Result<Found, OpenError> {
    let file = match open_file(path, wanted, 0, false) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => match wanted.size {
            Some(size) if !wanted.read_only => create(path, wanted, size)?,
            _ => return Err(error("cannot open", path)(e)),
        },
        other => other.map_err(error("cannot open", path))?,
    };
    let meta = file.metadata().map_err(error("cannot examine", path))?;
    let kind = meta.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = format!("{} is neither a file nor a block device", path.display());
        return Err(OpenError::Shape(what));
    }
    let device = kind.is_block_device();
    let memory = !device && is_tmpfs(&file).map_err(error("cannot examine", path))?;
    let sector = if device {
        let n: libc::c_int = ask(&file, BLKSSZGET).map_err(error("cannot examine", path))?;
        n as u32
    } else {
        512
    };
    let how = match wanted.direct {
        // Memory has no cache to go around.
        _ if memory => Direct::Off,
        // It may be another host's too, which does not see our page cache.
        Direct::Auto if device => Direct::On,
        how => how,
    };
    let tried = direct(&file, path, wanted, how, sector)?;
    let direct = tried.is_some();
    let (file, sync, unit) = match tried {
        Some((fresh, unit)) => (fresh, Some(file), unit),
        None => (file, None, sector),
    };
    let block_size = block_size(path, wanted, sector, direct, unit)?;
    let bytes = if device {
        device_size(&file).map_err(error("cannot examine", path))?
    } else {
        meta.size()
    };
    let size = bytes / u64::from(block_size) * u64::from(block_size);
    if size == 0 {
        let what = format!("{} holds no block of {block_size} bytes", path.display());
        return Err(OpenError::Shape(what));
    }
    if size != bytes {
        log::warn!(
            "{}: the last {} bytes are no whole block and cannot be reached",
            path.display(),
            bytes - size
        );
    }
    let mut geometry = Geometry::new(block_size, size);
    geometry.read_only = wanted.read_only;
    let preferred = if device {
        let n: libc::c_uint = ask(&file, BLKPBSZGET).unwrap_or(0);
        geometry.optimal_io = ask::<libc::c_uint>(&file, BLKIOOPT).unwrap_or(0);
        n
    } else {
        // A network file system says a megabyte here, and does not mean its blocks.
        u32::try_from(meta.blksize()).map_or(0, |n| n.min(4096))
    };
    if preferred.is_power_of_two() && preferred > block_size {
        geometry.physical_block_size = preferred;
    }
    if !wanted.read_only {
        let (discard, unmap) = clearing(&file, &meta, device, geometry.physical_block_size, size);
        geometry.discard = discard;
        geometry.write_zeroes = Some(ZeroLimits {
            max: MAX_CLEAR,
            unmap,
        });
    }
    Ok(Found {
        file,
        sync,
        geometry,
        device,
        direct,
        memory,
    })
}

fn create(path: &Path, wanted: &FileOptions, size: u64) -> Result<File, OpenError> {
    let file = open_file(path, wanted, 0, true).map_err(error("cannot create", path))?;
    if let Err(e) = file.set_len(size) {
        let _ = std::fs::remove_file(path);
        return Err(error("cannot give its size to", path)(e));
    }
    Ok(file)
}

/// Opens it again with O_DIRECT, where that is wanted and works. The unit is what offsets and
/// lengths must then be multiples of.
fn direct(
    file: &File,
    path: &Path,
    wanted: &FileOptions,
    how: Direct,
    sector: u32,
) -> Result<Option<(File, u32)>, OpenError> {
    if how == Direct::Off {
        return Ok(None);
    }
    let tried = open_file(path, wanted, libc::O_DIRECT, false).and_then(|f| {
        let (one, two) = (file.metadata()?, f.metadata()?);
        if (one.dev(), one.ino(), one.rdev()) != (two.dev(), two.ino(), two.rdev()) {
            return Err(io::Error::other("it was replaced meanwhile"));
        }
        let unit = unit(&f, sector)?;
        Ok((f, unit))
    });
    match (tried, how) {
        (Ok(found), Direct::On) => Ok(Some(found)),
        // Blocks smaller than the unit would need a read before each write.
        (Ok((f, unit)), _) if wanted.block_size.is_none_or(|b| b >= unit) => Ok(Some((f, unit))),
        (Err(e), Direct::On) => Err(error("cannot use O_DIRECT on", path)(e)),
        _ => Ok(None),
    }
}

/// The unit of O_DIRECT, tried out with reads.
fn unit(file: &File, sector: u32) -> io::Result<u32> {
    let buffer = Mapping::new(UNIT)?;
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for unit in [512, 4096] {
        if unit < sector {
            continue;
        }
        // At an odd multiple: some file systems take anything at 0.
        for at in [0, unit] {
            // SAFETY: the buffer holds 4096 bytes.
            let n = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    buffer.ptr().cast(),
                    unit as usize,
                    libc::off_t::from(at as i32),
                )
            };
            if n >= 0 && at > 0 {
                return Ok(unit);
            }
            if n < 0 {
                last = io::Error::last_os_error();
                break;
            }
        }
    }
    Err(last)
}

fn block_size(
    path: &Path,
    wanted: &FileOptions,
    sector: u32,
    direct: bool,
    unit: u32,
) -> Result<u32, OpenError> {
    let least = if direct { unit.max(sector) } else { sector };
    let block_size = wanted.block_size.unwrap_or(least.max(512));
    if block_size < least {
        let why = if direct { "O_DIRECT" } else { "the device" };
        let what = format!(
            "{}: {why} needs blocks of {least} bytes, not {block_size}",
            path.display()
        );
        return Err(OpenError::Shape(what));
    }
    if ![512, 4096].contains(&block_size) {
        let what = format!("{} has blocks of {block_size} bytes", path.display());
        return Err(OpenError::Shape(what));
    }
    Ok(block_size)
}

/// What it has for discard, and whether zeroes can give storage back.
fn clearing(
    file: &File,
    meta: &std::fs::Metadata,
    device: bool,
    physical: u32,
    size: u64,
) -> (Option<DiscardLimits>, bool) {
    if device {
        let max = queue(meta, "discard_max_bytes");
        let granularity = queue(meta, "discard_granularity");
        let granularity = u32::try_from(granularity).unwrap_or(0).max(physical);
        let discard = (max > 0).then_some(DiscardLimits {
            max: MAX_CLEAR,
            granularity: granularity.next_multiple_of(physical),
        });
        return (discard, queue(meta, "write_zeroes_max_bytes") > 0);
    }
    let punches = punches(file, size);
    let discard = punches.then_some(DiscardLimits {
        max: MAX_CLEAR,
        granularity: physical.max(4096),
    });
    (discard, punches)
}

/// Whether it makes holes, tried out beyond the end, where there is nothing to lose. Far beyond, as the file is not
/// locked: after the last whole block there may be some bytes, and another daemon may have made it longer just now.
fn punches(file: &File, size: u64) -> bool {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // Less where the file system has no files of that size.
    [1u64 << 40, 1 << 36, 1 << 32].iter().any(|beyond| {
        let at = size.next_multiple_of(1 << 20).saturating_add(*beyond);
        let Ok(at) = libc::off_t::try_from(at) else {
            return false;
        };
        // SAFETY: the descriptor is open; no memory is involved.
        unsafe { libc::fallocate(file.as_raw_fd(), mode, at, 4096) == 0 }
    })
}

/// A property of a block device's queue, 0 where it has none. A partition's are its disk's.
fn queue(meta: &std::fs::Metadata, name: &str) -> u64 {
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let dir = format!("/sys/dev/block/{major}:{minor}");
    [
        format!("{dir}/queue/{name}"),
        format!("{dir}/../queue/{name}"),
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
    .unwrap_or(0)
}

fn is_tmpfs(file: &File) -> io::Result<bool> {
    // SAFETY: plain data, filled by the kernel.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the buffer is ours.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut fs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fs.f_type == libc::TMPFS_MAGIC)
}

// linux/fs.h; the same on every architecture that we build for.
const BLKSSZGET: libc::Ioctl = 0x1268 as libc::Ioctl;
const BLKPBSZGET: libc::Ioctl = 0x127b as libc::Ioctl;
const BLKIOOPT: libc::Ioctl = 0x1279 as libc::Ioctl;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
const BLKDISCARD: libc::Ioctl = 0x1277 as libc::Ioctl;

/// A number that a block device tells.
fn ask<T: Default>(file: &File, what: libc::Ioctl) -> io::Result<T> {
    let mut value = T::default();
    // SAFETY: each of the requests above writes one number of the type that it is asked with.
    if unsafe { libc::ioctl(file.as_raw_fd(), what, &raw mut value) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// The size of a block device in bytes.
pub(crate) fn device_size(file: &File) -> io::Result<u64> {
    ask(file, BLKGETSIZE64)
}

/// Discards a range of a block device.
pub(crate) fn discard_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the request reads two 64-bit numbers.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
