//! A vhost-user front end without a VM, for tests and benchmarks.
//!
//! ```text
//!   a test's loop --> bluff-virtio-driver: rings, requests        in memfd memory
//!                          |
//!   FrontEnd: sets up the session in QEMU's order, by the `vhost` crate's Frontend --> socket
//! ```
//!
//! The messages are those of the `vhost` crate, which no one here wrote; only the two that it cannot
//! carry whole are sent from here: the 32-bit base of a packed ring, and its answer.
//!
//! With the feature `libblkio` there is also a front end that is wholly another's (module `libblkio`).
//!
//! Not here: migration logs, back-end requests.

#[cfg(feature = "libblkio")]
pub mod libblkio;

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use bluff_virtio_driver::{DriverQueue, Features, Layout, Memory, MemoryError};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the session did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The `vhost` crate, or an error that the back end answered.
    #[error("vhost-user: {0:?}")]
    Vhost(#[from] vhost::Error),
    /// An address outside of the driver's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The back end does not offer what was asked for.
    #[error("the back end does not offer features {0:#x}")]
    Features(u64),
}

/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// The feature bits of a driver's queue.
pub fn ring_features(features: Features, packed: bool) -> u64 {
    let when = |on: bool, bit: u32| if on { 1u64 << bit } else { 0 };
    VERSION_1
        | when(features.indirect, 28)
        | when(features.event_idx, 29)
        | when(packed, 34)
        | when(features.in_order, 35)
}

/// What a session is set up with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many queues will be started at most.
    pub queues: u16,
    /// Descriptors of each queue, for the in-flight region.
    pub queue_size: u16,
    /// Ring features that have to be there: [`ring_features`].
    pub features: u64,
    /// Device features that are taken where they are offered.
    pub device_features: u64,
    /// Whether requests in flight are recorded.
    pub inflight: bool,
}

impl Options {
    /// One queue of 256 descriptors with these ring features and every virtio-blk feature.
    pub fn new(features: u64) -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            features,
            device_features: 0x00ff_ffff,
            inflight: false,
        }
    }
}

/// The two events of a queue.
#[derive(Debug)]
pub struct Events {
    /// Written to notify the device.
    pub kick: EventFd,
    /// Readable when the device has notified the driver.
    pub call: EventFd,
}

impl Events {
    fn new() -> Result<Self, std::io::Error> {
        let new = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            kick: new()?,
            call: new()?,
        })
    }
}

/// A session with a back end.
pub struct FrontEnd {
    frontend: Frontend,
    stream: UnixStream,
    memory: Arc<Memory>,
    options: Options,
    features: u64,
    /// By queue; they outlive a connection, as a VMM's do.
    events: Vec<Events>,
    inflight: Option<(VhostUserInflight, File)>,
    /// By queue: the base that it was last started with.
    bases: Vec<u32>,
}

impl std::fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrontEnd({:?})", self.options)
    }
}

