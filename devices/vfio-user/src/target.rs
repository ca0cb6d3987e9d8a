//! What a session asks of a function.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bluff_pci::IoStore;

use crate::{Errno, Mapping};

/// Names an answer that comes later: given with the call, given back to [`Session::finished`](crate::Session::finished).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub(crate) u64);

/// Whether something is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// It is.
    Done,
    /// It will be when the ticket is given back.
    Pending,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// It is done.
    Done,
    /// It took the device's DMA away, by a reset or by the end of bus mastering. The client's write is answered when that is over.
    Unsettled(Progress),
}

/// A region of the device (vfio-user, "VFIO_USER_DEVICE_GET_REGION_INFO").
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// Bytes; zero for a region that is not there.
    pub size: u64,
    /// The client may read it.
    pub read: bool,
    /// The client may write it.
    pub write: bool,
    /// What of it can be mapped.
    pub map: Option<RegionMap>,
}

/// What of a region can be mapped by the client.
#[derive(Clone, Debug)]
pub struct RegionMap {
    /// The file to map.
    pub file: Arc<OwnedFd>,
    /// Where the region begins in the file.
    pub offset: u64,
    /// Offset in the region and bytes of each area that may be mapped; none: all of it.
    pub areas: Vec<(u64, u64)>,
}

/// An address of a region where writes can be signalled without a message (vfio-user,
/// "Sub-Region IO FD info format (ioeventfd)").
#[derive(Clone, Debug)]
pub struct IoEventFd {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes of the write; zero for any.
    pub size: u64,
    /// Only writes of this value.
    pub value: Option<u64>,
    /// What is signalled.
    pub file: Arc<OwnedFd>,
    /// Where the value is stored before that; otherwise it is lost.
    pub store: Option<IoStore>,
}

/// A type of interrupts (vfio-user, "VFIO_USER_DEVICE_GET_IRQ_INFO").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Irqs {
    /// How many there are.
    pub count: u32,
    /// Bits of [`spec::irq`](crate::spec::irq): EVENTFD, MASKABLE, AUTOMASKED, NORESIZE.
    pub flags: u32,
}

/// What is done to an interrupt, or what is signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// The device raises it.
    Trigger,
    /// It is masked.
    Mask,
    /// It is unmasked.
    Unmask,
}

/// A change to interrupts of one type (vfio-user, "VFIO_USER_DEVICE_SET_IRQS").
#[derive(Debug)]
pub enum IrqChange {
    /// All descriptors of the type are dropped.
    Disable,
    /// Does something to some of them, now.
    Now {
        /// What.
        action: IrqAction,
        /// To which; each exists.
        vectors: Vec<u32>,
    },
    /// Descriptors to signal from now on, instead of those before.
    Assign {
        /// When to signal.
        action: IrqAction,
        /// The interrupt of the first descriptor; those of all exist.
        start: u32,
        /// One for each interrupt; `None` drops what there was. Nothing about them is checked.
        files: Vec<Option<OwnedFd>>,
    },
}

/// A function as a session sees it.
///
/// The session checks first: regions and interrupts exist, ranges lie inside and are not empty, mappings do not overlap.
/// Methods return at once. What takes time answers [`Progress::Pending`], and whoever drives the session gives the
/// ticket to [`Session::finished`](crate::Session::finished); until then no other request is served. The session puts no bound on that: the target does,
/// below the client's patience (QEMU: 5 s).
pub trait Target {
    /// A command is served from here on that did not wait behind another one. What it waits for, and what those
    /// wait for that came meanwhile, has to fit into one bound: the client may have given all of them the same time.
    fn begin(&mut self) {}

    /// How many regions there are; at most 100, as QEMU takes no more. For PCI at least
    /// [`PCI_COUNT`](crate::spec::region::PCI_COUNT), those that are not there with size zero.
    fn regions(&self) -> u32;

    /// A region; `index` is below [`Target::regions`].
    fn region(&self, index: u32) -> Region;

    /// What the client may have signalled without a message, of a region.
    fn io_event_fds(&mut self, _region: u32) -> Vec<IoEventFd> {
        Vec::new()
    }

    /// How many types of interrupts there are; at most 50, as QEMU takes no more.
    fn irq_types(&self) -> u32;

    /// A type of interrupts; `index` is below [`Target::irq_types`].
    fn irqs(&self, index: u32) -> Irqs;

    /// Reads `to.len()` bytes, at least one, of a readable region.
    ///
    /// # Errors
    /// What the client is told.
    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Writes `from.len()` bytes, at least one, to a writable region. The ticket is for a write that is
    /// [unsettled](Written::Unsettled) and not over yet. What is under way with [`Session::dma_read`](crate::Session::dma_read) and
    /// `dma_write` fails as soon as a write is unsettled: a client that waits for the reply to the write would not answer it.
    ///
    /// # Errors
    /// What the client is told.
    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        ticket: Ticket,
    ) -> Result<Written, Errno>;

    /// Changes interrupts of a type.
    ///
    /// # Errors
    /// What the client is told; then nothing has changed, and the descriptors are closed.
    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno>;

    /// Memory that the device may use. Over when all of the device knows of it: the client may then name it at once, in a way that
    /// nobody here is told of (a mapped doorbell). Without a file only
    /// [`Session::dma_read`](crate::Session::dma_read) and [`Session::dma_write`](crate::Session::dma_write) get there.
    /// The file may be of any kind, shorter than the mapping, and shrink later. It may be the function's own: QEMU maps back
    /// what it has mapped of its regions.
    ///
    /// # Errors
    /// What the client is told; then nothing has changed, and the file is closed.
    fn map(
        &mut self,
        mapping: Mapping,
        file: Option<OwnedFd>,
        ticket: Ticket,
    ) -> Result<Progress, Errno>;

    /// Memory that was mapped and is to be used no more; at least one mapping. Over when nothing here touches it. What is under way for it with
    /// [`Session::dma_read`](crate::Session::dma_read) and `dma_write` has failed already. It cannot be refused.
    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress;

    /// Resets the device; memory and descriptors of interrupts stay. Over when it is as after power-on.
    fn reset(&mut self, ticket: Ticket) -> Progress;

    /// The client has gone: all memory and all descriptors of interrupts are to be given up (vfio-user, "Client Disconnection"), and the
    /// next client is to find the function clean. It can come while an unmap, a write or a reset is pending; their
    /// tickets are of no more use then.
    fn disconnected(&mut self, ticket: Ticket) -> Progress;
}
