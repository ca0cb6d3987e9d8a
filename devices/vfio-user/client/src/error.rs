//! What can go wrong.

use std::io;
use std::time::Duration;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("socket")]
    Socket(#[from] io::Error),
    /// The server has ended the connection.
    #[error("the server closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("no reply within {0:?}")]
    Timeout(Duration),
    /// The server answered with an error.
    #[error("command {command} was refused with errno {errno}")]
    Refused {
        /// One of [`command`](crate::spec::command).
        command: u16,
        /// What it said; may be zero.
        errno: i32,
    },
    /// What came is no message: the stream is of no more use.
    #[error("no message: {0}")]
    Framing(&'static str),
    /// A reply to nothing that was asked: the stream is of no more use.
    #[error("message {id} of command {command} answers nothing that was asked")]
    Stray {
        /// Its message ID.
        id: u16,
        /// Its command.
        command: u16,
    },
    /// A reply that breaks the protocol.
    #[error("reply to command {command}: {what}")]
    Reply {
        /// One of [`command`](crate::spec::command).
        command: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An earlier error has made the stream useless.
    #[error("the connection is of no use since an earlier error")]
    Broken,
    /// What the server shares cannot be mapped.
    #[error("cannot map what the server shares")]
    Map(#[source] io::Error),
    /// It is shorter than it was said to be, or not made of pages.
    #[error("the server shares less than it says: {0}")]
    Shared(&'static str),
    /// Configuration space makes no sense, or lacks what was asked for.
    #[error("configuration space: {0}")]
    Pci(&'static str),
}

impl Error {
    /// What the server refused with.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => Self::Closed,
            other => Self::Socket(other.into()),
        }
    }
}
