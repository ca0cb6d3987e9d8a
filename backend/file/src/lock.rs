//! The lock that keeps two users from writing one file: open-file-description locks on single
//! bytes, laid out as QEMU lays them out, so that QEMU on the same file is refused too, and refuses.
//!
//! ```text
//!   byte 100 + p   somebody uses permission p           p: 0 consistent read, 1 write, 3 resize
//!   byte 200 + p   somebody does not want others to use permission p
//! ```
//! All are *read* locks, so any number of users may hold a byte. Who comes takes its bytes first and
//! then looks whether anybody contradicts them. Two who come at once can both see the other and
//! both give way; each tries again after a pause of its own length.
//!
//! Unsafe, because it calls `fcntl`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const USED: i64 = 100;
const REFUSED: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why the lock was not had.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Somebody else holds the file.
    Held,
    /// The file system has no such locks, or failed.
    System(io::Error),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        Self::System(e)
    }
}

fn fcntl(file: &File, command: i32, kind: i32, at: i64) -> io::Result<libc::flock> {
    // SAFETY: plain data.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at as libc::off_t;
    lock.l_len = 1;
    // SAFETY: the descriptor is open and the structure is ours.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if rc == 0 {
        Ok(lock)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set(file: &File, kind: i32, at: i64) -> Result<(), Refused> {
    match fcntl(file, libc::F_OFD_SETLK, kind, at) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(Refused::Held)
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether another user holds the byte in any way.
fn is_held(file: &File, at: i64) -> io::Result<bool> {
    let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, at)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn used(read_only: bool) -> &'static [i64] {
    if read_only {
        &[READ]
    } else {
        &[READ, WRITE, RESIZE]
    }
}

/// What no other user may do, whatever we do ourselves.
const OURS_ALONE: [i64; 2] = [WRITE, RESIZE];

fn try_bytes(file: &File, read_only: bool) -> Result<(), Refused> {
    for p in used(read_only) {
        set(file, libc::F_RDLCK, USED + p)?;
    }
    for p in OURS_ALONE {
        set(file, libc::F_RDLCK, REFUSED + p)?;
    }
    for p in used(read_only) {
        if is_held(file, REFUSED + p)? {
            return Err(Refused::Held);
        }
    }
    for p in OURS_ALONE {
        if is_held(file, USED + p)? {
            return Err(Refused::Held);
        }
    }
    Ok(())
}

/// Takes the lock, or leaves everything as it was.
pub(crate) fn take(file: &File, read_only: bool) -> Result<(), Refused> {
    try_bytes(file, read_only).inspect_err(|_| give(file))
}

/// Gives it up.
pub(crate) fn give(file: &File) {
    for p in [READ, WRITE, RESIZE] {
        for at in [USED + p, REFUSED + p] {
            // Fails only where there are no locks, and then there is none to give up.
            let _ = set(file, libc::F_UNLCK, at);
        }
    }
}
