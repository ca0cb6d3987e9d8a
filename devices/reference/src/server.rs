//! Sockets, sessions one after the other, and their end.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_block::{BlockError, InUse, Volume};
use vhost::vhost_user::Listener;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::backend::Backend;
use crate::worker::OpenError;
use crate::{Device, DeviceOptions, relay};

/// How long somebody who has the volume may take to let go.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// How long the end of a session waits for requests in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// Where front ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that is made here, and removed at the end.
    Path(PathBuf),
    /// A socket that somebody else made: one that listens, or one that is connected.
    Socket(OwnedFd),
}

/// Why there is no service.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another program listens there.
    #[error("{0} is in use")]
    InUse(PathBuf),
    /// Something else has this name.
    #[error("{0} is there and is no socket")]
    NoSocket(PathBuf),
    /// The socket.
    #[error("socket")]
    Socket(#[source] io::Error),
    /// The volume cannot be locked.
    #[error("volume")]
    Volume(#[source] BlockError),
    /// A session cannot begin.
    #[error("session")]
    Open(#[from] OpenError),
    /// The stack failed.
    #[error("vhost-user-backend: {0}")]
    Stack(String),
}

/// Ends a [`Server`], from any thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<StopState>);

struct StopState {
    flag: AtomicBool,
    event: EventFd,
    session: Mutex<Option<ShutdownHandle>>,
}

impl std::fmt::Debug for StopState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StopState")
    }
}

impl Stop {
    /// Ends the present session and takes no more. Requests in flight are finished first.
    pub fn stop(&self) {
        self.0.flag.store(true, Ordering::SeqCst);
        let _ = self.0.event.write(1);
        if let Some(session) = &*self.0.session.lock().expect("held for no work") {
            session.shutdown();
        }
    }

    fn is_set(&self) -> bool {
        self.0.flag.load(Ordering::SeqCst)
    }

    /// The session that is to be ended, or none. It ends at once where the stop came before it.
    fn set_session(&self, session: Option<ShutdownHandle>) {
        let mut slot = self.0.session.lock().expect("held for no work");
        *slot = session;
        if let (true, Some(session)) = (self.is_set(), &*slot) {
            session.shutdown();
        }
    }
}

/// A device on a socket. Front ends come one after the other; one that comes while another is there
/// waits in the socket's backlog.
pub struct Server {
    in_use: InUse,
    options: DeviceOptions,
    listener: Listener,
    /// A socket that was connected from the beginning has one session.
    once: bool,
    stop: Stop,
    /// Watches the listener and the stop.
    epoll: Epoll,
}

impl Server {
    /// Locks the volume and listens.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(
        volume: Arc<dyn Volume>,
        options: DeviceOptions,
        endpoint: Endpoint,
    ) -> Result<Self, ServerError> {
        let in_use = InUse::within(volume, LOCK_PATIENCE).map_err(ServerError::Volume)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ServerError::Socket)?;
        let (listener, once) = match endpoint {
            Endpoint::Path(path) => (bind(&path)?, false),
            Endpoint::Socket(fd) if relay::listens(&fd).map_err(ServerError::Socket)? => {
                let listener = UnixListener::from(fd);
                // The stack would spin on one that does not block.
                listener
                    .set_nonblocking(false)
                    .map_err(ServerError::Socket)?;
                (Listener::from(listener), false)
            }
            Endpoint::Socket(fd) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(ServerError::Socket)?;
                let (listener, _) = relay::relay(stream).map_err(ServerError::Socket)?;
                (Listener::from(listener), true)
            }
        };
        let epoll = watch([listener.as_raw_fd(), event.as_raw_fd()]);
        Ok(Self {
            epoll: epoll.map_err(ServerError::Socket)?,
            in_use,
            options,
            listener,
            once,
            stop: Stop(Arc::new(StopState {
                flag: AtomicBool::new(false),
                event,
                session: Mutex::new(None),
            })),
        })
    }

    /// What ends it.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Serves until it is stopped; on a socket that was connected from the beginning, until that ends.
    ///
    /// # Errors
    /// [`ServerError`]. What a front end does wrong ends its session, and is logged.
    pub fn run(&mut self) -> Result<(), ServerError> {
        while self.wait().map_err(ServerError::Socket)? {
            self.session()?;
            if self.once {
                break;
            }
        }
        Ok(())
    }

    /// Waits for a front end. `false`: for a stop.
    fn wait(&self) -> io::Result<bool> {
        let mut ready = [EpollEvent::default(); 2];
        while !self.stop.is_set() {
            match self.epoll.wait(-1, &mut ready) {
                Ok(0) => {}
                Ok(_) => return Ok(!self.stop.is_set()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    /// One front end. A daemon serves one and no more: it never forgets that it has an owner.
    fn session(&mut self) -> Result<(), ServerError> {
        let device = Device::new(self.in_use.volume().clone(), self.options.clone());
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Backend::new(Arc::new(device), mem.clone()).map_err(ServerError::Socket)?;
        let mut daemon = VhostUserDaemon::new("session".into(), backend.clone(), mem)
            .map_err(|e| ServerError::Stack(e.to_string()))?;
        backend.open(&daemon.get_epoll_handlers())?;
        daemon
            .start(&mut self.listener)
            .map_err(|e| ServerError::Stack(e.to_string()))?;
        log::info!("a front end is here");
        self.stop.set_session(daemon.shutdown_handle());
        let end = daemon.wait();
        self.stop.set_session(None);
        match end {
            Ok(()) => log::info!("the front end has gone"),
            Err(e) => log::warn!("the session ended: {e}"),
        }
        backend.close(DRAIN);
        Ok(())
    }
}

fn watch(fds: [RawFd; 2]) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    for fd in fds {
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, fd, event)?;
    }
    Ok(epoll)
}

/// Listens at `path`; takes over a socket that nobody listens at.
fn bind(path: &Path) -> Result<Listener, ServerError> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ServerError::NoSocket(path.into()));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(ServerError::InUse(path.into())),
        Ok(_) => std::fs::remove_file(path).map_err(ServerError::Socket)?,
        Err(_) => {}
    }
    Listener::new(path, false).map_err(|e| match e {
        vhost::vhost_user::Error::SocketError(e) => ServerError::Socket(e),
        other => ServerError::Socket(io::Error::other(other)),
    })
}
