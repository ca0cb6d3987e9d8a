//! Records: what is too long for a message travels as sealed memory.
//!
//! Whoever reads one may be read to by somebody hostile. The seals say that it is plain memory (no file
//! system that makes its reader wait), that it keeps its size, and that nobody writes to it any more, so that what was
//! checked is what is used.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};

const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL);

/// Makes a record.
///
/// # Errors
/// Where memory or descriptors are used up.
pub fn write(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("bluff-record", flags)?);
    file.write_all_at(bytes, 0)?;
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    Ok(file.into())
}

/// Reads a record of at most `most` bytes.
///
/// # Errors
/// `InvalidData` where it is none, or longer.
pub fn read(record: BorrowedFd<'_>, most: usize) -> io::Result<Vec<u8>> {
    let no_record = || io::Error::from(io::ErrorKind::InvalidData);
    let seals = rustix::fs::fcntl_get_seals(record).map_err(|_| no_record())?;
    let length = rustix::fs::fstat(record)?.st_size;
    let length = usize::try_from(length).map_err(|_| no_record())?;
    if !seals.contains(SEALS) || length > most {
        return Err(no_record());
    }
    let mut bytes = vec![0; length];
    // A file of its own: the position that others share is left alone.
    File::from(record.as_fd().try_clone_to_owned()?).read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 1 << 20;

    #[test]
    fn a_record_is_read_as_written_and_cannot_change() {
        for length in [0, 1, 5000, MOST] {
            let bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let record = write(&bytes).unwrap();
            assert_eq!(read(record.as_fd(), MOST).unwrap(), bytes);
            let file = File::from(record);
            assert!(file.write_all_at(b"x", 0).is_err());
            assert!(file.set_len(length as u64 + 1).is_err());
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let long = write(&vec![0; MOST + 1]).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (pipe, _end) = std::os::unix::net::UnixStream::pair().unwrap();
        let open = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        for other in [long.as_fd(), file.as_fd(), pipe.as_fd(), open.as_fd()] {
            let error = read(other, MOST).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
