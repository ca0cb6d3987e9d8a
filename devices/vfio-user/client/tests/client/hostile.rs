//! Replies that break the rules: an error that says which, and never a panic.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use bluff_vfio_client::spec::{self, Header, command, flag};
use bluff_vfio_client::{Client, Error, Message, Options, Socket};
use zerocopy::IntoBytes;

const LIMIT: Duration = Duration::from_secs(10);

struct Answer {
    header: Header,
    body: Vec<u8>,
    files: usize,
}

fn reply(message: &Message, body: &[u8]) -> Answer {
    let mut header = message.header;
    header.flags = flag::REPLY.into();
    header.size = ((spec::HEADER + body.len()) as u32).into();
    Answer {
        header,
        body: body.to_vec(),
        files: 0,
    }
}

fn send(socket: &Socket, answer: &Answer) {
    let (file, _) = UnixStream::pair().unwrap();
    let files: Vec<BorrowedFd<'_>> = vec![file.as_fd(); answer.files];
    let _ = socket.send(&[answer.header.as_bytes(), &answer.body], &files);
}

/// A server that agrees on a version and answers what comes then by `answer`, once; then it closes.
fn serve(answer: impl FnOnce(&Message) -> Answer + Send + 'static) -> (Client, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let socket = Socket::new(theirs, 1 << 20);
        let version = socket.receive(LIMIT).unwrap().unwrap();
        send(&socket, &reply(&version, &[0; 4]));
        if let Ok(Some(message)) = socket.receive(LIMIT) {
            send(&socket, &answer(&message));
        }
    });
    (Client::over(ours, Options::default()).unwrap(), thread)
}

/// What a read of 4 bytes ends with.
fn read(answer: impl FnOnce(&Message) -> Answer + Send + 'static) -> Error {
    let (client, thread) = serve(answer);
    let error = client.read32(0, 0).unwrap_err();
    thread.join().unwrap();
    // And whatever it was, the next call ends too.
    assert!(client.read32(0, 0).is_err());
    error
}

fn access(count: u32, data: usize) -> Vec<u8> {
    let mut body = [[0u32, 0, 0], [count, 0, 0]].concat()[..4]
        .as_bytes()
        .to_vec();
    body.resize(16 + data, 0);
    body
}

fn with(change: impl FnOnce(&mut Answer) + Send + 'static) -> Error {
    read(move |m| {
        let mut answer = reply(m, &access(4, 4));
        change(&mut answer);
        answer
    })
}

#[test]
fn streams_that_cannot_be_trusted() {
    let stray = |e: Error| assert!(matches!(e, Error::Stray { .. }), "{e}");
    stray(with(|a| a.header.id = (a.header.id.get() + 1).into()));
    stray(with(|a| a.header.command = command::REGION_WRITE.into()));
    let framing = |e: Error| assert!(matches!(e, Error::Framing(_)), "{e}");
    framing(with(|a| a.header.size = 15.into()));
    framing(with(|a| a.header.size = 0.into()));
    framing(with(|a| a.header.size = u32::MAX.into()));
    framing(with(|a| a.header.flags = 2.into()));
    framing(with(|a| a.files = 33));
    framing(with(|a| a.files = 200));
    let closed = |e: Error| assert!(matches!(e, Error::Closed), "{e}");
    closed(with(|a| a.header.size = (a.header.size.get() + 1).into()));
    closed(with(|a| a.body.truncate(3)));
}

#[test]
fn replies_that_are_not_what_was_asked_for() {
    let wrong = |e: Error| {
        let is = matches!(
            e,
            Error::Reply {
                command: command::REGION_READ,
                ..
            }
        );
        assert!(is, "{e}");
    };
    for body in [
        vec![],
        vec![0; 15],
        access(4, 3),
        access(4, 5),
        access(5, 5),
        access(3, 4),
    ] {
        wrong(read(move |m| reply(m, &body)));
    }
    wrong(with(|a| a.files = 1));
    // An error is a header alone.
    wrong(with(|a| {
        a.header.flags = (flag::REPLY | flag::ERROR).into();
    }));
    let refused = read(|m| {
        let mut answer = reply(m, &[]);
        answer.header.flags = (flag::REPLY | flag::ERROR).into();
        answer.header.error = 5.into();
        answer
    });
    assert_eq!(refused.errno(), Some(5));
}

#[test]
fn region_info_that_lies() {
    let raw = |argsz: u32, flags: u32, cap: u32| spec::Region {
        argsz: argsz.into(),
        flags: flags.into(),
        cap_offset: cap.into(),
        size: 0x4000.into(),
        ..spec::Region::default()
    };
    let info = |raw: spec::Region, rest: &[u32], files: usize| {
        let body = [raw.as_bytes(), rest.as_bytes()].concat();
        let (client, thread) = serve(move |m| {
            let mut answer = reply(m, &body);
            answer.files = files;
            answer
        });
        let result = client.region_info(0);
        drop(client);
        thread.join().unwrap();
        result
    };
    assert!(info(raw(32, 3, 0), &[], 0).is_ok());
    // As a whole, by a file that is no memory: the error is the mapping's.
    let whole = info(raw(32, 7, 0), &[], 1).unwrap();
    assert!(whole.map().is_err());
    for (raw, files) in [
        (raw(32, 7, 0), 0),
        (raw(32, 3, 0), 1),
        (raw(32, 7, 0), 2),
        (raw(31, 3, 0), 0),
        (raw(u32::MAX, 3, 0), 0),
        (raw(32, 0xb, 32), 0),
        (raw(32, 0xb, 8), 0),
        (raw(32, 0xb, u32::MAX), 0),
    ] {
        let error = info(raw, &[], files).unwrap_err();
        assert!(matches!(error, Error::Reply { .. }), "{raw:?}: {error}");
    }
}

