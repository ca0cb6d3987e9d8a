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
//! The session does no I/O: bytes and descriptors go in and come out, time is given. [`SessionLoop`] is one thread with the sockets of
//! all functions, and routes [`Ticket`]s; an [`Attachment`] is a function. Who embeds it listens, and gives it the connections
//! ([`LoopHandle::connection`]).
//!
//! * [`spec`] is the wire, [`framing`] cuts the stream into messages, [`request`] checks what does not depend on anything else.
//! * [`Session`] keeps the order, what was agreed on, and what is mapped. A refused request changes nothing, is answered with an
//!   errno, and its descriptors are closed.
//! * [`Target`] is what a session asks of a function, [`PciTarget`] the one over any [`PciFunction`](bluff_pci::PciFunction).
//! * With a [`keeper`] a session outlives the process that serves it: [`Record`] is everything that it stands on.
//!
//! # The protocol
//! Follows the specification of vfio-user that comes with QEMU 11.1 (`docs/interop/vfio-user.rst`), version 0.0, with
//! what QEMU, libvfio-user and the `vfio_user` crate do where it leaves room. `docs/vfio-user.md` has every message.
//!
//! Not implemented: migration (`DEVICE_FEATURE`, `MIG_DATA_*`, `DIRTY_PAGES`), a second socket (`twin_socket`), ioregionfds,
//! mappings by file I/O, descriptors that unmask INTx. The session can do DMA by messages, for memory without a file; no function uses them, so
//! DMA that goes there fails.
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

mod attachment;
mod capabilities;
mod counters;
mod dma;
mod error;
pub mod framing;
mod function;
#[doc(hidden)]
pub mod fuzzing;
pub mod keeper;
mod mappings;
mod record;
pub mod request;
mod session;
mod slot;
pub mod spec;
mod target;

pub use attachment::{Attachment, AttachmentEvent, DEFAULT_BOUND, Listener, Options, Resume};
pub use capabilities::{Agreed, Limits};
pub use counters::{Counters, Messages};
pub use dma::{DmaDone, MAX_BYTES, MAX_OPS};
pub use error::{Errno, Error};
pub use function::{Finish, PciTarget};
pub use mappings::Mapping;
pub use record::Record;
pub use session::{Outgoing, Refused, Session};
pub use target::{
    IoEventFd, IrqAction, IrqChange, Irqs, Progress, Region, RegionMap, Target, Ticket, Written,
};

/// One thread for the sessions of all [`Attachment`]s.
pub type SessionLoop = bluff_attachment::SessionLoop<slot::Slot>;

/// Reaches the loop from any thread.
pub type LoopHandle = bluff_attachment::LoopHandle<slot::Slot>;
