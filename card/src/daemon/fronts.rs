//! Front ends, as the control half has them: their connections, and what is recorded of their sessions.
//!
//! ```text
//!   listener or connect --> Door: one for each function
//!                             current: connection + Ledger --- hand_over() --> a data half, and the next one
//!                             next:    who came before the last one was gone
//!                             files:   what the function itself keeps
//! ```
//!
//! Control accepts and connects itself, so that there is no moment in which a front end is known to a data half only. With
//! a data half that is a process, a message of the front end leaves its socket here, and is answered here, when the
//! [`Commit`] that the data half made of it is recorded. So a data half can die anywhere: the next one gets the connection,
//! the state and the descriptors, and looks at the first message that is still in the socket.
//!
//! A data half may be in a hostile host's hand. What it can do here is bounded by [`Ledger::apply`], as the function's attachment needs
//! it ([`Bounds`]); for what does not fit, that one front end loses its connection. What is in records and files is for the next data half
//! to check: nothing here looks into it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bluff_attachment::descriptor;
use bluff_attachment::keeper::{Bounds, Commit, Key, Ledger, Progress};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::message::{FILES_MAX, record};
use crate::runtime_dir::BoundSocket;
use crate::spec::Id;

/// Connections that are accepted at one door in a turn.
const ACCEPTS: usize = 32;
/// Pause after `accept` has failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// What happens by itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Happening {
    /// There is a connection to hand over.
    Came(Id),
    /// A reply that the front end had not read before is sent: the commit of this number is done.
    Done(Id, u64),
}

/// What a data half needs to serve a front end.
#[derive(Debug)]
pub(super) struct HandOver {
    /// The connection.
    pub connection: OwnedFd,
    /// What was recorded last, where anything was: the state, and the descriptors that it names.
    pub recorded: Option<(OwnedFd, Vec<(Key, OwnedFd)>)>,
}

/// All doors. One descriptor (an epoll of its own) for the daemon's loop.
#[derive(Debug)]
pub(super) struct Fronts {
    epoll: OwnedFd,
    doors: BTreeMap<Id, Door>,
    tokens: BTreeMap<u64, Id>,
    next_token: u64,
}

/// Where the front ends of one function come in.
#[derive(Debug)]
struct Door {
    /// Its number in the epoll: even for the listener, one more for the connection.
    token: u64,
    /// None in client mode.
    listener: Option<BoundSocket>,
    /// What a session may have recorded.
    bounds: Bounds,
    /// What the function keeps, from its first data half on.
    files: Vec<OwnedFd>,
    /// Until when nothing is accepted.
    paused: Option<Instant>,
    /// Whether nobody can be served: who comes is told so by the end of the connection.
    barred: bool,
    current: Option<Front>,
    next: Option<UnixStream>,
    /// When it was last logged that one was turned away.
    logged: Option<Instant>,
}

/// A front end.
#[derive(Debug)]
struct Front {
    socket: UnixStream,
    ledger: Ledger,
    /// Whether the present data half has it.
    handed: bool,
    /// The commit whose reply the front end does not read.
    blocked: Option<u64>,
}

impl Front {
    fn new(socket: UnixStream, bounds: Bounds) -> Self {
        Self {
            socket,
            ledger: Ledger::new(bounds),
            handed: false,
            blocked: None,
        }
    }
}