#[test]
fn lists_of_areas_that_lie() {
    // The first answer says how much there is, the second has it.
    let info = |words: Vec<u32>| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let socket = Socket::new(theirs, 1 << 20);
            let version = socket.receive(LIMIT).unwrap().unwrap();
            send(&socket, &reply(&version, &[0; 4]));
            let argsz = 32 + 4 * words.len() as u32;
            let head = |flags, cap| [argsz, flags, 0, cap, 0x4000, 0, 0, 0];
            let first = socket.receive(LIMIT).unwrap().unwrap();
            let mut answer = reply(&first, head(7, 0).as_bytes());
            answer.files = 1;
            send(&socket, &answer);
            if let Ok(Some(second)) = socket.receive(LIMIT) {
                let body = [head(0xf, 32).as_bytes(), words.as_bytes()].concat();
                let mut answer = reply(&second, &body);
                answer.files = 1;
                send(&socket, &answer);
            }
        });
        let client = Client::over(ours, Options::default()).unwrap();
        let result = client.region_info(0).map(|i| i.areas);
        drop(client);
        thread.join().unwrap();
        result
    };
    let sparse = 1 | 1 << 16;
    let area = |offset, size| [sparse, 0, 1, 0, offset, 0, size, 0];
    assert_eq!(info(area(0x1000, 0x1000).to_vec()).unwrap().len(), 1);
    // Another capability before it is skipped.
    let two = [&[9, 48, 0, 0][..], &area(0, 0x4000)].concat();
    assert_eq!(info(two).unwrap().len(), 1);
    for lie in [
        area(0x1000, 0x3001).to_vec(),
        area(0x4000, 1).to_vec(),
        vec![sparse, 0, 1, 0, u32::MAX, u32::MAX, 0x1000, 0],
        vec![sparse, 0, 2, 0, 0, 0, 0x1000, 0],
        vec![sparse, 0, u32::MAX, 0],
        vec![sparse, 32, 0, 0],
        vec![sparse, 33, 0, 0],
        vec![sparse, 1000, 0, 0],
    ] {
        let error = info(lie.clone()).unwrap_err();
        assert!(matches!(error, Error::Reply { .. }), "{lie:?}: {error}");
    }
}

/// What a client says to such a version reply.
fn version(body: &'static [u8]) -> Result<(), Error> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let socket = Socket::new(theirs, 1 << 20);
        let message = socket.receive(LIMIT).unwrap().unwrap();
        send(&socket, &reply(&message, body));
    });
    let client = Client::over(ours, Options::default());
    thread.join().unwrap();
    client.map(drop)
}

#[test]
fn versions_that_make_no_sense() {
    assert!(version(b"\0\0\0\0").is_ok());
    assert!(version(b"\0\0\0\0{\"capabilities\":{}}\0").is_ok());
    let long: &[u8] = Box::leak(
        [b"\0\0\0\0{}".to_vec(), vec![b' '; 1000], vec![0]]
            .concat()
            .into(),
    );
    for lie in [
        b"" as &[u8],
        b"\0\0\0",
        b"\x01\0\0\0",
        b"\0\0\x01\0",
        b"\0\0\0\0{}",
        b"\0\0\0\0{\0",
        b"\0\0\0\0{\"capabilities\":3}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"\0\0\0\0{\"capabilities\":{\"write_multiple\":1}}\0",
        long,
    ] {
        let error = version(lie).unwrap_err();
        let is = matches!(
            error,
            Error::Reply {
                command: command::VERSION,
                ..
            }
        );
        assert!(is, "{lie:?}: {error}");
    }
}

#[test]
fn commands_of_the_server_that_make_no_sense_are_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let socket = Socket::new(theirs, 1 << 20);
        let version = socket.receive(LIMIT).unwrap().unwrap();
        send(&socket, &reply(&version, &[0; 4]));
        let ask = |command: u16, body: &[u8]| {
            let mut asked = reply(&version, body);
            asked.header.flags = flag::COMMAND.into();
            asked.header.command = command.into();
            send(&socket, &asked);
            let answer = socket.receive(LIMIT).unwrap().unwrap();
            assert_eq!(answer.header.flags.get(), flag::REPLY | flag::ERROR);
            assert!(answer.body.is_empty());
            answer.header.error.get()
        };
        let words = |words: [u64; 2]| words.as_bytes().to_vec();
        assert_eq!(ask(command::DMA_READ, &[]), 22);
        assert_eq!(ask(command::DMA_READ, &words([0, u64::MAX])), 22);
        assert_eq!(ask(command::DMA_READ, &words([0, 1])), 14);
        assert_eq!(ask(command::DMA_WRITE, &words([0, 1])), 22);
        assert_eq!(ask(command::REGION_READ, &words([0, 1])), 95);
    });
    let client = Client::over(ours, Options::default()).unwrap();
    while client.serve(LIMIT).is_ok() {}
    thread.join().unwrap();
}
