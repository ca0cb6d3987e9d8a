//! Network namespaces for tests that need links of their own. A namespace lives in a thread, so nothing of it is left when the test is over, however it ends.
//!
//! Unsafe, because entering one is a system call without a safe form here.
#![allow(unsafe_code)]

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

type Job = Box<dyn FnOnce() + Send>;

/// Whether the calling test may make namespaces. Under emulation it does not: an emulator does not pass all on that they are set up with, and what is tested there is
/// the same kernel's. Where it may not, it is run again, by this program in a user namespace of its own, and
/// has to succeed there: `test` is its whole name, and the caller returns at once.
///
/// # Panics
/// Where it fails there.
pub fn is_allowed(test: &str) -> bool {
    if crate::is_emulated() {
        return false;
    }
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } == 0 {
        return true;
    }
    let me = std::env::current_exe().expect("a program has a name");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user"]).arg(me);
    let status = command.args(["--exact", test, "--nocapture"]).status();
    let status = status.expect("unshare, of util-linux");
    assert!(status.success(), "in a user namespace: {status}");
    false
}

/// A network namespace, and a thread in it.
#[derive(Debug)]
pub struct Namespace {
    jobs: Sender<Job>,
    thread: libc::pid_t,
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Namespace {
    /// A new one, with nothing in it but `lo`.
    ///
    /// # Panics
    /// Without CAP_SYS_ADMIN: see [`is_allowed`].
    pub fn new() -> Self {
        let (jobs, take) = channel::<Job>();
        let (tell, thread) = channel();
        std::thread::spawn(move || {
            // SAFETY: it concerns this thread alone.
            let made = match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                // SAFETY: asks for a number.
                0 => Ok(unsafe { libc::gettid() }),
                _ => Err(std::io::Error::last_os_error()),
            };
            let _ = tell.send(made);
            serve(&take);
        });
        let thread = thread.recv().expect("it tells");
        let thread = thread.expect("a network namespace, which needs CAP_SYS_ADMIN");
        let this = Self { jobs, thread };
        this.ip("link set lo up");
        this
    }

    /// What `ip link set DEVICE netns` takes.
    pub fn id(&self) -> String {
        self.thread.to_string()
    }

    /// Does something in it, on its thread.
    ///
    /// # Panics
    /// As that does.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, done) = channel();
        let job = Box::new(move || {
            let _ = tell.send(catch_unwind(AssertUnwindSafe(job)));
        });
        self.jobs.send(job).expect("its thread waits for jobs");
        match done.recv().expect("it tells") {
            Ok(done) => done,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Runs `ip` of iproute2 in it, for each line.
    ///
    /// # Panics
    /// Where it fails.
    pub fn ip(&self, lines: &str) {
        let lines = lines.to_owned();
        self.run(move || {
            let mut command = Command::new("ip");
            command.args(["-batch", "-"]).stdin(Stdio::piped());
            let mut ip = command
                .stderr(Stdio::piped())
                .spawn()
                .expect("ip, of iproute2");
            let mut input = ip.stdin.take().expect("piped");
            input.write_all(lines.as_bytes()).expect("it reads");
            drop(input);
            let output = ip.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "ip: {said}{lines}");
        });
    }
}

fn serve(jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        job();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_one_are_not_those_of_another() {
        if !is_allowed("namespace::tests::links_of_one_are_not_those_of_another") {
            return;
        }
        let (one, two) = (Namespace::new(), Namespace::new());
        one.ip(&format!(
            "link add near type veth peer name far\nlink set far netns {}",
            two.id()
        ));
        let links = |of: &Namespace| {
            let names = of.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
            (names.contains("near:"), names.contains("far:"))
        };
        assert_eq!((links(&one), links(&two)), ((true, false), (false, true)));
    }
}
