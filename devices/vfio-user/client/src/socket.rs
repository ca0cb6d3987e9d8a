//! Bytes and descriptors over the socket, and the server's messages out of it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::FromBytes;

use crate::Error;
use crate::event::wait_readable;
use crate::spec::{HEADER, Header};

/// More descriptors than this in one message are taken for an attack.
const MAX_FDS: usize = 32;
/// Descriptors that Linux lets through in one message (`SCM_MAX_FD`).
const SENT_FDS: usize = 253;

/// A message of the server as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows: as long as the header says.
    pub body: Vec<u8>,
    /// What came with it.
    pub files: Vec<OwnedFd>,
}

/// A message that has begun.
#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    /// Bytes of it that have come.
    have: usize,
    files: Vec<OwnedFd>,
}

impl Partial {
    fn new() -> Self {
        Self {
            bytes: vec![0; HEADER],
            have: 0,
            files: Vec::new(),
        }
    }
}

/// A connection, below anything that has a meaning: what hostile tests use. Sending and receiving do not wait for each other.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    sending: Mutex<()>,
    partial: Mutex<Partial>,
    /// Bytes of the largest message that is taken.
    max: usize,
}

impl Socket {
    /// Connects. A message of more than `max` bytes is refused.
    ///
    /// # Errors
    /// Where nobody listens.
    pub fn connect(path: &Path, max: usize) -> Result<Self, Error> {
        Ok(Self::new(UnixStream::connect(path)?, max))
    }

    /// Over a stream that is connected.
    pub fn new(stream: UnixStream, max: usize) -> Self {
        Self {
            stream,
            sending: Mutex::new(()),
            partial: Mutex::new(Partial::new()),
            max,
        }
    }

    /// The stream itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends these bytes, whatever they are, with descriptors beside the first of them. All of it goes in one piece as
    /// far as the socket has room.
    ///
    /// # Errors
    /// [`Error::Closed`], or the socket's.
    pub fn send(&self, parts: &[&[u8]], files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let one = self.sending.lock().expect("no sender panics");
        let mut sent = if files.is_empty() {
            self.send_some(parts, 0, &mut SendAncillaryBuffer::default())?
        } else {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SENT_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(Error::Framing("too many descriptors to send"));
            }
            self.send_some(parts, 0, &mut control)?
        };
        let all: usize = parts.iter().map(|p| p.len()).sum();
        while sent < all {
            sent += self.send_some(parts, sent, &mut SendAncillaryBuffer::default())?;
        }
        drop(one);
        Ok(())
    }

    fn send_some(
        &self,
        parts: &[&[u8]],
        mut skip: usize,
        control: &mut SendAncillaryBuffer<'_, '_, '_>,
    ) -> Result<usize, Error> {
        let mut slices = [IoSlice::new(&[]); 4];
        assert!(
            parts.len() <= slices.len(),
            "as many parts as commands have"
        );
        for (slice, part) in slices.iter_mut().zip(parts) {
            let begin = skip.min(part.len());
            skip -= begin;
            *slice = IoSlice::new(&part[begin..]);
        }
        loop {
            match sendmsg(&self.stream, &slices, control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// The next message, of whatever kind; `None`: none came within `limit`. What has come of one by then is kept.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::Framing`] for a size that cannot be or for too many descriptors: then the stream
    /// is of no more use.
    pub fn receive(&self, limit: Duration) -> Result<Option<Message>, Error> {
        let mut partial = self.partial.lock().expect("no receiver panics");
        let end = Instant::now() + limit;
        loop {
            if !self.receive_some(&mut partial)? {
                let rest = end.saturating_duration_since(Instant::now());
                if !wait_readable(self.stream.as_fd(), rest)? {
                    return Ok(None);
                }
                continue;
            }
            if partial.have < partial.bytes.len() {
                continue;
            }
            let (header, _) = Header::read_from_prefix(&partial.bytes).expect("it has a header");
            let size = header.size.get() as usize;
            if partial.have == HEADER {
                if size < HEADER {
                    return Err(Error::Framing("its size is below a header's"));
                }
                if size > self.max {
                    return Err(Error::Framing("its size is above what was agreed on"));
                }
                partial.bytes.resize(size, 0);
            }
            if partial.have == size {
                let whole = std::mem::replace(&mut *partial, Partial::new());
                return Ok(Some(Message {
                    header,
                    body: whole.bytes[HEADER..].to_vec(),
                    files: whole.files,
                }));
            }
        }
    }

    /// Reads once, no further than the message; whether there was anything.
    fn receive_some(&self, partial: &mut Partial) -> Result<bool, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let to = &mut partial.bytes[partial.have..];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = match recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(to)],
            &mut control,
            flags,
        ) {
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            other => other?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                partial.files.extend(files);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || partial.files.len() > MAX_FDS {
            return Err(Error::Framing("it has too many descriptors"));
        }
        if got.bytes == 0 {
            return Err(Error::Closed);
        }
        partial.have += got.bytes;
        Ok(true)
    }
}
