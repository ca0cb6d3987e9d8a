//! Messages out of a stream of bytes, without any I/O (vfio-user, "Header").
//!
//! ```text
//!   bytes, descriptors --> Framer --> Message { header, payload, descriptors }
//! ```
//!
//! A stream may be cut anywhere and messages may come merged. Descriptors travel with a byte. A read of a Unix
//! socket ends with the bytes that descriptors came with, if they come at all: so they belong to the message that
//! holds the *last* byte of the read. Only where a client puts two messages into one `sendmsg` with descriptors would
//! that be wrong; whoever reads no further than [`Framer::missing`] says is exact there too.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, IntoBytes};

use crate::Error;
use crate::spec::{HEADER_LEN, RawHeader, flag};

/// How many descriptors a message may carry: as many as QEMU sends at most.
pub const MAX_FILES: usize = 16;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command.
    Command {
        /// The sender wants no reply, not even one that says why the command was refused.
        no_reply: bool,
    },
    /// A reply to a command of ours.
    Reply {
        /// The command failed; the errno, which may be zero.
        error: Option<u32>,
    },
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of the command, and in no way unique.
    pub id: u16,
    /// The command's number.
    pub command: u16,
    /// Command or reply.
    pub kind: Kind,
    /// Bytes of payload.
    pub payload: usize,
}

impl Header {
    /// Reads a header. `max`: bytes that a message may have. Flags that the protocol does not define are not looked
    /// at, nor is the error field of a command, which is reserved.
    ///
    /// # Errors
    /// [`Error::Type`], [`Error::Size`]: the stream is not to be trusted.
    pub fn parse(raw: &RawHeader, max: usize) -> Result<Self, Error> {
        let flags = raw.flags.get();
        let kind = match flags & flag::TYPE {
            flag::COMMAND => Kind::Command {
                no_reply: flags & flag::NO_REPLY != 0,
            },
            flag::REPLY => Kind::Reply {
                error: (flags & flag::ERROR != 0).then_some(raw.error.get()),
            },
            other => return Err(Error::Type(other)),
        };
        let size = raw.size.get() as usize;
        if size < HEADER_LEN || size > max {
            return Err(Error::Size(raw.size.get()));
        }
        Ok(Self {
            id: raw.id.get(),
            command: raw.command.get(),
            kind,
            payload: size - HEADER_LEN,
        })
    }
}

