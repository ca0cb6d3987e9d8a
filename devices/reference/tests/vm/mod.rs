//! A front end: memory in a memfd, the `vhost` crate's session, rings with their event descriptors.
#![allow(dead_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::ring::Ring;

pub const MEMORY: usize = 16 << 20;
/// How long anything may take before it counts as never.
pub const LONG: Duration = Duration::from_secs(20);

pub struct Lane {
    pub ring: Ring,
    pub kick: EventFd,
    pub call: EventFd,
    published: u16,
}

pub struct Vm {
    pub frontend: Frontend,
    pub mem: Arc<GuestMemoryMmap>,
    pub lanes: Vec<Lane>,
    pub event_idx: bool,
    file: File,
}

pub fn memfd(len: usize) -> File {
    // SAFETY: a name that ends with a zero; the result is checked and is nobody else's.
    #[allow(unsafe_code)]
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64).unwrap();
    file
}

impl Vm {
    /// Negotiates everything that is offered but `without`, and starts `queues` queues of `size`.
    pub fn new(socket: UnixStream, queues: usize, size: u16, without: u64) -> Self {
        let file = memfd(MEMORY);
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), MEMORY, Some(offset))];
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let mut frontend = Frontend::from_stream(socket, queues as u64);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap() & !without;
        frontend.set_features(features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert!(frontend.get_queue_num().unwrap() >= queues as u64);
        let mut vm = Self {
            frontend,
            mem,
            lanes: Vec::new(),
            event_idx: features & bluff_reference::spec::feature::EVENT_IDX != 0,
            file,
        };
        vm.map();
        for i in 0..queues {
            let base = 0x1_0000 * (i as u64 + 1);
            let lane = Lane {
                ring: Ring::new(vm.mem.clone(), base, size),
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
                published: 0,
            };
            vm.lanes.push(lane);
            vm.start(i, 0);
        }
        vm
    }

    fn host(&self, at: u64) -> u64 {
        self.mem.get_host_address(GuestAddress(at)).unwrap() as u64
    }

    /// Tells the back end of the memory.
    pub fn map(&mut self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: self.host(0),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    pub fn start(&mut self, i: usize, base: u16) {
        let ring = &self.lanes[i].ring;
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: self.host(ring.base),
            used_ring_addr: self.host(ring.used_at()),
            avail_ring_addr: self.host(ring.avail_at()),
            log_addr: None,
        };
        let lane = &self.lanes[i];
        self.frontend.set_vring_num(i, lane.ring.size).unwrap();
        self.frontend.set_vring_addr(i, &config).unwrap();
        self.frontend.set_vring_base(i, base).unwrap();
        self.frontend.set_vring_call(i, &lane.call).unwrap();
        self.frontend.set_vring_kick(i, &lane.kick).unwrap();
        self.frontend.set_vring_enable(i, true).unwrap();
    }

    pub fn stop(&mut self, i: usize) -> u16 {
        self.frontend.get_vring_base(i).unwrap() as u16
    }

    /// Publishes what was added, and kicks where the device wants that.
    pub fn publish(&mut self, i: usize) {
        let lane = &mut self.lanes[i];
        lane.ring.publish();
        if lane.ring.wants_kick(self.event_idx, lane.published) {
            lane.kick.write(1).unwrap();
        }
        lane.published = lane.ring.avail_index();
    }

    /// The next used entry, slept for as a driver sleeps: the interrupt must come.
    pub fn wait(&mut self, i: usize) -> (u32, u32) {
        let lane = &mut self.lanes[i];
        let end = Instant::now() + LONG;
        loop {
            if let Some(used) = lane.ring.take_used() {
                return used;
            }
            lane.ring.set_used_event(0);
            if let Some(used) = lane.ring.take_used() {
                return used;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no interrupt on queue {i}");
            readable(lane.call.as_raw_fd(), left);
            let _ = lane.call.read();
        }
    }
}

/// Waits for `fd` to be readable.
pub fn readable(fd: i32, limit: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, ours.
    #[allow(unsafe_code)]
    let n = unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as i32) };
    n == 1
}
