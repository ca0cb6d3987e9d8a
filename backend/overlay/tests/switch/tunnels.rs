//! Networks of several cards, over an underlay that is a function call.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_net::{Cause, Lent, NetError, all_of};
use bluff_overlay::{Arrival, Key, Place, PortOptions, Underlay, Uplink};
use bluff_packet::{Mac, Vni};
use bluff_reactor::Context;

use crate::rig::*;

type Arrivals = Arc<Mutex<HashMap<IpAddr, Arrival>>>;

/// Calls the arrival of the card that a frame is for.
#[derive(Clone, Debug)]
struct Wires {
    from: IpAddr,
    arrivals: Arrivals,
}

impl Underlay for Wires {
    fn open(&self, _: &mut Context<'_>) -> Result<Box<dyn Uplink>, NetError> {
        Ok(Box::new(self.clone()))
    }
}

impl Uplink for Wires {
    fn send(&mut self, now: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr) {
        let mut arrivals = self.arrivals.lock().unwrap();
        if let Some(arrival) = arrivals.get_mut(&to) {
            arrival.receive(now, batch, which, vni, self.from);
        }
    }
}

fn vtep(n: u8) -> IpAddr {
    [10, 0, 0, n].into()
}

fn vni(n: u32) -> Vni {
    Vni::new(n).unwrap()
}

/// So many cards with one network, each with a way to all others.
fn cards(count: u8) -> (Vec<Rig>, Arrivals) {
    let arrivals = Arrivals::default();
    let cards: Vec<_> = (1..=count)
        .map(|n| {
            let rig = Rig::default();
            let wires = Wires {
                from: vtep(n),
                arrivals: arrivals.clone(),
            };
            let others: Vec<_> = (1..=count).filter(|m| *m != n).map(vtep).collect();
            rig.network
                .set_tunnel(vni(5001), &others, Arc::new(wires))
                .unwrap();
            let arrival = Arrival::new(rig.network.clone(), rig.now);
            arrivals.lock().unwrap().insert(vtep(n), arrival);
            rig
        })
        .collect();
    (cards, arrivals)
}

const ALL: Mac = Mac([0xff; 6]);

#[test]
fn cards_learn_where_addresses_are() {
    let (mut cards, _) = cards(3);
    let mut a = cards[0].station(1);
    let mut b = cards[1].station(2);
    let mut c = cards[2].station(3);
    let d = cards[2].station(4);
    // To everybody: once to each, and to none twice.
    let all = plain(ALL, mac(1), b"all");
    a.send(&all);
    for other in [&b, &c, &d] {
        assert_eq!(other.got(), std::slice::from_ref(&all));
    }
    assert!(a.got().is_empty());
    // All know now where the first is.
    for (other, n) in [(&mut b, 2), (&mut c, 3)] {
        let answer = plain(mac(1), mac(n), b"answer");
        other.send(&answer);
        assert_eq!(a.got(), [answer]);
    }
    assert!(d.got().is_empty());
    let direct = plain(mac(3), mac(1), b"direct");
    a.send(&direct);
    assert_eq!((c.got(), b.got(), d.got()), (vec![direct], vec![], vec![]));
    let fdb = cards[0].network.fdb();
    let place = |n: u8| fdb.find(Key::new(mac(n).0, 0)).map(|e| e.place);
    assert_eq!(
        (place(2), place(3)),
        (Some(Place::Vtep(0)), Some(Place::Vtep(1)))
    );
    // A card that is no more: what was behind it is forgotten, what was behind the other is not.
    let wires = Wires {
        from: vtep(1),
        arrivals: Arrivals::default(),
    };
    cards[0]
        .network
        .set_tunnel(vni(5001), &[vtep(3)], Arc::new(wires))
        .unwrap();
    assert_eq!((place(2), place(3)), (None, Some(Place::Vtep(1))));
}

