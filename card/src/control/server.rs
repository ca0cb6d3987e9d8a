//! Serving the control socket without ever waiting for a client.
//!
//! The server is one descriptor (an epoll of its own) for the daemon's loop. A client that sends nonsense, too much or
//! too slowly harms itself only: a question is bounded, a second one is not read before the first is answered and the answer
//! has been taken, so that what is held for a client never exceeds one question and one answer.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::{Outcome, REQUEST_MAX, Request, RequestLine, Response, ResponseLine, VERSION};
use crate::runtime_dir::BoundSocket;

/// Most clients at once. One more takes the place of the one that has been silent for longest.
const CLIENTS_MAX: usize = 64;
/// The listener's number; clients begin after it.
const LISTENER: u64 = 0;
/// Pause after `accept` has failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes that are read from a client in one turn.
const READ_SIZE: usize = 4096;

/// Names a client; never used again.
pub type ClientNumber = u64;

/// The control socket and its clients.
#[derive(Debug)]
pub struct Server {
    epoll: OwnedFd,
    socket: BoundSocket,
    clients: BTreeMap<ClientNumber, Client>,
    next: ClientNumber,
    turn: u64,
    /// Until when nobody is accepted.
    paused: Option<Instant>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// The number of the question that is being answered.
    asked: Option<u64>,
    /// Whether it goes once the output is written.
    is_leaving: bool,
    /// The last turn of the server in which it did something.
    last_turn: u64,
}

