//! Messages out of a stream of bytes, without any I/O (vhost-user, "Message Specification").
//!
//! ```text
//!   bytes, descriptors --> Framer --> Message { header, payload, descriptors }
//! ```
//!
//! A stream may be cut anywhere and messages may come merged. Descriptors travel with a byte, so
//! whoever reads the socket never reads past the end of a message ([`Framer::missing`] says how far
//! that is): then every descriptor belongs to the message in whose bytes it came.

use std::os::fd::OwnedFd;

use crate::Error;

/// Bytes in a header: request, flags and payload size, in the machine's own byte order.
pub const HEADER_LEN: usize = 12;

/// The largest payload of a request: configuration space with its description.
pub const MAX_PAYLOAD: usize = 12 + 4096;

const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The request's number.
    pub request: u32,
    /// The front end wants an acknowledgement, where REPLY_ACK is negotiated.
    pub need_reply: bool,
    /// Bytes of payload, at most [`MAX_PAYLOAD`].
    pub size: usize,
}

impl Header {
    /// Reads the header of a request.
    ///
    /// # Errors
    /// [`Error::Version`], [`Error::Reply`], [`Error::Oversized`]: the stream is not to be trusted.
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Result<Self, Error> {
        let (request, flags, size) = fields(bytes);
        if flags & VERSION_MASK != VERSION {
            return Err(Error::Version(flags & VERSION_MASK));
        }
        if flags & REPLY != 0 {
            return Err(Error::Reply(request));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(Error::Oversized(size));
        }
        Ok(Self {
            request,
            need_reply: flags & NEED_REPLY != 0,
            size: size as usize,
        })
    }
}

fn fields(bytes: [u8; HEADER_LEN]) -> (u32, u32, u32) {
    let word = |i: usize| {
        let mut w = [0; 4];
        w.copy_from_slice(&bytes[4 * i..4 * i + 4]);
        u32::from_ne_bytes(w)
    };
    (word(0), word(1), word(2))
}

fn frame(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&request.to_ne_bytes());
    bytes.extend_from_slice(&(flags | VERSION).to_ne_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The bytes of a reply.
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    frame(request, REPLY, payload)
}

/// The bytes of a request: the back end sends these on its own channel.
pub fn request(request: u32, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    frame(request, if need_reply { NEED_REPLY } else { 0 }, payload)
}

/// Reads the header of a reply: the request that it answers, and the bytes of payload.
///
/// # Errors
/// [`Error::Version`], [`Error::Oversized`]; [`Error::Unsupported`] for what is no reply.
pub fn parse_reply(bytes: [u8; HEADER_LEN]) -> Result<(u32, usize), Error> {
    let (request, flags, size) = fields(bytes);
    if flags & VERSION_MASK != VERSION {
        return Err(Error::Version(flags & VERSION_MASK));
    }
    if flags & REPLY == 0 {
        return Err(Error::Unsupported(request));
    }
    if size as usize > MAX_PAYLOAD {
        return Err(Error::Oversized(size));
    }
    Ok((request, size as usize))
}

/// A whole message as it came: nothing of its payload is checked.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload: as long as the header says.
    pub payload: Vec<u8>,
    /// The descriptors that came with any of its bytes.
    pub files: Vec<OwnedFd>,
    /// There were more descriptors than a message may have; the others are closed.
    pub truncated: bool,
}

/// Collects one message.
#[derive(Debug, Default)]
pub struct Framer {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
    truncated: bool,
}

