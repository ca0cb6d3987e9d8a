//! What a driver receives, as it has set it.

use std::sync::Arc;

use bluff_net::{Cause, Pair};
use bluff_reactor::Reactor;
use bluff_virtio::VirtioDevice;
use bluff_virtio_net::spec::{ACK_ERR, Header, command, feature, header_flag};

use crate::control::{CONTROL, ask, set};
use crate::rig::*;

struct Wire {
    reactor: Reactor,
    a: Guest,
    b: Guest,
}

impl Wire {
    fn new(features: u64) -> Self {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let a = Guest::new(&mut reactor, Arc::new(a), Kind::SPLIT, ALL, 64);
        let mut b = Guest::new(&mut reactor, Arc::new(b), Kind::SPLIT, features, 64);
        b.offer(0, &[2048; 32]);
        Self { reactor, a, b }
    }

    fn set(&mut self, which: (u8, u8), data: &[u8]) {
        set(&mut self.reactor, &mut self.b, which, data);
    }

    /// Whether a frame for this address, with this tag, is received.
    fn passes(&mut self, to: [u8; 6], vlan: Option<u16>) -> bool {
        let mut frame = to.to_vec();
        frame.extend([2, 0, 0, 0, 0, 9]);
        if let Some(vlan) = vlan {
            // With a priority, which is no part of it.
            frame.extend([0x81, 0]);
            frame.extend((vlan | 0xa000).to_be_bytes());
        }
        frame.extend([0x88, 0xb5]);
        frame.resize(64, 0);
        let drops = |w: &Self| w.b.device.counters()[0].received.drops.get(Cause::Filtered);
        let before = drops(self);
        self.a.send(0, &Header::default(), &frame);
        let a = &mut self.a;
        until(&mut self.reactor, || (a.sent(0) == 1).then_some(()));
        let got = self.b.receive(0);
        if let Some(got) = &got {
            assert!(got.bytes == frame);
            self.b.offer(0, &[2048]);
        }
        assert_eq!(drops(self) - before, u64::from(got.is_none()));
        got.is_some()
    }
}

const FILTERS: u64 = CONTROL
    | feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::MAC;
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 5];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 5];
const ALL_STATIONS: [u8; 6] = [0xff; 6];

