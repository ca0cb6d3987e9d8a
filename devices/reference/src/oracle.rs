//! The device without a session: for tests that give the same bytes to two devices.

use std::sync::Arc;
use std::time::Instant;

use bluff_block::{Channel, Completion, InUse, OpenContext};
use bluff_reactor::{Options, Poll, Reactor};
use virtio_queue::Queue;
use vm_memory::GuestMemory;

use crate::lane::{Lane, Taken};
use crate::worker::{OpenError, Woken};
use crate::{Device, worker};

/// A queue of a device on the calling thread, which does what is available and returns.
pub struct Oracle {
    // Dropped first: it may have operations in flight.
    channel: Box<dyn Channel>,
    reactor: Reactor,
    device: Arc<Device>,
    _in_use: InUse,
}

impl Oracle {
    /// Opens a channel of the device's volume.
    ///
    /// # Errors
    /// Where the volume cannot be opened, or is locked.
    pub fn new(device: Arc<Device>) -> Result<Self, OpenError> {
        let in_use = InUse::new(device.volume().clone()).map_err(OpenError::Volume)?;
        let mut reactor = Reactor::new(&Options::default()).map_err(OpenError::Reactor)?;
        let id = reactor
            .context()
            .insert(Poll::Never, |_, _| Box::new(Woken::default()));
        let context = OpenContext {
            waker: reactor.context().waker(id),
            uring: reactor.context().uring(),
        };
        let channel = device.volume().open(&context).map_err(OpenError::Volume)?;
        Ok(Self {
            channel,
            reactor,
            device,
            _in_use: in_use,
        })
    }

    /// Does all requests that are available in `queue`, one after the other in the order of the
    /// available ring, and gives each back before it takes the next. `queue` is one that was set up
    /// and made ready; what the driver negotiated is `device`'s ([`Device::set_acked`]). Blocks until the
    /// volume has done them.
    ///
    /// Says how many chains it took, and whether the driver is to be notified; `None` where the ring
    /// itself is broken.
    pub fn process<M: GuestMemory>(&mut self, queue: &mut Queue, mem: &M) -> Option<(usize, bool)> {
        let mut lane: Lane<&M> = Lane::new(0, self.device.clone());
        let mut ops = Vec::new();
        let mut done = Vec::new();
        let mut count = 0;
        let mut notify = false;
        loop {
            match lane.take(queue, &mem, 1, &mut ops) {
                Taken::Broken => return None,
                Taken::Chains(0) => return Some((count, notify)),
                Taken::Chains(n) => count += n,
            }
            while !ops.is_empty() || lane.outstanding() {
                worker::submit(&mut *self.channel, &mut ops);
                self.poll(&mut done);
                let nothing = done.is_empty();
                for completion in done.drain(..) {
                    lane.complete(&completion);
                }
                if nothing {
                    let now = Instant::now();
                    let at = self.channel.deadline();
                    self.reactor
                        .step(at.map(|at| at.saturating_duration_since(now)));
                }
            }
            notify |= lane.publish(queue, mem);
        }
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.channel.poll(Instant::now(), done);
    }
}
