//! What is counted of frames.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! causes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a frame was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Cause {
            $($(#[$doc])* $name,)*
        }

        impl Cause {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name for people and for metrics; it does not change.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

causes! {
    /// The receiver has no buffers, and its backlog is full.
    NoBuffers = "no-buffers",
    /// The way to another reactor, or to the kernel, is full.
    Congested = "congested",
    /// The port's link is down, or nobody serves its queues.
    LinkDown = "link-down",
    /// Its headers contradict each other, or it is too short for an Ethernet header.
    Malformed = "malformed",
    /// Longer than the way that it has to go allows.
    TooLong = "too-long",
    /// Its source is not one that the port may have.
    Spoofed = "spoofed",
    /// Over the port's rate.
    Limited = "limited",
    /// Over what the network allows of broadcasts, multicasts and unknown destinations.
    Storm = "storm",
    /// It would go back to where it came from, or nobody is there.
    Nowhere = "nowhere",
    /// Its VLAN tag is not one that the port may have.
    Vlan = "vlan",
    /// The receiver asked not to be given such frames.
    Filtered = "filtered",
    /// A tunnel header that makes no sense, or options that have to be understood and are not.
    BadTunnel = "bad-tunnel",
    /// From an underlay address that is no VTEP of the network, or with a VNI that is not here.
    Stranger = "stranger",
    /// The kernel refused it.
    Refused = "refused",
}

/// Frames dropped, by cause. One thread writes, with plain loads and stores; readers may be a moment late.
#[derive(Debug, Default)]
pub struct Drops([AtomicU64; Cause::ALL.len()]);

impl Drops {
    /// Counts `n` frames.
    #[inline]
    pub fn add(&self, cause: Cause, n: u64) {
        add(&self.0[cause as usize], n);
    }

    /// As [`Drops::add`], where several threads count.
    pub fn add_shared(&self, cause: Cause, n: u64) {
        self.0[cause as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn get(&self, cause: Cause) -> u64 {
        self.0[cause as usize].load(Ordering::Relaxed)
    }

    /// How many there were of all causes.
    pub fn total(&self) -> u64 {
        Cause::ALL.iter().map(|c| self.get(*c)).sum()
    }
}

/// What went one way.
#[derive(Debug, Default)]
pub struct Direction {
    /// Frames that were handed on. One that stands for several is one.
    pub frames: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// What was not.
    pub drops: Drops,
}

impl Direction {
    /// Counts frames that were handed on.
    #[inline]
    pub fn passed(&self, frames: u64, bytes: u64) {
        add(&self.frames, frames);
        add(&self.bytes, bytes);
    }
}

/// Both ways, as a function sees them.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the function.
    pub sent: Direction,
    /// To the function.
    pub received: Direction,
}

/// Adds to a counter that the calling thread alone writes.
#[inline]
fn add(cell: &AtomicU64, n: u64) {
    let value = cell.load(Ordering::Relaxed).wrapping_add(n);
    cell.store(value, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_have_names_of_their_own() {
        let mut names: Vec<_> = Cause::ALL.iter().map(|c| c.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Cause::ALL.len());
        let drops = Drops::default();
        for (i, cause) in Cause::ALL.iter().enumerate() {
            assert_eq!(*cause as usize, i);
            drops.add(*cause, i as u64);
        }
        assert_eq!(drops.get(Cause::Congested), 1);
        let n = Cause::ALL.len() as u64;
        assert_eq!(drops.total(), n * (n - 1) / 2);
    }
}
