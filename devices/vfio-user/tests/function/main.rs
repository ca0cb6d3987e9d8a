//! A PCI function over a socket: the loop of sessions, a client's bytes, and a small device behind them.

mod attacks;
mod clients;
mod device;
mod life;
mod memory;
mod recorded;
mod settling;
mod support;
#[path = "../wire/mod.rs"]
mod wire;
