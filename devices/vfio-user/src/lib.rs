//! The vfio-user attachment: sessions with clients (VMMs), over which they use a PCI function.
//!
//! ```text
//!   socket --> framing --> request --> session --------> Target: a function
//!     ^        messages    checked     in order,           |  ^
//!     |                                one at a time       |  `- dma_read, dma_write
//!     `------- poll_transmit <-----------+---- finished ---'
//!                                        `---- dma: DMA_READ, DMA_WRITE, by message ID
//! ```
//!
//! Nothing here does I/O: bytes and descriptors go in and come out, time is given. Whoever embeds it has the
//! sockets, and routes [`Ticket`]s and DMA operations.
//!
//! * [`spec`] is the wire, [`framing`] cuts the stream into messages, [`request`] checks what does not depend on anything else.
//! * [`Session`] keeps the order, what was agreed on, and what is mapped. A refused request changes nothing, is answered with an
//!   errno, and its descriptors are closed.
//! * [`Target`] is what a session asks of a function.
//!
//! # The protocol
//! Follows the specification of vfio-user that comes with QEMU 11.1 (`docs/interop/vfio-user.rst`), version 0.0, with
//! what QEMU, libvfio-user and the `vfio_user` crate do where it leaves room. `docs/vfio-user.md` has every message.
//!
//! Not implemented: migration (`DEVICE_FEATURE`, `MIG_DATA_*`, `DIRTY_PAGES`), a second socket (`twin_socket`), ioregionfds,
//! mappings by file I/O.
//!
//! # Where the protocol leaves room
//! * An unmap takes all mappings within its range, and is refused where it would cut one; a range without any is
//!   answered as any other. `VFIO_DMA_UNMAP_FLAG_ALL` takes all.
//! * While an unmap, a reset, or a write that ends DMA is not answered, later commands wait: "the server will process commands in the order
//!   they are received". DMA messages are answered out of that order.
//! * An unmap fails what is under way by DMA messages in its range; a reset, and a write that ends DMA, all of it: QEMU answers none of them while it waits
//!   for the reply.
//! * A client whose first message is not an acceptable `VERSION` gets an error and is to be closed. A second
//!   `VERSION` is refused.

mod capabilities;
mod dma;
mod error;
pub mod framing;
#[doc(hidden)]
pub mod fuzzing;
mod mappings;
pub mod request;
mod session;
pub mod spec;
mod target;

pub use capabilities::{Agreed, Limits};
pub use dma::{DmaDone, MAX_BYTES, MAX_OPS};
pub use error::{Errno, Error};
pub use mappings::Mapping;
pub use session::{Outgoing, Refused, Session};
pub use target::{
    IoEventFd, IrqAction, IrqChange, Irqs, Progress, Region, RegionMap, Target, Ticket, Written,
};
