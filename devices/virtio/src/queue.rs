//! A virtqueue of either kind.

use crate::{Limits, QueueSetup, RingError, features, packed, split};

/// A virtqueue. Its device matches once for a batch and then works on the kind that it is.
#[derive(Debug)]
pub enum Queue {
    /// A split virtqueue.
    Split(Box<split::Ring>),
    /// A packed virtqueue.
    Packed(Box<packed::Ring>),
}

impl Queue {
    /// Takes up a queue of the kind that was negotiated.
    ///
    /// # Errors
    /// [`RingError`] where the setup does not make sense.
    pub fn new(setup: &QueueSetup, limits: Limits) -> Result<Self, RingError> {
        if setup.features & features::RING_PACKED != 0 {
            Ok(Self::Packed(Box::new(packed::Ring::new(setup, limits)?)))
        } else {
            Ok(Self::Split(Box::new(split::Ring::new(setup, limits)?)))
        }
    }
}

/// Does the same for either kind of ring: `with_ring!(queue, ring => ring.publish())`.
#[macro_export]
macro_rules! with_ring {
    ($queue:expr, $ring:ident => $body:expr) => {
        match $queue {
            $crate::Queue::Split($ring) => $body,
            $crate::Queue::Packed($ring) => $body,
        }
    };
}
