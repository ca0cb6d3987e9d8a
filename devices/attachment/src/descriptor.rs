//! Descriptors that a host sent, which may be anything, and some of our own.
//!
//! Unsafe, because the kernel is asked about raw descriptors, and these change their owners.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// The kind of a file, as `stat` has it; 0 for an anonymous inode such as an eventfd.
fn kind(file: BorrowedFd<'_>) -> io::Result<libc::mode_t> {
    // SAFETY: plain data, filled by the kernel.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: the descriptor is open and the buffer is ours.
    if unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.st_mode & libc::S_IFMT)
}

/// Makes sure that a socket is a Unix socket. Others may wait when they are closed (`SO_LINGER`), and a notifier is
/// closed on its reactor.
fn check_unix(file: BorrowedFd<'_>) -> io::Result<()> {
    match option(file, libc::SO_DOMAIN)? {
        libc::AF_UNIX => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Makes a descriptor that a front end sent usable for notifications: it must be able to signal
/// (an eventfd, a pipe, a Unix socket), and neither reads nor writes wait as long as the front end leaves it so. It can
/// have them wait at any time: who writes to it is prepared for that (`bluff_reactor::Notifier`).
///
/// # Errors
/// `InvalidInput` for a file of another kind.
pub fn set_notifier(file: BorrowedFd<'_>) -> io::Result<()> {
    match kind(file)? {
        0 | libc::S_IFIFO => {}
        libc::S_IFSOCK => check_unix(file)?,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    set_nonblocking(file)
}

/// Makes a descriptor that a front end sent usable where only an eventfd will do: for kicks, whose count is never read and never stands in the
/// way of another kick (a pipe or a socket would be full one day), and for interrupts of a function.
///
/// # Errors
/// `InvalidInput` for a file of another kind.
pub fn set_event(file: BorrowedFd<'_>) -> io::Result<()> {
    if kind(file)? != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    set_nonblocking(file)
}

/// Makes sure that a descriptor that a front end sent is a stream socket of this machine: others report errors that no read
/// takes away.
///
/// # Errors
/// `InvalidInput` for a file of another kind.
pub fn set_channel(file: BorrowedFd<'_>) -> io::Result<()> {
    if kind(file)? != libc::S_IFSOCK || option(file, libc::SO_TYPE)? != libc::SOCK_STREAM {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    check_unix(file)?;
    set_nonblocking(file)
}

/// A number among a socket's options.
fn option(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    let (fd, level) = (socket.as_raw_fd(), libc::SOL_SOCKET);
    // SAFETY: the buffer is ours and as long as we say.
    let rc = unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut len) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Makes reads and writes answer `WouldBlock` instead of waiting.
///
/// # Errors
/// Whatever `fcntl` says.
pub fn set_nonblocking(file: BorrowedFd<'_>) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: no memory is involved.
    let rc = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the peer has closed its end, whatever is left to read.
pub fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which is ours.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n == 1 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// The descriptor as the type that devices take.
pub fn event_fd(file: OwnedFd) -> EventFd {
    // SAFETY: an open descriptor changes its owner. That it may be a pipe or a socket (User-Mode
    // Linux sends these) does not matter: eight bytes are read and written.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

/// A descriptor of ours, to be sent.
pub fn owned(event: EventFd) -> OwnedFd {
    // SAFETY: an open descriptor changes its owner.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

/// An anonymous file of `len` zero bytes that can neither shrink nor grow, so that nobody who holds
/// it can take its pages away.
///
/// # Errors
/// Whatever the kernel says.
pub fn sealed_memory(name: &std::ffi::CStr, len: u64) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made just now, and nobody else has it.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is involved.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn sealed_memory_keeps_its_size() {
        let file = std::fs::File::from(sealed_memory(c"x", 4096).unwrap());
        assert!(file.set_len(0).is_err() && file.set_len(8192).is_err());
        assert_eq!(file.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn only_what_signals_is_a_notifier() {
        let file = sealed_memory(c"x", 10).unwrap();
        assert!(set_notifier(file.as_fd()).is_err());
        let (a, _b) = UnixStream::pair().unwrap();
        set_notifier(a.as_fd()).unwrap();
        set_channel(a.as_fd()).unwrap();
        let (_end, pipe) = io::pipe().unwrap();
        set_notifier(pipe.as_fd()).unwrap();
        assert!(set_channel(pipe.as_fd()).is_err());
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(set_notifier(udp.as_fd()).is_err() && set_channel(udp.as_fd()).is_err());
        // SAFETY: the descriptor has no other owner.
        let event = unsafe { OwnedFd::from_raw_fd(EventFd::new(0).unwrap().into_raw_fd()) };
        set_notifier(event.as_fd()).unwrap();
        let event = event_fd(event);
        assert_eq!(event.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