impl Server {
    /// Serves this socket.
    ///
    /// # Errors
    /// Where the system has no more descriptors.
    pub fn new(socket: BoundSocket) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &socket.listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        Ok(Self {
            epoll,
            socket,
            clients: BTreeMap::new(),
            next: LISTENER + 1,
            turn: 0,
            paused: None,
        })
    }

    /// Does what can be done now, and returns the questions that came, each to be answered once by [`Server::answer`].
    pub fn turn(&mut self) -> Vec<(ClientNumber, Request)> {
        self.turn += 1;
        let mut events = [const {
            epoll::Event {
                flags: EventFlags::empty(),
                data: EventData::new_u64(0),
            }
        }; 32];
        let now = Duration::ZERO.try_into().expect("zero fits");
        let count = match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok(count) => count,
            Err(error) => {
                log::warn!("the control socket: {error}");
                0
            }
        };
        let mut questions = Vec::new();
        for event in &events[..count] {
            // Copies: the kernel packs this struct.
            let (data, flags) = (event.data, event.flags);
            match data.u64() {
                LISTENER => self.accept(),
                number => {
                    // Both directions are closed: what was asked still counts, but nobody waits for an answer.
                    let has_left = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                    questions.extend(self.serve(number).map(|request| (number, request)));
                    if has_left {
                        self.remove(number);
                    }
                }
            }
        }
        questions
    }

    /// Answers a question. A client that has left meanwhile is no error.
    pub fn answer(&mut self, number: ClientNumber, outcome: Result<Response, String>) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        client.answer(outcome);
        self.settle(number);
    }

    /// Another descriptor of a client's connection, for whoever will go on with it.
    ///
    /// # Errors
    /// Where the client has left, or there are no more descriptors.
    pub fn connection(&self, number: ClientNumber) -> io::Result<OwnedFd> {
        let client = self.clients.get(&number).ok_or(ErrorKind::NotConnected)?;
        Ok(client.stream.try_clone()?.into())
    }

    /// Answers a question, and leaves the connection to whoever has another descriptor of it. A client that does not take even a
    /// short answer is left too: it has not read what came before.
    pub fn hand_over(&mut self, number: ClientNumber, response: Response) {
        if let Some(client) = self.clients.get_mut(&number) {
            client.answer(Ok(response));
            let _ = client.flush();
            self.remove(number);
        }
    }

    fn remove(&mut self, number: ClientNumber) {
        if let Some(client) = self.clients.remove(&number) {
            // Closing the stream takes it out of the epoll only where there is no duplicate of it.
            let _ = epoll::delete(&self.epoll, &client.stream);
        }
    }

    fn accept(&mut self) {
        // One at a time: the others still wait in the next turn.
        let stream = match self.socket.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => return,
            Err(error) => {
                log::warn!("the control socket: {error}");
                self.pause();
                return;
            }
        };
        if self.clients.len() >= CLIENTS_MAX {
            let silent = self
                .clients
                .iter()
                .min_by_key(|(_, client)| client.last_turn);
            if let Some(number) = silent.map(|(number, _)| *number) {
                self.remove(number);
            }
        }
        let added = stream.set_nonblocking(true).and_then(|()| {
            Ok(epoll::add(
                &self.epoll,
                &stream,
                EventData::new_u64(self.next),
                EventFlags::IN,
            )?)
        });
        match added {
            Ok(()) => {
                self.clients
                    .insert(self.next, Client::new(stream, self.turn));
                self.next += 1;
            }
            Err(error) => log::warn!("the control socket: {error}"),
        }
    }

    /// Leaves those that want to connect for a while: nothing else ends the shortage, and they would keep the loop awake.
    fn pause(&mut self) {
        let quiet = self.listen_for(EventFlags::empty());
        self.paused = quiet.is_ok().then(|| Instant::now() + PAUSE);
    }

    fn listen_for(&self, what: EventFlags) -> rustix::io::Result<()> {
        let listener = EventData::new_u64(LISTENER);
        epoll::modify(&self.epoll, &self.socket.listener, listener, what)
    }

    /// When [`Server::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.paused
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) {
        if self.paused.is_some_and(|until| until <= now) {
            let again = self.listen_for(EventFlags::IN);
            self.paused = again.is_err().then_some(now + PAUSE);
        }
    }

    fn serve(&mut self, number: ClientNumber) -> Option<Request> {
        let client = self.clients.get_mut(&number)?;
        client.last_turn = self.turn;
        let request = match client.flush().and_then(|()| client.read()) {
            Ok(request) => request,
            Err(_) => {
                // It left, which is its right; there is nobody to tell.
                self.remove(number);
                return None;
            }
        };
        self.settle(number);
        request
    }

    /// Waits for what the client can do next; lets it go where that is nothing.
    fn settle(&mut self, number: ClientNumber) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        let is_gone = client.flush().is_err() || client.is_leaving && client.output.is_empty();
        let interest = client.interest();
        let data = EventData::new_u64(number);
        if is_gone || epoll::modify(&self.epoll, &client.stream, data, interest).is_err() {
            self.remove(number);
        }
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Client {
    fn new(stream: UnixStream, turn: u64) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: VecDeque::new(),
            asked: None,
            is_leaving: false,
            last_turn: turn,
        }
    }

    /// Reads until a whole question is there, or no more is to be had.
    fn read(&mut self) -> io::Result<Option<Request>> {
        while self.asked.is_none() && self.output.is_empty() && !self.is_leaving {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                if let Some(request) = self.question(&line) {
                    return Ok(Some(request));
                }
                self.flush()?;
                continue;
            }
            if self.input.len() > REQUEST_MAX {
                self.refuse(0, format!("a question has at most {REQUEST_MAX} bytes"));
                self.is_leaving = true;
                break;
            }
            let mut buffer = [0; READ_SIZE];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.input.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn question(&mut self, line: &[u8]) -> Option<Request> {
        /// What can be read of a question whose version is another.
        #[derive(serde::Deserialize)]
        struct Head {
            version: u32,
            #[serde(default)]
            id: u64,
        }
        let id = match serde_json::from_slice::<Head>(line) {
            Ok(head) if head.version == VERSION => head.id,
            Ok(head) => {
                let other = head.version;
                self.refuse(
                    head.id,
                    format!("this daemon speaks version {VERSION}, not {other}"),
                );
                return None;
            }
            Err(error) => {
                self.refuse(0, format!("this is no question: {error}"));
                return None;
            }
        };
        match serde_json::from_slice::<RequestLine>(line) {
            Ok(question) => {
                self.asked = Some(id);
                Some(question.request)
            }
            Err(error) => {
                self.refuse(id, format!("this is no question: {error}"));
                None
            }
        }
    }

    fn refuse(&mut self, id: u64, error: String) {
        self.asked = Some(id);
        self.answer(Err(error));
    }

    fn answer(&mut self, outcome: Result<Response, String>) {
        let Some(id) = self.asked.take() else { return };
        let outcome = outcome.map_or_else(Outcome::Error, Outcome::Result);
        let line = serde_json::to_vec(&ResponseLine {
            version: VERSION,
            id,
            outcome,
        });
        self.output.extend(line.expect("an answer is plain data"));
        self.output.push_back(b'\n');
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(self.output.as_slices().0) {
                Ok(written) => drop(self.output.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn interest(&self) -> EventFlags {
        match (self.output.is_empty(), self.asked) {
            (false, _) => EventFlags::OUT,
            // A question that is there already is read when this one is answered: that needs a turn of its own.
            (true, None) if self.input.contains(&b'\n') => EventFlags::IN | EventFlags::OUT,
            (true, None) => EventFlags::IN,
            // While it waits for its answer, only its leaving is of interest, and epoll tells that unasked.
            (true, Some(_)) => EventFlags::empty(),
        }
    }
}

#[cfg(test)]
mod tests;
