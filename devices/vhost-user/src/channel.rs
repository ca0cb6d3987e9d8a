//! The channel on which the back end sends requests of its own (vhost-user, "Back-end message types").
//!
//! Only `CONFIG_CHANGE_MSG` is sent. Where acknowledgements are negotiated one is asked for, and no
//! second message is sent before it came: changes in between become one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vhost::vhost_user::message::BackendReq;

use crate::framing::{self, HEADER_LEN};
use crate::{Error, unix};

/// How often in a row a socket may be said to be ready and have nothing. More than once is no accident: out-of-band data, for
/// one, is reported for ever and is not in the stream.
pub(crate) const VAIN: u8 = 8;

/// Whether the front end knows of the last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Nothing to tell.
    Yes,
    /// Sent, and not acknowledged yet.
    Asked,
    /// As `Asked`, and another change has come since.
    AskedAndChanged,
    /// To be sent when the socket takes it.
    Blocked,
}

/// What became of a channel that was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum State {
    /// It goes on.
    Open,
    /// The front end has closed its end, between two messages: it is to be dropped, and nothing is wrong.
    Closed,
}

/// The channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    told: Told,
    ack: bool,
    /// What is left of a message that the socket took in part.
    unsent: Vec<u8>,
    incoming: Vec<u8>,
    /// How often in a row it was ready and had nothing.
    vain: u8,
}

impl Channel {
    /// A channel over the front end's descriptor; `ack` where REPLY_ACK is negotiated.
    pub fn new(socket: OwnedFd, ack: bool) -> Self {
        Self {
            socket,
            told: Told::Yes,
            ack,
            unsent: Vec::new(),
            incoming: Vec::new(),
            vain: 0,
        }
    }

    /// The descriptor, readable when there is something to call [`Channel::ready`] for.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it waits to be writable.
    pub fn is_blocked(&self) -> bool {
        self.told == Told::Blocked || !self.unsent.is_empty()
    }

    /// Tells the front end that configuration space has changed.
    ///
    /// # Errors
    /// Where the channel is broken: it is to be dropped.
    pub fn config_changed(&mut self) -> Result<(), Error> {
        match self.told {
            Told::Yes => self.tell(),
            Told::Asked => {
                self.told = Told::AskedAndChanged;
                Ok(())
            }
            Told::AskedAndChanged | Told::Blocked => Ok(()),
        }
    }

