//! The front end of the crate `vhost`, which Cloud Hypervisor and others use.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bluff_vhost_user::unix;
use bluff_virtio::{DeviceEvent, Notice, Stop, features};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::support::*;

/// The front end of the crate `vhost`, which Cloud Hypervisor and others use.
#[test]
fn the_vhost_crate_s_front_end() {
    let _alone = alone();
    let function = Function::new(4);
    for round in 1..=3 {
        let mut front = Frontend::from_stream(function.stream(), 4);
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        front.set_features(features & !features::LOG_ALL).unwrap();
        let protocol = front.get_protocol_features().unwrap();
        assert!(protocol.contains(
            VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT
                | VhostUserProtocolFeatures::STATUS
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        ));
        assert!(!protocol.intersects(
            VhostUserProtocolFeatures::MTU
                | VhostUserProtocolFeatures::RARP
                | VhostUserProtocolFeatures::PAGEFAULT
        ));
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(front.get_queue_num().unwrap(), 4);
        assert_eq!(front.get_max_mem_slots().unwrap(), 509);
        let (_, config) = front
            .get_config(4, 8, VhostUserConfigFlags::empty(), &[0; 8])
            .unwrap();
        assert!(config.iter().copied().eq(4..12));
        front
            .set_config(32, VhostUserConfigFlags::WRITABLE, &[1])
            .unwrap();
        front
            .set_config(0, VhostUserConfigFlags::WRITABLE, &[1])
            .unwrap_err();
        let info = VhostUserInflight {
            num_queues: 4,
            queue_size: 128,
            ..VhostUserInflight::default()
        };
        let (inflight, file) = front.get_inflight_fd(&info).unwrap();
        front.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        let guest = unix::sealed_memory(c"guest", MEMORY).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: guest.as_raw_fd(),
        };
        if round == 2 {
            front.add_mem_region(&region).unwrap();
        } else {
            front.set_mem_table(&[region]).unwrap();
        }
        let log = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: unix::sealed_memory(c"log", 4096).unwrap().as_raw_fd(),
        };
        assert!(log.mmap_handle >= 0);
        let log_file = unix::sealed_memory(c"log", 4096).unwrap();
        front
            .set_log_base(
                0,
                Some(VhostUserDirtyLogRegion {
                    mmap_handle: log_file.as_raw_fd(),
                    ..log
                }),
            )
            .unwrap();
        let (kick, call, err) = (event(), event(), event());
        for i in 0..4u16 {
            let at = USER + u64::from(i) * 0x1_0000;
            let data = VringConfigData {
                queue_max_size: 128,
                queue_size: 128,
                flags: 0,
                desc_table_addr: at,
                used_ring_addr: at + 0x8000,
                avail_ring_addr: at + 0x4000,
                log_addr: None,
            };
            let queue = usize::from(i);
            front.set_vring_num(queue, 128).unwrap();
            front.set_vring_addr(queue, &data).unwrap();
            front.set_vring_base(queue, 3).unwrap();
            front.set_vring_call(queue, &call).unwrap();
            front.set_vring_err(queue, &err).unwrap();
            front.set_vring_kick(queue, &kick).unwrap();
            front.set_vring_enable(queue, true).unwrap();
        }
        {
            let inner = function.control.lock();
            let setup = &inner.running[&3];
            assert_eq!((setup.size, setup.enabled), (128, true));
            assert_eq!(
                setup.features,
                features & !features::LOG_ALL & !F_PROTOCOL,
                "the driver's"
            );
            let part = setup.inflight.as_ref().unwrap();
            assert_eq!((part.offset, part.len), (3 * 4160, 4160));
            // The descriptors are the front end's.
            assert_eq!(setup.call.as_ref().unwrap().notify(), Notice::Given);
            assert_eq!(call.read().unwrap(), 1);
            kick.write(1).unwrap();
            assert_eq!(setup.kick.as_ref().unwrap().read().unwrap(), 1);
        }
        // A replaced descriptor of a running ring.
        let other = event();
        front.set_vring_call(0, &other).unwrap();
        front.set_vring_kick(0, &other).unwrap();
        let notice = function.control.lock().running[&0]
            .call
            .as_ref()
            .unwrap()
            .notify();
        assert_eq!((notice, other.read().unwrap()), (Notice::Given, 1));
        function.control.take_calls();
        // Packed: both positions come back.
        assert_eq!(front.get_vring_base(2).unwrap(), 0x0009_8009);
        let leave = Stop {
            bound: Duration::from_millis(300),
            leave: true,
            answer: true,
        };
        assert_eq!(function.control.take_calls(), [Call::Stop(2, leave)]);
        if round == 2 {
            front.reset_device().unwrap();
            assert!(function.control.lock().running.is_empty());
        } else {
            front.reset_owner().unwrap();
            assert!(function.control.lock().running.is_empty());
            assert_eq!(front.get_vring_base(1).unwrap(), 0x0008_8008);
        }
        drop(front);
        function.wait_gone(round);
    }
}

fn event() -> EventFd {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap()
}

/// The crate's own receiver of back-end requests.
#[test]
fn config_changes_reach_the_vhost_crate() {
    let _alone = alone();
    struct Handler(AtomicU64);
    impl VhostUserFrontendReqHandler for Handler {
        fn handle_config_change(&self) -> HandlerResult<u64> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(0)
        }
    }
    let function = Function::new(1);
    let mut front = Frontend::from_stream(function.stream(), 1);
    let features = front.get_features().unwrap();
    front.set_features(features).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let handler = Arc::new(Handler(AtomicU64::new(0)));
    let mut receiver = FrontendReqHandler::new(handler.clone()).unwrap();
    receiver.set_reply_ack_flag(true);
    // SAFETY: the receiver lives until the end of the test.
    #[allow(unsafe_code)]
    let end = unsafe { std::os::fd::BorrowedFd::borrow_raw(receiver.get_tx_raw_fd()) };
    front.set_backend_request_fd(&end).unwrap();
    for n in 1..=3 {
        function.control.event(DeviceEvent::ConfigChanged);
        receiver.handle_request().unwrap();
        assert_eq!(handler.0.load(Ordering::SeqCst), n);
    }
}
