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
/// through a channel and a [`crate::Waker`]; it must not panic, or its thread is gone. Dropping the
/// pool waits for the jobs that have begun; the others are dropped.
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

    /// Lets go of the threads without waiting: each ends after the job that it has begun, which may
    /// hang for as long as the storage does. Jobs that have not begun are dropped.
    pub fn detach(mut self) {
        self.threads.clear();
    }

    fn close(&self) {
        let rest = {
            let mut queue = self.shared.queue.lock().expect("jobs run without the lock");
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        self.shared.more.notify_all();
        // What a job owns may use this pool when it is dropped: not under the lock.
        drop(rest);
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
        self.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