impl Framer {
    /// The bytes of the message that is not whole yet.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The descriptors that came with them.
    pub fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// Whether descriptors of this message were refused.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// How many more bytes may be read without reading past the message, if `ahead` are the next bytes
    /// of the stream: the rest of the header, until that is known. Never zero.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn missing(&self, ahead: &[u8]) -> Result<usize, Error> {
        let mut head = [0; HEADER_LEN];
        let mut known = 0;
        for byte in self.bytes.iter().chain(ahead).take(HEADER_LEN) {
            head[known] = *byte;
            known += 1;
        }
        if known < HEADER_LEN {
            return Ok(HEADER_LEN - self.bytes.len());
        }
        let total = HEADER_LEN + Header::parse(head)?.size;
        Ok(total - self.bytes.len())
    }

    /// How many descriptors the message lacks, if `ahead` are the rest of its bytes.
    pub fn files_wanted(&self, ahead: &[u8]) -> usize {
        let bytes: Vec<u8> = self.bytes.iter().chain(ahead).copied().collect();
        let Some((head, payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return 0;
        };
        let (request, _, _) = fields(*head);
        crate::message::files_wanted(request, payload).saturating_sub(self.files.len())
    }

    /// Takes bytes and descriptors of the current message, and gives it back when it is whole.
    ///
    /// # Errors
    /// As [`Header::parse`]; the descriptors are closed.
    ///
    /// # Panics
    /// Where more bytes are pushed than [`Framer::missing`] allows.
    pub fn push(
        &mut self,
        bytes: &[u8],
        files: Vec<OwnedFd>,
        truncated: bool,
    ) -> Result<Option<Message>, Error> {
        let missing = match self.missing(bytes) {
            Ok(n) => n,
            Err(e) => {
                *self = Self::default();
                return Err(e);
            }
        };
        assert!(bytes.len() <= missing, "read past the end of a message");
        self.bytes.extend_from_slice(bytes);
        self.truncated |= truncated;
        for file in files {
            if self.files.len() == crate::unix::MAX_FILES {
                // The message is refused for it later, when it is known which it is.
                self.truncated = true;
            } else {
                self.files.push(file);
            }
        }
        if bytes.len() < missing || self.bytes.len() < HEADER_LEN {
            return Ok(None);
        }
        let mut head = [0; HEADER_LEN];
        head.copy_from_slice(&self.bytes[..HEADER_LEN]);
        let header = Header::parse(head)?;
        if self.bytes.len() < HEADER_LEN + header.size {
            return Ok(None);
        }
        let whole = std::mem::take(self);
        Ok(Some(Message {
            header,
            payload: whole.bytes[HEADER_LEN..].to_vec(),
            files: whole.files,
            truncated: whole.truncated,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unix::sealed_memory;

    fn feed(framer: &mut Framer, stream: &[u8], step: usize) -> Vec<Message> {
        let mut at = 0;
        let mut out = Vec::new();
        while at < stream.len() {
            let n = framer
                .missing(&[])
                .unwrap()
                .min(step)
                .min(stream.len() - at);
            out.extend(framer.push(&stream[at..at + n], vec![], false).unwrap());
            at += n;
        }
        out
    }

    #[test]
    fn cut_anywhere_and_merged_messages_come_out_whole() {
        let mut stream = request(1, false, &[]);
        stream.extend(request(2, true, &7u64.to_ne_bytes()));
        stream.extend(request(24, false, &[9; MAX_PAYLOAD]));
        for step in [1, 2, 3, 11, 12, 13, 100_000] {
            let mut framer = Framer::default();
            let got = feed(&mut framer, &stream, step);
            let heads: Vec<_> = got
                .iter()
                .map(|m| (m.header.request, m.header.need_reply, m.payload.len()))
                .collect();
            let want = [(1, false, 0), (2, true, 8), (24, false, MAX_PAYLOAD)];
            assert_eq!(heads, want, "step {step}");
            assert!(framer.bytes().is_empty());
        }
    }

    #[test]
    fn descriptors_of_every_part_count() {
        let file = || sealed_memory(c"x", 1).unwrap();
        let bytes = request(5, false, &[0; 8]);
        let mut framer = Framer::default();
        let first = (0..7).map(|_| file()).collect();
        assert!(framer.push(&bytes[..1], first, false).unwrap().is_none());
        assert!(
            framer
                .push(&bytes[1..12], vec![file()], false)
                .unwrap()
                .is_none()
        );
        let whole = framer.push(&bytes[12..], vec![file()], false).unwrap();
        let whole = whole.unwrap();
        assert_eq!((whole.files.len(), whole.truncated), (8, true));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let with = |flags: u32, size: u32| {
            let mut h = [0; HEADER_LEN];
            h[0] = 1;
            h[4..8].copy_from_slice(&flags.to_ne_bytes());
            h[8..].copy_from_slice(&size.to_ne_bytes());
            Header::parse(h)
        };
        assert!(with(1, 0).is_ok() && with(9, MAX_PAYLOAD as u32).is_ok());
        assert!(matches!(with(0, 0), Err(Error::Version(0))));
        assert!(matches!(with(2, 0), Err(Error::Version(2))));
        assert!(matches!(with(5, 0), Err(Error::Reply(1))));
        for size in [MAX_PAYLOAD as u32 + 1, u32::MAX] {
            assert!(matches!(with(1, size), Err(Error::Oversized(_))));
        }
    }
}
