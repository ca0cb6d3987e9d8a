//! A namespace, as the data path sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bluff_block::{Geometry, Volume};

use crate::attached::AnaState;
use crate::spec::Status;

/// A namespace that is attached to a controller. What changes without another one taking its place (its size, and whether a
/// format is going on) is atomic; with another LBA format it is another one.
#[derive(Debug)]
pub struct Namespace {
    nsid: u32,
    volume: Arc<dyn Volume>,
    lba_shift: u8,
    /// Of the volume, but for the size.
    geometry: Geometry,
    size: AtomicU64,
    blocked: AtomicBool,
}

impl Namespace {
    /// A namespace with blocks of `1 << lba_shift` bytes on `volume`.
    ///
    /// # Panics
    /// Where a block is smaller than the volume's, or `nsid` is 0 or stands for all.
    pub fn new(nsid: u32, volume: Arc<dyn Volume>, lba_shift: u8) -> Arc<Self> {
        let geometry = volume.geometry();
        assert!(
            nsid != 0 && nsid != crate::spec::ALL_NAMESPACES,
            "an NSID of one namespace"
        );
        assert!(
            (9..=16).contains(&lba_shift) && 1u32 << lba_shift >= geometry.block_size,
            "the volume reads and writes blocks of that size"
        );
        Arc::new(Self {
            nsid,
            lba_shift,
            size: AtomicU64::new(geometry.size),
            geometry,
            volume,
            blocked: AtomicBool::new(false),
        })
    }

    /// Its identifier.
    pub fn nsid(&self) -> u32 {
        self.nsid
    }

    /// What it stands on.
    pub fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }

    /// Bytes of a logical block, as a power of two.
    pub fn lba_shift(&self) -> u8 {
        self.lba_shift
    }

    /// Its volume's shape, as far as it does not change: not the size.
    #[inline]
    pub(crate) fn shape(&self) -> &Geometry {
        &self.geometry
    }

    /// How many logical blocks it has now.
    #[inline]
    pub fn blocks(&self) -> u64 {
        self.size.load(Ordering::Relaxed) >> self.lba_shift
    }

    /// Takes up the size that its volume has now ([`bluff_block::VolumeEvent::Resized`]).
    pub fn resized(&self) {
        self.size
            .store(self.volume.geometry().size, Ordering::Relaxed);
    }

    /// Whether a format is going on: commands are refused.
    #[inline]
    pub fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Acquire)
    }

    /// Has commands refused from now on, or no longer. What was taken before goes on: see `Message::Drain`.
    pub fn block(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Release);
    }
}

/// The namespaces that are attached to a controller: never changed, but replaced.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// The highest NSID that the subsystem can have (NN of Identify Controller).
    highest: u32,
    /// By NSID.
    attached: Vec<Arc<Namespace>>,
    /// For each of them: as which path to it the controller is known.
    states: Vec<AnaState>,
}

/// A table that many read.
pub type NamespaceTable = Arc<Namespaces>;

impl Namespaces {
    /// A table of these, in any order.
    ///
    /// # Panics
    /// Where two have one NSID, or one is above `highest`.
    pub fn new(highest: u32, attached: Vec<Arc<Namespace>>) -> NamespaceTable {
        let all = attached.into_iter().map(|n| (n, AnaState::Optimized));
        Self::with_states(highest, all.collect())
    }

    /// The same, with the state of the way to each.
    ///
    /// # Panics
    /// As [`Namespaces::new`].
    pub fn with_states(highest: u32, mut all: Vec<(Arc<Namespace>, AnaState)>) -> NamespaceTable {
        all.sort_unstable_by_key(|(n, _)| n.nsid);
        let (attached, states): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        assert!(
            attached.windows(2).all(|w| w[0].nsid < w[1].nsid),
            "one namespace has an NSID"
        );
        assert!(attached.last().is_none_or(|n| n.nsid <= highest));
        Arc::new(Self {
            highest,
            attached,
            states,
        })
    }

    /// The highest NSID that there can be.
    pub fn highest(&self) -> u32 {
        self.highest
    }

    /// Those that are attached, by NSID.
    pub fn attached(&self) -> &[Arc<Namespace>] {
        &self.attached
    }

    /// What a command of this namespace is refused with, because this is no way to it now (Base 2.1 §8.1.1.4 to §8.1.1.8).
    pub(crate) fn refusal(&self, nsid: u32) -> Option<Status> {
        let i = self.attached.binary_search_by_key(&nsid, |n| n.nsid).ok()?;
        self.states[i].check().err()
    }

    /// The one with this NSID.
    pub fn get(&self, nsid: u32) -> Option<&Arc<Namespace>> {
        let i = self.attached.binary_search_by_key(&nsid, |n| n.nsid).ok()?;
        Some(&self.attached[i])
    }
}
