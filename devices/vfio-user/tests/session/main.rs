//! Sessions from outside: every message and every refusal, against a function that only records.

mod attacks;
mod dma;
mod info;
mod irqs;
mod memory;
mod order;
mod regions;
mod support;
mod unsettled;
mod version;
#[path = "../wire/mod.rs"]
mod wire;
