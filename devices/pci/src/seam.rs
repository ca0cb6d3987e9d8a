//! The seam between an attachment and a PCI function.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bluff_memory::GuestMemory;
use bluff_reactor::Notifier;

use crate::{Error, Layout};

/// Called once, on any thread, when what it was given for is over.
pub type Done = Box<dyn FnOnce() + Send>;

/// What a host can read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// Configuration space: 4096 bytes.
    Config,
    /// A BAR, by its number. The upper half of a 64-bit one is none.
    Bar(u8),
}

/// An interrupt of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Interrupt {
    /// The legacy interrupt: level-triggered. After each notification it is masked until it is unmasked, and then given again
    /// where it is still asserted (vfio: AUTOMASKED).
    Intx,
    /// An MSI-X vector, by its number.
    Msix(u16),
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// It is done.
    Done,
    /// It began something that takes its time: a function level reset, or the end of bus mastering. The attachment calls
    /// [`PciFunction::settle`], and answers the host's write only when that is over.
    Unsettled,
}

/// A register that a host can write by way of a descriptor, so that the write wakes whom it concerns at once.
/// Without a [`IoEvent::store`] the value is lost: that is for registers whose write says all.
#[derive(Clone, Debug)]
pub struct IoEvent {
    /// Offset in the BAR, in bytes.
    pub offset: u64,
    /// How many bytes a write has to have: 1, 2, 4 or 8; 0 for any.
    pub len: u32,
    /// Only writes of this value, where there is one.
    pub value: Option<u64>,
    /// What is signalled: an eventfd. Several registers may have the same one.
    pub event: Arc<OwnedFd>,
    /// Where the value is stored before the event is signalled.
    pub store: Option<IoStore>,
}

/// Memory that a value written by way of a descriptor is stored to, as wide as the write.
#[derive(Clone, Debug)]
pub struct IoStore {
    /// The memory, which the attachment's host may map and write as it likes: nothing in it can be trusted. Its size is sealed.
    pub file: Arc<OwnedFd>,
    /// Where in it, in bytes: aligned to the width of the write.
    pub offset: u64,
}

/// Something that the attachment has to know of.
///
/// Functions log nothing that a host can cause at will: the attachment does, and knows how often that may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PciEvent {
    /// The notifier of an interrupt blocked and was given up. The host hears nothing of it until there is another.
    NotifierHung(Interrupt),
    /// The device has stopped by itself, and needs a reset.
    Failed {
        /// What is wrong, for an operator.
        cause: Arc<str>,
    },
}

/// A PCI function, as its attachment sees it.
///
/// # Contract
/// Methods are called by one attachment at a time, on its thread, and return at once; the work happens on reactors.
/// What takes longer has a `bound` and a `done`: requests in flight get so long, are then cancelled, and `done` is
/// called within the bound and what cancelling takes. It may be called before the method returns.
///
/// The function uses memory from the time that it is set until the `done` of the next change, of a reset or of
/// [`PciFunction::detach`]; and only while the host lets it be bus master. Interrupts are given, by the descriptors that were set, as long as these are set.
///
/// A function begins as it is after power on: no memory, no interrupts set.
///
/// A session that is taken up by another process is made again in this order: memory, interrupts and their masks, then
/// [`PciFunction::load`].
pub trait PciFunction: Send {
    /// What of it is fixed.
    fn layout(&self) -> &Layout;

    /// Registers of a BAR that can be written by way of a descriptor; none is a good answer. They can be until [`PciFunction::detach`]; whoever asks
    /// again before that gets the same descriptors.
    fn io_events(&mut self, bar: u8) -> Vec<IoEvent>;

    /// Reads. Any length and alignment that lies in the region has an answer, be it all ones.
    ///
    /// # Errors
    /// [`Error::NoRegion`], [`Error::Range`]; `to` is all ones then, for an attachment whose host gets no errors.
    fn read(&mut self, region: Region, offset: u64, to: &mut [u8]) -> Result<(), Error>;

    /// Writes. Any length and alignment that lies in the region has an outcome, be it none.
    ///
    /// # Errors
    /// [`Error::NoRegion`], [`Error::Range`]; nothing is written then.
    fn write(&mut self, region: Region, offset: u64, from: &[u8]) -> Result<Written, Error>;

    /// Ends what the last write began, if it said [`Written::Unsettled`]; otherwise `done` is called at once. To be called before any other method.
    ///
    /// With `done` of a function level reset no request of before touches memory any more, and the function can be used.
    /// As a driver waits 100 ms for that and no longer (PCIe §6.6.2), the write itself has to be what lasts.
    fn settle(&mut self, bound: Duration, done: Done);

    /// How an interrupt is given from now on; `None`: it cannot be. What was asserted or pending is given at once.
    /// When this returns, nothing is written to the notifier before.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`].
    fn set_interrupt(
        &mut self,
        interrupt: Interrupt,
        notifier: Option<Notifier>,
    ) -> Result<(), Error>;

    /// Masks an interrupt for the attachment, or no longer. That is apart from what the host has masked in the function's
    /// own registers; it is given when nobody masks it. Unmasking gives what was asserted or pending.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`].
    fn mask_interrupt(&mut self, interrupt: Interrupt, masked: bool) -> Result<(), Error>;

    /// Gives an interrupt as if the device had, for tests of the way.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`].
    fn trigger_interrupt(&mut self, interrupt: Interrupt) -> Result<(), Error>;

    /// A new epoch of memory. With `done` all of the function has it, and nothing uses the one before it any more: requests that touch
    /// what has gone are waited for within `bound`, then cancelled.
    fn set_memory(&mut self, memory: Arc<GuestMemory>, bound: Duration, done: Done);

    /// A conventional reset: all but memory, and what the attachment has set for interrupts, is then as after power on.
    /// Until `done` BARs read as all ones, configuration space as it will be, and what is written is dropped. A reset while another is going on ends with it.
    fn reset(&mut self, bound: Duration, done: Done);

    /// The host has gone: a reset, and memory and interrupts are forgotten. The next one finds the function as after power on.
    fn detach(&mut self, bound: Duration, done: Done);

    /// State that is neither in the host's memory nor in the attachment's. Not while a reset is going on.
    fn save(&self) -> Vec<u8>;

    /// Takes up what [`PciFunction::save`] gave, in a function that has begun.
    ///
    /// # Errors
    /// [`Error::State`] where it is not of this function or version; the function is then as it was.
    fn load(&mut self, state: &[u8]) -> Result<(), Error>;

    /// Who is told of events, on any thread; replaces the one before.
    fn on_event(&mut self, listener: Arc<dyn Fn(PciEvent) + Send + Sync>);
}
