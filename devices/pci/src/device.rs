//! What stands behind the BARs.

use std::sync::Arc;
use std::time::Duration;

use bluff_memory::GuestMemory;

use crate::events::Events;
use crate::{Done, Error, Intx, IoEvent, Vector};

/// How far a device may reach into the host's memory.
#[derive(Clone, Debug)]
pub enum Dma {
    /// Not at all: the host has taken bus mastering away, or power. Requests keep their place. What cannot be finished is done again, or goes on, when
    /// there is memory again; a reset forgets it.
    Off,
    /// In this epoch.
    On(Arc<GuestMemory>),
}

/// What a device is made with: how it is heard.
#[derive(Debug)]
pub struct Resources {
    /// Its MSI-X vectors, by number.
    pub vectors: Vec<Vector>,
    /// Its legacy interrupt.
    pub intx: Option<Intx>,
    /// To whom it tells what an operator should know.
    pub events: Events,
}

/// A device: registers in BARs, and DMA.
///
/// # Contract
/// Methods are called on one thread and return at once; the work happens on reactors.
///
/// Register accesses have 1, 2, 4 or 8 bytes and are naturally aligned; they lie in a BAR of the layout, outside of the MSI-X table and
/// the pending bits. None comes while the host has memory space disabled, in D3hot, or between the call of [`Device::reset`] and its `done`. What a
/// device has no register of that width for reads as it likes, and is dropped where it is written.
///
/// Memory is used only while DMA is on. It begins, and is after a reset, off.
pub trait Device: Send {
    /// Reads registers.
    fn read(&mut self, bar: u8, offset: u64, to: &mut [u8]);

    /// Writes registers.
    fn write(&mut self, bar: u8, offset: u64, from: &[u8]);

    /// Changes how far the device may reach. With `done` all of it knows that, and nothing uses what it could reach before, and cannot now:
    /// requests that touch it are waited for within `bound`, then cancelled.
    ///
    /// Another change can come before an earlier one, or a reset, is over: the last one holds, and each `done` is called when what it
    /// stands for is over.
    fn set_dma(&mut self, dma: Dma, bound: Duration, done: Done);

    /// Everything is as after power on, and DMA is off; what was not finished within `bound` is cancelled and forgotten. With `done`
    /// nothing uses memory, and registers can be accessed. It is not called again before; a change of DMA may still be going on
    /// when it is called.
    fn reset(&mut self, bound: Duration, done: Done);

    /// Whether requests of the device are in flight (Transactions Pending, PCIe §7.5.3.5). A driver that is about to
    /// reset the function may wait a second for it to say no.
    fn transactions_pending(&self) -> bool {
        false
    }

    /// Registers of a BAR that can be written by way of a descriptor, until [`Device::drop_io_events`]. Whoever asks again gets the same
    /// descriptors.
    fn io_events(&mut self, bar: u8) -> Vec<IoEvent> {
        let _ = bar;
        Vec::new()
    }

    /// The host has gone: nothing that was given by [`Device::io_events`] may have an effect on the next one, whoever still holds it.
    /// A reset follows.
    fn drop_io_events(&mut self) {}

    /// State that is neither in the host's memory nor in what the function keeps.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes up what [`Device::save`] gave. DMA is off; where the host has it on, it is turned on after this.
    ///
    /// # Errors
    /// [`Error::State`]; the device is then as it was.
    fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        match state {
            [] => Ok(()),
            _ => Err(Error::State("the device has none")),
        }
    }
}