#[test]
fn an_address_that_is_configured_is_not_flooded() {
    let (mut cards, _) = cards(3);
    let mut a = cards[0].station(1);
    let b = cards[1].station(2);
    let c = cards[2].station(3);
    cards[0]
        .network
        .fix(Key::new(mac(2).0, 0), vtep(2))
        .unwrap();
    assert!(
        cards[0]
            .network
            .fix(Key::new(mac(2).0, 0), vtep(9))
            .is_err()
    );
    let frame = plain(mac(2), mac(1), b"known");
    a.send(&frame);
    assert_eq!((b.got(), c.got()), (vec![frame], vec![]));
}

/// A tenant's VNI from somebody who is not of the network, or another VNI from one who is.
#[test]
fn f07_a_vni_injected_by_an_unknown_underlay_address() {
    let (mut cards, arrivals) = cards(2);
    let a = cards[0].station(1);
    let inject = |vni: Vni, from: IpAddr, frame: &[u8]| {
        let mut batch = bluff_net::Batch::default();
        batch.push(frame);
        let mut lent = batch.lent();
        let all = all_of(&lent);
        let mut arrivals = arrivals.lock().unwrap();
        let arrival = arrivals.get_mut(&vtep(1)).unwrap();
        arrival.receive(Instant::now(), &mut lent, all, vni, from);
    };
    let frame = plain(mac(1), mac(9), b"injected");
    inject(vni(5001), vtep(3), &frame);
    inject(vni(5002), vtep(2), &frame);
    inject(vni(5001), "fd00::2".parse().unwrap(), &frame);
    let dropped = |cause| cards[0].network.arrived().get(cause);
    assert_eq!(dropped(Cause::Stranger), 3);
    assert!(a.got().is_empty());
    assert_eq!(
        cards[0].network.fdb().learnt(),
        0,
        "nothing is learnt of them"
    );
    // From a card of the network: what it says is bounded too.
    inject(
        vni(5001),
        vtep(2),
        &plain(ALL, mac(1), b"an address of this card"),
    );
    assert_eq!(dropped(Cause::Spoofed), 1);
    inject(vni(5001), vtep(2), &plain(mac(1), ALL, b"from a group"));
    assert_eq!(dropped(Cause::Malformed), 1);
    assert!(a.got().is_empty());
    inject(vni(5001), vtep(2), &frame);
    assert_eq!(a.got(), [frame]);
}

/// Inner frames of 0 to 13 bytes.
#[test]
fn f01_frames_without_a_whole_header() {
    let (mut cards, arrivals) = cards(2);
    let a = cards[0].station(1);
    for len in 1..14 {
        let mut batch = bluff_net::Batch::default();
        batch.push(&vec![2; len]);
        let mut lent = batch.lent();
        let mut arrivals = arrivals.lock().unwrap();
        let arrival = arrivals.get_mut(&vtep(1)).unwrap();
        arrival.receive(Instant::now(), &mut lent, 1, vni(5001), vtep(2));
    }
    assert_eq!(cards[0].network.arrived().get(Cause::Malformed), 13);
    assert!(a.got().is_empty());
}

/// What comes from one card does not go on to another, nor back.
#[test]
fn no_frame_is_handed_on_between_cards() {
    let (mut cards, _) = cards(3);
    let mut a = cards[0].join(PortOptions::default());
    let mut b = cards[1].join(PortOptions::default());
    let c = cards[2].join(PortOptions::default());
    b.send(&plain(ALL, mac(2), b"here"));
    a.got();
    c.got();
    // The third believes that the second's address is with the first.
    a.send(&plain(ALL, mac(7), b"learn"));
    b.got();
    c.got();
    let frame = plain(mac(2), mac(1), b"once");
    a.send(&frame);
    assert_eq!((b.got(), c.got()), (vec![frame], vec![]));
    // A VM moves: the newest place counts, and old ones hear of it by its first broadcast.
    let mut moved = cards[2].join(PortOptions::default());
    moved.send(&plain(ALL, mac(2), b"moved"));
    assert_eq!((a.got().len(), b.got().len()), (1, 1));
    c.got();
    let frame = plain(mac(2), mac(1), b"to its new place");
    a.send(&frame);
    assert_eq!((moved.got(), b.got()), (vec![frame], vec![]));
}