impl Fronts {
    /// No doors yet.
    ///
    /// # Errors
    /// Where the system has no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            doors: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next_token: 0,
        })
    }

    /// Whether a function has its door.
    pub fn has_door(&self, id: &Id) -> bool {
        self.doors.contains_key(id)
    }

    /// Whether a front end of a function is there, or was a moment ago.
    pub fn is_taken(&self, id: &Id) -> bool {
        self.doors.get(id).is_some_and(|d| d.current.is_some())
    }

    /// Whether the present data half was given a front end of this function.
    pub fn is_handed(&self, id: &Id) -> bool {
        let current = self.doors.get(id).and_then(|d| d.current.as_ref());
        current.is_some_and(|front| front.handed)
    }

    /// Opens a function's door; `listener` in server mode. `bounds` are for what is recorded of its sessions.
    ///
    /// # Errors
    /// Where the socket cannot be waited for.
    pub fn open(
        &mut self,
        id: Id,
        listener: Option<BoundSocket>,
        bounds: Bounds,
    ) -> io::Result<()> {
        let token = self.next_token;
        if let Some(socket) = &listener {
            let data = EventData::new_u64(token);
            epoll::add(&self.epoll, &socket.listener, data, EventFlags::IN)?;
        }
        self.next_token += 2;
        self.tokens.insert(token, id.clone());
        let door = Door {
            token,
            listener,
            bounds,
            files: Vec::new(),
            paused: None,
            barred: false,
            current: None,
            next: None,
            logged: None,
        };
        self.doors.insert(id, door);
        Ok(())
    }

    /// Takes files that are to be kept for a function, until its door is closed, or a data half that could not go on with them gives others.
    ///
    /// # Errors
    /// Where they are too many: then none is kept.
    pub fn keep(&mut self, id: &Id, files: Vec<OwnedFd>) -> io::Result<()> {
        if files.len() > FILES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if let Some(door) = self.doors.get_mut(id)
            && !files.is_empty()
        {
            door.files = files;
        }
        Ok(())
    }

    /// Duplicates of the files that are kept for a function, for its next data half.
    ///
    /// # Errors
    /// Where descriptors are used up.
    pub fn files(&self, id: &Id) -> io::Result<Vec<OwnedFd>> {
        let kept = self.doors.get(id).into_iter().flat_map(|d| &d.files);
        kept.map(OwnedFd::try_clone).collect()
    }

    /// Closes a function's door and connections.
    pub fn close(&mut self, id: &Id) {
        self.let_go(id);
        if let Some(door) = self.doors.remove(id) {
            self.tokens.remove(&door.token);
        }
    }

    /// Closes the connection to a front end, and forgets what was recorded.
    pub fn let_go(&mut self, id: &Id) {
        let Some(door) = self.doors.get_mut(id) else {
            return;
        };
        door.next = None;
        if let Some(front) = door.current.take() {
            forget(&self.epoll, &front);
            // A data half may hold it too.
            let _ = front.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Sets whether who comes to a function is turned away at once, as it would not be served.
    pub fn bar(&mut self, id: &Id, barred: bool) {
        if let Some(door) = self.doors.get_mut(id) {
            door.barred = barred;
        }
        if barred {
            self.let_go(id);
        }
    }

    /// A connection that control has made.
    pub fn connected(&mut self, id: &Id, socket: OwnedFd) {
        if let Some(door) = self.doors.get_mut(id) {
            door.current = Some(Front::new(socket.into(), door.bounds));
        }
    }

    /// The data half has ended, and holds nothing any more.
    pub fn data_half_lost(&mut self) {
        for front in self.doors.values_mut().filter_map(|d| d.current.as_mut()) {
            front.handed = false;
        }
    }

    /// What the present data half needs to serve the front end; `None` where there is none, it has it, or a reply has to be
    /// read first, as a session has one step under way at most.
    ///
    /// # Errors
    /// Where descriptors or memory are used up.
    pub fn hand_over(&mut self, id: &Id) -> io::Result<Option<HandOver>> {
        let Some(door) = self.doors.get_mut(id) else {
            return Ok(None);
        };
        // One that has gone while nobody served it: its session is over, and its requests are not to be done again.
        let has_gone = |f: &mut Front| !f.handed && descriptor::is_hung_up(f.socket.as_fd());
        while let Some(gone) = door.current.take_if(has_gone) {
            forget(&self.epoll, &gone);
            door.current = door.next.take().map(|next| Front::new(next, door.bounds));
        }
        let waits = |front: &&mut Front| !front.handed && front.blocked.is_none();
        let Some(front) = door.current.as_mut().filter(waits) else {
            return Ok(None);
        };
        let recorded = match front.ledger.snapshot()? {
            None => None,
            Some((state, files)) => Some((record::write(&state)?, files.into_iter().collect())),
        };
        let connection = front.socket.try_clone()?.into();
        front.handed = true;
        Ok(Some(HandOver {
            connection,
            recorded,
        }))
    }

    /// Records a step of a session, takes its message off the socket and answers it. Gives the number of the commit when
    /// that is done; otherwise [`Happening::Done`] does, later. On an error the front end loses its connection; the data
    /// half sees that, and says that it is gone.
    ///
    /// # Errors
    /// Where it is no commit, does not fit, or the front end is gone.
    pub fn commit(&mut self, id: &Id, mut descriptors: Vec<OwnedFd>) -> io::Result<Option<u64>> {
        let door = self.doors.get_mut(id);
        let Some((door, front)) = door.and_then(|d| Some((d.token, d.current.as_mut()?))) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if !front.handed {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let done = match descriptors.is_empty() {
            // This process has too many open to take them.
            true => Err(io::Error::other("the descriptors of its step were lost")),
            false => record::read(descriptors.remove(0).as_fd(), front.ledger.bounds().record)
                .and_then(|bytes| Commit::decode(&bytes, descriptors))
                .and_then(|commit| apply(front, commit)),
        };
        match done {
            Ok((seq, Progress::Done)) => Ok(Some(seq)),
            Ok((seq, _)) => {
                if front.blocked.replace(seq).is_none() {
                    let data = EventData::new_u64(door + 1);
                    epoll::add(&self.epoll, &front.socket, data, EventFlags::OUT)?;
                }
                Ok(None)
            }
            Err(error) => {
                let _ = front.socket.shutdown(std::net::Shutdown::Both);
                Err(error)
            }
        }
    }

    /// The data half says that a front end is gone: the next one may be there already.
    pub fn gone(&mut self, id: &Id) {
        let Some(door) = self.doors.get_mut(id) else {
            return;
        };
        if door.current.as_ref().is_none_or(|front| !front.handed) {
            // Of one that the data half does not have nothing can be said.
            return;
        }
        if let Some(front) = door.current.take() {
            forget(&self.epoll, &front);
        }
        door.current = door.next.take().map(|next| Front::new(next, door.bounds));
    }

    /// When [`Fronts::turn`] has something to do at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.doors.values().filter_map(|door| door.paused).min()
    }

    /// Does what can be done now.
    pub fn turn(&mut self, now: Instant) -> Vec<Happening> {
        self.resume_accepting(now);
        let mut events = [const {
            epoll::Event {
                flags: EventFlags::empty(),
                data: EventData::new_u64(0),
            }
        }; 32];
        let no_wait = Duration::ZERO.try_into().expect("zero fits");
        let count = match epoll::wait(&self.epoll, &mut events, Some(&no_wait)) {
            Ok(count) => count,
            Err(error) => {
                log::warn!("the functions' sockets: {error}");
                0
            }
        };
        let mut happenings = Vec::new();
        for event in &events[..count] {
            // A copy: the kernel packs this struct.
            let data = event.data;
            let token = data.u64();
            let Some(id) = self.tokens.get(&(token & !1)).cloned() else {
                continue;
            };
            if token & 1 == 0 {
                happenings.extend(self.accept(&id, now).then_some(Happening::Came(id)));
            } else {
                happenings.extend(self.flush(&id));
            }
        }
        happenings
    }

    fn resume_accepting(&mut self, now: Instant) {
        for door in self.doors.values_mut() {
            if door.paused.is_some_and(|until| until <= now)
                && let Some(socket) = &door.listener
            {
                let data = EventData::new_u64(door.token);
                let again = epoll::modify(&self.epoll, &socket.listener, data, EventFlags::IN);
                door.paused = again.is_err().then_some(now + PAUSE);
            }
        }
    }

    /// Whether there is a connection to hand over.
    fn accept(&mut self, id: &Id, now: Instant) -> bool {
        let Some(door) = self.doors.get_mut(id) else {
            return false;
        };
        let mut came = false;
        for _ in 0..ACCEPTS {
            let Some(socket) = &door.listener else {
                return came;
            };
            match socket.listener.accept() {
                Ok((connection, _)) => came |= door.accepted(id, connection, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return came,
                // It was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    log::warn!("function {id}: nobody can be accepted: {error}");
                    let data = EventData::new_u64(door.token);
                    let none = EventFlags::empty();
                    let quiet = epoll::modify(&self.epoll, &socket.listener, data, none);
                    door.paused = quiet.is_ok().then_some(now + PAUSE);
                    return came;
                }
            }
        }
        came
    }

    fn flush(&mut self, id: &Id) -> Option<Happening> {
        let front = self.doors.get_mut(id)?.current.as_mut()?;
        let result = front.ledger.flush(front.socket.as_fd());
        if let Ok(Progress::Blocked | Progress::Later) = result {
            return None;
        }
        forget(&self.epoll, front);
        let seq = front.blocked.take()?;
        if let Err(error) = result {
            log::debug!("function {id}: its front end: {error}");
            let _ = front.socket.shutdown(std::net::Shutdown::Both);
        }
        // Nobody waits for the commit where the data half that made it is gone.
        Some(match front.handed {
            true => Happening::Done(id.clone(), seq),
            false => Happening::Came(id.clone()),
        })
    }
}

impl Door {
    /// Whether there is a connection to hand over.
    fn accepted(&mut self, id: &Id, connection: UnixStream, now: Instant) -> bool {
        match &mut self.current {
            _ if self.barred => false,
            None => {
                self.current = Some(Front::new(connection, self.bounds));
                true
            }
            // It comes back before the data half has said that it was gone.
            Some(front) if descriptor::is_hung_up(front.socket.as_fd()) => {
                self.next = Some(connection);
                false
            }
            Some(_) => {
                if self.logged.is_none_or(|at| now >= at + PAUSE) {
                    self.logged = Some(now);
                    log::warn!("function {id}: a second front end is turned away");
                }
                false
            }
        }
    }
}

fn apply(front: &mut Front, commit: Commit) -> io::Result<(u64, Progress)> {
    let seq = commit.seq;
    let progress = front.ledger.apply(front.socket.as_fd(), commit)?;
    Ok((seq, progress))
}

/// Takes a connection out of the epoll: others may hold the same open file, so that closing is not enough.
fn forget(epoll: &OwnedFd, front: &Front) {
    if front.blocked.is_some() {
        let _ = epoll::delete(epoll, &front.socket);
    }
}

impl AsRawFd for Fronts {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
