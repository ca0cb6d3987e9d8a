//! The runtime directory: where the sockets stand, and who may be there.
//!
//! One daemon has the directory, by a lock that the kernel gives up when the daemon dies, however it dies. Sockets of a
//! dead daemon are taken over; one that somebody serves is never touched; nothing else than a socket is ever removed.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The control socket, in the runtime directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The lock of the daemon that has the directory.
const LOCK: &str = "bluffd.lock";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the directory or a socket in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// Another daemon has it.
    #[error("another bluffd{} runs in {path}", .pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Running {
        /// The directory.
        path: PathBuf,
        /// The other daemon's process.
        pid: Option<u32>,
    },
    /// Others could put their own things into it.
    #[error(
        "{0} can be changed by others: it must belong to this user or root, and not be writable by everyone"
    )]
    Unsafe(PathBuf),
    /// Somebody serves the socket.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Something else than a socket has its place.
    #[error("{0} is there and is no socket; it is not removed")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("{path}")]
    Io {
        /// What it was about.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io {
        path: path.clone(),
        source,
    }
}

/// Where it stands unless told: that of the user's session, or the system's.
pub fn default_path() -> PathBuf {
    let is_root = rustix::process::geteuid().is_root();
    let session = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty() && !is_root);
    session
        .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
        .join("diamond-bluff")
}

/// The directory, taken by this process until it is dropped.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    _lock: File,
}

impl RuntimeDir {
    /// Creates the directory if it is not there, and takes it.
    ///
    /// # Errors
    /// [`RuntimeDirError::Running`] where another daemon has it; where others could tamper with it.
    pub fn take(path: &Path) -> Result<Self, RuntimeDirError> {
        let io_error = io_error(path);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(&io_error)?;
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|error| io_error(error.into()))?;
        let dir = File::from(dir);
        let metadata = dir.metadata().map_err(&io_error)?;
        let is_owned = [0, rustix::process::geteuid().as_raw()].contains(&metadata.uid());
        if !is_owned || metadata.mode() & 0o002 != 0 {
            return Err(RuntimeDirError::Unsafe(path.to_owned()));
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&dir, LOCK, flags, Mode::RUSR | Mode::WUSR);
        let mut lock = File::from(lock.map_err(|error| io_error(error.into()))?);
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // Only for the message: the other may be about to write it.
                let _ = lock.take(16).read_to_string(&mut pid);
                return Err(RuntimeDirError::Running {
                    path: path.to_owned(),
                    pid: pid.trim().parse().ok(),
                });
            }
            Err(error) => return Err(io_error(error.into())),
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .map_err(&io_error)?;
        writeln!(lock, "{}", std::process::id()).map_err(&io_error)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A listening socket whose name goes when it is dropped.
#[derive(Debug)]
pub struct BoundSocket {
    /// The socket. It does not block.
    pub listener: UnixListener,
    path: PathBuf,
}

impl BoundSocket {
    /// Listens at `path`, with at most these permissions from the first moment on: the umask may narrow them. A socket that nobody serves is taken over.
    ///
    /// # Errors
    /// Where somebody serves it, or something else stands there.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, RuntimeDirError> {
        remove_stale(path)?;
        let bind = || -> rustix::io::Result<OwnedFd> {
            let socket = stream_socket()?;
            // On Linux the name gets the mode of the socket, less the umask: there is no moment with a wider one, as
            // there is with chmod after bind.
            rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode))?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket = bind().map_err(|error| io_error(path)(error.into()))?;
        Ok(Self {
            listener: socket.into(),
            path: path.to_owned(),
        })
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Somebody may have removed it, which is what was wanted.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to a socket without waiting.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] where the other side has too many that wait; others where nobody serves it.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = stream_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn remove_stale(path: &Path) -> Result<(), RuntimeDirError> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(RuntimeDirError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(path)(error)),
    }
    match connect(path) {
        Ok(_) => Err(RuntimeDirError::InUse(path.to_owned())),
        // Somebody lives who does not accept quickly enough.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(RuntimeDirError::InUse(path.to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io_error(path))
        }
        Err(error) => Err(io_error(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn one_daemon_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = RuntimeDir::take(&path).unwrap();
        let error = RuntimeDir::take(&path).unwrap_err();
        let own = std::process::id();
        assert!(
            matches!(&error, RuntimeDirError::Running { pid: Some(pid), .. } if *pid == own),
            "{error}"
        );
        drop(first);
        RuntimeDir::take(&path).unwrap();
    }

    #[test]
    fn a_directory_of_everyone_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(
            RuntimeDir::take(dir.path()),
            Err(RuntimeDirError::Unsafe(_))
        ));
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(RuntimeDir::take(&link).is_err());
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "data").unwrap();
        std::os::unix::fs::symlink(&victim, real.join(LOCK)).unwrap();
        assert!(RuntimeDir::take(&real).is_err());
        std::os::unix::fs::symlink(&victim, real.join("x.sock")).unwrap();
        assert!(matches!(
            BoundSocket::bind(&real.join("x.sock"), 0o600),
            Err(RuntimeDirError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&victim).unwrap(), b"data");
    }

    #[test]
    fn a_socket_has_its_mode_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let socket = BoundSocket::bind(&path, 0o600).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            BoundSocket::bind(&path, 0o600),
            Err(RuntimeDirError::InUse(_))
        ));
        // Also when the other has no time to accept.
        let mut waiting = Vec::new();
        while let Ok(socket) = connect(&path) {
            waiting.push(socket);
        }
        assert!(matches!(
            BoundSocket::bind(&path, 0o600),
            Err(RuntimeDirError::InUse(_))
        ));
        drop(other);
        let socket = BoundSocket::bind(&path, 0o600).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(socket.listener.accept().is_ok());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            BoundSocket::bind(&path, 0o600),
            Err(RuntimeDirError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
