//! A driver of a virtio-net device, on a reactor that the test steps.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_memory::{GuestMemory, Region, RegionSpec, Space};
use bluff_net::Port;
use bluff_reactor::{Options, Poll, Reactor};
use bluff_virtio::{
    DeviceEvent, Notifier, Position, QueueChange, QueueSetup, RingAddresses, Stop, StoppedQueue,
    VirtioDevice, features,
};
use bluff_virtio_driver as driver;
use bluff_virtio_net::spec::{HashReport, Header, feature};
use bluff_virtio_net::{Net, NetOptions};
use driver::{Buffer, DriverQueue, PackedDriver, SplitDriver};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, IntoBytes};

pub const BASE: u64 = 0x4000_0000;
/// Bytes of a buffer of the driver.
pub const ROOM: u64 = 72 << 10;
const HEADER: usize = 12;

/// Which kind of rings.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub packed: bool,
    pub in_order: bool,
    pub event_idx: bool,
}

impl Kind {
    pub const SPLIT: Self = Self {
        packed: false,
        in_order: false,
        event_idx: true,
    };
    pub const PACKED: Self = Self {
        packed: true,
        ..Self::SPLIT
    };

    pub fn all() -> impl Iterator<Item = Self> {
        (0..8).map(|bits| Self {
            packed: bits & 1 != 0,
            in_order: bits & 2 != 0,
            event_idx: bits & 4 != 0,
        })
    }

    fn features(self) -> u64 {
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        features::VERSION_1
            | features::INDIRECT_DESC
            | when(self.packed, features::RING_PACKED)
            | when(self.in_order, features::IN_ORDER)
            | when(self.event_idx, features::EVENT_IDX)
    }

    fn driver(self, memory: &Arc<driver::Memory>, size: u16) -> Box<dyn DriverQueue> {
        let features = driver::Features {
            event_idx: self.event_idx,
            indirect: true,
            in_order: self.in_order,
        };
        let config = driver::Config {
            indirect_entries: 64,
            ..driver::Config::new(size, features)
        };
        match self.packed {
            true => Box::new(PackedDriver::new(memory, &config).unwrap()),
            false => Box::new(SplitDriver::new(memory, &config).unwrap()),
        }
    }
}

/// A device with its driver.
pub struct Guest {
    pub device: Net,
    pub features: u64,
    pub memory: Arc<driver::Memory>,
    pub epoch: Arc<GuestMemory>,
    pub queues: Vec<Box<dyn DriverQueue>>,
    /// What the device has said, but for what follows.
    pub events: Arc<Mutex<Vec<DeviceEvent>>>,
    /// How often it has said that its state is to be recorded.
    pub changes: Arc<AtomicU64>,
    /// Places of `ROOM` bytes that are free.
    places: Vec<u64>,
    /// Receive buffers by token, with the length that was offered.
    offered: Vec<Option<(u64, u32)>>,
}

/// A frame that was received: its header, its bytes, and the buffers that it took.
#[derive(Debug)]
pub struct Received {
    pub header: Header,
    /// The hash and what it is of.
    pub report: Option<(u32, u16)>,
    pub bytes: Vec<u8>,
}

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Features of a driver that takes everything.
pub const ALL: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::HOST_USO
    | feature::MRG_RXBUF
    | feature::MAC;

/// What only a driver whose control queue comes to the device can take.
pub const BY_CONTROL: u64 = feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::CTRL_GUEST_OFFLOADS
    | feature::RSS
    | feature::HASH_REPORT
    | feature::NOTF_COAL
    | feature::VQ_NOTF_COAL;

/// A reactor that is stepped.
pub fn reactor() -> Reactor {
    Reactor::new(&Options::default()).unwrap()
}

pub fn turns(reactor: &mut Reactor, n: usize) {
    for _ in 0..n {
        reactor.step(Some(Duration::ZERO));
    }
}

/// Steps until `what` is there.
pub fn until<T>(reactor: &mut Reactor, mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(t) = what() {
            return t;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came");
        reactor.step(Some(Duration::ZERO));
    }
}

