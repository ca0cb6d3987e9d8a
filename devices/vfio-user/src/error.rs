//! What can be wrong with a client, and what follows from it.

use std::fmt;

/// An errno, as it goes into a reply. Never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(i32);

impl Errno {
    /// `EINVAL`.
    pub const INVAL: Self = Self(libc::EINVAL);
    /// `EEXIST`: memory that is mapped already.
    pub const EXIST: Self = Self(libc::EEXIST);
    /// `ENOTSUP`: what is not implemented.
    pub const NOTSUP: Self = Self(libc::ENOTSUP);
    /// `E2BIG`: more bytes than were negotiated.
    pub const TOOBIG: Self = Self(libc::E2BIG);
    /// `ENOSPC`: more mappings than there may be.
    pub const NOSPC: Self = Self(libc::ENOSPC);
    /// `EPERM`: a region or memory that may not be used in that way.
    pub const PERM: Self = Self(libc::EPERM);
    /// `EFAULT`: no memory there.
    pub const FAULT: Self = Self(libc::EFAULT);
    /// `EIO`: a reply that makes no sense, or an error without a number.
    pub const IO: Self = Self(libc::EIO);
    /// `ETIMEDOUT`: no reply in time.
    pub const TIMEDOUT: Self = Self(libc::ETIMEDOUT);
    /// `ECANCELED`: a reset came in between.
    pub const CANCELED: Self = Self(libc::ECANCELED);
    /// `ENOTCONN`: the client has gone.
    pub const NOTCONN: Self = Self(libc::ENOTCONN);
    /// `EBUSY`: too much is under way.
    pub const BUSY: Self = Self(libc::EBUSY);

    /// An errno; what is no positive number becomes `EIO`.
    pub fn new(number: i32) -> Self {
        if number > 0 { Self(number) } else { Self::IO }
    }

    /// The number, positive.
    pub fn get(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}

/// Why a request is refused, or a session ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A type other than command and reply (vfio-user, "Header").
    #[error("message of type {0}")]
    Type(u32),
    /// A size under that of a header, or over that of any message.
    #[error("message of {0} bytes")]
    Size(u32),
    /// The connection ended in the middle of a message.
    #[error("connection ended within a message")]
    Truncated,
    /// A socket that is said to be readable again and again, and has nothing.
    #[error("data that cannot be read")]
    Unreadable,
    /// A reply to nothing that was asked.
    #[error("reply {id} to command {command}, which was not sent")]
    Reply {
        /// Its message ID.
        id: u16,
        /// Its command.
        command: u16,
    },
    /// A first message other than `VERSION`, or a `VERSION` that cannot be agreed on (vfio-user, "VFIO_USER_VERSION").
    #[error("no version agreed on: {0}")]
    Version(&'static str),
    /// A second `VERSION`.
    #[error("a version was agreed on before")]
    Again,
    /// A command that this server does not know or did not offer.
    #[error("command {0} is not supported")]
    Unsupported(u16),
    /// A payload whose length does not fit the command.
    #[error("command {command} with a payload of {len} bytes")]
    Length {
        /// The command.
        command: u16,
        /// Bytes of payload.
        len: usize,
    },
    /// More or fewer descriptors than the command takes.
    #[error("command {command} with {files} descriptors")]
    Files {
        /// The command.
        command: u16,
        /// How many there were; more than a message may have are not counted further.
        files: usize,
    },
    /// A field that is out of its range.
    #[error("{field} of {value:#x} is not allowed")]
    Value {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// More data than was agreed on.
    #[error("{0} bytes in one message")]
    TooMuch(u64),
    /// A range past the end of a region, or one that wraps.
    #[error("region {region} has no {offset:#x}+{count:#x}")]
    Region {
        /// The region.
        region: u32,
        /// First byte.
        offset: u64,
        /// Bytes.
        count: u64,
    },
    /// A region that may not be read, or not be written.
    #[error("region {0} may not be used in that way")]
    Permission(u32),
    /// A range of addresses that is empty, wraps, is not made of pages, or cuts a mapping.
    #[error("no mapping can be at {address:#x}+{size:#x}")]
    Range {
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A mapping over another one.
    #[error("{address:#x}+{size:#x} is mapped already")]
    Mapped {
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// More mappings, or more mapped bytes, than there may be.
    #[error("too much is mapped")]
    Full,
    /// A recorded session that cannot be taken up.
    #[error("recorded state does not fit: {0}")]
    Recorded(&'static str),
    /// The target refuses.
    #[error("the function refuses: {0}")]
    Target(Errno),
}

impl Error {
    /// Whether the client cannot be understood any more: the connection is closed.
    pub fn ends_session(&self) -> bool {
        matches!(
            self,
            Self::Type(_)
                | Self::Size(_)
                | Self::Truncated
                | Self::Unreadable
                | Self::Reply { .. }
                | Self::Version(_)
                | Self::Recorded(_)
        )
    }

    /// What the reply says.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unsupported(_) => Errno::NOTSUP,
            Self::TooMuch(_) => Errno::TOOBIG,
            Self::Permission(_) => Errno::PERM,
            Self::Mapped { .. } => Errno::EXIST,
            Self::Full => Errno::NOSPC,
            Self::Target(errno) => *errno,
            _ => Errno::INVAL,
        }
    }
}
