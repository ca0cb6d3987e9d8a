use bluff_testing::{Chance, times};
use proptest::prelude::*;

use super::*;

const OWN: Mac = [2, 0, 0, 0, 0, 1];
const ALL: u64 = feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::GUEST_ANNOUNCE
    | feature::MQ
    | feature::RSS
    | feature::HASH_REPORT
    | feature::CTRL_GUEST_OFFLOADS
    | feature::NOTF_COAL
    | feature::VQ_NOTF_COAL
    | OFFLOADS;

fn control(features: u64) -> Control {
    let mut control = Control::new(OWN, 4);
    control.reset(features);
    for queue in 0..8 {
        control.set_running(queue, true);
    }
    control
}

fn bytes(which: (u8, u8), data: &[u8]) -> Vec<u8> {
    [&[which.0, which.1], data].concat()
}

fn value(which: (u8, u8)) -> Result<Effect, Refused> {
    Err(Refused::Value(which.0, which.1))
}

fn length(bytes: &[u8]) -> Result<Effect, Refused> {
    Err(Refused::Length(bytes.len()))
}

#[test]
fn each_command_needs_its_feature() {
    for class in 0..=8 {
        for number in 0..=8 {
            let which = (class, number);
            let unknown = Err(Refused::Unknown(class, number));
            let command = bytes(which, &[0; 7]);
            let Some(needed) = feature_of(which) else {
                assert_eq!(control(u64::MAX).command(&command), unknown);
                continue;
            };
            assert_eq!(control(ALL & !needed).command(&command), unknown);
            assert_eq!(control(ALL & !feature::CTRL_VQ).command(&command), unknown);
            assert_ne!(control(ALL).command(&command), unknown);
        }
    }
    for short in [&[][..], &[0]] {
        assert_eq!(control(ALL).command(short), length(short));
    }
    let long = vec![0; COMMAND_MAX + 1];
    assert_eq!(control(ALL).command(&long), length(&long));
}

#[test]
fn what_is_received() {
    let mut c = control(ALL);
    let (other, group, all) = ([2, 0, 0, 0, 0, 9], [0x33, 0x33, 0, 0, 0, 1], [0xff; 6]);
    let wants = |c: &Control, to: Mac| c.settings().wants(&to, None);
    assert!(
        wants(&c, other) && wants(&c, group),
        "all, until the driver filters"
    );
    let set = |c: &mut Control, which, on: u8| c.command(&bytes(which, &[on]));
    assert_eq!(
        set(&mut c, command::RX_PROMISC, 2),
        value(command::RX_PROMISC)
    );
    assert_eq!(set(&mut c, command::RX_PROMISC, 0), Ok(Effect::Settings));
    let received = |c: &Control| [OWN, other, group, all].map(|to| wants(c, to));
    assert_eq!(received(&c), [true, false, false, true]);
    for (which, wanted) in [
        (command::RX_ALLMULTI, [true, false, true, true]),
        (command::RX_ALLUNI, [true, true, false, true]),
        (command::RX_NOUNI, [false, false, false, true]),
        (command::RX_NOBCAST, [true, false, false, false]),
    ] {
        set(&mut c, which, 1).unwrap();
        assert_eq!(received(&c), wanted, "{which:?}");
        set(&mut c, which, 0).unwrap();
    }
    // No multicast, though all.
    set(&mut c, command::RX_ALLMULTI, 1).unwrap();
    set(&mut c, command::RX_NOMULTI, 1).unwrap();
    assert_eq!(received(&c), [true, false, false, true]);
    set(&mut c, command::RX_ALLMULTI, 0).unwrap();
    set(&mut c, command::RX_NOMULTI, 0).unwrap();
    // By table.
    let table = |unicast: &[Mac], multicast: &[Mac]| {
        let count = |t: &[Mac]| (t.len() as u32).to_le_bytes();
        let data = [
            &count(unicast)[..],
            unicast.as_flattened(),
            &count(multicast),
            multicast.as_flattened(),
        ];
        bytes(command::MAC_TABLE_SET, &data.concat())
    };
    c.command(&table(&[other], &[group])).unwrap();
    assert_eq!(received(&c), [true; 4]);
    c.command(&table(&[], &vec![group; MAC_TABLE + 1])).unwrap();
    assert_eq!(c.settings().multicast, None, "too many: all");
    assert_eq!(received(&c), [true, false, true, true]);
    // Another address of its own.
    c.command(&bytes(command::MAC_ADDR_SET, &other)).unwrap();
    assert_eq!(received(&c), [false, true, true, true]);
    for bad in [group, [0; 6]] {
        assert_eq!(
            c.command(&bytes(command::MAC_ADDR_SET, &bad)),
            value(command::MAC_ADDR_SET)
        );
    }
    assert_eq!(c.settings().mac, other);
    c.reset(ALL);
    assert_eq!(c.settings().mac, OWN);
}

