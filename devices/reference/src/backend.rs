//! The device as `vhost-user-backend` wants it.
//!
//! Unsafe, because the stack leaks a descriptor that has to be closed here.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::Device;
use crate::spec::feature;
use crate::worker::{Gauge, Memory, OpenError, Vring, Worker};

thread_local! {
    /// The worker of this queue thread. A channel and its reactor never leave their thread, and the
    /// stack has no place for what belongs to one; each of its threads serves one backend only.
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

type Handlers = Vec<Weak<VringEpollHandler<Arc<Backend>>>>;

/// One session's device.
pub(crate) struct Backend {
    device: Arc<Device>,
    mem: Memory,
    gauges: Vec<Arc<Gauge>>,
    closing: Arc<AtomicBool>,
    handlers: OnceLock<Handlers>,
    /// Where threads tell that they have begun.
    begun: Mutex<Option<Sender<Result<(), OpenError>>>>,
    /// What tells them to begin.
    begin: Vec<(EventConsumer, EventNotifier)>,
    /// Exit descriptors that the stack was given and does not close.
    exits: Mutex<Vec<RawFd>>,
}

impl Backend {
    pub(crate) fn new(device: Arc<Device>, mem: Memory) -> io::Result<Arc<Self>> {
        let queues = usize::from(device.options().num_queues);
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let threads = Self::threads(&device);
        let begin = (0..threads).map(|_| new_event_consumer_and_notifier(flags));
        Ok(Arc::new(Self {
            begin: begin.collect::<io::Result<_>>()?,
            device,
            mem,
            gauges: (0..queues).map(|_| Arc::default()).collect(),
            closing: Arc::default(),
            handlers: OnceLock::new(),
            begun: Mutex::new(None),
            exits: Mutex::default(),
        }))
    }

    /// A thread for each queue, where the volume bears that many channels; otherwise one for all.
    fn threads(device: &Device) -> usize {
        let queues = usize::from(device.options().num_queues);
        if device.volume().max_channels() >= queues {
            queues
        } else {
            1
        }
    }

    fn begin_token(&self) -> u64 {
        u64::from(self.device.options().num_queues) + 1
    }

    fn reactor_token(&self) -> u64 {
        u64::from(self.device.options().num_queues) + 2
    }

    /// Has each queue thread open its channel, and waits for all.
    pub(crate) fn open(
        &self,
        handlers: &[Arc<VringEpollHandler<Arc<Self>>>],
    ) -> Result<(), OpenError> {
        let weak = handlers.iter().map(Arc::downgrade).collect();
        assert!(self.handlers.set(weak).is_ok(), "opened once");
        let (tx, rx): (_, Receiver<_>) = channel();
        *self.begun.lock().expect("held for no work") = Some(tx);
        for (handler, (consumer, notifier)) in handlers.iter().zip(&self.begin) {
            handler
                .register_listener(consumer.as_raw_fd(), EventSet::IN, self.begin_token())
                .and_then(|()| notifier.notify())
                .map_err(OpenError::Watch)?;
        }
        for _ in handlers {
            rx.recv().expect("each thread answers")?;
        }
        Ok(())
    }

    fn begin(&self, thread: usize) {
        let _ = self.begin[thread].0.consume();
        let threads = self.begin.len();
        let queues = if threads == 1 {
            0..self.gauges.len()
        } else {
            thread..thread + 1
        };
        let first = queues.start as u16;
        let gauges = &self.gauges[queues];
        let (mem, closing) = (self.mem.clone(), self.closing.clone());
        let made = Worker::new(self.device.clone(), mem, first, gauges, closing);
        let result = made.and_then(|worker| {
            let handlers = self.handlers.get().expect("set before threads begin");
            if let Some(handler) = handlers[thread].upgrade() {
                handler
                    .register_listener(worker.fd(), EventSet::IN, self.reactor_token())
                    .map_err(OpenError::Watch)?;
            }
            WORKER.with_borrow_mut(|slot| *slot = Some(worker));
            Ok(())
        });
        let begun = self.begun.lock().expect("held for no work");
        if let Some(begun) = &*begun {
            let _ = begun.send(result);
        }
    }

    /// Takes no more chains, and waits until those that were taken are given back, for `limit` at most.
    pub(crate) fn close(&self, limit: Duration) {
        self.closing.store(true, Ordering::SeqCst);
        if !self.gauges.iter().all(|gauge| gauge.drained(Some(limit))) {
            log::warn!("the volume has not finished in {limit:?}: requests are dropped");
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        for fd in self.exits.get_mut().expect("held for no work").drain(..) {
            // SAFETY: VringEpollHandler made it a raw descriptor and forgot it; the threads that watched it
            // have ended, as each of them held this backend.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.gauges.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.options().queue_size)
    }

    fn features(&self) -> u64 {
        self.device.features() | feature::PROTOCOL_FEATURES
    }

    fn acked_features(&self, features: u64) {
        self.device.set_acked(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The vrings have been told.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.device.read_config(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if self.device.write_config(offset, bytes) {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::InvalidInput))
        }
    }

    fn update_memory(&self, _: Memory) -> io::Result<()> {
        // Workers load the new map with their next batch; what is in flight keeps the old one.
        for gauge in &self.gauges {
            gauge.fresh.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let queues = self.gauges.len();
        if self.begin.len() == queues {
            (0..queues).map(|i| 1 << i).collect()
        } else {
            vec![u64::MAX]
        }
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let made = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC);
        let (consumer, notifier) = made
            .inspect_err(|e| log::error!("a queue thread cannot be ended: {e}"))
            .ok()?;
        let mut exits = self.exits.lock().expect("held for no work");
        exits.push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        // The vring says not ready: no more is taken. The reply waits for what was.
        let gauge = &self.gauges[index as usize];
        gauge.drained(None);
        gauge.fresh.store(true, Ordering::Release);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == self.begin_token() {
            self.begin(thread);
        }
        // An error would end the thread, and with it the queue, in silence.
        WORKER.with_borrow_mut(|worker| {
            if let Some(worker) = worker {
                worker.serve(vrings);
            }
        });
        Ok(())
    }
}