impl Drop for FrontEnd {
    /// Closing is not enough: a process that is being started has every descriptor of this one until it runs its program.
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl FrontEnd {
    /// Connects, negotiates and shares `memory`. No queue is started.
    ///
    /// # Errors
    /// Where the back end is not there, refuses, or lacks a feature.
    pub fn connect(path: &Path, memory: &Arc<Memory>, options: Options) -> Result<Self, Error> {
        let events = (0..options.queues)
            .map(|_| Events::new())
            .collect::<Result<_, std::io::Error>>()?;
        let stream = UnixStream::connect(path)?;
        let mut this = Self {
            frontend: Frontend::from_stream(stream.try_clone()?, u64::from(options.queues)),
            stream,
            memory: memory.clone(),
            options,
            features: 0,
            events,
            inflight: None,
            bases: vec![0; usize::from(options.queues)],
        };
        this.negotiate()?;
        Ok(this)
    }

    /// Ends the connection, whatever is in flight.
    pub fn disconnect(&self) {
        // Fails where the back end has ended it already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Connects again after the back end has gone, or after [`FrontEnd::disconnect`]; what was in flight is recorded in the region that
    /// this side kept.
    ///
    /// # Errors
    /// As [`FrontEnd::connect`].
    pub fn reconnect(&mut self, path: &Path) -> Result<(), Error> {
        self.stream = UnixStream::connect(path)?;
        let queues = u64::from(self.options.queues);
        self.frontend = Frontend::from_stream(self.stream.try_clone()?, queues);
        self.negotiate()
    }

    fn negotiate(&mut self) -> Result<(), Error> {
        let f = &mut self.frontend;
        f.set_owner()?;
        let offered = f.get_features()?;
        let missing = self.options.features & !offered;
        if missing != 0 {
            return Err(Error::Features(missing));
        }
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let wanted = self.options.features | self.options.device_features | protocol;
        self.features = offered & wanted;
        if offered & protocol != 0 {
            let there = f.get_protocol_features()?;
            let mut wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::RESET_DEVICE;
            if self.options.inflight {
                wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
            }
            f.set_protocol_features(there & wanted)?;
            if there.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        self.set_up()?;
        self.share_memory()
    }

    /// What a device is told anew after each reset: features and the in-flight region.
    fn set_up(&mut self) -> Result<(), Error> {
        let f = &mut self.frontend;
        f.set_features(self.features)?;
        if self.options.inflight {
            let ask = VhostUserInflight {
                num_queues: self.options.queues,
                queue_size: self.options.queue_size,
                ..VhostUserInflight::default()
            };
            if self.inflight.is_none() {
                self.inflight = Some(f.get_inflight_fd(&ask)?);
            }
            if let Some((shape, file)) = &self.inflight {
                f.set_inflight_fd(shape, file.as_raw_fd())?;
            }
        }
        Ok(())
    }

    /// Resets the device, as for a guest that reboots: rings are forgotten, and what was in flight with
    /// them. Features and a new in-flight region are set again; memory stays shared.
    ///
    /// # Errors
    /// Where the back end refuses.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.frontend.reset_device()?;
        self.inflight = None;
        self.set_up()
    }

    /// Sends the memory table.
    ///
    /// # Errors
    /// Where the back end refuses it.
    pub fn share_memory(&self) -> Result<(), Error> {
        self.share_regions(|_| true)
    }

    /// Sends a memory table of those regions whose index is `wanted`.
    ///
    /// # Errors
    /// Where the back end refuses it.
    pub fn share_regions(&self, wanted: impl Fn(usize) -> bool) -> Result<(), Error> {
        let regions: Vec<_> = (0..self.memory.regions().len())
            .filter(|&i| wanted(i))
            .map(|i| self.region(i))
            .collect();
        self.frontend.set_mem_table(&regions)?;
        Ok(())
    }

    /// Adds one region to what is shared.
    ///
    /// # Errors
    /// Where the back end refuses it.
    pub fn add_region(&mut self, index: usize) -> Result<(), Error> {
        let region = self.region(index);
        self.frontend.add_mem_region(&region)?;
        Ok(())
    }

    /// Takes one region back.
    ///
    /// # Errors
    /// Where the back end refuses.
    pub fn remove_region(&mut self, index: usize) -> Result<(), Error> {
        let region = self.region(index);
        Ok(self.frontend.remove_mem_region(&region)?)
    }

    fn region(&self, index: usize) -> VhostUserMemoryRegionInfo {
        let r = &self.memory.regions()[index];
        VhostUserMemoryRegionInfo {
            guest_phys_addr: r.config().guest_addr,
            memory_size: r.config().size,
            userspace_addr: r.user_addr(),
            mmap_offset: r.config().file_offset,
            mmap_handle: r.as_fd().as_raw_fd(),
        }
    }

    /// Gives a queue, which may run, new events in place of those before.
    ///
    /// # Errors
    /// Where the back end refuses, or the system has no descriptors.
    pub fn replace_events(&mut self, index: u16) -> Result<(), Error> {
        let i = usize::from(index);
        let new = Events::new()?;
        self.frontend.set_vring_kick(i, &new.kick)?;
        self.frontend.set_vring_call(i, &new.call)?;
        self.events[i] = new;
        Ok(())
    }

    /// What was negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The `vhost` crate's side, for messages that this type does not wrap.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The events of a queue.
    pub fn events(&self, index: u16) -> &Events {
        &self.events[usize::from(index)]
    }

    /// Reads `len` bytes of configuration space.
    ///
    /// # Errors
    /// Where the back end has none.
    pub fn config(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let (_, bytes) = self.frontend.get_config(
            0,
            len as u32,
            VhostUserConfigFlags::empty(),
            &vec![0; len],
        )?;
        Ok(bytes)
    }

    /// Starts a queue from `base`: [`bluff_virtio_driver::Positions::split_base`] or `packed_base`.
    ///
    /// # Errors
    /// Where the back end refuses.
    pub fn start(&mut self, index: u16, queue: &dyn DriverQueue, base: u32) -> Result<(), Error> {
        self.start_at(index, queue.layout(), queue.size(), base)
    }

    /// As [`FrontEnd::start`], from the queue's parts.
    ///
    /// # Errors
    /// Where the back end refuses.
    pub fn start_at(
        &mut self,
        index: u16,
        layout: Layout,
        size: u16,
        base: u32,
    ) -> Result<(), Error> {
        let i = usize::from(index);
        self.frontend.set_vring_num(i, size)?;
        self.set_base(index, base)?;
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: self.memory.user_addr(layout.descriptors)?,
            avail_ring_addr: self.memory.user_addr(layout.driver)?,
            used_ring_addr: self.memory.user_addr(layout.device)?,
            log_addr: None,
        };
        self.frontend.set_vring_addr(i, &config)?;
        self.frontend.set_vring_call(i, &self.events[i].call)?;
        self.frontend.set_vring_kick(i, &self.events[i].kick)?;
        self.frontend.set_vring_enable(i, true)?;
        Ok(())
    }

    /// The base that a queue is started with after its back end died, as QEMU has it (its
    /// `virtio_queue_restore_last_avail_idx`): of a split ring the used index that stands in the ring; of
    /// a packed one, where nothing in shared memory says, the base of the start before. Where requests
    /// are in flight neither is where the device stood: that is in the in-flight region.
    ///
    /// # Errors
    /// Where the ring does not lie in memory.
    pub fn recovery_base(&self, index: u16, queue: &dyn DriverQueue) -> Result<u32, Error> {
        const RING_PACKED: u64 = 1 << 34;
        if self.features & RING_PACKED != 0 {
            return Ok(self.bases[usize::from(index)]);
        }
        let used_index = queue.layout().device + 2;
        Ok(u32::from(self.memory.read_u16(used_index)?))
    }

    /// SET_VRING_BASE with all 32 bits, which the crate's own has no room for.
    fn set_base(&mut self, index: u16, base: u32) -> Result<(), Error> {
        const SET_VRING_BASE: u32 = 10;
        const VERSION: u32 = 1;
        let words = [SET_VRING_BASE, VERSION, 8, u32::from(index), base];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        // The crate's side waits for its answers, so nothing else is under way on the socket.
        (&self.stream).write_all(&bytes)?;
        self.bases[usize::from(index)] = base;
        Ok(())
    }

    /// Stops a queue: what it has in flight is finished. Gives its base.
    ///
    /// # Errors
    /// Where the back end refuses.
    pub fn stop(&mut self, index: u16) -> Result<u32, Error> {
        Ok(self.frontend.get_vring_base(usize::from(index))?)
    }

    /// Notifies the device.
    pub fn kick(&self, index: u16) {
        // Full only after 2^64 kicks that nobody read.
        let _ = self.events[usize::from(index)].kick.write(1);
    }
}
