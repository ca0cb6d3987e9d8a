//! The kernel's own VXLAN device as the other VTEP.
//!
//! Unsafe, because packet sockets have no safe form here.
#![allow(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_net::tap::{Carries, Tap, TapOptions};
use bluff_net::{Gso, GsoKind, Offloads, Port};
use bluff_overlay::udp::{TunnelKind, UdpOptions, UdpUnderlay};
use bluff_overlay::wire::{WireOptions, WireUnderlay};
use bluff_packet::checksum::{Sum, fill_ipv4_header};
use bluff_packet::{IpProto, Mac, Vni};
use bluff_reactor::Poll;
use bluff_testing::namespace::{Namespace, is_allowed};

use crate::rig::*;

/// The tenant's addresses: the card's station, and the kernel.
const STATION: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 1);
const KERNEL: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 2);
const PORT: u16 = 5000;

fn vni() -> Vni {
    Vni::new(5001).unwrap()
}

fn addresses(v6: bool) -> [IpAddr; 2] {
    match v6 {
        false => [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()],
        true => ["fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()],
    }
}

/// The other machine: a link `up1` to `up0` in `card`, and a VTEP.
fn kernel(card: &Namespace, v6: bool) -> Namespace {
    let peer = Namespace::new();
    let [local, remote] = addresses(v6);
    let (bits, more) = if v6 { (64, "nodad") } else { (24, "") };
    card.ip(&format!(
        "link add up0 mtu 1600 type veth peer name up1\nlink set up1 netns {}\nlink set up0 up",
        peer.id()
    ));
    // A card with a wire of its own leaves outer checksums out, and IPv6 wants to be told that that is right.
    peer.ip(&format!(
        "link set up1 mtu 1600 up\n\
         addr add {remote}/{bits} dev up1 {more}\n\
         link add vx0 address {} mtu 1450 type vxlan id 5001 local {remote} remote {local} dstport 4789 udp6zerocsumrx\n\
         addr add {KERNEL}/24 dev vx0\n\
         link set vx0 up",
        mac(2)
    ));
    peer
}

/// What carries the card's tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Udp,
    Tap,
}

/// The card, in the namespace of this thread. What it holds has to stay.
struct Card {
    rig: Rig,
    station: Station,
    tap: Option<Tap>,
    _underlay: Arc<dyn std::any::Any>,
}

/// Whether the kernel cuts tunnelled frames.
fn cuts_tunnels(card: &Card) -> bool {
    let tap = card.tap.as_ref();
    tap.is_some_and(|tap| tap.completes().contains(Offloads::TSO4))
}

fn card(kind: Kind, v6: bool) -> Card {
    let mut rig = Rig::default();
    let [local, remote] = addresses(v6);
    let (tap, underlay): (_, Arc<dyn std::any::Any>) = match kind {
        Kind::Udp => {
            let underlay = UdpUnderlay::new(UdpOptions {
                local,
                kind: TunnelKind::Vxlan,
                port: 4789,
                poll: Poll::Never,
                reactors: vec![rig.reactor.handle()],
            })
            .unwrap();
            let network = rig.network.clone();
            network
                .set_tunnel(vni(), &[remote], underlay.clone())
                .unwrap();
            underlay.set_network(vni(), Some(network));
            (None, underlay)
        }
        Kind::Tap => {
            let mut tap = Tap::open(TapOptions {
                name: "bluff0".into(),
                carries: Carries::Tunnels,
                reactors: vec![rig.reactor.handle()],
                poll: Poll::Never,
            })
            .unwrap();
            tap.raise_mtu(1600).unwrap();
            let underlay = WireUnderlay::new(WireOptions {
                local,
                mac: Mac([6, 0, 0, 0, 0, 1]),
                gateway: None,
                kind: TunnelKind::Vxlan,
                port: 4789,
                mtu: 1600,
            });
            underlay.set_completes(tap.completes());
            let port: Arc<dyn Port> = underlay.clone();
            tap.plug_in(&port);
            let network = rig.network.clone();
            network
                .set_tunnel(vni(), &[remote], underlay.clone())
                .unwrap();
            underlay.set_network(vni(), Some(network));
            (Some(tap), underlay)
        }
    };
    let station = rig.station(1);
    Card {
        rig,
        station,
        tap,
        _underlay: underlay,
    }
}

impl Card {
    fn until<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
            self.rig.reactor.step(Some(Duration::from_millis(1)));
            self.station.now = Instant::now();
        }
    }
}

/// ARP from the station: who has `target`?
fn question(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = arp(mac(1), mac(1), sender.octets());
    let at = frame.len() - 4;
    frame[at..].copy_from_slice(&target.octets());
    frame
}

