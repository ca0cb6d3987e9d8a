//! The socket between the halves: one message a record, descriptors beside it.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use super::{DESCRIPTORS_MAX, Message};

/// Most bytes of one message. It stays below the socket buffer that every kernel grants (`net.core.wmem_default`).
pub const MESSAGE_MAX: usize = 128 << 10;
/// Most messages that wait for the other half to read. Past that, it does not live.
const OUTBOX_MAX: usize = 16_384;

/// What can go wrong between the halves.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other half closed its end.
    #[error("the other half has ended")]
    Closed,
    /// The socket failed.
    #[error("the socket between the halves failed")]
    Socket(#[from] std::io::Error),
    /// A message is longer than [`MESSAGE_MAX`].
    #[error("a message of {0} bytes is too long")]
    TooLong(usize),
    /// A message was cut off.
    #[error("a message arrived incomplete")]
    Incomplete,
    /// A message cannot be read.
    #[error("a message cannot be read")]
    Malformed(#[from] serde_json::Error),
    /// A message came with another number of descriptors than it says.
    #[error("a message came with {found} descriptors and speaks of {stated}")]
    Descriptors {
        /// How many it speaks of.
        stated: usize,
        /// How many came.
        found: usize,
    },
    /// The other half does not read.
    #[error("{OUTBOX_MAX} messages wait for the other half")]
    Full,
}

/// One end of the socket: sends `S` and receives `R`.
#[derive(Debug)]
pub struct Link<S, R> {
    socket: OwnedFd,
    buffer: Vec<u8>,
    types: PhantomData<fn(S) -> R>,
}

/// A socket pair for the two halves; both ends block until told otherwise.
pub fn pair() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

impl<S: Message, R: Message> Link<S, R> {
    /// Speaks over this socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: vec![0; MESSAGE_MAX],
            types: PhantomData,
        }
    }

    /// Sets whether [`Link::send`] and [`Link::receive`] wait.
    pub fn set_blocking(&self, blocking: bool) -> std::io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.socket, !blocking)?)
    }

    /// Sends a message. `false`: not now, as the other half has not read enough.
    ///
    /// # Errors
    /// Where it is too long, or the other half is gone.
    ///
    /// # Panics
    /// Where the descriptors are not those that the message speaks of.
    pub fn send(&self, message: &S, descriptors: &[BorrowedFd<'_>]) -> Result<bool, LinkError> {
        self.send_bytes(&encode(message, descriptors.len())?, descriptors)
    }

    fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<bool, LinkError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
            assert!(fits, "space was made for DESCRIPTORS_MAX");
        }
        loop {
            match rustix::net::sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                // Too many descriptors of this user are under way until the other half has read some.
                Err(Errno::AGAIN | Errno::TOOMANYREFS) => return Ok(false),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Socket(error.into())),
            }
        }
    }

    /// Receives a message. `None`: there is none now.
    ///
    /// Where this process could not take its descriptors, as it has too many open, the message comes without any: that
    /// concerns whom the message is about, and not the socket.
    ///
    /// # Errors
    /// Where it cannot be read, which the other half cannot mend, or where that half is gone.
    pub fn receive(&mut self) -> Result<Option<(R, Vec<OwnedFd>)>, LinkError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut self.buffer)];
            match rustix::net::recvmsg(
                &self.socket,
                &mut buffers,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                // A reset is said once, ahead of what the other half had sent: that is read first.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(LinkError::Socket(error.into())),
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            // No message is empty: this is the end.
            return Err(LinkError::Closed);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(LinkError::Incomplete);
        }
        let lost = received.flags.contains(ReturnFlags::CTRUNC);
        let message: R = serde_json::from_slice(&self.buffer[..received.bytes])?;
        let (stated, found) = (message.descriptors(), descriptors.len());
        if lost && found < stated {
            descriptors.clear();
        } else if stated != found {
            return Err(LinkError::Descriptors { stated, found });
        }
        Ok(Some((message, descriptors)))
    }
}

fn encode(message: &impl Message, descriptors: usize) -> Result<Vec<u8>, LinkError> {
    assert_eq!(
        message.descriptors(),
        descriptors,
        "a message travels with the descriptors that it speaks of"
    );
    assert!(
        descriptors <= DESCRIPTORS_MAX,
        "more descriptors go in further messages"
    );
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MESSAGE_MAX {
        Err(LinkError::TooLong(bytes.len()))
    } else {
        Ok(bytes)
    }
}

impl<S, R> AsFd for Link<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S, R> AsRawFd for Link<S, R> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// A non-blocking link with a queue of what could not be sent yet, for halves that must not wait for each other.
#[derive(Debug)]
pub struct Outbox<S, R> {
    link: Link<S, R>,
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl<S: Message, R: Message> Outbox<S, R> {
    /// Speaks over this socket, without ever waiting.
    pub fn new(socket: OwnedFd) -> std::io::Result<Self> {
        let link = Link::new(socket);
        link.set_blocking(false)?;
        Ok(Self {
            link,
            waiting: VecDeque::new(),
        })
    }

    /// Sends a message now, or when [`Outbox::flush`] can.
    ///
    /// # Errors
    /// As [`Link::send`]; [`LinkError::Full`] where the other half has stopped reading.
    pub fn send(&mut self, message: &S, descriptors: Vec<OwnedFd>) -> Result<(), LinkError> {
        let bytes = encode(message, descriptors.len())?;
        if self.waiting.len() >= OUTBOX_MAX {
            return Err(LinkError::Full);
        }
        self.waiting.push_back((bytes, descriptors));
        self.flush()
    }

    /// Sends what waits, as far as the other half has room.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while let Some((bytes, descriptors)) = self.waiting.front() {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            if !self.link.send_bytes(bytes, &borrowed)? {
                break;
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Whether something waits: then the socket's becoming writable is of interest.
    pub fn wants_to_write(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// As [`Link::receive`].
    pub fn receive(&mut self) -> Result<Option<(R, Vec<OwnedFd>)>, LinkError> {
        self.link.receive()
    }
}

impl<S, R> AsRawFd for Outbox<S, R> {
    fn as_raw_fd(&self) -> RawFd {
        self.link.as_raw_fd()
    }
}

impl<S, R> AsFd for Outbox<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}
