//! What is done with a device from outside of its queues, while its attachment has it.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bluff_net::Batch;
use bluff_packet::{EtherType, Mac as Address};
use bluff_reactor::{Context, Handle};
use bluff_virtio::{DeviceEvent, Tell};

use crate::device::State as Device;
use crate::settings::Mac;
use crate::shared::Shared;

/// Announcements are no closer together: a front end asks for them as it likes, and each is a broadcast.
const APART: Duration = Duration::from_millis(10);
/// The shortest frame, without its checksum (IEEE 802.3 §4.4.2).
const LEAST: usize = 60;

/// The cable of a device: it is pulled out, and plugged in, by an operator.
#[derive(Clone)]
pub struct Cable {
    shared: Arc<Shared>,
    device: Arc<Mutex<Device>>,
    reactor: Handle,
    tell: Tell,
    /// When the device was last announced.
    announced: Arc<Mutex<Option<Instant>>>,
}

impl fmt::Debug for Cable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cable").finish_non_exhaustive()
    }
}

impl Cable {
    pub(crate) fn new(
        shared: Arc<Shared>,
        device: Arc<Mutex<Device>>,
        reactor: Handle,
        tell: Tell,
    ) -> Self {
        Self {
            shared,
            device,
            reactor,
            tell,
            announced: Arc::default(),
        }
    }

    /// The operator plugs the cable in, or pulls it out: no frame passes any more, and a driver that can is told. Where it is plugged in, the driver is
    /// asked to announce itself, as it may be somewhere else now.
    pub fn set_link(&self, up: bool) {
        let changed = self.shared.link.swap(up, Ordering::Relaxed) != up;
        if changed {
            if up {
                self.ask();
            }
            (self.tell)(DeviceEvent::ConfigChanged);
        }
    }

    /// The function is somewhere else in its network now: its driver is asked to announce itself, and where it cannot be, that is done for it, as by
    /// [`Cable::announce`].
    pub fn moved(&self) {
        if self.ask() {
            (self.tell)(DeviceEvent::ConfigChanged);
            return;
        }
        let mac = self.device().control.settings().mac;
        self.announce(mac);
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().expect("nothing panics with it")
    }

    /// Shows the driver that it is to announce itself (virtio 1.3 §5.1.6.5.4); `false` where it cannot be asked.
    fn ask(&self) -> bool {
        let mut device = self.device();
        let asked = device.control.may_be_asked();
        device.announce |= asked;
        asked
    }

    /// Bytes of the longest IP packet that its network carries.
    pub fn mtu(&self) -> u16 {
        self.shared.port.attributes().mtu
    }

    /// Tells the network where `mac` is now, as its driver cannot, by a broadcast request of RARP (RFC 903). Returns at once. One that comes less
    /// than 10 ms after another is not made.
    pub fn announce(&self, mac: Mac) {
        let now = Instant::now();
        {
            let mut last = self.announced.lock().expect("nothing panics with it");
            if last.is_some_and(|last| now < last + APART) {
                return;
            }
            *last = Some(now);
        }
        let shared = self.shared.clone();
        self.reactor.send(move |cx| send(cx, &shared, mac));
    }
}

fn send(cx: &mut Context<'_>, shared: &Shared, mac: Mac) {
    if !shared.link.load(Ordering::Relaxed) {
        return;
    }
    match shared.port.open(cx, 0) {
        Ok(mut lane) => {
            let mut batch = Batch::default();
            batch.push(&announcement(mac));
            lane.send(cx.now(), batch.lent());
        }
        Err(error) => log::debug!("an announcement cannot be sent: {error}"),
    }
}

fn announcement(mac: Mac) -> [u8; LEAST] {
    let mut frame = [0; LEAST];
    frame[..6].copy_from_slice(&Address::BROADCAST.0);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&EtherType::RARP.0.to_be_bytes());
    // Ethernet, IPv4, the lengths of their addresses; 3 asks for an IP address. The sender asks for its own, and knows none.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}