    fn tell(&mut self) -> Result<(), Error> {
        if !self.unsent.is_empty() {
            self.told = Told::Blocked;
            return self.flush();
        }
        self.unsent = framing::request(BackendReq::CONFIG_CHANGE_MSG.into(), self.ack, &[]);
        self.told = if self.ack { Told::Asked } else { Told::Yes };
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Error> {
        while !self.unsent.is_empty() {
            match unix::send(self.socket.as_fd(), &self.unsent, &[]) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// The descriptor is readable or writable.
    ///
    /// # Errors
    /// Where the channel is broken, or what comes on it is no acknowledgement: it is to be dropped.
    pub fn ready(&mut self) -> Result<State, Error> {
        let waiting = self.unsent.len();
        self.flush()?;
        let mut moved = self.unsent.len() < waiting;
        if self.told == Told::Blocked && self.unsent.is_empty() {
            self.tell()?;
        }
        loop {
            let mut want = HEADER_LEN + 8;
            if let Some(head) = self.incoming.first_chunk::<HEADER_LEN>() {
                let (request, size) = framing::parse_reply(*head)?;
                if request != u32::from(BackendReq::CONFIG_CHANGE_MSG) || size != 8 {
                    return Err(Error::Unsupported(request));
                }
                if self.incoming.len() == want {
                    self.incoming.clear();
                    // Whether the front end liked it does not matter: it was told.
                    match std::mem::replace(&mut self.told, Told::Yes) {
                        Told::AskedAndChanged => self.tell()?,
                        Told::Blocked => self.told = Told::Blocked,
                        Told::Yes | Told::Asked => {}
                    }
                    continue;
                }
            }
            want -= self.incoming.len();
            let mut buf = [0; HEADER_LEN + 8];
            match unix::take(self.socket.as_fd(), &mut buf[..want]) {
                Ok(got) if got.len == 0 && self.incoming.is_empty() => return Ok(State::Closed),
                Ok(got) if got.len == 0 => return Err(Error::Truncated),
                Ok(got) => {
                    moved = true;
                    self.incoming.extend_from_slice(&buf[..got.len]);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.vain = if moved { 0 } else { self.vain + 1 };
                    if self.vain > VAIN {
                        return Err(Error::Unreadable);
                    }
                    return Ok(State::Open);
                }
                // It went without having read what we told it last.
                Err(e)
                    if e.kind() == io::ErrorKind::ConnectionReset && self.incoming.is_empty() =>
                {
                    return Ok(State::Closed);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const CHANGE: u32 = 2;

    fn count(front: &UnixStream) -> usize {
        let mut buf = [0; 1200];
        match unix::take(front.as_fd(), &mut buf) {
            Ok(got) => {
                assert!(got.len.is_multiple_of(HEADER_LEN));
                got.len / HEADER_LEN
            }
            Err(_) => 0,
        }
    }

    #[test]
    fn changes_become_one_until_they_are_acknowledged() {
        let (front, back) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(back.into(), true);
        for _ in 0..5 {
            channel.config_changed().unwrap();
        }
        assert_eq!(count(&front), 1);
        let ack = framing::reply(CHANGE, &[0; 8]);
        for byte in &ack {
            unix::send(front.as_fd(), &[*byte], &[]).unwrap();
            assert_eq!(channel.ready().unwrap(), State::Open);
        }
        assert_eq!(count(&front), 1, "what changed in between");
        unix::send(front.as_fd(), &ack, &[]).unwrap();
        assert_eq!(channel.ready().unwrap(), State::Open);
        assert_eq!(count(&front), 0);
        channel.config_changed().unwrap();
        assert_eq!(count(&front), 1);
    }

    #[test]
    fn without_acknowledgements_each_change_is_told() {
        let (front, back) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(back.into(), false);
        channel.config_changed().unwrap();
        channel.config_changed().unwrap();
        assert_eq!(count(&front), 2);
    }

    #[test]
    fn a_front_end_that_does_not_read_costs_one_message() {
        let (front, back) = UnixStream::pair().unwrap();
        while unix::send(back.as_fd(), &[0; HEADER_LEN], &[]).is_ok() {}
        let mut channel = Channel::new(back.into(), false);
        for _ in 0..1000 {
            channel.config_changed().unwrap();
        }
        assert!(channel.is_blocked());
        while count(&front) > 0 {}
        assert_eq!(channel.ready().unwrap(), State::Open);
        assert!(!channel.is_blocked());
        // The one that was under way, and one for all that came while it was.
        assert_eq!(count(&front), 2);
    }

    #[test]
    fn an_end_between_messages_is_no_error_and_one_inside_is() {
        for sent in [0, 1, HEADER_LEN, HEADER_LEN + 7, HEADER_LEN + 8] {
            let (front, back) = UnixStream::pair().unwrap();
            let mut channel = Channel::new(back.into(), true);
            channel.config_changed().unwrap();
            assert_eq!(count(&front), 1);
            let ack = framing::reply(CHANGE, &[0; 8]);
            unix::send(front.as_fd(), &ack[..sent], &[]).unwrap();
            assert_eq!(channel.ready().unwrap(), State::Open);
            drop(front);
            match sent % ack.len() {
                0 => assert_eq!(channel.ready().unwrap(), State::Closed, "{sent}"),
                _ => assert!(matches!(channel.ready(), Err(Error::Truncated)), "{sent}"),
            }
        }
    }

    #[test]
    fn a_front_end_that_goes_without_reading_is_no_error() {
        let (front, back) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(back.into(), true);
        channel.config_changed().unwrap();
        drop(front);
        assert_eq!(channel.ready().unwrap(), State::Closed);
    }

    #[test]
    fn what_is_no_acknowledgement_breaks_the_channel() {
        for bad in [
            framing::request(CHANGE, false, &[0; 8]),
            framing::reply(1, &[0; 8]),
            framing::reply(CHANGE, &[0; 4096]),
        ] {
            let (front, back) = UnixStream::pair().unwrap();
            let mut channel = Channel::new(back.into(), true);
            unix::send(front.as_fd(), &bad, &[]).unwrap();
            assert!(channel.ready().is_err());
        }
    }
}