#[test]
fn tables_of_addresses_that_lie() {
    let mut c = control(ALL);
    let before = c.settings().clone();
    for data in [
        &[][..],
        &[1, 0, 0],
        &[1, 0, 0, 0, 2, 0, 0, 0, 0],
        &[0, 0, 0, 0],
        &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[0xab, 0xaa, 0xaa, 0xaa, 0, 0, 0, 0],
        &[0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let command = bytes(command::MAC_TABLE_SET, data);
        assert_eq!(c.command(&command), length(&command));
    }
    assert_eq!(*c.settings(), before);
}

#[test]
fn vlans() {
    let plain = control(ALL & !feature::CTRL_VLAN);
    assert!(plain.settings().wants(&OWN, Some(7)));
    let mut c = control(ALL);
    c.command(&bytes(command::RX_PROMISC, &[0])).unwrap();
    assert!(c.settings().wants(&OWN, None) && !c.settings().wants(&OWN, Some(7)));
    for vlan in [0u16, 7, 63, 64, 4095] {
        c.command(&bytes(command::VLAN_ADD, &vlan.to_le_bytes()))
            .unwrap();
        assert!(c.settings().wants(&OWN, Some(vlan)));
        assert!(!c.settings().wants(&OWN, Some(vlan ^ 1)), "{vlan}");
        c.command(&bytes(command::VLAN_DEL, &vlan.to_le_bytes()))
            .unwrap();
        assert!(!c.settings().wants(&OWN, Some(vlan)));
    }
    let past = bytes(command::VLAN_ADD, &4096u16.to_le_bytes());
    assert_eq!(c.command(&past), value(command::VLAN_ADD));
}

#[test]
fn pairs_and_announcements() {
    let mut c = control(ALL);
    assert_eq!(c.settings().steer, Steer::Auto { pairs: 1 });
    for (pairs, good) in [
        (0u16, false),
        (1, true),
        (4, true),
        (5, false),
        (0x8000, false),
    ] {
        let answer = c.command(&bytes(command::MQ_PAIRS_SET, &pairs.to_le_bytes()));
        match good {
            true => {
                assert_eq!(answer, Ok(Effect::Settings));
                assert_eq!(c.settings().transmit(), pairs);
            }
            false => assert_eq!(answer, value(command::MQ_PAIRS_SET)),
        }
    }
    let ack = bytes(command::ANNOUNCE_ACK, &[]);
    assert_eq!(c.command(&ack), Ok(Effect::Announced));
}

#[test]
fn what_the_driver_takes() {
    let some = ALL & !feature::GUEST_USO6;
    let mut c = control(some);
    assert_eq!(c.settings().offloads, some & OFFLOADS);
    let mut set = |bits: u64| c.command(&bytes(command::GUEST_OFFLOADS_SET, &bits.to_le_bytes()));
    let refused = value(command::GUEST_OFFLOADS_SET);
    assert_eq!(
        set(feature::GUEST_CSUM | feature::GUEST_USO6),
        refused,
        "not negotiated"
    );
    assert_eq!(set(feature::GUEST_CSUM | feature::MAC), refused);
    assert_eq!(set(feature::GUEST_TSO4), refused, "without checksums");
    assert_eq!(
        set(feature::GUEST_TSO4 | feature::GUEST_CSUM),
        Ok(Effect::Settings)
    );
    assert_eq!(set(0), Ok(Effect::Settings));
    assert_eq!(c.settings().offloads, 0);
}

/// What a driver sends to set up RSS.
fn rss(table: &[u16], unclassified: u16, transmit: u16, key: &[u8]) -> Vec<u8> {
    let mut data = HashTypes::TCPV4.0.to_le_bytes().to_vec();
    data.extend((table.len() as u16).wrapping_sub(1).to_le_bytes());
    data.extend(unclassified.to_le_bytes());
    data.extend(table.iter().flat_map(|q| q.to_le_bytes()));
    data.extend(transmit.to_le_bytes());
    data.push(key.len() as u8);
    data.extend(key);
    bytes(command::MQ_RSS_CONFIG, &data)
}

#[test]
fn receive_side_scaling() {
    let mut c = control(ALL);
    let key: Vec<u8> = (1..=40).collect();
    c.command(&rss(&[0, 3, 1, 2], 3, 2, &key)).unwrap();
    let Steer::Rss {
        hashing,
        table,
        unclassified,
        transmit,
    } = &c.settings().steer
    else {
        panic!("it is set");
    };
    assert_eq!(
        (hashing.types, &hashing.key[..]),
        (HashTypes::TCPV4.0, &key[..])
    );
    assert_eq!(
        (&table[..], *unclassified, *transmit),
        (&[0, 3, 1, 2][..], 3, 2)
    );
    assert_eq!(c.settings().transmit(), 2);
    // A shorter key is filled up.
    c.command(&rss(&[0; 128], 0, 1, &[9; 16])).unwrap();
    let Steer::Rss { hashing, .. } = &c.settings().steer else {
        panic!("it is set");
    };
    assert_eq!((hashing.key[15], hashing.key[16]), (9, 0));
    // Pairs end it.
    c.command(&bytes(command::MQ_PAIRS_SET, &[3, 0])).unwrap();
    assert_eq!(c.settings().steer, Steer::Auto { pairs: 3 });
}

/// The table names a queue that does not exist, in any place where it could.
#[test]
fn a15_rss_table_names_a_queue_that_does_not_exist() {
    let mut c = control(ALL);
    let before = c.settings().clone();
    let refused = value(command::MQ_RSS_CONFIG);
    for place in 0..8 {
        for queue in [4, 5, 0x7fff, 0xffff] {
            let mut table = [1; 8];
            table[place] = queue;
            assert_eq!(c.command(&rss(&table, 0, 1, &[])), refused);
            assert_eq!(c.command(&rss(&[0], queue, 1, &[])), refused);
        }
    }
    for transmit in [0, 5, 0xffff] {
        assert_eq!(c.command(&rss(&[0], 0, transmit, &[])), refused);
    }
    // No power of two; longer than is offered; as long as can be said.
    for len in [3, 127, 256, 65_536] {
        assert_eq!(
            c.command(&rss(&vec![0; len], 0, 1, &[])),
            if len < 8192 {
                refused
            } else {
                length(&vec![0; len * 2 + 13])
            }
        );
    }
    assert_eq!(c.command(&rss(&[0], 0, 1, &[0; 41])), refused);
    let mut types = rss(&[0], 0, 1, &[]);
    types[3] = 0x80;
    assert_eq!(c.command(&types), refused);
    // Every truncation.
    let whole = rss(&[0, 1], 0, 1, &[7; 8]);
    for n in 2..whole.len() {
        assert_eq!(c.command(&whole[..n]), length(&whole[..n]));
    }
    assert_eq!(*c.settings(), before);
    assert_eq!(c.command(&whole), Ok(Effect::Settings));
}

#[test]
fn hashes_that_are_reported() {
    let mut c = control(ALL);
    let mut data = (HashTypes::UDPV6.0 | HashTypes::IPV4.0)
        .to_le_bytes()
        .to_vec();
    data.extend([0; 8]);
    data.push(2);
    data.extend([7, 8]);
    c.command(&bytes(command::MQ_HASH_CONFIG, &data)).unwrap();
    assert_eq!(
        c.settings().report.types,
        HashTypes::UDPV6.0 | HashTypes::IPV4.0
    );
    assert_eq!(c.settings().report.key[..3], [7, 8, 0]);
    data[12] = 3;
    let short = bytes(command::MQ_HASH_CONFIG, &data);
    assert_eq!(c.command(&short), length(&short));
}

#[test]
fn coalescing_of_all_and_of_one() {
    let mut c = control(ALL);
    let coal = |packets: u32, usecs: u32| [packets.to_le_bytes(), usecs.to_le_bytes()].concat();
    let of = |max_packets, max_usecs| Coalescing {
        max_packets,
        max_usecs,
    };
    c.command(&bytes(command::COAL_TX_SET, &coal(1, 2)))
        .unwrap();
    c.command(&bytes(command::COAL_RX_SET, &coal(3, 4)))
        .unwrap();
    let one = |queue: u16, rest: &[u8]| [&queue.to_le_bytes()[..], &[0; 2], rest].concat();
    c.command(&bytes(command::COAL_VQ_SET, &one(5, &coal(6, 7))))
        .unwrap();
    let set = &c.settings().coalescing;
    assert_eq!(
        (set[0], set[1], set[4], set[5]),
        (of(3, 4), of(1, 2), of(3, 4), of(6, 7))
    );
    let get = |c: &mut Control, queue| c.command(&bytes(command::COAL_VQ_GET, &one(queue, &[])));
    assert_eq!(get(&mut c, 5), Ok(Effect::Answer(of(6, 7))));
    // The control queue itself, and what is not there.
    for queue in [8, 9, 0xffff] {
        assert_eq!(get(&mut c, queue), value(command::COAL_VQ_GET));
        let set = bytes(command::COAL_VQ_SET, &one(queue, &coal(1, 1)));
        assert_eq!(c.command(&set), value(command::COAL_VQ_SET));
    }
    // One that is stopped has nothing set, and begins with what is set for all.
    c.set_running(5, false);
    assert_eq!(get(&mut c, 5), value(command::COAL_VQ_GET));
    c.set_running(5, true);
    assert_eq!(get(&mut c, 5), Ok(Effect::Answer(of(1, 2))));
    // Without several pairs there are two queues.
    let mut c = control(ALL & !(feature::MQ | feature::RSS));
    assert_eq!(get(&mut c, 1), Ok(Effect::Answer(of(0, 0))));
    assert_eq!(get(&mut c, 2), value(command::COAL_VQ_GET));
}

/// What a driver of a front end that has the control queue itself would set is not heard of: nothing is filtered.
#[test]
fn filters_are_off_until_a_driver_sets_them_here() {
    let (filters, vlan) = (feature::CTRL_RX | feature::CTRL_VLAN, feature::CTRL_VLAN);
    let wants = |features, vlan| {
        control(features)
            .settings()
            .wants(&[2, 9, 9, 9, 9, 9], vlan)
    };
    for features in [
        0,
        filters,
        vlan,
        feature::CTRL_VQ,
        feature::CTRL_VQ | filters,
    ] {
        assert!(wants(features, None) && wants(features, Some(5)));
    }
    // VLANs alone: tags are filtered, addresses are not.
    let alone = feature::CTRL_VQ | vlan;
    assert!(wants(alone, None) && !wants(alone, Some(5)));
}

/// Whatever was set is what is read again, and nothing else is.
#[test]
fn settings_survive_their_bytes() {
    for seed in 0..times(300, 10_000) {
        let mut chance = Chance::new(seed);
        let mut c = control(ALL);
        for _ in 0..20 {
            c.command(&good_command(&mut chance)).unwrap();
        }
        let saved = c.save();
        let (features, settings) = c.read(&saved).expect("what was written");
        assert_eq!((features, &settings), (ALL, c.settings()));
        // A part of it, or more, is none of it.
        let cut = chance.below(saved.len() as u64) as usize;
        assert!(c.read(&saved[..cut]).is_none());
        assert!(c.read(&[&saved[..], &[0]].concat()).is_none());
        // Fewer pairs may not have what is set; and any other bytes are read or refused.
        let mut changed = saved.clone();
        changed[cut] ^= 1 << chance.below(8);
        if let Some((_, settings)) = c.read(&changed) {
            assert!(settings.transmit() <= 4 && settings.coalescing.len() == 8);
        }
    }
}

/// A command that is obeyed.
fn good_command(chance: &mut Chance) -> Vec<u8> {
    let macs = |chance: &mut Chance| {
        let n = [0, 1, 5, 64, 65][chance.below(5) as usize];
        let mut table = (n as u32).to_le_bytes().to_vec();
        table.extend((0..6 * n).map(|_| chance.below(256) as u8));
        table
    };
    let coal = |chance: &mut Chance| {
        let mut word = || chance.below(1 << 32) as u32;
        [word().to_le_bytes(), word().to_le_bytes()].concat()
    };
    match chance.below(10) {
        n @ 0..=1 => bytes((0, chance.below(6) as u8), &[n as u8]),
        2 => {
            let tables = [macs(chance), macs(chance)].concat();
            bytes(command::MAC_TABLE_SET, &tables)
        }
        3 => bytes(
            command::MAC_ADDR_SET,
            &[2, 0, 0, 0, 1, chance.below(256) as u8],
        ),
        4 => {
            let vlan = (chance.below(4096) as u16).to_le_bytes();
            bytes((2, chance.below(2) as u8), &vlan)
        }
        5 => bytes(command::MQ_PAIRS_SET, &[1 + chance.below(4) as u8, 0]),
        6 => {
            let len = 1u16 << chance.below(8);
            let mut data = 0x1ffu32.to_le_bytes().to_vec();
            data.extend((len - 1).to_le_bytes());
            for _ in 0..=len {
                data.extend([chance.below(4) as u8, 0]);
            }
            data.extend([1 + chance.below(4) as u8, 0, 40]);
            data.extend((0..40).map(|_| chance.below(256) as u8));
            bytes(command::MQ_RSS_CONFIG, &data)
        }
        7 => {
            let mut data = vec![0x3f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
            data.extend([7, 8, chance.below(256) as u8]);
            bytes(command::MQ_HASH_CONFIG, &data)
        }
        8 => bytes((6, chance.below(2) as u8), &coal(chance)),
        _ => {
            let queue = [chance.below(8) as u8, 0, 0, 0];
            let data = [&queue[..], &coal(chance)].concat();
            bytes(command::COAL_VQ_SET, &data)
        }
    }
}

/// Whatever was asked before, a refused command has changed nothing, and what is set can be obeyed.
#[test]
fn any_commands() {
    for seed in 0..times(300, 30_000) {
        let mut chance = Chance::new(seed);
        let mut c = control(ALL);
        for _ in 0..50 {
            let mut command = vec![chance.below(8) as u8, chance.below(5) as u8];
            let (len, small) = (chance.below(60), chance.percent(50));
            command.extend((0..len).map(|_| chance.below(if small { 4 } else { 256 }) as u8));
            let before = c.settings().clone();
            if c.command(&command).is_err() {
                assert_eq!(*c.settings(), before);
            }
            let s = c.settings();
            assert!((1..=4).contains(&s.transmit()) && s.coalescing.len() == 8);
            assert!(s.offloads & !OFFLOADS == 0 && s.mac[0] & 1 == 0);
            if let Steer::Rss {
                table,
                unclassified,
                ..
            } = &s.steer
            {
                assert!(table.len().is_power_of_two());
                assert!(table.iter().chain([unclassified]).all(|q| *q < 4));
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(command in prop::collection::vec(any::<u8>(), 0..300), features: u64) {
        let mut c = control(features);
        let before = c.settings().clone();
        if c.command(&command).is_err() {
            prop_assert_eq!(c.settings(), &before);
        }
    }
}
