//! The one neutral error of storage; each device turns it into a status of its own in one place.

/// Why an operation, or a volume, failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The medium or the target failed.
    #[error("input/output error")]
    Io,
    /// The operation reaches past the end of the volume.
    #[error("beyond the end of the volume")]
    OutOfRange,
    /// Offset or length are no multiples of the block size, or the length is over a limit.
    #[error("not aligned to the block size, or over a limit")]
    Invalid,
    /// The volume does not do this operation.
    #[error("operation not supported")]
    Unsupported,
    /// A write to a volume that is read-only.
    #[error("volume is read-only")]
    ReadOnly,
    /// The storage is full; the same write may succeed later.
    #[error("no space on the storage")]
    NoSpace,
    /// Cancelled before it was finished; what it did to the medium is unknown.
    #[error("cancelled")]
    Cancelled,
    /// Somebody else holds the volume.
    #[error("volume is locked by another user")]
    Locked,
    /// The storage is not there: not found, not reachable, permission denied.
    #[error("storage is not available")]
    Unavailable,
}

impl From<std::io::Error> for BlockError {
    fn from(e: std::io::Error) -> Self {
        match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpace,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Self::Unsupported,
            Some(libc::EROFS) => Self::ReadOnly,
            Some(libc::ECANCELED) => Self::Cancelled,
            Some(libc::EINVAL) => Self::Invalid,
            Some(libc::ENOENT | libc::EACCES | libc::EPERM | libc::ENXIO | libc::ENODEV) => {
                Self::Unavailable
            }
            _ => Self::Io,
        }
    }
}

/// Why a volume could not be made from its URI.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URI does not fit.
    #[error(transparent)]
    Uri(#[from] crate::UriError),
    /// The storage refused.
    #[error("{what}")]
    Storage {
        /// What was tried, and on what.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The storage is there, but not as the URI says.
    #[error("{0}")]
    Shape(String),
}