/// The bytes of a message.
pub fn message(id: u16, command: u16, flags: u32, error: u32, parts: &[&[u8]]) -> Vec<u8> {
    let len = HEADER_LEN + parts.iter().map(|p| p.len()).sum::<usize>();
    let raw = RawHeader {
        id: id.into(),
        command: command.into(),
        size: (len as u32).into(),
        flags: flags.into(),
        error: error.into(),
    };
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(raw.as_bytes());
    for part in parts {
        bytes.extend_from_slice(part);
    }
    bytes
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

/// Cuts a stream into messages.
#[derive(Debug)]
pub struct Framer {
    max: usize,
    bytes: Vec<u8>,
    header: Option<Header>,
    files: Vec<OwnedFd>,
    truncated: bool,
}

impl Framer {
    /// For messages of at most `max` bytes.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            bytes: Vec::new(),
            header: None,
            files: Vec::new(),
            truncated: false,
        }
    }

    /// How many more bytes may be read without reading past the message: the rest of the header, until that is known.
    /// Never zero.
    pub fn missing(&self) -> usize {
        let total = self.header.map_or(0, |h| h.payload) + HEADER_LEN;
        total - self.bytes.len()
    }

    /// Whether a message has begun and is not whole.
    pub fn is_within_message(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// What has come of a message that is not whole: its bytes, its descriptors, and whether some were lost.
    pub fn partial(&self) -> (&[u8], &[OwnedFd], bool) {
        (&self.bytes, &self.files, self.truncated)
    }

    /// Takes what one read gave, and appends the messages that it made whole. `truncated`: the kernel has dropped descriptors.
    ///
    /// # Errors
    /// As [`Header::parse`]; the descriptors are closed, and the stream is of no more use. Messages before that are
    /// whole and are appended.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        files: Vec<OwnedFd>,
        truncated: bool,
        whole: &mut VecDeque<Message>,
    ) -> Result<(), Error> {
        let mut files = Some((files, truncated));
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(self.missing().min(bytes.len()));
            bytes = rest;
            self.bytes.extend_from_slice(now);
            if bytes.is_empty() {
                // The message of the last byte.
                if let Some((files, truncated)) = files.take() {
                    self.attach(files, truncated);
                }
            }
            if self.header.is_none() && self.bytes.len() == HEADER_LEN {
                let raw = RawHeader::ref_from_bytes(&self.bytes);
                let raw = raw.expect("as long as a header");
                match Header::parse(raw, self.max) {
                    Ok(header) => self.header = Some(header),
                    Err(error) => {
                        *self = Self::new(self.max);
                        return Err(error);
                    }
                }
            }
            if let Some(header) = self.header
                && self.bytes.len() == HEADER_LEN + header.payload
            {
                let mut payload = std::mem::take(&mut self.bytes);
                payload.drain(..HEADER_LEN);
                self.header = None;
                whole.push_back(Message {
                    header,
                    payload,
                    files: std::mem::take(&mut self.files),
                    truncated: std::mem::take(&mut self.truncated),
                });
            }
        }
        Ok(())
    }

    fn attach(&mut self, files: Vec<OwnedFd>, truncated: bool) {
        self.truncated |= truncated;
        for file in files {
            if self.files.len() == MAX_FILES {
                // The message is refused for it later, when it is known which it is.
                self.truncated = true;
            } else {
                self.files.push(file);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const MAX: usize = 4096;

    fn file() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn stream() -> Vec<u8> {
        let mut all = message(1, 13, 0, 0, &[]);
        all.extend(message(2, 9, flag::NO_REPLY, 0, &[&[7; 16]]));
        all.extend(message(3, 11, flag::REPLY | flag::ERROR, 5, &[]));
        all.extend(message(4, 10, 0, 0, &[&[9; MAX - HEADER_LEN]]));
        all
    }

    #[test]
    fn cut_anywhere_and_merged_messages_come_out_whole() {
        let all = stream();
        for step in [1, 2, 3, 15, 16, 17, 31, 33, 100, 100_000] {
            let (mut framer, mut whole) = (Framer::new(MAX), VecDeque::new());
            for part in all.chunks(step) {
                framer.push(part, vec![], false, &mut whole).unwrap();
            }
            assert!(!framer.is_within_message() && framer.missing() == HEADER_LEN);
            let got: Vec<_> = whole.iter().map(|m| (m.header.id, m.header.kind)).collect();
            let command = |no_reply| Kind::Command { no_reply };
            let want = [
                (1, command(false)),
                (2, command(true)),
                (3, Kind::Reply { error: Some(5) }),
                (4, command(false)),
            ];
            assert_eq!(got, want, "step {step}");
            assert_eq!(whole[1].payload, [7; 16]);
            assert_eq!(whole[3].payload.len(), MAX - HEADER_LEN);
        }
    }

    #[test]
    fn descriptors_belong_to_the_message_of_the_last_byte() {
        let one = message(1, 2, 0, 0, &[&[0; 32]]);
        let two = message(2, 2, 0, 0, &[&[0; 32]]);
        let merged = [&one[..], &two[..]].concat();
        // Where the read ends, and which message has the descriptor then.
        for (end, want) in [
            (1, [1, 0]),
            (16, [1, 0]),
            (48, [1, 0]),
            (49, [0, 1]),
            (96, [0, 1]),
        ] {
            let (mut framer, mut whole) = (Framer::new(MAX), VecDeque::new());
            let (first, rest) = merged.split_at(end);
            framer.push(first, vec![file()], false, &mut whole).unwrap();
            framer.push(rest, vec![], false, &mut whole).unwrap();
            let got: Vec<_> = whole.iter().map(|m| m.files.len()).collect();
            assert_eq!(got, want, "read of {end}");
        }
    }

    #[test]
    fn a_reader_that_stops_where_messages_end_is_exact() {
        let one = message(1, 2, 0, 0, &[&[0; 32]]);
        let merged = [&one[..], &message(2, 4, 0, 0, &[&[0; 16]])].concat();
        let (mut framer, mut whole) = (Framer::new(MAX), VecDeque::new());
        let mut at = 0;
        // The descriptor came with the first byte of one large write.
        let mut files = vec![file()];
        while at < merged.len() {
            let end = at + framer.missing();
            let part = &merged[at..end];
            let files = std::mem::take(&mut files);
            framer.push(part, files, false, &mut whole).unwrap();
            at = end;
        }
        let got: Vec<_> = whole.iter().map(|m| m.files.len()).collect();
        assert_eq!(got, [1, 0]);
    }

    #[test]
    fn too_many_descriptors_are_closed_and_remembered() {
        let bytes = message(1, 8, 0, 0, &[&[0; 20]]);
        let (mut framer, mut whole) = (Framer::new(MAX), VecDeque::new());
        let many = |n: usize| (0..n).map(|_| file()).collect();
        framer
            .push(&bytes[..1], many(MAX_FILES), false, &mut whole)
            .unwrap();
        framer
            .push(&bytes[1..20], many(1), false, &mut whole)
            .unwrap();
        framer
            .push(&bytes[20..], vec![], false, &mut whole)
            .unwrap();
        assert_eq!(whole[0].files.len(), MAX_FILES);
        assert!(whole[0].truncated);
        // And the next one is itself again.
        framer.push(&bytes, many(1), false, &mut whole).unwrap();
        assert!(!whole[1].truncated && whole[1].files.len() == 1);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let with = |flags: u32, size: u32| {
            let raw = RawHeader {
                flags: flags.into(),
                size: size.into(),
                ..RawHeader::default()
            };
            Header::parse(&raw, MAX)
        };
        assert!(with(0, 16).is_ok() && with(1, MAX as u32).is_ok());
        for size in [0, 1, 15, MAX as u32 + 1, u32::MAX] {
            assert!(matches!(with(0, size), Err(Error::Size(s)) if s == size));
        }
        for kind in 2..16 {
            assert!(matches!(with(kind, 16), Err(Error::Type(t)) if t == kind));
        }
        // What is not defined is not looked at.
        assert!(with(0xffff_ffc0, 16).is_ok());
    }

    #[test]
    fn messages_before_a_bad_one_are_whole() {
        let mut all = message(1, 13, 0, 0, &[]);
        all.extend([0xff; 16]);
        let (mut framer, mut whole) = (Framer::new(MAX), VecDeque::new());
        assert!(framer.push(&all, vec![], false, &mut whole).is_err());
        assert_eq!(whole.len(), 1);
    }
}
