//! A tap device in a namespace of its own: what the kernel sends comes out of the port, and the other way round.
//!
//! Unsafe, because a datagram that stands for several is asked for by a system call.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use bluff_net::tap::{Carries, Tap, TapOptions};
use bluff_net::{
    Batch, Gso, GsoKind, Offload, Offloads, Pair, Port, Receive, Receivers, Registration, Steering,
};
use bluff_reactor::{Options, Poll, Reactor};
use bluff_testing::namespace::{Namespace, is_allowed};

const STATION: [u8; 6] = [2, 0, 0, 0, 0, 2];

struct Keeper(Sender<(Vec<u8>, Offload)>);

impl Receive for Keeper {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        for i in which.iter().map(|i| usize::from(*i)) {
            let frame = &batch.frames()[i];
            let mut bytes = vec![0; frame.len()];
            batch.copy_to(i, 0, &mut bytes);
            self.0.send((bytes, frame.offload)).unwrap();
        }
    }
}

fn open(reactor: &Reactor, name: &str) -> Result<Tap, bluff_net::NetError> {
    Tap::open(TapOptions {
        name: name.into(),
        carries: Carries::Frames,
        reactors: vec![reactor.handle()],
        poll: Poll::Never,
    })
}

fn until<T>(reactor: &mut Reactor, mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came");
        reactor.step(Some(Duration::from_millis(1)));
    }
}

#[test]
fn frames_cross_with_what_is_left_to_do() {
    if is_allowed("frames_cross_with_what_is_left_to_do") {
        let namespace = Namespace::new();
        let id = namespace.id();
        namespace.run(move || crosses(&id));
    }
}

fn crosses(id: &str) {
    let mut reactor = Reactor::new(&Options::default()).unwrap();
    let mut tap = open(&reactor, "blue%d").unwrap();
    assert_eq!(tap.name(), "blue0");
    assert_eq!(tap.raise_mtu(1280).unwrap(), 1500);
    assert_eq!(tap.raise_mtu(1600).unwrap(), 1600);
    // Each queue has one user.
    let error = open(&reactor, "blue0").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot use the tap device: somebody else does"
    );
    let error = open(&reactor, "lo").unwrap_err();
    assert!(error.to_string().contains("it is no tap device"), "{error}");
    for line in [
        "addr add 10.1.0.1/24 dev blue0",
        "neigh add 10.1.0.2 lladdr 02:00:00:00:00:02 dev blue0",
    ] {
        let mut ip = std::process::Command::new("ip");
        let status = ip.args(line.split(' ')).status().unwrap();
        assert!(status.success(), "{id}: {line}");
    }
    let (near, far) = Pair::new();
    let near: Arc<dyn Port> = Arc::new(near);
    tap.plug_in(&near);
    let (sender, got) = channel();
    let keeper = Rc::new(RefCell::new(Keeper(sender)));
    let registration = Registration::new(&mut reactor.context(), keeper);
    far.set_receivers(Arc::new(Receivers {
        queues: vec![Some(registration.outlet().clone())],
        steering: Steering::Spread(1),
    }));
    let mut lane = far.open(&mut reactor.context(), 0).unwrap();
    let socket = UdpSocket::bind(("10.1.0.1", 7)).unwrap();
    socket.set_nonblocking(true).unwrap();
    // The kernel cuts nothing that the card can.
    let size: libc::c_int = if tap.completes().contains(Offloads::USO4) {
        1000
    } else {
        0
    };
    let value = (&raw const size).cast();
    // SAFETY: a number.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            value,
            4,
        )
    };
    assert_eq!(set, 0);
    let payload: Vec<u8> = (0..1400).map(|i| i as u8).collect();
    socket.send_to(&payload, ("10.1.0.2", 9)).unwrap();
    let (frame, offload) = until(&mut reactor, || {
        got.try_iter()
            .find(|(f, _)| f[..6] == STATION && f[23] == 17)
    });
    assert_eq!(frame[42..], payload);
    if size > 0 {
        let gso = Gso {
            kind: GsoKind::Udp,
            ecn: false,
            size: 1000,
            network: 14,
            transport: 34,
            headers: 42,
        };
        assert_eq!(offload.gso, Some(gso));
    }
    // Back, as it came: with a checksum that is to be completed, and to be cut.
    let mut back = [&frame[6..12], &STATION, &frame[12..]].concat();
    back[26..34].copy_from_slice(&[10, 1, 0, 2, 10, 1, 0, 1]);
    back[34..38].copy_from_slice(&[0, 9, 0, 7]);
    let mut batch = Batch::default();
    let (head, rest) = back.split_at(256);
    batch.push(head).unwrap().offload = offload;
    let rest = bluff_memory::IoVec::new(rest.as_ptr().cast_mut(), rest.len());
    // SAFETY: it outlives the batch.
    unsafe { batch.lend(&[rest]) };
    lane.send(Instant::now(), batch.lent());
    let (mut all, mut buffer) = (Vec::new(), [0; 2000]);
    until(&mut reactor, || {
        while let Ok(len) = socket.recv(&mut buffer) {
            assert!(size == 0 || len <= 1000);
            all.extend_from_slice(&buffer[..len]);
        }
        (all.len() >= payload.len()).then_some(())
    });
    assert!(all == payload);
    assert_eq!(tap.malformed(), 0);
    // It goes with its user.
    drop(tap);
    until(&mut reactor, || {
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        (!devices.contains("blue0")).then_some(())
    });
}
