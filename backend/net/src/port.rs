//! The seam between a network function and its network.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bluff_reactor::Context;

use crate::{Lent, Offloads, Outlet, Steering};

/// Why a port cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its network has no place for it, or has gone.
    #[error("the network is not there")]
    Gone,
    /// The system refused something.
    #[error("{what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// What a port is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The longest IP packet that it carries whole, in bytes; frames are longer by their Ethernet header and tags. Frames that stand for
    /// several may be longer.
    pub mtu: u16,
    /// What may be left undone on the frames that it is given.
    pub takes: Offloads,
    /// Whether it is connected.
    pub link: bool,
}

/// A function's place in a network. It is shared by all queues of the function, on all reactors.
///
/// # Contract
/// Methods are called on any thread and return at once.
pub trait Port: Send + Sync + fmt::Debug {
    /// What it is like now.
    fn attributes(&self) -> Attributes;

    /// Opens the way out for a transmit queue, on the reactor that the queue lives on.
    ///
    /// # Errors
    /// [`NetError`].
    fn open(&self, cx: &mut Context<'_>, queue: u16) -> Result<Box<dyn Lane>, NetError>;

    /// Says where frames for the function go from now on. Frames that are under way may still go to where they went before.
    fn set_receivers(&self, receivers: Arc<Receivers>);
}

/// The way out of one transmit queue. It lives on the queue's reactor.
pub trait Lane {
    /// When it takes frames again, where it takes none now: the port is over its rate. A batch that is sent all the same is taken.
    fn ready(&mut self, now: Instant) -> Result<(), Instant> {
        let _ = now;
        Ok(())
    }

    /// Sends every frame of the batch on its way, or drops it and counts why. Their heads may be changed. When it returns nothing uses
    /// what the batch lends.
    fn send(&mut self, now: Instant, batch: Lent<'_>);
}

/// Where frames for a function go.
#[derive(Clone, Debug)]
pub struct Receivers {
    /// By receive queue, from 0. `None`: it is not served, and what is for it is dropped.
    pub queues: Vec<Option<Outlet>>,
    /// Which of them a frame is for.
    pub steering: Steering,
}

impl Receivers {
    /// Nobody.
    pub fn none() -> Self {
        Self {
            queues: Vec::new(),
            steering: Steering::Spread(1),
        }
    }
}
