//! A function, at its seam: what a host can read and write, and what its device hears of it.

mod bars;
mod config;
mod dma;
mod intx;
mod model;
mod msix;
mod resets;
mod rig;
mod state;
