//! Unix sockets that carry descriptors along.
//!
//! Unsafe, because `recvmsg` and `sendmsg` take raw buffers and hand over raw descriptors.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most descriptors that a message of any protocol here may carry.
pub const MOST_FILES: usize = 16;

/// What one read gave.
#[derive(Debug, Default)]
pub struct Received {
    /// How many bytes were copied. Zero: the peer has closed its end.
    pub len: usize,
    /// The descriptors that came along, close-on-exec.
    pub files: Vec<OwnedFd>,
    /// There were more than a message may carry; the rest is closed.
    pub truncated: bool,
}

/// Room for a control message with `MOST_FILES` descriptors and one more, aligned as `cmsghdr` asks.
#[repr(C, align(8))]
struct Control([u8; ROOM]);

const ROOM: usize = 96;
const _: () = assert!(ROOM >= 16 + (4 * (MOST_FILES + 1)).next_multiple_of(8));

/// Looks at up to `to.len()` bytes without taking them. Descriptors are duplicates: the peeked
/// message keeps its own. At most `files` of them are made.
///
/// # Errors
/// Whatever `recvmsg` says; `WouldBlock` where there is nothing yet.
///
/// # Panics
/// With `files` over [`MOST_FILES`].
pub fn peek(socket: BorrowedFd<'_>, to: &mut [u8], files: usize) -> io::Result<Received> {
    receive(
        socket,
        to,
        Some(files).filter(|n| *n > 0),
        libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
    )
}

/// Takes up to `to.len()` bytes, and at most `files` of the descriptors that come with them; the others are closed.
///
/// # Errors
/// As [`peek`].
///
/// # Panics
/// With `files` over [`MOST_FILES`].
pub fn take(socket: BorrowedFd<'_>, to: &mut [u8], files: usize) -> io::Result<Received> {
    receive(
        socket,
        to,
        Some(files),
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
        let got = receive(socket, &mut sink[..want], None, libc::MSG_DONTWAIT)?;
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
    files: Option<usize>,
    flags: libc::c_int,
) -> io::Result<Received> {
    assert!(files <= Some(MOST_FILES), "more than there is room for");
    let mut control = Control([0; ROOM]);
    let mut iov = libc::iovec {
        iov_base: to.as_mut_ptr().cast(),
        iov_len: to.len(),
    };
    // SAFETY: plain data; the pointers below live until the call is over.
    let mut msg: libc::msghdr = unsafe { zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if let Some(most) = files {
        msg.msg_control = control.0.as_mut_ptr().cast();
        // Room for one too many: not every system says that it has dropped some.
        // SAFETY: arithmetic only.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE((4 * (most + 1)) as u32) } as _;
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
        truncated: files.is_some() && msg.msg_flags & libc::MSG_CTRUNC != 0,
    };
    if let Some(most) = files {
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
        got.truncated |= got.files.len() > most;
        got.files.truncate(most);
    }
    Ok(got)
}

/// Sends `bytes` with `files` (at most [`MOST_FILES`]) attached to the first one; says how many bytes went.
///
/// # Errors
/// Whatever `sendmsg` says; `WouldBlock` where the peer does not read.
///
/// # Panics
/// With more than [`MOST_FILES`] files.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    assert!(files.len() <= MOST_FILES, "too many descriptors to send");
    let mut control = Control([0; ROOM]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: plain data; the pointers below live until the call is over, and the control buffer
    // holds MOST_FILES descriptors.
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

#[cfg(test)]
mod tests {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;
    use crate::descriptor::sealed_memory;
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
            let got = peek(b.as_fd(), &mut buf, 8).unwrap();
            assert_eq!((got.len, got.files.len(), &buf), (5, 1, b"hello"));
        }
        discard(b.as_fd(), 5).unwrap();
        let got = take(b.as_fd(), &mut buf, 8).unwrap();
        assert_eq!((got.len, got.files.len(), &buf), (5, 0, b"world"));
        let empty = peek(b.as_fd(), &mut buf, 8).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(peek(b.as_fd(), &mut buf, 8).unwrap().len, 0);
    }

    #[test]
    fn more_descriptors_than_there_may_be_are_reported() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = sealed_memory(c"x", 10).unwrap();
        for (most, count) in [(8, 8), (8, 9), (8, 100), (16, 16), (16, 17), (16, 100)] {
            let many = vec![file.as_raw_fd(); count];
            a.send_with_fds(&[&b"x"[..]], &many).unwrap();
            for look in [true, false] {
                let mut buf = [0; 1];
                let got = if look {
                    peek(b.as_fd(), &mut buf, most).unwrap()
                } else {
                    take(b.as_fd(), &mut buf, most).unwrap()
                };
                assert_eq!((got.files.len(), got.truncated), (most, count > most));
            }
        }
    }
}