impl Guest {
    /// A device at `port` with one pair of queues of `size`, which run.
    pub fn new(
        reactor: &mut Reactor,
        port: Arc<dyn Port>,
        kind: Kind,
        features: u64,
        size: u16,
    ) -> Self {
        Self::with_pairs(reactor, port, kind, features, size, 1)
    }

    pub fn with_pairs(
        reactor: &mut Reactor,
        port: Arc<dyn Port>,
        kind: Kind,
        features: u64,
        size: u16,
        pairs: u16,
    ) -> Self {
        let device = Self::device(reactor, port, pairs);
        let this = Self::of(device, kind, features, size, pairs);
        turns(reactor, 20);
        this
    }

    /// A device with so many pairs of queues.
    pub fn device(reactor: &Reactor, port: Arc<dyn Port>, pairs: u16) -> Net {
        let options = NetOptions {
            pairs,
            mac: MAC,
            speed: Some(25_000),
            control_queue: true,
            poll: Poll::Never,
            reactors: vec![reactor.handle()],
        };
        Net::new(port, options)
    }

    /// With a device, whose queues are told to start.
    pub fn of(mut device: Net, kind: Kind, features: u64, size: u16, pairs: u16) -> Self {
        let events: Arc<Mutex<Vec<DeviceEvent>>> = Arc::default();
        let changes = Arc::new(AtomicU64::new(0));
        let (sink, counter) = (events.clone(), changes.clone());
        device.on_event(Arc::new(move |e| match e {
            DeviceEvent::StateChanged => drop(counter.fetch_add(1, Ordering::Relaxed)),
            e => sink.lock().unwrap().push(e),
        }));
        let features = features | kind.features();
        assert_eq!(features & !device.features(), 0, "all of it is offered");
        device.set_features(features);
        let memory = driver::Memory::flat(BASE, 64 << 20).unwrap();
        let epoch = epoch(&memory);
        let control = features & feature::CTRL_VQ != 0;
        let count = 2 * pairs + u16::from(control);
        let queues = (0..count).map(|_| kind.driver(&memory, size)).collect();
        let places = (0..400).map(|_| memory.alloc(ROOM, 64).unwrap()).collect();
        let mut this = Self {
            device,
            features,
            memory,
            epoch,
            queues,
            events,
            changes,
            places,
            offered: Vec::new(),
        };
        for index in 0..count {
            this.start(index);
        }
        this
    }

    /// Bytes before each frame.
    pub fn before(&self) -> usize {
        match self.features & feature::HASH_REPORT {
            0 => HEADER,
            _ => HEADER + 8,
        }
    }

