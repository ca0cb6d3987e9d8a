//! Sockets, and many datagrams with one call.
//!
//! Unsafe, because the kernel is given pointers to buffers and addresses.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bluff_memory::IoVec;

/// Bytes of a socket's buffers: the kernel counts more than the data, and some frames of 64 KiB have to fit.
const BUFFER: libc::c_int = 4 << 20;
/// Room for one control message with a number.
pub(super) const CONTROL: usize = 32;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

fn set(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is a number of the length that is given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// An address as the kernel has it.
#[derive(Clone, Copy)]
pub(super) struct Address {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
}

impl Address {
    pub(super) fn new(at: SocketAddr) -> Self {
        // SAFETY: all zeroes are an address of no family.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        let len = match at {
            SocketAddr::V4(at) => {
                let address = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: at.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: at.ip().to_bits().to_be(),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: the storage is large enough, and aligned, for an address of any family.
                unsafe {
                    (&raw mut storage)
                        .cast::<libc::sockaddr_in>()
                        .write(address);
                }
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(at) => {
                let address = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: at.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr {
                        s6_addr: at.ip().octets(),
                    },
                    sin6_scope_id: at.scope_id(),
                };
                // SAFETY: as above.
                unsafe {
                    (&raw mut storage)
                        .cast::<libc::sockaddr_in6>()
                        .write(address);
                }
                size_of::<libc::sockaddr_in6>()
            }
        };
        Self {
            storage,
            len: len as libc::socklen_t,
        }
    }

    /// The IP address that the kernel has written.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        match libc::c_int::from(self.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says that it is one.
                let at = unsafe { (&raw const self.storage).cast::<libc::sockaddr_in>().read() };
                Some(Ipv4Addr::from_bits(u32::from_be(at.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let at = unsafe {
                    (&raw const self.storage)
                        .cast::<libc::sockaddr_in6>()
                        .read()
                };
                Some(Ipv6Addr::from(at.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

fn bound(at: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    let family = if at.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: makes a descriptor.
    let fd = check(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: it is ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if shared {
        set(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    if at.is_ipv6() {
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        // As much of it as this user may have.
        set(&socket, libc::SOL_SOCKET, name, BUFFER)?;
    }
    let address = Address::new(at);
    // SAFETY: an address of the length that it says.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address.storage).cast(),
            address.len,
        )
    })?;
    Ok(socket)
}

/// A socket that datagrams come to. Several may have one address: the kernel spreads flows over them.
pub(super) fn listen(at: SocketAddr) -> io::Result<OwnedFd> {
    let socket = bound(at, true)?;
    // Not in old kernels: then datagrams come one by one.
    let _ = set(&socket, libc::SOL_UDP, libc::UDP_GRO, 1);
    if at.is_ipv6() {
        // VTEPs may leave the checksum out (RFC 6935, RFC 7348 §4.1).
        set(&socket, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
    }
    Ok(socket)
}

/// A socket with a source port of its own, whose datagrams are not fragmented.
pub(super) fn sender(local: IpAddr) -> io::Result<OwnedFd> {
    let socket = bound(SocketAddr::new(local, 0), false)?;
    if local.is_ipv4() {
        set(
            &socket,
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        )?;
    } else {
        set(
            &socket,
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        )?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1)?;
    }
    Ok(socket)
}

/// A message: where its pieces begin and how many there are, and of how many bytes each of its datagrams is (0: it is one).
#[derive(Clone, Copy, Debug)]
pub(super) struct Outgoing {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) segment: u16,
}

/// What the kernel is given of several messages. It is kept, so that it is allocated once.
#[derive(Default)]
pub(super) struct Slots {
    messages: Vec<libc::mmsghdr>,
    controls: Vec<Control>,
}

/// Room for a control message, aligned as one.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Sends messages to one address; says how many the kernel took.
///
/// # Errors
/// Of the first message, where it took none.
///
/// # Safety
/// The memory that `pieces` name is mapped.
pub(super) unsafe fn send(
    socket: &OwnedFd,
    to: &Address,
    messages: &[Outgoing],
    pieces: &[IoVec],
    slots: &mut Slots,
) -> io::Result<usize> {
    slots.messages.clear();
    slots.controls.clear();
    slots.controls.resize(messages.len(), Control([0; CONTROL]));
    for (message, control) in messages.iter().zip(&mut slots.controls) {
        // SAFETY: all zeroes are a message without anything.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_name = (&raw const to.storage).cast_mut().cast();
        header.msg_namelen = to.len;
        let its = &pieces[message.first..message.first + message.count];
        header.msg_iov = IoVec::as_raw(its).cast_mut();
        header.msg_iovlen = its.len() as _;
        if message.segment > 0 {
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: arithmetic.
            header.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as _;
            // SAFETY: the control buffer has room for one message, and is aligned.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&header);
                (*cmsg).cmsg_level = libc::SOL_UDP;
                (*cmsg).cmsg_type = libc::UDP_SEGMENT;
                (*cmsg).cmsg_len = libc::CMSG_LEN(2) as _;
                libc::CMSG_DATA(cmsg)
                    .cast::<u16>()
                    .write_unaligned(message.segment);
            }
        }
        slots.messages.push(libc::mmsghdr {
            msg_hdr: header,
            msg_len: 0,
        });
    }
    let count = slots.messages.len() as libc::c_uint;
    // SAFETY: addresses, pieces and control messages live until it returns; the kernel only reads them.
    let sent = check(unsafe {
        libc::sendmmsg(socket.as_raw_fd(), slots.messages.as_mut_ptr(), count, 0)
    })?;
    Ok(sent as usize)
}

/// A datagram, or several of one flow, that came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    pub(super) from: Option<IpAddr>,
    /// Bytes in the buffer.
    pub(super) len: usize,
    /// Bytes of each datagram but the last.
    pub(super) segment: usize,
    /// There was more than the buffer holds.
    pub(super) cut: bool,
}

/// Takes what has come, up to one message for each buffer; says what is in them.
///
/// # Errors
/// Also where nothing has come: `WouldBlock`.
pub(super) fn receive(
    socket: &OwnedFd,
    buffers: &mut [Box<[u8]>],
    got: &mut Vec<Incoming>,
) -> io::Result<()> {
    const MOST: usize = 16;
    let n = buffers.len().min(MOST);
    got.clear();
    // SAFETY: all zeroes are messages without anything, and addresses of no family.
    let mut messages: [libc::mmsghdr; MOST] = unsafe { zeroed() };
    // SAFETY: as above.
    let mut from: [libc::sockaddr_storage; MOST] = unsafe { zeroed() };
    let mut pieces = [IoVec::default(); MOST];
    let mut controls = [Control([0; CONTROL]); MOST];
    for i in 0..n {
        pieces[i] = IoVec::new(buffers[i].as_mut_ptr(), buffers[i].len());
        let header = &mut messages[i].msg_hdr;
        header.msg_name = (&raw mut from[i]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_iov = IoVec::as_raw(&pieces[i..=i]).cast_mut();
        header.msg_iovlen = 1;
        header.msg_control = controls[i].0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL as _;
    }
    // SAFETY: buffers, addresses and control messages are ours until it returns.
    let received = check(unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            n as libc::c_uint,
            0,
            std::ptr::null_mut(),
        )
    })?;
    for i in 0..received as usize {
        let (header, len) = (&messages[i].msg_hdr, messages[i].msg_len as usize);
        let mut segment = len;
        // SAFETY: the kernel has written the control messages, and their length.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(header);
            while !cmsg.is_null() {
                if ((*cmsg).cmsg_level, (*cmsg).cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                    let size = libc::CMSG_DATA(cmsg).cast::<libc::c_int>().read_unaligned();
                    segment = usize::try_from(size).unwrap_or(len);
                }
                cmsg = libc::CMSG_NXTHDR(header, cmsg);
            }
        }
        let from = Address {
            storage: from[i],
            len: header.msg_namelen,
        };
        got.push(Incoming {
            from: from.ip(),
            len,
            segment: segment.max(1),
            cut: header.msg_flags & libc::MSG_TRUNC != 0,
        });
    }
    Ok(())
}
