//! What composes a card: the daemon `bluffd`, its CLI `bluffctl`, and the library under both.
//!
//! ```text
//!   card.toml       bluffctl
//!       |               |
//!    config         control (a line of JSON each way)
//!        \           /
//!         daemon: the control half ---- registry: volumes, functions, states, events
//!            |
//!         message: numbered, serialised, with descriptors, over one socket pair
//!            |
//!         data: the data half ---- reactors, sessions, queues, volumes
//! ```
//!
//! The control half knows what there is and never touches I/O; the data half does I/O and holds what hosts send. They are
//! threads of one process, or two processes, which makes no difference to either. What a card is to present is said in the
//! neutral types of [`spec`]; the file, the socket and a later API translate to them.
//!
//! Not here: access control beyond the permissions of the control socket; a configuration that is read again while the
//! daemon runs (the [`registry`] can create, change and delete live; what is missing is a face for it).

pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod data;
pub mod data_half;
pub mod descriptors;
pub mod formats;
pub mod identity;
pub mod kinds;
pub mod message;
pub mod registry;
pub mod runtime_dir;
pub mod spec;
pub mod stats;
pub mod units;