    /// Has a queue notify somebody, and says how often it has until now.
    pub fn listen(&mut self, reactor: &mut Reactor, index: u16) -> u64 {
        let call = Notifier::new(EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        self.device
            .change_queue(index, QueueChange::Call(Some(call)));
        // One comes for what may have been missed.
        until(reactor, || (self.interrupts(index) > 0).then_some(()));
        self.interrupts(index)
    }

    /// How often a queue has notified.
    pub fn interrupts(&self, index: u16) -> u64 {
        let line = &self.device.lines()[usize::from(index)];
        line.interrupts.load(Ordering::Relaxed)
    }

    pub fn setup(&self, index: u16) -> QueueSetup {
        let queue = &self.queues[usize::from(index)];
        let at = queue.layout();
        QueueSetup {
            index,
            size: queue.size(),
            features: self.features,
            addresses: RingAddresses {
                space: Space::Guest,
                desc: at.descriptors,
                driver: at.driver,
                device: at.device,
            },
            position: Position::START,
            memory: self.epoch.clone(),
            kick: None,
            call: None,
            error: None,
            inflight: None,
            log: None,
            enabled: true,
        }
    }

    pub fn start(&mut self, index: u16) {
        let setup = self.setup(index);
        self.device.start_queue(setup).unwrap();
    }

    pub fn stop(&mut self, reactor: &mut Reactor, index: u16) -> StoppedQueue {
        let (tx, rx) = channel();
        let how = Stop {
            bound: Duration::from_secs(1),
            leave: false,
            answer: true,
        };
        self.device
            .stop_queue(index, how, Box::new(move |s| tx.send(s).unwrap()));
        until(reactor, || rx.try_recv().ok()).expect("it ran")
    }

    pub fn change_memory(&mut self, memory: Arc<GuestMemory>) -> Receiver<()> {
        let (tx, rx) = channel();
        for index in 0..self.queues.len() as u16 {
            let tx = tx.clone();
            let change = QueueChange::Memory {
                memory: memory.clone(),
                bound: Duration::from_secs(1),
                done: Box::new(move || tx.send(()).unwrap()),
            };
            self.device.change_queue(index, change);
        }
        self.epoch = memory;
        rx
    }

    fn place(&mut self) -> u64 {
        self.places.pop().expect("enough places")
    }

    /// Makes receive buffers available, one descriptor each.
    pub fn offer(&mut self, pair: u16, lens: &[u32]) {
        for len in lens {
            self.offer_chain(pair, &[*len]);
        }
        self.queues[usize::from(2 * pair)].publish();
    }

    /// Adds a receive buffer of several descriptors.
    pub fn offer_chain(&mut self, pair: u16, lens: &[u32]) {
        let at = self.place();
        let mut next = at;
        let chain: Vec<_> = lens
            .iter()
            .map(|len| {
                let buffer = Buffer::writable(next, *len);
                next += u64::from(*len);
                buffer
            })
            .collect();
        let token = self.offered.len() as u64;
        self.offered.push(Some((at, (next - at) as u32)));
        self.queues[usize::from(2 * pair)]
            .add(&chain, lens.len() > 1, token)
            .unwrap();
    }

    /// Takes a used receive buffer: its bytes, as many as the device says that it has written.
    pub fn used(&mut self, pair: u16) -> Option<Vec<u8>> {
        let used = self.queues[usize::from(2 * pair)].pop_used().unwrap()?;
        let (at, _) = self.offered[used.token as usize].take().expect("once");
        let mut bytes = vec![0; used.written as usize];
        self.memory.read(at, &mut bytes).unwrap();
        self.places.push(at);
        Some(bytes)
    }

    /// Takes a frame.
    pub fn receive(&mut self, pair: u16) -> Option<Received> {
        let mut bytes = self.used(pair)?;
        let (header, _) = Header::read_from_prefix(&bytes).expect("a header");
        let report = match self.before() {
            HEADER => None,
            n => Some(HashReport::read_from_bytes(&bytes[HEADER..n]).unwrap()),
        };
        bytes.drain(..self.before());
        for _ in 1..header.num_buffers.get() {
            let more = self.used(pair).expect("all of a frame's buffers at once");
            bytes.extend(more);
        }
        Some(Received {
            header,
            report: report.map(|r| (r.value.get(), r.report.get())),
            bytes,
        })
    }

    /// Sends a frame whose header and bytes are split at these places.
    pub fn send_cut(&mut self, pair: u16, header: &Header, frame: &[u8], cuts: &[usize]) {
        let at = self.place();
        let rest = vec![0; self.before() - HEADER];
        let all = [header.as_bytes(), &rest, frame].concat();
        self.memory.write(at, &all).unwrap();
        let mut chain = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([all.len()]) {
            let to = to.clamp(from, all.len());
            if to > from {
                chain.push(Buffer::readable(at + from as u64, (to - from) as u32));
            }
            from = to;
        }
        self.send_chain(pair, &chain, at);
    }

    /// Sends any chain. `token`: the place that is free when it is used.
    pub fn send_chain(&mut self, pair: u16, chain: &[Buffer], token: u64) {
        let queue = &mut self.queues[usize::from(2 * pair + 1)];
        queue.add(chain, chain.len() > 8, token).unwrap();
        queue.publish();
    }

    pub fn send(&mut self, pair: u16, header: &Header, frame: &[u8]) {
        self.send_cut(pair, header, frame, &[self.before()]);
    }

    /// Takes back what was sent; says how many.
    pub fn sent(&mut self, pair: u16) -> usize {
        let mut n = 0;
        while let Some(used) = self.queues[usize::from(2 * pair + 1)].pop_used().unwrap() {
            assert_eq!(used.written, 0);
            if used.token != 0 {
                self.places.push(used.token);
            }
            n += 1;
        }
        n
    }
}

/// An epoch of the driver's memory.
pub fn epoch(memory: &driver::Memory) -> Arc<GuestMemory> {
    let specs = memory.regions().iter().map(|r| RegionSpec {
        guest: r.config().guest_addr,
        len: r.config().size,
        user: r.user_addr(),
        offset: r.config().file_offset,
        file: r.as_fd().try_clone_to_owned().unwrap(),
    });
    let none = GuestMemory::empty();
    GuestMemory::new(specs.map(|s| Region::new(s, &none).unwrap()).collect()).unwrap()
}

/// A frame: Ethernet, IPv4 or IPv6, TCP or UDP, with a payload that depends on `seed`. Its checksum is begun as virtio has it.
pub fn frame(v6: bool, tcp: bool, payload: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    bytes.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let len = if tcp { 20 } else { 8 } + payload;
    let proto = if tcp { 6 } else { 17 };
    if v6 {
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((len as u16).to_be_bytes());
        bytes.extend([proto, 64]);
        bytes.extend([0xfd; 32]);
    } else {
        bytes.extend([0x45, 0]);
        bytes.extend((len as u16 + 20).to_be_bytes());
        bytes.extend([0, seed, 0x40, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let at = bytes.len() - 20;
        bluff_packet::checksum::fill_ipv4_header(&mut bytes[at..]);
    }
    if tcp {
        bytes.extend([
            0x12, seed, 0, 80, 0, 0, 0, seed, 0, 0, 0, 9, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
        ]);
    } else {
        bytes.extend([0x12, seed, 0, 53]);
        bytes.extend((len as u16).to_be_bytes());
        bytes.extend([0, 0]);
    }
    bytes.extend((0..payload).map(|i| (i * 7 + i / 256) as u8 ^ seed));
    let parsed = bluff_packet::parse(&bytes[..bytes.len().min(256)], bytes.len()).unwrap();
    let (start, offset) = (parsed.l4_offset().unwrap(), if tcp { 16 } else { 6 });
    use bluff_packet::{IpProto, checksum::Sum};
    let proto = if tcp { IpProto::TCP } else { IpProto::UDP };
    let pseudo = match v6 {
        true => Sum::pseudo_v6([0xfd; 16].into(), [0xfd; 16].into(), proto, len as u32),
        false => Sum::pseudo_v4(
            [10, 0, 0, 1].into(),
            [10, 0, 0, 2].into(),
            proto,
            len as u16,
        ),
    };
    bytes[start + offset..start + offset + 2].copy_from_slice(&pseudo.partial().to_be_bytes());
    bytes
}

/// The header of [`frame`], to be cut into segments of `size` bytes where that is not 0.
pub fn header(v6: bool, tcp: bool, size: u16) -> Header {
    use bluff_virtio_net::spec::{gso, header_flag};
    let start = if v6 { 54 } else { 34 };
    let mut header = Header {
        flags: header_flag::NEEDS_CSUM,
        ..Header::default()
    };
    header.csum_start.set(start);
    header.csum_offset.set(if tcp { 16 } else { 6 });
    if size > 0 {
        header.gso_type = match (tcp, v6) {
            (true, false) => gso::TCPV4,
            (true, true) => gso::TCPV6,
            (false, _) => gso::UDP_L4,
        };
        header.gso_size.set(size);
        header.hdr_len.set(start + if tcp { 20 } else { 8 });
    }
    header
}

/// The frame that answers one of [`frame`]: the same with its ends changed.
pub fn answer(frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    bytes[..12].rotate_left(6);
    let ports = match bytes[12] {
        8 => {
            bytes[26..34].rotate_left(4);
            34
        }
        _ => {
            bytes[22..54].rotate_left(16);
            54
        }
    };
    bytes[ports..ports + 4].rotate_left(2);
    bytes
}

/// Whether the transport's checksum is right.
pub fn is_good(frame: &[u8]) -> bool {
    use bluff_packet::checksum::{Verdict, verify};
    let parsed = bluff_packet::parse(&frame[..frame.len().min(256)], frame.len()).unwrap();
    verify(&parsed, [frame]) == Verdict::Good
}
