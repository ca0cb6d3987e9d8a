//! A session on a socket that is connected already.
//!
//! `vhost-user-backend` 0.24 can accept a connection or make one, but not take one over. So a
//! connected socket is relayed, descriptors included, to a private one that it can accept from. That
//! costs messages a copy, and the rings nothing: they are in shared memory.
//!
//! Unsafe, because descriptors that were received are numbers at first.
#![allow(unsafe_code)]

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most descriptors of one message (`VHOST_USER_MAX_FDS` and some).
const MAX_FDS: usize = 32;

/// A private socket that the connection can be accepted from. The threads end with the
/// connection.
pub(crate) fn relay(socket: UnixStream) -> io::Result<(UnixListener, [JoinHandle<()>; 2])> {
    let folder = tempfile::Builder::new()
        .prefix("bluff-reference-")
        .tempdir()?;
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let inner = UnixStream::connect(&path)?;
    let back = (inner.try_clone()?, socket.try_clone()?);
    let spawn = |name: &str, from: UnixStream, to: UnixStream| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                if let Err(e) = pump(&from, &to) {
                    log::debug!("relay: {e}");
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            })
    };
    let there = spawn("relay-in", socket, inner)?;
    let back = spawn("relay-out", back.0, back.1)?;
    Ok((listener, [there, back]))
}

/// Moves bytes and descriptors until `from` has ended. The kernel never joins the bytes of two messages
/// where either carries descriptors, so what came together goes together.
fn pump(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut buffer = [0u8; 8192];
    loop {
        let (n, fds) = receive(from, &mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = to.send_with_fds(&[&buffer[..n]], &raw)?;
        let mut to = to;
        to.write_all(&buffer[sent..n])?;
    }
}

fn receive(from: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut raw = [-1; MAX_FDS];
    let mut iovec = [libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }];
    loop {
        // SAFETY: the one iovec names a buffer that is ours and as long as it says.
        match unsafe { from.recv_with_fds(&mut iovec, &mut raw) } {
            Ok((n, count)) => {
                // SAFETY: the kernel made these for this process just now.
                let own = |&fd: &RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
                return Ok((n, raw[..count].iter().map(own).collect()));
            }
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether a socket listens, rather than being connected.
pub(crate) fn listens(socket: &OwnedFd) -> io::Result<bool> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: pointers to an integer of ours and to its length.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if rc == 0 {
        Ok(value != 0)
    } else {
        Err(io::Error::last_os_error())
    }
}