/// A packet from the station to the kernel, with a checksum that is begun.
fn packet(proto: IpProto, from: Ipv4Addr, to: Ipv4Addr, header: &[u8], payload: &[u8]) -> Vec<u8> {
    let len = header.len() + payload.len();
    let mut ip = vec![0x45, 0];
    ip.extend((len as u16 + 20).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, proto.0, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    fill_ipv4_header(&mut ip);
    let mut transport = header.to_vec();
    let at = if proto == IpProto::UDP { 6 } else { 16 };
    let sum = Sum::pseudo_v4(from, to, proto, len as u16).partial();
    transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    [&mac(2).0[..], &mac(1).0, &[8, 0], &ip, &transport, payload].concat()
}

fn udp(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut header = [PORT.to_be_bytes(), PORT.to_be_bytes(), [0; 2], [0; 2]].concat();
    header[4..6].copy_from_slice(&(payload.len() as u16 + 8).to_be_bytes());
    packet(IpProto::UDP, from, to, &header, payload)
}

/// The same with a whole checksum left out, which is legal.
fn small_udp(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut frame = udp(from, to, payload);
    frame[40..42].fill(0);
    frame
}

fn tcp(payload: &[u8]) -> Vec<u8> {
    let header = [
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];
    packet(IpProto::TCP, STATION, KERNEL, &header, payload)
}

fn gso(kind: GsoKind, size: u16) -> Gso {
    Gso {
        kind,
        ecn: false,
        size,
        network: 14,
        transport: 34,
        headers: if kind == GsoKind::Udp { 42 } else { 54 },
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

/// A socket that sees a device's frames whole, and can send such.
fn packets(device: &str, headers: bool) -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let all = (libc::ETH_P_ALL as u16).to_be();
    let name = std::ffi::CString::new(device).unwrap();
    // SAFETY: makes a descriptor, and names a device; addresses are of their lengths.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, kind, i32::from(all));
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut at: libc::sockaddr_ll = std::mem::zeroed();
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = all;
        at.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(fd, (&raw const at).cast(), len), 0);
        let on: libc::c_int = 1;
        let aux = libc::PACKET_AUXDATA;
        let set = libc::setsockopt(fd, libc::SOL_PACKET, aux, (&raw const on).cast(), 4);
        assert_eq!(set, 0);
        if headers {
            // PACKET_VNET_HDR.
            let set = libc::setsockopt(fd, libc::SOL_PACKET, 15, (&raw const on).cast(), 4);
            assert_eq!(set, 0);
        }
        socket
    }
}

/// A frame, and the VLAN of the tag that the kernel has taken off.
fn receive(socket: &OwnedFd) -> Option<(Vec<u8>, Option<u16>)> {
    let mut bytes = vec![0; 70_000];
    let mut control = [0u64; 8];
    // SAFETY: buffers of their lengths; what is read of the control message the kernel has written.
    unsafe {
        let mut piece = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let n = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        bytes.truncate(usize::try_from(n).ok()?);
        let first = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!first.is_null(), "it was asked for");
        let data = libc::CMSG_DATA(first).cast::<libc::tpacket_auxdata>();
        let data = data.read_unaligned();
        let tag = data.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
        Some((bytes, tag.then_some(data.tp_vlan_tci & 0xfff)))
    }
}

fn crosses(kind: Kind, v6: bool) {
    let own = Namespace::new();
    let peer = kernel(&own, v6);
    match kind {
        Kind::Udp => {
            let (bits, more) = if v6 { (64, "nodad") } else { (24, "") };
            let local = addresses(v6)[0];
            own.ip(&format!("addr add {local}/{bits} dev up0 {more}"));
        }
        Kind::Tap => {
            own.ip("link add br0 mtu 1600 type bridge\nlink set br0 up\nlink set up0 master br0");
        }
    }
    let bridged = own.id();
    // The bridge gets the tap once it is there.
    own.run(move || {
        let mut card = card(kind, v6);
        if kind == Kind::Tap {
            let set = std::process::Command::new("ip")
                .args(["link", "set", "bluff0", "master", "br0"])
                .status();
            assert!(set.unwrap().success(), "{bridged}");
        }
        both_ways(&mut card, &peer);
        large(&mut card, &peer, v6);
    });
}

