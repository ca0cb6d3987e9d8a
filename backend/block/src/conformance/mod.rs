//! What every kind of volume promises, as tests that each kind runs.
//!
//! ```text
//!   run(profile, make) --> case, case, ...   each on a fresh volume of `make`
//!                            |
//!                           Rig: a reactor, stepped by the test --> Line: a channel on it
//! ```
//!
//! A [`Line`] polls its channel only when the channel woke it, when its deadline has come, or right
//! after a submit, as a queue does: a kind that forgets to wake fails here by time-out.
//!
//! The suite panics at the first broken promise. It wants writable volumes of 4 MiB or more, empty
//! or not.

mod cases;
mod data;
mod faults;
mod rig;

use std::any::Any;
use std::sync::Arc;

use bluff_reactor::UringUse;

pub use data::Memory;
pub use rig::{Line, Rig};

use crate::Volume;

/// A volume to be tested.
pub struct TestVolume {
    /// It.
    pub volume: Arc<dyn Volume>,
    /// What it stands on, and is to be dropped after it: a temporary folder.
    pub keep: Box<dyn Any>,
}

impl TestVolume {
    /// A volume that stands on nothing else.
    pub fn new(volume: Arc<dyn Volume>) -> Self {
        Self {
            volume,
            keep: Box::new(()),
        }
    }
}

/// What can be asked of a kind of volume.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Whether a read gives what was written; not so for null volumes.
    pub keeps_data: bool,
    /// Whether it can be resized.
    pub resizes: bool,
    /// Whether the reactors have an io_uring.
    pub uring: UringUse,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            keeps_data: true,
            resizes: true,
            uring: UringUse::Auto,
        }
    }
}

/// Runs every case, each on a fresh volume.
///
/// # Panics
/// At the first broken promise.
pub fn run(profile: &Profile, make: &dyn Fn() -> TestVolume) {
    let all: &[(&str, cases::Case)] = &[
        ("shape", cases::shape),
        ("data", cases::data),
        ("boundaries", cases::boundaries),
        ("flush", cases::flush),
        ("threads", cases::threads),
        ("discard", cases::discard),
        ("zeroes", cases::zeroes),
        ("resize", cases::resize),
        ("busy", faults::busy),
        ("cancel", faults::cancel),
        ("late writes", faults::late_writes),
        ("drop", faults::dropped),
    ];
    for (name, case) in all {
        log::debug!("conformance: {name}");
        let made = make();
        let size = made.volume.geometry().size;
        assert!(size >= 4 << 20, "{name}: the suite needs 4 MiB");
        case(profile, &made.volume);
        // The volume before what it stands on.
        drop(made.volume);
        drop(made.keep);
    }
}

/// Checks a volume that answers nothing: operations can still be cancelled and the channel dropped,
/// both at once.
///
/// # Panics
/// At the first broken promise.
pub fn run_silent(profile: &Profile, make: &dyn Fn() -> TestVolume) {
    let made = make();
    faults::silent(profile, &made.volume);
}
