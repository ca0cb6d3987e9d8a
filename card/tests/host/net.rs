//! Functions of networks: frames cross, cables are pulled out, data halves die, cards reach each other.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use bluff_card::control::{NetworkEntry, Request, Response};
use bluff_card::message::AddressPlace;
use bluff_card::stats::NetStatistics;
use bluff_front_end::{FrontEnd, Options, ring_features};
use bluff_testing::loopback;
use bluff_testing::namespace::{Namespace, is_allowed};
use bluff_virtio_driver::{Buffer, Config, DriverQueue, Features, Memory, SplitDriver};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::support::daemon::{Daemon, Place};
use crate::support::until;

/// Descriptors of a queue.
const RING: u16 = 64;
/// Bytes of a buffer.
const ROOM: u32 = 2048;
/// Bytes before a frame (virtio 1.3 §5.1.6).
const HEADER: usize = 12;
const MAC_FEATURE: u64 = 1 << 5;
const PACKED: u64 = 1 << 34;
const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

const RX: u16 = 0;
const TX: u16 = 1;

pub fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

/// A frame of an experimental ethertype (IEEE 802 §9.2.3).
pub fn frame(from: u8, to: [u8; 6], text: &str) -> Vec<u8> {
    let mut bytes = [&to[..], &mac(from), &[0x88, 0xb5], text.as_bytes()].concat();
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// A guest with one pair of queues.
pub struct Station {
    number: u8,
    memory: Arc<Memory>,
    front_end: FrontEnd,
    rx: SplitDriver,
    tx: SplitDriver,
    /// Where each buffer lies: first those for receiving.
    places: Vec<u64>,
}

impl Station {
    pub fn start(socket: &Path, number: u8) -> Self {
        let memory = Memory::flat(0x4000_0000, 4 << 20).unwrap();
        let features = Features {
            event_idx: true,
            indirect: true,
            in_order: false,
        };
        let mut options = Options::new(ring_features(features, false));
        (options.queues, options.queue_size) = (2, RING);
        options.device_features = MAC_FEATURE;
        let mut front_end = FrontEnd::connect(socket, &memory, options).unwrap();
        let config = Config::new(RING, features);
        let queue = || SplitDriver::new(&memory, &config).unwrap();
        let (rx, tx) = (queue(), queue());
        let place = |_| memory.alloc(u64::from(ROOM), 64).unwrap();
        let places = (0..2 * RING).map(place).collect();
        front_end.start(RX, &rx, 0).unwrap();
        front_end.start(TX, &tx, 0).unwrap();
        let mut this = Self {
            number,
            memory,
            front_end,
            rx,
            tx,
            places,
        };
        for token in 0..RING {
            this.offer(token);
        }
        this
    }

    fn offer(&mut self, token: u16) {
        let buffer = Buffer::writable(self.places[usize::from(token)], ROOM);
        self.rx.add(&[buffer], false, token.into()).unwrap();
        if self.rx.publish() {
            self.front_end.kick(RX);
        }
    }

    /// Sends a frame, and takes back what was sent before.
    pub fn send(&mut self, to: [u8; 6], text: &str) {
        self.send_frame(&frame(self.number, to, text));
    }

    pub fn send_frame(&mut self, frame: &[u8]) {
        while self.tx.pop_used().unwrap().is_some() {}
        let token = self.tx.positions().avail.index % RING;
        let at = self.places[usize::from(RING + token)];
        let bytes = [&[0; HEADER][..], frame].concat();
        self.memory.write(at, &bytes).unwrap();
        let buffer = Buffer::readable(at, bytes.len() as u32);
        self.tx.add(&[buffer], false, token.into()).unwrap();
        if self.tx.publish() {
            self.front_end.kick(TX);
        }
    }

    /// What has been received.
    pub fn received(&mut self) -> Option<Vec<u8>> {
        let used = self.rx.pop_used().expect("the device keeps the rules")?;
        let mut bytes = vec![0; used.written as usize];
        let token = used.token as u16;
        self.memory
            .read(self.places[usize::from(token)], &mut bytes)
            .unwrap();
        self.offer(token);
        Some(bytes.split_off(HEADER))
    }

    /// Waits for a frame: the next one.
    fn expect(&mut self, from: u8, to: [u8; 6], text: &str) {
        let got = until(text, || self.received());
        assert_eq!(got, frame(from, to, text));
    }

    /// Waits until all that it has sent is used.
    pub fn settle(&mut self) {
        until("the end of what was sent", || {
            while self.tx.pop_used().unwrap().is_some() {}
            (self.tx.in_flight() == 0).then_some(())
        });
    }
}

/// Sends until one arrives: a function that goes on before its neighbour does sends into nothing, and what was under way may come twice.
fn cross_again(from: &mut Station, to: &mut Station, text: &str) {
    let wanted = frame(from.number, mac(to.number), text);
    until(text, || {
        from.send(mac(to.number), text);
        from.settle();
        to.received().filter(|got| *got == wanted)
    });
}

/// Sends a frame, and waits for it.
pub fn cross(from: &mut Station, to: &mut Station, text: &str) {
    let (number, there) = (from.number, mac(to.number));
    from.send(there, text);
    let wanted = frame(number, there, text);
    until(text, || to.received().filter(|got| *got == wanted));
}

fn function(n: u8, network: &str, more: &str) -> String {
    format!(
        "[function.net{n}]\nkind = \"virtio-net\"\nattach = \"vhost-user\"\nnetwork = \"{network}\"\nmac = \"02:00:00:00:00:{n:02x}\"\n{more}\n"
    )
}

pub fn local(card: &str) -> Place {
    Place::new(&format!(
        "[card]\npoll_us = 20\n{card}\n[network.blue]\n{}{}",
        function(1, "blue", ""),
        function(2, "blue", "")
    ))
}

fn net(daemon: &Daemon, function: &str) -> NetStatistics {
    let function = Some(function.parse().unwrap());
    match daemon.ask(Request::Statistics { function }).unwrap() {
        Response::Statistics(all) => {
            let mut all = all.functions.into_iter().filter_map(|f| f.net);
            all.next().expect("a network function")
        }
        other => panic!("{other:?}"),
    }
}

fn set_link(daemon: &Daemon, function: &str, up: bool) {
    let function = function.parse().unwrap();
    let answer = daemon.ask(Request::SetLink { function, up }).unwrap();
    let Response::Function(entry) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(entry.spec.port().unwrap().1.unplugged, !up);
}

#[test]
fn frames_cross_between_functions_of_a_network() {
    for card in ["", "data = \"process\""] {
        let place = local(card);
        let daemon = place.start();
        let mut one = Station::start(&place.socket("net1"), 1);
        let mut two = Station::start(&place.socket("net2"), 2);
        one.send(mac(2), "to two");
        two.expect(1, mac(2), "to two");
        two.send([0xff; 6], "to all");
        one.expect(2, [0xff; 6], "to all");
        // Not its own address: it is counted, and nobody hears of it.
        one.send_frame(&frame(9, mac(2), "spoofed"));
        one.settle();
        one.send(mac(2), "after it");
        two.expect(1, mac(2), "after it");
        let counted = net(&daemon, "net1");
        assert_eq!(counted.total().sent, 3);
        assert_eq!(counted.sent_drops.get("spoofed"), Some(&1));
        assert_eq!(net(&daemon, "net2").total().received, 2);
        let network = "blue".parse().unwrap();
        let addresses = match daemon.ask(Request::ListAddresses { network }).unwrap() {
            Response::Addresses(addresses) => addresses,
            other => panic!("{other:?}"),
        };
        let at = |n: usize| AddressPlace::Function(format!("net{n}").parse().unwrap());
        assert_eq!(addresses.len(), 2);
        assert_eq!((&addresses[0].place, &addresses[1].place), (&at(1), &at(2)));
        assert!(addresses.iter().all(|address| address.fixed));
        drop((one, two));
        daemon.terminate();
    }
}

#[test]
fn a_cable_that_is_pulled_out_carries_nothing() {
    let place = local("data = \"process\"");
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    let mut two = Station::start(&place.socket("net2"), 2);
    cross(&mut one, &mut two, "before");
    set_link(&daemon, "net1", false);
    one.send(mac(2), "into nothing");
    one.settle();
    // Another data half has it pulled out too.
    daemon.kill_data_half();
    one.send(mac(2), "into nothing");
    one.settle();
    assert_eq!(two.received(), None);
    set_link(&daemon, "net1", true);
    cross_again(&mut one, &mut two, "after");
    drop((one, two));
    daemon.terminate();
}

#[test]
fn frames_cross_again_after_the_data_half_died() {
    let place = local("data = \"process\"");
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    let mut two = Station::start(&place.socket("net2"), 2);
    for round in 0..5 {
        // So that rings stand somewhere, also beyond their first lap.
        for i in 0..50 {
            cross(&mut one, &mut two, &format!("round {round}, {i}"));
            cross(&mut two, &mut one, &format!("back {round}, {i}"));
        }
        daemon.kill_data_half();
        cross_again(&mut one, &mut two, "again");
        cross_again(&mut two, &mut one, "and back again");
    }
    drop((one, two));
    daemon.terminate();
}

#[test]
fn what_a_front_end_is_offered() {
    let more = "queues = 4";
    let place = Place::new(&format!("[network.blue]\n{}", function(1, "blue", more)));
    let daemon = place.start();
    let memory = Memory::flat(0x4000_0000, 1 << 20).unwrap();
    let mut options = Options::new(ring_features(Features::default(), false));
    options.queues = 2;
    let mut front_end = FrontEnd::connect(&place.socket("net1"), &memory, options).unwrap();
    let config = front_end.config(24).unwrap();
    assert_eq!(config[..6], mac(1));
    assert_eq!(config[8..12], [4, 0, 0xdc, 5], "pairs, and an MTU of 1500");
    let raw = front_end.frontend();
    let features = raw.get_features().unwrap();
    assert_eq!(features & (PACKED | 1 << 40), 0, "no RING_RESET either");
    assert_eq!(features & (INDIRECT | EVENT_IDX), INDIRECT | EVENT_IDX);
    let protocol = raw.get_protocol_features().unwrap().bits();
    // INFLIGHT_SHMFD, DEVICE_STATE, GET_VRING_BASE_INFLIGHT; MQ, RARP, REPLY_ACK, MTU, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS.
    assert_eq!(protocol & (1 << 12 | 1 << 19 | 1 << 20), 0);
    for bit in [0, 1, 2, 3, 4, 5, 9, 15] {
        assert_ne!(protocol & 1 << bit, 0, "{bit}");
    }
    assert_eq!(raw.get_queue_num().unwrap(), 4, "pairs");
    drop(front_end);
    daemon.terminate();
}

/// What only a function whose front end hands the control queue over offers: CTRL_RX, CTRL_VLAN, RSS among others (virtio 1.3 §5.1.3).
const BY_CONTROL: u64 =
    1 << 2 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 52 | 1 << 53 | 1 << 57 | 1 << 60;
/// CTRL_VQ, STATUS, GUEST_ANNOUNCE, CTRL_MAC_ADDR.
const CONTROLLED: u64 = 1 << 17 | 1 << 16 | 1 << 21 | 1 << 23;

#[test]
fn what_a_control_queue_has_set_outlives_the_data_half() {
    let place = Place::new(&format!(
        "[card]\ndata = \"process\"\n[network.blue]\n{}{}",
        function(1, "blue", "control_queue = true"),
        function(2, "blue", "")
    ));
    let daemon = place.start();
    let memory = Memory::flat(0x4000_0000, 1 << 20).unwrap();
    let features = Features::default();
    let mut options = Options::new(ring_features(features, false));
    (options.queues, options.queue_size) = (3, RING);
    let mut other = FrontEnd::connect(&place.socket("net2"), &memory, options).unwrap();
    let offered = other.frontend().get_features().unwrap();
    assert_eq!(offered & BY_CONTROL, 0, "not said of this one");
    options.device_features = MAC_FEATURE | CONTROLLED;
    let mut front_end = FrontEnd::connect(&place.socket("net1"), &memory, options).unwrap();
    let offered = front_end.frontend().get_features().unwrap();
    assert_eq!(offered & BY_CONTROL, BY_CONTROL);
    let mut queues: Vec<_> = (0..3)
        .map(|_| SplitDriver::new(&memory, &Config::new(RING, features)).unwrap())
        .collect();
    for (index, queue) in queues.iter().enumerate() {
        front_end.start(index as u16, queue, 0).unwrap();
    }
    let at = memory.alloc(64, 64).unwrap();
    let set = [1, 1, 2, 9, 9, 9, 9, 9];
    memory.write(at, &set).unwrap();
    let chain = [Buffer::readable(at, 8), Buffer::writable(at + 32, 1)];
    queues[2].add(&chain, false, 0).unwrap();
    if queues[2].publish() {
        front_end.kick(2);
    }
    let used = until("the answer", || queues[2].pop_used().unwrap());
    assert_eq!(used.written, 1);
    assert_eq!(front_end.config(8).unwrap(), [2, 9, 9, 9, 9, 9, 1, 0]);
    daemon.kill_data_half();
    // It asks its driver to say where it is, too.
    assert_eq!(front_end.config(8).unwrap(), [2, 9, 9, 9, 9, 9, 3, 0]);
    drop((front_end, other));
    daemon.terminate();
}

/// One of two cards that share a segment.
pub fn tunnelled(number: u8, [here, there]: [Ipv4Addr; 2], kind: &str, card: &str) -> Place {
    Place::new(&format!(
        "[card]\npoll_us = 20\n{card}\n[network.blue]\nvni = 5001\ntunnel = \"{kind}\"\nvtep = \"{here}\"\nvteps = [\"{there}\"]\n{}",
        function(number, "blue", "")
    ))
}

#[test]
fn two_cards_share_a_segment() {
    for (kind, card) in [("vxlan", ""), ("geneve", "data = \"process\"")] {
        let (a, b) = (loopback(), loopback());
        let places = [
            tunnelled(2, [a, b], kind, card),
            tunnelled(3, [b, a], kind, card),
        ];
        let daemons = [places[0].start(), places[1].start()];
        let mut two = Station::start(&places[0].socket("net2"), 2);
        let mut three = Station::start(&places[1].socket("net3"), 3);
        cross(&mut two, &mut three, "through the tunnel");
        cross(&mut three, &mut two, "and back");
        if !card.is_empty() {
            daemons[1].kill_data_half();
            // What comes while nobody listens is lost, as on any network.
            cross_again(&mut two, &mut three, "again");
        }
        let network = "blue".parse().unwrap();
        let addresses = daemons[0].ask(Request::ListAddresses { network }).unwrap();
        let Response::Addresses(addresses) = addresses else {
            panic!("{addresses:?}");
        };
        let places: Vec<_> = addresses.into_iter().map(|a| a.place).collect();
        let there = AddressPlace::Vtep(b.into());
        assert_eq!(places[1], there);
        drop((two, three));
        daemons.into_iter().for_each(Daemon::terminate);
    }
}

/// A card whose tunnels go over a function of its own, `up0`, which a test has as a driver.
fn wired(kind: &str, vtep: &str, others: &str, card: &str) -> Place {
    Place::new(&format!(
        "[card]\npoll_us = 20\n{card}\n[network.blue]\nvni = 5001\ntunnel = \"{kind}\"\nvtep = \"{vtep}\"\nvteps = [\"{others}\"]\nunderlay = \"port:up0\"\n{}[function.up0]\nkind = \"uplink\"\nattach = \"vhost-user\"\nmac = \"06:00:00:00:00:01\"\n",
        function(1, "blue", "")
    ))
}

/// The card's address on the wire, and that of the other VTEP.
const CARD: [u8; 6] = [6, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [6, 0, 0, 0, 0, 2];

/// A question or an answer of ARP (RFC 826): from 10.0.0.2 to 10.0.0.1.
fn arp(op: u8) -> Vec<u8> {
    let to = if op == 1 { [0xff; 6] } else { CARD };
    let mut bytes = [&to[..], &OTHER, &[8, 6, 0, 1, 8, 0, 6, 4, 0, op]].concat();
    bytes.extend([&OTHER[..], &[10, 0, 0, 2]].concat());
    bytes.extend(
        [
            if op == 1 { [0; 6] } else { CARD }.as_slice(),
            &[10, 0, 0, 1],
        ]
        .concat(),
    );
    bytes
}

/// The next frame on the wire that is one of those that are wanted.
fn on_wire(wire: &mut Station, what: &str, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    until(what, || wire.received().filter(|frame| wanted(frame)))
}

#[test]
fn a_function_is_the_wire_of_tunnels() {
    for (kind, card) in [("vxlan", ""), ("geneve", "data = \"process\"")] {
        let place = wired(kind, "10.0.0.1", "10.0.0.2", card);
        let daemon = place.start();
        let mut one = Station::start(&place.socket("net1"), 1);
        let mut wire = Station::start(&place.socket("up0"), 9);
        for round in 0..2 {
            // The card answers who asks for its address.
            let answer = until("an answer", || {
                wire.send_frame(&arp(1));
                wire.settle();
                wire.received()
                    .filter(|f| f[12..14] == [8, 6] && f[21] == 2)
            });
            assert_eq!(answer[..6], OTHER);
            assert_eq!(answer[22..32], [&CARD[..], &[10, 0, 0, 1]].concat());
            // It asks for the other's.
            let question = until("a question", || {
                one.send([0xff; 6], "to all");
                one.settle();
                let frame = wire.received()?;
                (frame[12..14] == [8, 6] && frame[21] == 1).then_some(frame)
            });
            assert_eq!(question[38..42], [10, 0, 0, 2]);
            wire.send_frame(&arp(2));
            wire.settle();
            one.send([0xff; 6], "to all");
            let outer = on_wire(&mut wire, "a tunnelled frame", |f| f[12..14] == [8, 0]);
            assert_eq!(outer[..12], [OTHER, CARD].concat());
            assert_eq!(outer[26..34], [10, 0, 0, 1, 10, 0, 0, 2]);
            let header: [u8; 8] = match kind {
                "vxlan" => [8, 0, 0, 0, 0, 0x13, 0x89, 0],
                _ => [0, 0, 0x65, 0x58, 0, 0x13, 0x89, 0],
            };
            assert_eq!(outer[42..50], header);
            assert_eq!(outer[50..], frame(1, [0xff; 6], "to all"));
            // Back: from another station behind the other VTEP.
            let inner = frame(7, mac(1), "to one");
            let back = [
                &outer[6..12],
                &outer[..6],
                &outer[12..26],
                &outer[30..34],
                &outer[26..30],
                &outer[34..50],
                &inner,
            ]
            .concat();
            let mut back = back;
            let lens = [(16, back.len() - 14), (38, back.len() - 34)];
            for (at, len) in lens {
                back[at..at + 2].copy_from_slice(&(len as u16).to_be_bytes());
            }
            bluff_packet::checksum::fill_ipv4_header(&mut back[14..34]);
            until("a frame out of the tunnel", || {
                wire.send_frame(&back);
                wire.settle();
                one.received().filter(|f| *f == inner)
            });
            while one.received().is_some() {}
            // Not for the card: it reaches nobody, and is counted.
            let mut stranger = back.clone();
            stranger[47] ^= 1;
            wire.send_frame(&stranger);
            wire.settle();
            assert_eq!(net(&daemon, "up0").sent_drops.get("stranger"), Some(&1));
            assert_eq!(one.received(), None);
            if round == 0 {
                if card.is_empty() {
                    break;
                }
                daemon.kill_data_half();
            }
        }
        let text = bluff_card::ctl::net::network(&show(&daemon, "blue"), None);
        assert!(text.contains("port:up0"), "{text}");
        drop((one, wire));
        daemon.terminate();
    }
}

#[test]
fn a_wire_comes_and_goes() {
    let place = wired("vxlan", "fd00::1", "fd00::2", "");
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    // Nobody has the wire: what would go there is counted.
    one.send([0xff; 6], "into nothing");
    one.settle();
    let solicitation = |f: &[u8]| f[12..14] == [0x86, 0xdd] && f[20] == 58 && f[54] == 135;
    for _ in 0..2 {
        let mut wire = Station::start(&place.socket("up0"), 9);
        let asked = until("a question", || {
            one.send([0xff; 6], "to all");
            one.settle();
            wire.received().filter(|frame| solicitation(frame))
        });
        assert_eq!(asked[62..78], *b"\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02");
        drop(wire);
    }
    drop(one);
    daemon.terminate();
}

#[test]
fn tunnels_over_a_tap_reach_the_kernel() {
    if is_allowed("net::tunnels_over_a_tap_reach_the_kernel") {
        let links = |lines: &str| {
            for line in lines.lines() {
                let mut ip = std::process::Command::new("ip");
                assert!(
                    ip.args(line.split(' ')).status().unwrap().success(),
                    "{line}"
                );
            }
        };
        Namespace::new().run(move || tap_and_kernel(links));
    }
}

fn show(daemon: &Daemon, id: &str) -> NetworkEntry {
    let id = id.parse().unwrap();
    match daemon.ask(Request::ShowNetwork { id }).unwrap() {
        Response::Network(shown) => *shown,
        other => panic!("{other:?}"),
    }
}

fn tap_and_kernel(links: impl Fn(&str)) {
    let place = Place::new(&format!(
        "[card]\npoll_us = 20\n[network.blue]\nvni = 5001\ntunnel = \"vxlan\"\nvtep = \"10.0.0.1\"\nvteps = [\"10.0.0.2\"]\nunderlay = \"tap:blue0\"\n{}[network.green]\nvni = 5003\ntunnel = \"geneve\"\nvtep = \"10.0.0.4\"\nunderlay = \"tap\"\n",
        function(1, "blue", "")
    ));
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    links(
        "addr add 10.0.0.2/24 dev blue0\nlink add vx0 address 02:00:00:00:00:09 type vxlan id 5001 local 10.0.0.2 remote 10.0.0.1 dstport 4789\naddr add 192.168.7.2/24 dev vx0\nlink set vx0 up",
    );
    // Who has 192.168.7.2? The kernel of the machine that the card runs on is the other VTEP.
    let mut question = [&[0xff; 6][..], &mac(1), &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    question.extend([&mac(1)[..], &[192, 168, 7, 1], &[0; 6], &[192, 168, 7, 2]].concat());
    let answer = until("the kernel's answer", || {
        one.send_frame(&question);
        one.settle();
        let frame = one.received()?;
        (frame[12..14] == [8, 6] && frame[21] == 2).then_some(frame)
    });
    assert_eq!(answer[..12], [mac(1), mac(9)].concat());
    let text = bluff_card::ctl::net::network(&show(&daemon, "blue"), None);
    assert!(text.contains("tap:blue0"), "{text}");
    // One that is given no name has the kernel's.
    let text = bluff_card::ctl::net::network(&show(&daemon, "green"), None);
    assert!(text.contains("tap:bluff0 (tap)"), "{text}");
    drop(one);
    daemon.terminate();
    // What is no tap device is told, and the daemon does not begin.
    let place = Place::new(
        "[network.red]\nvni = 5002\ntunnel = \"vxlan\"\nvtep = \"10.0.0.3\"\nunderlay = \"tap:lo\"\n",
    );
    let arguments = place.arguments();
    let mut command = std::process::Command::new(&arguments[0]);
    let output = command.args(&arguments[1..]).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    let wanted =
        "network red: tap device lo: cannot use the device of that name: it is no tap device";
    assert!(said.contains(wanted), "{said}");
}
