//! The seam between networks and what carries their tunnels.

use std::fmt;
use std::net::IpAddr;
use std::time::Instant;

use bluff_net::{Lent, NetError};
use bluff_packet::Vni;
use bluff_reactor::Context;

use crate::udp::UdpDrops;

/// Leads from this card to others. It is shared by networks and reactors.
pub trait Underlay: Send + Sync + fmt::Debug {
    /// Opens the way out on a reactor, for one port of one network.
    ///
    /// # Errors
    /// [`NetError`].
    fn open(&self, cx: &mut Context<'_>) -> Result<Box<dyn Uplink>, NetError>;

    /// What it has dropped, of all networks together; `None`: it does not count.
    fn counted(&self) -> Option<&UdpDrops> {
        None
    }
}

/// The way out to other cards. It lives on a reactor.
pub trait Uplink {
    /// Sends the frames whose bits are set in `which` to the VTEP `to`, as frames of `vni`. What cannot be sent is dropped and counted where the underlay counts.
    /// Heads are as they were when it returns, and nothing uses what is lent any more.
    fn send(&mut self, now: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr);
}
