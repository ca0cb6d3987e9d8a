//! A vfio-user client without a VM, for tests and benchmarks.
//!
//! ```text
//!   Pci            BARs sized, capabilities, MSI-X, resets, power     pci
//!    |
//!   Client         one method a command; answers DMA messages         client, info, irq, region, dma
//!    |    \
//!    |     Mapped  what of a region the server shares                 mapped
//!    |
//!   Socket         any bytes and descriptors, messages of the server  socket
//! ```
//!
//! It judges the server, so it shares no code and no constant with it. What the server answers is not trusted: a reply that is short, that
//! nobody asked for, or that has descriptors where none belong, is an [`Error`], and never a panic.
//!
//! # Threads
//! A [`Client`] can be used by many threads at once. Commands go out in the order in which they come; one thread at a time reads what
//! comes back, and keeps what others wait for. DMA messages of the server are answered by whoever reads: by every
//! method that waits for a reply, and by [`Client::serve`].
//!
//! # The protocol
//! Follows `docs/interop/vfio-user.rst` of QEMU 11.1, version 0.0, in the way QEMU speaks it: what it proposes, how it asks for
//! region info twice, and how it sends interrupts in chunks. Section names in quotes are of that document.
//!
//! Not implemented: migration, `twin_socket`, ioregionfds.

mod client;
mod dma;
mod error;
mod event;
mod info;
mod irq;
mod mapped;
pub mod pci;
mod region;
mod socket;
pub mod spec;

pub use client::{Agreed, Client, Options, Reply, Sent};
pub use dma::{DmaMap, DmaMemory};
pub use error::Error;
pub use event::Event;
pub use info::{Area, DeviceInfo, IoEventFd, IrqInfo, RegionInfo, Store};
pub use irq::{IrqAction, IrqData};
pub use mapped::Mapped;
pub use pci::Pci;
pub use region::Write;
pub use socket::{Message, Socket};
