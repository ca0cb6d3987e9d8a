//! The way in: datagrams into frames of their networks.
//!
//! Unsafe, because frames are lent out of the buffers that datagrams came into.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bluff_memory::IoVec;
use bluff_net::{Batch, Cause, HEAD, all_of};
use bluff_packet::Vni;
use bluff_packet::tunnel::{Geneve, Vxlan};
use bluff_reactor::{Actor, Context, Event, Glance, Turn};

use super::socket::{self, Incoming};
use super::{Shared, TunnelKind};
use crate::arrival::Arrival;
use crate::network::Network;

/// Messages of one call, each of up to 64 KiB.
const BUFFERS: usize = 8;

/// Takes datagrams of one socket.
pub(super) struct Receiver {
    socket: OwnedFd,
    shared: Arc<Shared>,
    buffers: Vec<Box<[u8]>>,
    got: Vec<Incoming>,
    arrivals: HashMap<Vni, (Weak<Network>, Arrival)>,
    batch: Batch,
    glance: Glance,
}

impl Receiver {
    pub(super) fn new(cx: &mut Context<'_>, socket: OwnedFd, shared: Arc<Shared>) -> Self {
        let events = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
        if let Err(e) = cx.register(socket.as_raw_fd(), 0, events) {
            log::error!("tunnelled frames cannot be waited for: {e}");
        }
        Self {
            socket,
            shared,
            buffers: Vec::new(),
            got: Vec::new(),
            arrivals: HashMap::new(),
            batch: Batch::default(),
            glance: Glance::default(),
        }
    }

    /// Goes through what has come.
    fn unwrap(&mut self, shared: &Shared, now: Instant) {
        let drops = &shared.drops.received;
        let mut of = None;
        for at in 0..self.got.len() {
            let Incoming {
                from,
                len,
                segment,
                cut,
            } = self.got[at];
            let Some(from) = from.filter(|_| !cut) else {
                drops.add_shared(Cause::Malformed, 1);
                continue;
            };
            let mut start = 0;
            if len == 0 {
                drops.add_shared(Cause::BadTunnel, 1);
            }
            while start < len {
                let end = (start + segment).min(len);
                let datagram = &self.buffers[at][start..end];
                start = end;
                let parsed = match shared.kind {
                    TunnelKind::Vxlan => {
                        Vxlan::parse(datagram, datagram.len()).map(|t| (t.vni, t.inner, false))
                    }
                    TunnelKind::Geneve => {
                        Geneve::parse(datagram, datagram.len()).map(|t| (t.vni, t.inner, t.control))
                    }
                };
                let (vni, inner) = match parsed {
                    Ok((vni, inner, false)) => (vni, inner),
                    Ok((_, _, true)) | Err(_) => {
                        drops.add_shared(Cause::BadTunnel, 1);
                        continue;
                    }
                };
                // Frames of one network and from one card go on together.
                if self.batch.is_full() || of.is_some_and(|of| of != (vni, from)) {
                    deliver(&mut self.arrivals, &mut self.batch, shared, now, of);
                }
                of = Some((vni, from));
                let frame = &datagram[inner..];
                let (head, rest) = frame.split_at(frame.len().min(HEAD));
                if self.batch.push(head).is_some() {
                    let rest = IoVec::new(rest.as_ptr().cast_mut(), rest.len());
                    // SAFETY: the buffers stay as they are until the batch is cleared, before the next datagrams come.
                    unsafe { self.batch.lend(&[rest]) };
                }
            }
        }
        deliver(&mut self.arrivals, &mut self.batch, shared, now, of);
    }
}

/// Gives the batch, frames of one VNI from one address, to their network.
fn deliver(
    arrivals: &mut HashMap<Vni, (Weak<Network>, Arrival)>,
    batch: &mut Batch,
    shared: &Shared,
    now: Instant,
    of: Option<(Vni, IpAddr)>,
) {
    let Some((vni, from)) = of else { return };
    let which = all_of(batch);
    let networks = shared.networks.load();
    match networks.get(&vni) {
        Some(network) => {
            let known = arrivals.get(&vni);
            if !known.is_some_and(|(weak, _)| std::ptr::eq(weak.as_ptr(), Arc::as_ptr(network))) {
                let arrival = Arrival::new(network.clone(), now);
                arrivals.insert(vni, (Arc::downgrade(network), arrival));
            }
            if let Some((_, arrival)) = arrivals.get_mut(&vni) {
                arrival.receive(now, &mut batch.lent(), which, vni, from);
            }
        }
        None => {
            // Not kept for a network that has gone.
            arrivals.remove(&vni);
            let n = u64::from(which.count_ones());
            shared.drops.received.add_shared(Cause::Stranger, n);
        }
    }
    batch.clear();
}

impl Actor for Receiver {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {
        self.glance.told();
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        let shared = self.shared.clone();
        if shared.closed.load(Ordering::Relaxed) {
            cx.unregister(self.socket.as_raw_fd());
            return Turn::Done;
        }
        if !self.glance.is_due() {
            return Turn::Idle;
        }
        if self.buffers.is_empty() {
            self.buffers = (0..BUFFERS).map(|_| vec![0; 65_536].into()).collect();
        }
        // An error is of something that was sent before, or says that nothing has come.
        if let Err(e) = socket::receive(&self.socket, &mut self.buffers, &mut self.got) {
            return match e.kind() {
                std::io::ErrorKind::WouldBlock => {
                    self.glance.found_nothing();
                    Turn::Idle
                }
                _ => Turn::Worked,
            };
        }
        self.unwrap(&shared, cx.now());
        Turn::Worked
    }
}
