//! The vhost-user attachment: sessions with front ends (VMMs), over which they set a virtio device's
//! queues up and take them down.
//!
//! ```text
//!   socket --reader--> framing --> message --> plan ----> session ----> VirtioDevice
//!     ^                                       (pure)         |  ^            |
//!     |                                                      |  +-- done ----+
//!     +------------- keeper: record, consume, reply <--------+
//!                      |
//!                      `- control half: SessionState and its descriptors
//! ```
//!
//! * [`framing`], [`message`], [`plan`], [`session`] do no I/O on the front end's socket. A [`plan`] is the next state,
//!   what has to happen before it holds, and the reply; a refused message changes nothing.
//! * [`state`] is everything that was negotiated as one value. With a [`keeper`] that records it, a session outlives
//!   the process that serves it, and the front end sees no disconnection.
//! * [`SessionLoop`] is one thread for the sessions of all functions; an [`Attachment`] is a function. Who embeds it
//!   listens, or connects, and gives it the connections ([`LoopHandle::connection`]). Devices answer from their reactors' threads through a mailbox.
//!
//! # The protocol
//! Follows the vhost-user protocol as QEMU 11.1 documents it. Protocol features: MQ, LOG_SHMFD, REPLY_ACK,
//! BACKEND_REQ, CONFIG, RESET_DEVICE, STATUS, CONFIGURE_MEM_SLOTS; INFLIGHT_SHMFD and GET_VRING_BASE_INFLIGHT for devices that
//! record what is in flight; NET_MTU and RARP for network devices.
//!
//! Not implemented: IOTLB messages (ACCESS_PLATFORM is not offered), postcopy, in-band notifications, host
//! notifiers, crypto sessions, cross-endian rings, shared objects and memory, device state over the protocol,
//! vring addresses that are guest addresses. `SET_LOG_FD` is accepted and never signalled.
//!
//! # Where the protocol leaves room
//! * A ring starts at `SET_VRING_KICK`, and only when features, size, addresses and memory are there.
//! * A ring that runs can be given another kick, call or error descriptor, another log flag, and
//!   `VHOST_F_LOG_ALL`; every other change is refused. A ring that is started but disabled is stopped by such a
//!   change: User-Mode Linux sets its rings up again in that way.
//! * `RESET_DEVICE` drops rings, features and the in-flight region. Memory, the log, the back-end channel,
//!   call and error descriptors stay, as QEMU does not send them again. Status 0 keeps features and positions too,
//!   and finishes what runs: QEMU 7.2 sends it before `GET_VRING_BASE`. `RESET_OWNER` stops rings.
//! * A log is for one migration: it goes with `VHOST_F_LOG_ALL`, and memory beyond it is refused while it is there.
//! * A request that is refused is answered with an error where an acknowledgement was asked for, and closes the
//!   connection elsewhere. `GET_CONFIG` answers without payload. A stream that makes no sense is closed in any case.
//! * Reconnection: one front end at a time. A second one is accepted and closed; one that comes while the last one's
//!   rings are still being stopped waits for that.
//! * The bound for stopping holds for all rings that a front end stops one after another.
//! * A device that records nothing in flight is offered split rings only: after its process's death they go on at their used
//!   index. Packed rings do not say where they stand.
//! * `GET_QUEUE_NUM` counts the pairs of a network device, as QEMU does, and the queues of others.
//! * Packed rings: base 0 of a front end that cannot migrate (User-Mode Linux) is a fresh ring, though its wrap counters
//!   say otherwise.

mod attachment;
pub mod channel;
mod error;
pub mod framing;
#[doc(hidden)]
pub mod fuzzing;
pub mod keeper;
pub mod message;
pub mod plan;
pub mod reader;
pub mod session;
mod slot;
pub mod spec;
pub mod state;
pub mod unix;

pub use bluff_attachment::limit;

pub use attachment::{
    Attachment, AttachmentEvent, DEFAULT_BOUND, Listener, Negotiated, Options, Resume,
};
pub use error::Error;
pub use session::NetControl;
pub use state::SessionState;

/// One thread for the sessions of all [`Attachment`]s.
pub type SessionLoop = bluff_attachment::SessionLoop<slot::Slot>;

/// Reaches the loop from any thread.
pub type LoopHandle = bluff_attachment::LoopHandle<slot::Slot>;
