//! From a socket to the bytes and descriptors of one message.
//!
//! Two ways. [`take`] takes them off the socket, for a session that nobody keeps. [`look`] leaves them
//! there for the keeper to take. What the kernel says about descriptors is exact only in the first:
//! a look that finds none in the bytes asked for goes on to the next bytes that carry some, though it
//! does not give these bytes out. So a look takes descriptors only where the message is one that has
//! them; whatever else is attached goes when the keeper takes the message.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::framing::{Framer, HEADER_LEN, MAX_PAYLOAD};
use crate::{Error, unix};

/// A part of a message, or all of it.
#[derive(Debug)]
pub struct Piece {
    /// Its bytes; none at the end of the stream.
    pub bytes: Vec<u8>,
    /// The descriptors that came with them.
    pub files: Vec<OwnedFd>,
    /// There were more than a message may have.
    pub truncated: bool,
    /// How many of its bytes are still in the socket: all or none.
    pub consume: usize,
}

/// The size of the largest message.
const LONGEST: usize = HEADER_LEN + MAX_PAYLOAD;

/// Takes what there is of the present message's header, or of the rest of it. `None`: nothing.
///
/// # Errors
/// As [`Framer::missing`]; [`Error::Io`].
pub fn take(socket: BorrowedFd<'_>, framer: &Framer) -> Result<Option<Piece>, Error> {
    let mut buf = [0; LONGEST];
    let want = framer.missing(&[])?;
    let Some(got) = nothing_yet(unix::take(socket, &mut buf[..want]))? else {
        return Ok(None);
    };
    Ok(Some(Piece {
        bytes: buf[..got.len].to_vec(),
        files: got.files,
        truncated: got.truncated,
        consume: 0,
    }))
}

/// Looks at as much of the present message as can be seen. `None`: nothing.
///
/// A look ends behind bytes that carry descriptors, so a message that was sent in pieces may be seen
/// in part only; that part has to be consumed before the rest can be seen.
///
/// # Errors
/// As [`take`].
pub fn look(socket: BorrowedFd<'_>, framer: &Framer) -> Result<Option<Piece>, Error> {
    let mut buf = [0; LONGEST];
    let mut want = framer.missing(&[])?;
    if framer.bytes().len() < HEADER_LEN {
        match nothing_yet(unix::peek(socket, &mut buf[..want], false))? {
            Some(head) => want = framer.missing(&buf[..head.len])?,
            None => return Ok(None),
        }
    }
    // With descriptors first: they belong to these bytes wherever these are not all that was asked for.
    let Some(mut got) = nothing_yet(unix::peek(socket, &mut buf[..want], true))? else {
        return Ok(None);
    };
    if got.len == want && framer.files_wanted(&buf[..want]) == 0 {
        got.files.clear();
        got.truncated = false;
    }
    Ok(Some(Piece {
        bytes: buf[..got.len].to_vec(),
        files: got.files,
        truncated: got.truncated,
        consume: got.len,
    }))
}

fn nothing_yet(result: io::Result<unix::Received>) -> Result<Option<unix::Received>, Error> {
    match result {
        Ok(got) => Ok(Some(got)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::framing::request;

    /// Reads everything that was sent: request codes with their numbers of descriptors.
    fn read(socket: &UnixStream, keep: bool) -> Vec<(u32, usize)> {
        let mut framer = Framer::default();
        let mut all = Vec::new();
        let how = if keep { look } else { take };
        while let Some(piece) = how(socket.as_fd(), &framer).unwrap() {
            unix::discard(socket.as_fd(), piece.consume).unwrap();
            let whole = framer.push(&piece.bytes, piece.files, piece.truncated);
            all.extend(whole.unwrap().map(|m| (m.header.request, m.files.len())));
        }
        assert!(framer.bytes().is_empty());
        all
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let file = unix::sealed_memory(c"x", 1).unwrap();
        let kick = |flag: u64| request(12, false, &flag.to_ne_bytes());
        let mut regions = vec![0; 8 + 64];
        regions[0] = 2;
        let script: &[(Vec<u8>, usize)] = &[
            (request(3, false, &[]), 0),
            (kick(0x100), 0),
            (kick(0), 1),
            (request(2, false, &[0; 8]), 0),
            (request(5, false, &regions), 2),
            (request(1, false, &[]), 0),
            (kick(1), 1),
        ];
        for keep in [false, true] {
            for cut in [1, 5, 12, 13, 1000] {
                let (front, back) = UnixStream::pair().unwrap();
                for (bytes, files) in script {
                    let mut files = vec![file.as_fd(); *files];
                    for part in bytes.chunks(cut) {
                        unix::send(front.as_fd(), part, &files).unwrap();
                        files.clear();
                    }
                }
                let want = [(3, 0), (12, 0), (12, 1), (2, 0), (5, 2), (1, 0), (12, 1)];
                assert_eq!(read(&back, keep), want, "{keep} {cut}");
            }
        }
    }
}
