//! A PCI Express function as the card composes it, and the trait that every function is to its attachment.
//!
//! ```text
//!   attachment (vfio-user)                                   reactors
//!      |  read, write, settle     memory, reset    eventfds     ^
//!      v                               |               |        |
//!   PciFunction ................ the seam ............ | ...... | ....
//!      |                               |               v        |
//!   Function<D>: ConfigSpace ----------+------> Msix, Intx: lines <-- signal --+
//!      |   what the host has set:      |        (mask, pending, eventfd)       |
//!      |   decoding, bus master, power v                                       |
//!      +--------- BARs ---------> Device: registers, DMA, reset ---------> its workers
//! ```
//!
//! A [`Device`] has registers and does DMA. All else is done once, here: configuration space with its
//! capabilities ([`ConfigSpace`]), the MSI-X table and its pending bits, INTx, and resets in all their forms. So
//! nothing here knows NVMe or virtio, and no device knows PCI.
//!
//! What a host writes is never trusted and never refused: PCI has no such answer. What cannot be served is an
//! *unsupported request*: it reads as all ones, and what is written is dropped. An [`Error`] is for an attachment that
//! names what is not there.
//!
//! Follows PCI Express Base 6.x (section numbers are of 6.0; configuration registers in §7.5 and §7.7, resets in §6.6,
//! interrupts in §6.1, power in §5) and, for what it took over, PCI Local Bus 3.0 and PCI Power Management 1.2. One function, an
//! endpoint: type 0 header, memory BARs, INTx, MSI-X, D0 and D3hot, function level reset, serial number. Not implemented: I/O BARs,
//! expansion ROM, MSI, D1, D2, D3cold and PME, advanced error reporting, ARI, SR-IOV, ATS, LTR, L1 substates, vital product data, several functions in a device.

pub mod config;
mod device;
mod error;
mod events;
mod function;
mod intx;
mod layout;
mod line;
mod msix;
mod seam;
pub mod spec;
mod state;
mod sync;

pub use config::ConfigSpace;
pub use device::{Device, Dma, Resources};
pub use error::Error;
pub use events::Events;
pub use function::Function;
pub use intx::Intx;
pub use layout::{Area, Bar, BarKind, Layout, PAGE};
pub use msix::Vector;
pub use seam::{Done, Interrupt, IoEvent, IoStore, PciEvent, PciFunction, Region, Written};
