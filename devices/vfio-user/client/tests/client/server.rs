//! A session on a thread, and what tests do with it from outside.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bluff_vfio_client::{Client, Error, Options, Socket};
use bluff_vfio_user::{Limits, Progress, Session};
use zerocopy::IntoBytes;

use crate::function::Function;

type Job = Box<dyn FnOnce(&mut Session<Function>) + Send>;

/// How often the thread looks whether a test wants something of it.
const TURN: Duration = Duration::from_millis(1);

pub struct Server {
    pub client: Arc<Client>,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

fn serve(stream: UnixStream, jobs: &Receiver<Job>) {
    let socket = Socket::new(stream, 2 << 20);
    let mut session = Session::new(Function::new(), Limits::default());
    session.connect();
    loop {
        match socket.receive(TURN) {
            Ok(Some(m)) => {
                let bytes = [m.header.as_bytes(), &m.body].concat();
                session.receive(&bytes, m.files, false).unwrap();
            }
            Ok(None) => {}
            Err(Error::Closed) => break,
            Err(other) => panic!("{other}"),
        }
        jobs.try_iter().for_each(|job| job(&mut session));
        let released = session.target().released.clone();
        if released.load(std::sync::atomic::Ordering::Acquire) {
            for ticket in std::mem::take(&mut session.target_mut().held) {
                session.finished(ticket);
            }
        }
        while let Some(message) = session.poll_transmit() {
            let files: Vec<_> = message.files.iter().map(|f| f.as_fd()).collect();
            match socket.send(&[&message.bytes], &files) {
                // A test that is over leaves at once.
                Ok(()) | Err(Error::Closed) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert_eq!(session.end(), Progress::Done);
}

impl Server {
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (jobs, receiver) = channel();
        let thread = std::thread::spawn(move || serve(theirs, &receiver));
        let client = Arc::new(Client::over(ours, options).unwrap());
        Self {
            client,
            jobs,
            thread,
        }
    }

    /// Has the thread do something with its session; what came of it.
    pub fn with_session<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Session<Function>) -> T + Send + 'static,
    ) -> T {
        let (give, take) = channel();
        let job = move |session: &mut Session<Function>| give.send(job(session)).unwrap();
        self.jobs.send(Box::new(job)).unwrap();
        take.recv().unwrap()
    }

    pub fn function<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Function) -> T + Send + 'static,
    ) -> T {
        self.with_session(move |session| job(session.target_mut()))
    }

    /// The client goes; the server has not panicked.
    pub fn end(self) {
        // Others may hold the client yet.
        let stream = self.client.socket().stream();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }
}
