//! A function on a loop of its own.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bluff_vhost_user::{Attachment, AttachmentEvent, Options, Resume, SessionLoop};

use super::{Control, Fake, PATIENCE, Raw, device};

/// A function on a loop of its own.
pub struct Function {
    pub control: Control,
    pub events: Arc<(Mutex<Vec<AttachmentEvent>>, Condvar)>,
    pub sessions: Option<SessionLoop>,
}

impl Drop for Function {
    fn drop(&mut self) {
        // What explains a failure.
        println!("{:?}", self.events.0.lock().unwrap());
    }
}

impl Function {
    pub fn new(queues: u16) -> Self {
        Self::with(device(queues), Duration::from_millis(300), |_| {})
    }

    pub fn with(
        (fake, control): (Box<Fake>, Control),
        bound: Duration,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let sessions = SessionLoop::spawn().unwrap();
        let mut options = Options {
            bound,
            ..Options::default()
        };
        change(&mut options);
        let events: Arc<(Mutex<Vec<_>>, Condvar)> = Arc::default();
        let told = events.clone();
        let listener = Arc::new(move |name: &str, event| {
            assert_eq!(name, "f");
            told.0.lock().unwrap().push(event);
            told.1.notify_all();
        });
        sessions
            .handle()
            .add(Attachment::new("f", fake, options, listener))
            .unwrap();
        Self {
            control,
            events,
            sessions: Some(sessions),
        }
    }

    pub fn connect(&self) -> Raw {
        Raw::new(self.stream())
    }

    /// A front end that has negotiated everything.
    pub fn negotiated(&self) -> Raw {
        let front = self.connect();
        front.negotiate();
        front
    }

    /// The front end's side of a new connection.
    pub fn stream(&self) -> UnixStream {
        let (front, socket) = UnixStream::pair().unwrap();
        let resume = Resume {
            socket,
            recorded: None,
        };
        let sessions = self.sessions.as_ref().expect("the loop runs");
        sessions.handle().connection("f", resume);
        front
    }

    /// Waits until `n` events of a kind have come in all.
    pub fn wait_events(&self, n: usize, kind: impl Fn(&AttachmentEvent) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut events = self.events.0.lock().unwrap();
        while events.iter().filter(|e| kind(e)).count() < n {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited for {n} events; {events:?}");
            events = self.events.1.wait_timeout(events, left).unwrap().0;
        }
    }

    pub fn wait_gone(&self, n: usize) {
        self.wait_events(n, |e| matches!(e, AttachmentEvent::Disconnected(_)));
    }

    pub fn count(&self, kind: impl Fn(&AttachmentEvent) -> bool) -> usize {
        let events = self.events.0.lock().unwrap();
        events.iter().filter(|e| kind(e)).count()
    }
}
