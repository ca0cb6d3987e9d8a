//! What the standard library lacks about Unix sockets and descriptors.
//!
//! Unsafe, because `recvmsg` and `sendmsg` take raw buffers and hand over raw descriptors.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

/// How many descriptors a message may carry (vhost-user, "Memory regions description").
pub const MAX_FILES: usize = 8;

/// What one read gave.
#[derive(Debug, Default)]
pub struct Received {
    /// How many bytes were copied. Zero: the peer has closed its end.
    pub len: usize,
    /// The descriptors that came along, close-on-exec.
    pub files: Vec<OwnedFd>,
    /// There were more than [`MAX_FILES`]; the kernel has closed the rest.
    pub truncated: bool,
}

/// Room for a control message with `MAX_FILES` descriptors, aligned as `cmsghdr` asks.
#[repr(C, align(8))]
struct Control([u8; 64]);

const _: () = assert!(size_of::<Control>() >= 16 + 4 * MAX_FILES);

/// Looks at up to `to.len()` bytes without taking them. Descriptors are duplicates: the peeked
/// message keeps its own. With `files` false none are made.
///
/// # Errors
/// Whatever `recvmsg` says; `WouldBlock` where there is nothing yet.
pub fn peek(socket: BorrowedFd<'_>, to: &mut [u8], files: bool) -> io::Result<Received> {
    receive(
        socket,
        to,
        files,
        libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
    )
}

/// Takes up to `to.len()` bytes, and the descriptors that come with them.
///
/// # Errors
/// As [`peek`].
pub fn take(socket: BorrowedFd<'_>, to: &mut [u8]) -> io::Result<Received> {
    receive(
        socket,
        to,
        true,
        libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
    )
}

/// Takes exactly `len` bytes that were peeked before and drops them, with their descriptors.
///
/// # Errors
/// `UnexpectedEof` where they are not there (somebody else has read the socket), or what `recvmsg`
/// says.
pub fn discard(socket: BorrowedFd<'_>, mut len: usize) -> io::Result<()> {
    let mut sink = [0u8; 4096];
    while len > 0 {
        let want = len.min(sink.len());
        // No room for control messages: the kernel closes the descriptors.
        let got = receive(socket, &mut sink[..want], false, libc::MSG_DONTWAIT)?;
        if got.len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        len -= got.len;
    }
    Ok(())
}

fn receive(
    socket: BorrowedFd<'_>,
    to: &mut [u8],
    files: bool,
    flags: libc::c_int,
) -> io::Result<Received> {
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec {
        iov_base: to.as_mut_ptr().cast(),
        iov_len: to.len(),
    };
    // SAFETY: plain data; the pointers below live until the call is over.
    let mut msg: libc::msghdr = unsafe { zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if files {
        msg.msg_control = control.0.as_mut_ptr().cast();
        // Room for one too many: not every system says that it has dropped some.
        // SAFETY: arithmetic only.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE((4 * (MAX_FILES + 1)) as u32) } as _;
    }
    let len = loop {
        // SAFETY: every pointer in `msg` is to a live buffer of the stated length.
        let rc = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut msg, flags) };
        if rc >= 0 {
            break rc as usize;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    let mut got = Received {
        len,
        files: Vec::new(),
        truncated: files && msg.msg_flags & libc::MSG_CTRUNC != 0,
    };
    if files {
        // SAFETY: the kernel has filled the control buffer; the macros walk what it filled.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&raw const msg);
            while !cmsg.is_null() {
                if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                    let bytes = (*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                    let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                    for i in 0..bytes / size_of::<RawFd>() {
                        // Ours from here on: closed whatever happens.
                        got.files
                            .push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                    }
                }
                cmsg = libc::CMSG_NXTHDR(&raw const msg, cmsg);
            }
        }
        got.truncated |= got.files.len() > MAX_FILES;
        got.files.truncate(MAX_FILES);
    }
    Ok(got)
}

/// Sends `bytes` with `files` (at most [`MAX_FILES`]) attached to the first one; says how many bytes went.
///
/// # Errors
/// Whatever `sendmsg` says; `WouldBlock` where the peer does not read.
///
/// # Panics
/// With more than [`MAX_FILES`] files.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    assert!(files.len() <= MAX_FILES, "too many descriptors to send");
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: plain data; the pointers below live until the call is over, and the control buffer
    // holds MAX_FILES descriptors.
    let msg = unsafe {
        let mut msg: libc::msghdr = zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        if !files.is_empty() {
            let len = (4 * files.len()) as u32;
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(len) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&raw const msg);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(len) as _;
            let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
            for (i, file) in files.iter().enumerate() {
                data.add(i).write_unaligned(file.as_raw_fd());
            }
        }
        msg
    };
    loop {
        // SAFETY: as built above.
        let rc = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const msg,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if rc >= 0 {
            return Ok(rc as usize);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

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
/// have them wait at any time: who writes to it is prepared for that (`bluff_virtio::Notifier`).
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

/// Makes a descriptor that a front end sent usable for kicks: an eventfd, whose count is never read and never stands in the
/// way of another kick. A pipe or a socket would be full one day.
///
/// # Errors
/// `InvalidInput` for a file of another kind.
pub fn set_kick(file: BorrowedFd<'_>) -> io::Result<()> {
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
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn peeked_bytes_stay_and_discarded_ones_go() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = sealed_memory(c"x", 10).unwrap();
        send(a.as_fd(), b"hello", &[file.as_fd()]).unwrap();
        (&a).write_all(b"world").unwrap();
        let mut buf = [0; 5];
        for _ in 0..2 {
            let got = peek(b.as_fd(), &mut buf, true).unwrap();
            assert_eq!((got.len, got.files.len(), &buf), (5, 1, b"hello"));
        }
        discard(b.as_fd(), 5).unwrap();
        let got = take(b.as_fd(), &mut buf).unwrap();
        assert_eq!((got.len, got.files.len(), &buf), (5, 0, b"world"));
        let empty = peek(b.as_fd(), &mut buf, true).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(peek(b.as_fd(), &mut buf, true).unwrap().len, 0);
    }

    #[test]
    fn more_than_eight_descriptors_are_reported() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = sealed_memory(c"x", 10).unwrap();
        for (count, truncated) in [(8, false), (9, true), (100, true)] {
            let many = vec![file.as_raw_fd(); count];
            a.send_with_fds(&[&b"x"[..]], &many).unwrap();
            for look in [true, false] {
                let mut buf = [0; 1];
                let got = if look {
                    peek(b.as_fd(), &mut buf, true).unwrap()
                } else {
                    take(b.as_fd(), &mut buf).unwrap()
                };
                assert_eq!((got.files.len(), got.truncated), (8, truncated));
            }
        }
    }

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
