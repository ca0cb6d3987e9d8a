//! Threads for work that blocks, where there is no io_uring.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

/// A few threads that run what they are given, in order of arrival. A job tells of its end itself,
/// through a channel and a [`crate::Waker`]. Dropping it waits for the jobs that have begun; the
/// others are dropped.
pub struct Offload {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Offload {
    /// Starts `threads` threads, with names that begin with `name`.
    ///
    /// # Errors
    /// Where a thread cannot be had.
    pub fn new(name: &str, threads: usize) -> std::io::Result<Self> {
        let mut this = Self {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for i in 0..threads {
            let shared = this.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{name}-{i}"))
                .spawn(move || run(&shared))?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Has `job` run on one of the threads.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.queue.lock().expect("jobs run without the lock");
        queue.jobs.push_back(Box::new(job));
        self.shared.more.notify_one();
    }
}

fn run(shared: &Shared) {
    let mut queue = shared.queue.lock().expect("jobs run without the lock");
    loop {
        if queue.closed {
            return;
        }
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            job();
            queue = shared.queue.lock().expect("jobs run without the lock");
        } else {
            queue = shared.more.wait(queue).expect("jobs run without the lock");
        }
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.shared
            .queue
            .lock()
            .expect("jobs run without the lock")
            .closed = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
