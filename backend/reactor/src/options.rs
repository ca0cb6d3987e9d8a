//! How a reactor, and an actor on it, behave.

use std::time::Duration;

/// How long an actor without work is polled before it is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// For ever: its reactor never sleeps.
    Always,
    /// For this long.
    Adaptive(Duration),
    /// Not while it has nothing to do: it is armed at once, or up to 50 µs after work as long as looking on finds more
    /// work, which then costs less than the sleep.
    Never,
}

impl Default for Poll {
    fn default() -> Self {
        Self::Adaptive(Duration::from_micros(50))
    }
}

/// Whether a reactor has an io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum UringUse {
    /// Where the kernel allows it.
    #[default]
    Auto,
    /// Never, as where the kernel forbids it.
    Off,
}

/// How a reactor is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// The thread's name.
    pub name: String,
    /// The CPU that it is pinned to; `None` leaves it free.
    pub cpu: Option<usize>,
    /// Whether it has an io_uring.
    pub uring: UringUse,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "reactor".into(),
            cpu: None,
            uring: UringUse::Auto,
        }
    }
}