#[test]
fn modes_and_tables_say_what_is_received() {
    let mut w = Wire::new(FILTERS);
    let places = [MAC, OTHER, GROUP, ALL_STATIONS];
    let now = |w: &mut Wire| places.map(|to| u8::from(w.passes(to, None)));
    assert_eq!(now(&mut w), [1, 1, 1, 1], "a driver that has said nothing");
    w.set(command::RX_PROMISC, &[0]);
    assert_eq!(now(&mut w), [1, 0, 0, 1]);
    for (mode, with) in [
        (command::RX_ALLMULTI, [1, 0, 1, 1]),
        (command::RX_ALLUNI, [1, 1, 0, 1]),
        (command::RX_NOUNI, [0, 0, 0, 1]),
        (command::RX_NOBCAST, [1, 0, 0, 0]),
        (command::RX_NOMULTI, [1, 0, 0, 1]),
        (command::RX_PROMISC, [1, 1, 1, 1]),
    ] {
        w.set(mode, &[1]);
        assert_eq!(now(&mut w), with, "{mode:?}");
        w.set(mode, &[0]);
        assert_eq!(now(&mut w), [1, 0, 0, 1]);
    }
    let table = |macs: &[[u8; 6]]| {
        let mut bytes = (macs.len() as u32).to_le_bytes().to_vec();
        bytes.extend(macs.iter().flatten());
        bytes
    };
    let tables = |uni: &[[u8; 6]], multi: &[[u8; 6]]| [table(uni), table(multi)].concat();
    w.set(command::MAC_TABLE_SET, &tables(&[OTHER], &[]));
    assert_eq!(now(&mut w), [1, 1, 0, 1]);
    w.set(command::MAC_TABLE_SET, &tables(&[], &[GROUP]));
    assert_eq!(now(&mut w), [1, 0, 1, 1], "the first is replaced");
    // More than are kept: all of the kind, and not those that came last.
    w.set(
        command::MAC_TABLE_SET,
        &tables(&[[2, 8, 8, 8, 8, 8]; 65], &[]),
    );
    assert_eq!(now(&mut w), [1, 1, 0, 1]);
    w.set(
        command::MAC_TABLE_SET,
        &tables(&[], &[[1, 8, 8, 8, 8, 8]; 200]),
    );
    assert_eq!(now(&mut w), [1, 0, 1, 1]);
    w.set(command::MAC_TABLE_SET, &tables(&[], &[]));
    // One that says more than it has.
    let mut lie = [&[1, 0], &tables(&[OTHER], &[])[..]].concat();
    lie[2..6].copy_from_slice(&u32::MAX.to_le_bytes());
    let answer = ask(&mut w.reactor, &mut w.b, &lie, &[], 1);
    assert_eq!(answer, [ACK_ERR]);
    assert_eq!(now(&mut w), [1, 0, 0, 1]);
    // Another address of its own, which configuration space shows.
    w.set(command::MAC_ADDR_SET, &OTHER);
    assert_eq!(now(&mut w), [0, 1, 0, 1]);
    let mut mac = [0; 6];
    w.b.device.read_config(0, &mut mac);
    assert_eq!(mac, OTHER);
    // After a reset it is the first one again.
    w.b.device.reset();
    w.b.device.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn vlans_are_received_that_were_added() {
    for (features, untouched) in [(FILTERS, true), (FILTERS & !feature::CTRL_RX, false)] {
        let features = match features & feature::CTRL_RX {
            0 => features & !feature::CTRL_RX_EXTRA,
            _ => features,
        };
        let mut w = Wire::new(features);
        assert!(w.passes(MAC, None));
        assert_eq!(w.passes(MAC, Some(7)), untouched, "promiscuous at first");
        if untouched {
            w.set(command::RX_PROMISC, &[0]);
        }
        w.set(command::VLAN_ADD, &[7, 0]);
        assert!(w.passes(MAC, Some(7)) && !w.passes(MAC, Some(8)) && w.passes(MAC, None));
        // A tag alone opens nothing.
        assert_eq!(w.passes(OTHER, Some(7)), !untouched);
        w.set(command::VLAN_ADD, &[0xff, 0x0f]);
        w.set(command::VLAN_DEL, &[7, 0]);
        assert!(!w.passes(MAC, Some(7)) && w.passes(MAC, Some(0xfff)) && !w.passes(MAC, Some(0)));
    }
}

/// What a driver takes of frames changes while it runs, and counts for those that wait, too.
#[test]
fn offloads_are_what_the_driver_takes_now() {
    let mut w = Wire::new(ALL | CONTROL | feature::CTRL_GUEST_OFFLOADS);
    let (head, long) = (header(false, true, 1000), frame(false, true, 3000, 1));
    let receive = |w: &mut Wire| {
        let b = &mut w.b;
        let got = until(&mut w.reactor, || b.receive(0));
        b.offer(0, &[2048; 2]);
        got
    };
    w.a.send(0, &head, &long);
    let got = receive(&mut w);
    assert!(got.bytes == long && got.header.gso_size.get() == 1000);
    // All that was negotiated; what was not is refused.
    w.set(command::GUEST_OFFLOADS_SET, &[0; 8]);
    let ufo = [&[5, 0][..], &(1u64 << 10).to_le_bytes()].concat();
    assert_eq!(ask(&mut w.reactor, &mut w.b, &ufo, &[], 1), [ACK_ERR]);
    w.a.send(0, &head, &long);
    for _ in 0..3 {
        let got = receive(&mut w);
        assert_eq!((got.bytes.len(), got.header.flags), (54 + 1000, 0));
        assert!(is_good(&got.bytes));
    }
    let csum = feature::GUEST_CSUM.to_le_bytes();
    w.set(command::GUEST_OFFLOADS_SET, &csum);
    w.a.send(0, &header(false, true, 0), &frame(false, true, 100, 2));
    let flags = receive(&mut w).header.flags;
    assert_eq!(flags, header_flag::NEEDS_CSUM);
    // Some wait, made for what was taken then.
    let mut w = Wire::new(ALL | CONTROL | feature::CTRL_GUEST_OFFLOADS);
    w.b.offer(0, &[]);
    for _ in 0..18 {
        w.a.send(0, &head, &long);
        let a = &mut w.a;
        until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
    }
    w.set(command::GUEST_OFFLOADS_SET, &[0; 8]);
    let mut after = 0;
    for i in 0..16 {
        let b = &mut w.b;
        let got = until(&mut w.reactor, || b.receive(0));
        assert!(got.bytes == long, "{i}: given before");
    }
    w.b.offer(0, &[2048; 8]);
    while after < 6 {
        let b = &mut w.b;
        let got = until(&mut w.reactor, || b.receive(0));
        assert_eq!((got.bytes.len(), got.header.flags), (54 + 1000, 0));
        assert!(is_good(&got.bytes));
        after += 1;
    }
}
