//! How many descriptors there are, and what of them one function's front end may hold.
//!
//! A front end sends descriptors as it likes: a file for each of 509 regions, four for each ring. What it holds is open in
//! the data half, up to twice, and once more in the control half where that keeps sessions. Nobody may use them all up, since
//! everything else needs some too: so each function has a share.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What this process and the data half need for themselves: sockets, reactors, volumes, clients.
const OWN: u64 = 256;
/// How often a descriptor that a front end sent is open at once in one process.
const TIMES: u64 = 2;
/// What a front end needs whose guest has some memory: regions, an in-flight region, a log, a channel, a message under way.
const LEAST: u64 = 32;
/// Call, kick and error descriptor, and an in-flight region of our own.
const PER_QUEUE: u64 = 4;

/// Raises the soft limit to the hard one, which is there for programs that use `select`; gives what it is then. Children
/// inherit it.
pub fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            log::warn!("the limit of open descriptors stays as it is: {error}");
            limit.current
        }
    };
    now.unwrap_or(u64::MAX)
}

/// What this process may open now.
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many descriptors a front end of a function with `queues` queues may hold, where there are `functions` functions and
/// `limit` descriptors. Never less than it takes to serve a front end that wants nothing special.
pub fn share(limit: u64, functions: usize, queues: u16) -> u32 {
    let functions = u64::try_from(functions.max(1)).unwrap_or(u64::MAX);
    let share = limit.saturating_sub(OWN) / functions / TIMES;
    u32::try_from(share.max(needed(queues))).unwrap_or(u32::MAX)
}

/// What a front end of a function with `queues` queues holds at least.
fn needed(queues: u16) -> u64 {
    LEAST + PER_QUEUE * u64::from(queues)
}

/// What front ends of functions with so many queues each may hold together at least: more than the limit is a machine that is
/// set up too tightly.
pub fn needed_by_all(queues: impl Iterator<Item = u16>) -> u64 {
    OWN + TIMES * queues.map(needed).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fit_into_the_limit_and_serve_a_plain_front_end() {
        assert!(share(524_288, 100, 4) as u64 * 100 * TIMES + OWN <= 524_288);
        assert!(share(524_288, 100, 4) > 509 + 16 + 4 * 4);
        for tight in [0, 10, 1024] {
            assert_eq!(u64::from(share(tight, 1000, 8)), needed(8));
        }
        assert_eq!(share(u64::MAX, 1, 1), u32::MAX);
        assert!(needed_by_all(std::iter::repeat_n(1, 10)) < 1024);
        assert!(needed_by_all(std::iter::repeat_n(64, 100)) > 1024);
    }
}
