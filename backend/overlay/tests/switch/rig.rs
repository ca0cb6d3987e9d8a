//! Stations at the ports of one network, on a reactor of this thread.
//!
//! Unsafe, because stations lend the rest of their frames.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bluff_memory::IoVec;
use bluff_net::{
    Batch, Csum, Gso, GsoKind, HEAD, Lane, Offload, Port, Receive, Receivers, Registration,
    Steering,
};
use bluff_overlay::{FdbLimits, Network, NetworkOptions, NetworkPort, PortOptions, Rate, Rules};
use bluff_packet::Mac;
use bluff_packet::flow::FlowHasher;
use bluff_reactor::{Options, Reactor};

/// Keeps what it is given.
pub struct Keeper(pub std::sync::mpsc::Sender<Vec<u8>>);

impl Receive for Keeper {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        for i in which {
            let i = usize::from(*i);
            let mut bytes = vec![0; batch.frames()[i].len()];
            batch.copy_to(i, 0, &mut bytes);
            self.0.send(bytes).unwrap();
        }
    }
}

/// A network on its reactor.
pub struct Rig {
    pub reactor: Reactor,
    pub network: Arc<Network>,
    /// The reactor's clock, which stands still.
    pub now: Instant,
}

impl Default for Rig {
    fn default() -> Self {
        Self::with(None)
    }
}

impl Rig {
    pub fn with(flood: Option<Rate>) -> Self {
        let options = NetworkOptions {
            name: "blue".into(),
            mtu: 1450,
            fdb: FdbLimits {
                total: 100,
                each: 50,
            },
            age: Duration::from_secs(300),
            flood,
        };
        Self {
            reactor: Reactor::new(&Options::default()).unwrap(),
            network: Network::new(options, FlowHasher::new(&[7; FlowHasher::KEY_LEN]), 9),
            now: Instant::now(),
        }
    }

    pub fn join(&mut self, options: PortOptions) -> Station {
        let port = self.network.join(options).unwrap();
        let lane = port.open(&mut self.reactor.context(), 0).unwrap();
        let (sender, got) = channel();
        let keeper = Rc::new(RefCell::new(Keeper(sender)));
        let registration = Registration::new(&mut self.reactor.context(), keeper);
        port.set_receivers(Arc::new(Receivers {
            queues: vec![Some(registration.outlet().clone())],
            steering: Steering::Spread(1),
        }));
        Station {
            lane,
            port,
            got,
            now: self.now,
            _registration: registration,
        }
    }

    /// A port whose station has address `n`, and may have any IP address.
    pub fn station(&mut self, n: u8) -> Station {
        self.join(options(Rules {
            mac: Some(mac(n)),
            ..Rules::default()
        }))
    }
}

pub fn options(rules: Rules) -> PortOptions {
    PortOptions {
        rules,
        ..PortOptions::default()
    }
}

pub fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, n])
}

/// Who sends and receives at a port.
pub struct Station {
    pub lane: Box<dyn Lane>,
    pub port: NetworkPort,
    pub got: Receiver<Vec<u8>>,
    pub now: Instant,
    _registration: Registration,
}

impl Station {
    pub fn send_all(&mut self, frames: &[&[u8]], gso: Option<Gso>) {
        send(&mut *self.lane, self.now, frames, gso);
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_all(&[frame], None);
    }

    /// What came since the last time.
    pub fn got(&self) -> Vec<Vec<u8>> {
        self.got.try_iter().collect()
    }
}

/// Sends frames in batches.
pub fn send(lane: &mut dyn Lane, now: Instant, frames: &[&[u8]], gso: Option<Gso>) {
    for frames in frames.chunks(bluff_net::BATCH) {
        let mut batch = Batch::default();
        for frame in frames {
            let (head, rest) = frame.split_at(frame.len().min(HEAD));
            let Some(pushed) = batch.push(head) else {
                continue;
            };
            if let Some(gso) = gso {
                pushed.offload.gso = Some(gso);
                pushed.offload.csum = Csum::Partial {
                    start: gso.transport,
                    offset: if gso.kind == GsoKind::Udp { 6 } else { 16 },
                };
            }
            // SAFETY: `frames` outlive the batch.
            unsafe { batch.lend(&[IoVec::new(rest.as_ptr().cast_mut(), rest.len())]) };
        }
        lane.send(now, batch.lent());
    }
}

/// Sends a frame with something left to do.
pub fn send_left(lane: &mut dyn Lane, now: Instant, frame: &[u8], offload: Offload) {
    let mut batch = Batch::default();
    let (head, rest) = frame.split_at(frame.len().min(HEAD));
    batch.push(head).unwrap().offload = offload;
    // SAFETY: `frame` outlives the batch.
    unsafe { batch.lend(&[IoVec::new(rest.as_ptr().cast_mut(), rest.len())]) };
    lane.send(now, batch.lent());
}

/// A frame of a type that is not looked at.
pub fn plain(to: Mac, from: Mac, tail: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], tail].concat()
}

pub fn tagged(vlan: u16, frame: &[u8]) -> Vec<u8> {
    let [a, b] = vlan.to_be_bytes();
    [&frame[..12], &[0x81, 0, a, b], &frame[12..]].concat()
}

/// UDP over IPv4.
pub fn udp4(to: Mac, from: Mac, src: [u8; 4], ports: [u16; 2], payload: usize) -> Vec<u8> {
    let len = (8 + payload) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((len + 20).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(src);
    ip.extend([10, 0, 0, 99]);
    bluff_packet::checksum::fill_ipv4_header(&mut ip);
    let mut udp: Vec<u8> = ports.iter().flat_map(|p| p.to_be_bytes()).collect();
    udp.extend(len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(vec![0x55; payload]);
    [&to.0[..], &from.0, &[8, 0], &ip, &udp].concat()
}

pub fn arp(from: Mac, sender: Mac, ip: [u8; 4]) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &from.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    frame.extend(sender.0);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 99]);
    frame
}

/// ICMPv6: a neighbour advertisement for `target` where there is one, or else UDP.
pub fn ip6(to: Mac, from: Mac, src: [u8; 16], target: Option<([u8; 16], Mac)>) -> Vec<u8> {
    let body = match target {
        Some((target, link)) => {
            let mut body = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
            body.extend(target);
            body.extend([2, 1]);
            body.extend(link.0);
            body
        }
        None => vec![0x12, 0x34, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4],
    };
    let next = if target.is_some() { 58 } else { 17 };
    let mut frame = [&to.0[..], &from.0, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend((body.len() as u16).to_be_bytes());
    frame.extend([next, 255]);
    frame.extend(src);
    frame.extend([0xfd; 16]);
    frame.extend(body);
    frame
}

/// A request of RARP from `from`, as a VMM sends it for a station that says that it is `station`.
pub fn rarp(from: Mac, station: Mac) -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &from.0,
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
    ]
    .concat();
    for _ in 0..2 {
        frame.extend(station.0);
        frame.extend([0; 4]);
    }
    frame.resize(60, 0);
    frame
}