/// Small packets.
fn both_ways(card: &mut Card, peer: &Namespace) {
    card.until("answer of the kernel's ARP", |card| {
        card.station.send(&question(STATION, KERNEL));
        let got = card.station.got();
        let is_it = |f: &Vec<u8>| f[6..12] == mac(2).0 && f[12..14] == [8, 6] && f[21] == 2;
        got.into_iter().find(is_it)
    });
    let socket = peer.run(|| {
        let socket = UdpSocket::bind((KERNEL, PORT)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    });
    let there = pattern(1000);
    card.station.send(&small_udp(STATION, KERNEL, &there));
    let mut buffer = [0; 2000];
    let from = card.until("datagram at the kernel", |_| {
        let (len, from) = socket.recv_from(&mut buffer).ok()?;
        assert_eq!(buffer[..len], there);
        Some(from)
    });
    assert_eq!(from, (STATION, PORT).into());
    socket.send_to(b"back", from).unwrap();
    card.until("datagram of the kernel", |card| {
        let got = card.station.got();
        got.into_iter().find(|f| f[42..].starts_with(b"back"))
    });
    // With a tag: the kernel's device shows it, and sends one.
    let socket = peer.run(|| packets("vx0", false));
    let there = plain(mac(2), mac(1), &pattern(100));
    card.station.send(&tagged(7, &there));
    card.until("tagged frame at the kernel", |_| {
        let (frame, tag) = receive(&socket)?;
        (frame == there).then(|| assert_eq!(tag, Some(7)))
    });
    let back = tagged(7, &plain(mac(1), mac(2), &pattern(100)));
    // SAFETY: a buffer of its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), back.as_ptr().cast(), back.len(), 0) };
    assert_eq!(sent, back.len() as isize);
    card.until("tagged frame of the kernel", |card| {
        card.station.got().into_iter().find(|f| *f == back)
    });
}

/// Frames that stand for several, both ways.
fn large(card: &mut Card, peer: &Namespace, v6: bool) {
    // UDP there.
    let socket = peer.run(|| {
        let socket = UdpSocket::bind((KERNEL, PORT + 1)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    });
    let payload = pattern(40_000);
    let mut frame = udp(STATION, KERNEL, &payload);
    // Another port is another begun sum.
    frame[36..38].copy_from_slice(&(PORT + 1).to_be_bytes());
    card.station
        .send_all(&[&frame], Some(gso(GsoKind::Udp, 1400)));
    let (mut got, mut count, mut buffer) = (Vec::new(), 0, [0; 2000]);
    card.until("datagrams of one frame", |_| {
        while let Ok(len) = socket.recv(&mut buffer) {
            got.extend_from_slice(&buffer[..len]);
            count += 1;
        }
        (got.len() >= payload.len()).then_some(())
    });
    assert!(got == payload);
    assert_eq!(count, payload.len().div_ceil(1400));
    // TCP there: seen as the kernel's device has it. More than fits into an outer packet too.
    for len in [60_000, 65_480] {
        let socket = peer.run(|| packets("vx0", false));
        let payload = pattern(len);
        card.station
            .send_all(&[&tcp(&payload)], Some(gso(GsoKind::Tcp4, 1396)));
        let (mut got, mut whole) = (Vec::new(), 0);
        card.until("segments of one frame", |_| {
            while let Some((frame, _)) = receive(&socket) {
                // Its answers are seen too.
                if frame[6..12] == mac(1).0 && frame[23] == 6 {
                    whole = whole.max(frame.len());
                    got.extend_from_slice(&frame[54..]);
                }
            }
            (got.len() >= payload.len()).then_some(())
        });
        assert!(got == payload);
        if cuts_tunnels(card) {
            assert!(whole >= len / 2, "it was cut on the way: {whole}");
        }
    }
    // TCP back, as a machine behind the kernel would send it.
    let socket = peer.run(|| packets("vx0", true));
    let payload = pattern(60_000);
    let mut frame = tcp(&payload);
    frame[..6].copy_from_slice(&mac(1).0);
    frame[6..12].copy_from_slice(&mac(9).0);
    // NEEDS_CSUM, TCPV4, the headers' length, the size, where the checksum begins and is.
    let mut header = vec![1, 1];
    for half in [54u16, 1396, 34, 16] {
        header.extend(half.to_ne_bytes());
    }
    let bytes = [header, frame].concat();
    // SAFETY: a buffer of its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(
        sent,
        bytes.len() as isize,
        "{}",
        std::io::Error::last_os_error()
    );
    let (mut got, mut whole) = (Vec::new(), 0);
    card.until("segments of the kernel's frame", |card| {
        for frame in card.station.got() {
            if frame[6..12] == mac(9).0 {
                whole = whole.max(frame.len());
                got.extend_from_slice(&frame[54..]);
            }
        }
        (got.len() >= payload.len()).then_some(())
    });
    assert!(got == payload);
    if cuts_tunnels(card) {
        assert_eq!(whole, 54 + payload.len(), "it was cut on the way, v6 {v6}");
    }
}

#[test]
fn the_kernels_vtep_over_udp_sockets() {
    if is_allowed("kernel::the_kernels_vtep_over_udp_sockets") {
        [false, true]
            .into_iter()
            .for_each(|v6| crosses(Kind::Udp, v6));
    }
}

#[test]
fn the_kernels_vtep_over_a_tap() {
    if is_allowed("kernel::the_kernels_vtep_over_a_tap") {
        [false, true]
            .into_iter()
            .for_each(|v6| crosses(Kind::Tap, v6));
    }
}
