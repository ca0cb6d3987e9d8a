use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

struct Setup {
    server: Server,
    dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = BoundSocket::bind(&dir.path().join("control.sock"), 0o600).unwrap();
        Self {
            server: Server::new(socket).unwrap(),
            dir,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("control.sock")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Runs the server until `done`, answering everything with an empty list of volumes.
    fn run_until(&mut self, mut done: impl FnMut(&Server) -> bool) -> usize {
        let start = Instant::now();
        let mut asked = 0;
        while !done(&self.server) {
            assert!(start.elapsed() < LIMIT, "it does not happen");
            let a_while = Duration::from_millis(10).try_into().unwrap();
            let _ = rustix::event::poll(
                &mut [PollFd::new(&self.server.epoll.as_fd(), PollFlags::IN)],
                Some(&a_while),
            );
            for (client, _) in self.server.turn() {
                asked += 1;
                self.server
                    .answer(client, Ok(Response::Volumes(Vec::new())));
            }
        }
        asked
    }
}

fn readable(stream: &UnixStream) -> bool {
    let zero = Duration::ZERO.try_into().unwrap();
    rustix::event::poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&zero)).unwrap() > 0
}

fn line_of(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

const QUESTION: &str = "{\"version\":1,\"id\":7,\"request\":\"list_volumes\"}\n";
const ANSWER: &str = "{\"version\":1,\"id\":7,\"result\":{\"volumes\":[]}}\n";

#[test]
fn a_question_in_pieces_is_answered_once() {
    let mut setup = Setup::new();
    let mut client = setup.connect();
    for byte in QUESTION.as_bytes() {
        client.write_all(&[*byte]).unwrap();
        setup
            .server
            .turn()
            .into_iter()
            .for_each(|(n, _)| setup.server.answer(n, Ok(Response::Volumes(Vec::new()))));
    }
    setup.run_until(|_| readable(&client));
    assert_eq!(line_of(&client), ANSWER);
}

#[test]
fn many_questions_at_once_are_answered_one_by_one() {
    let mut setup = Setup::new();
    let mut client = setup.connect();
    client.write_all(QUESTION.repeat(100).as_bytes()).unwrap();
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut asked = 0;
    for _ in 0..100 {
        if reader.buffer().is_empty() {
            asked += setup.run_until(|_| readable(&client));
        }
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, ANSWER);
    }
    assert_eq!(asked, 100);
}

#[test]
fn nonsense_is_answered_with_what_is_wrong() {
    let mut setup = Setup::new();
    for (line, part) in [
        ("hello\n", "this is no question"),
        ("{}\n", "this is no question"),
        (
            "{\"version\":2,\"id\":7,\"request\":\"dance\"}\n",
            "\"id\":7,\"error\":\"this daemon speaks version 1, not 2",
        ),
        (
            "{\"version\":1,\"id\":7,\"request\":\"dance\"}\n",
            "\"id\":7,\"error\":\"this is no question",
        ),
        (
            "{\"version\":1,\"id\":7,\"request\":{\"show_function\":{\"id\":\"../x\"}}}\n",
            "an ID is",
        ),
        ("\u{0}\u{1}\n", "this is no question"),
    ] {
        let mut client = setup.connect();
        client.write_all(line.as_bytes()).unwrap();
        setup.run_until(|_| readable(&client));
        let answer = line_of(&client);
        assert!(answer.contains(part), "{line} {answer}");
        // It may go on.
        client.write_all(QUESTION.as_bytes()).unwrap();
        setup.run_until(|_| readable(&client));
        assert_eq!(line_of(&client), ANSWER);
    }
}

#[test]
fn an_endless_question_is_cut_off() {
    let mut setup = Setup::new();
    let mut client = setup.connect();
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    setup.run_until(|server| {
        sent += client.write(&[b'x'; 4096]).unwrap_or(0);
        sent > REQUEST_MAX && server.clients.is_empty()
    });
    client.set_nonblocking(false).unwrap();
    assert!(line_of(&client).contains("at most 65536 bytes"));
    assert!(setup.server.clients.is_empty());
}

#[test]
fn a_client_that_does_not_read_keeps_nobody_waiting() {
    let mut setup = Setup::new();
    let mut deaf = setup.connect();
    deaf.set_nonblocking(true).unwrap();
    // It asks until neither the server reads nor the socket takes any more.
    let mut quiet = 0;
    setup.run_until(|_| {
        match deaf.write(QUESTION.as_bytes()) {
            Ok(_) => quiet = 0,
            Err(_) => quiet += 1,
        }
        quiet > 20
    });
    let held: usize = setup
        .server
        .clients
        .values()
        .map(|client| client.input.len() + client.output.len())
        .sum();
    assert!(
        held <= REQUEST_MAX + READ_SIZE + ANSWER.len(),
        "{held} bytes are held"
    );
    let mut other = setup.connect();
    other.write_all(QUESTION.as_bytes()).unwrap();
    setup.run_until(|_| readable(&other));
    assert_eq!(line_of(&other), ANSWER);
}

#[test]
fn one_client_too_many_takes_the_place_of_a_silent_one() {
    let mut setup = Setup::new();
    let silent: Vec<UnixStream> = (0..CLIENTS_MAX).map(|_| setup.connect()).collect();
    setup.run_until(|server| server.clients.len() == CLIENTS_MAX);
    let mut client = setup.connect();
    client.write_all(QUESTION.as_bytes()).unwrap();
    setup.run_until(|_| readable(&client));
    assert_eq!(line_of(&client), ANSWER);
    assert_eq!(setup.server.clients.len(), CLIENTS_MAX);
    drop(silent);
    setup.run_until(|server| server.clients.len() == 1);
}

#[test]
fn an_answer_to_one_who_left_is_dropped() {
    let mut setup = Setup::new();
    let mut client = setup.connect();
    client.write_all(QUESTION.as_bytes()).unwrap();
    let start = Instant::now();
    let (number, _) = loop {
        assert!(start.elapsed() < LIMIT);
        if let Some(question) = setup.server.turn().pop() {
            break question;
        }
    };
    drop(client);
    setup.run_until(|server| server.clients.is_empty());
    setup
        .server
        .answer(number, Ok(Response::Volumes(Vec::new())));
}
