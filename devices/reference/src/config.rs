//! The device as its driver sees it: features, configuration space, cache mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bluff_block::{Geometry, Volume};
use zerocopy::IntoBytes;

use crate::spec::{Config, ID_LEN, SECTOR, WRITEBACK_OFFSET, feature};

/// Most data segments of a request: with header and status they fill a ring of 128, QEMU's default
/// size. A chain may not be longer than the ring, be it indirect (virtio 1.3 §2.7.5.3.1).
const SEG_MAX: u16 = 126;

/// What the device is made with.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Number of queues, 1 to 64: `vhost-user-backend` names them in 64 bits.
    pub num_queues: u16,
    /// Largest size of a queue, a power of two.
    pub queue_size: u16,
    /// Refuse writes, whatever the volume says.
    pub read_only: bool,
    /// What GET_ID answers; cut to 20 bytes.
    pub serial: String,
    /// Whether queue threads poll their rings and never sleep.
    pub poll: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            num_queues: 1,
            queue_size: 256,
            read_only: false,
            serial: "bluff-reference".into(),
            poll: false,
        }
    }
}

/// One virtio-blk device, shared by its queue threads and the session.
#[derive(Debug)]
pub struct Device {
    volume: Arc<dyn Volume>,
    options: DeviceOptions,
    acked: AtomicU64,
    writeback: AtomicBool,
}

impl Device {
    /// A device over `volume`.
    ///
    /// # Panics
    /// Where an option is outside of its range.
    pub fn new(volume: Arc<dyn Volume>, options: DeviceOptions) -> Self {
        assert!((1..=64).contains(&options.num_queues));
        assert!(options.queue_size.is_power_of_two() && options.queue_size <= 32768);
        Self {
            volume,
            options,
            acked: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// Its volume.
    pub fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }

    /// The volume's shape now, as the driver is told of it.
    pub fn geometry(&self) -> Geometry {
        let mut geometry = self.volume.geometry();
        geometry.read_only |= self.options.read_only;
        geometry
    }

    /// What it offers (virtio 1.3 §5.2.3 and §6).
    pub fn features(&self) -> u64 {
        let geometry = self.geometry();
        let mut offered = feature::VERSION_1
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH;
        if self.options.num_queues > 1 {
            offered |= feature::MQ;
        }
        if geometry.volatile_cache {
            offered |= feature::CONFIG_WCE;
        }
        if geometry.read_only {
            return offered | feature::RO;
        }
        if geometry.discard.is_some() {
            offered |= feature::DISCARD;
        }
        if geometry.write_zeroes.is_some() {
            offered |= feature::WRITE_ZEROES;
        }
        offered
    }

    /// Notes what the driver took.
    pub fn set_acked(&self, features: u64) {
        self.acked.store(features, Ordering::Relaxed);
    }

    /// Whether the driver took `bit`.
    pub fn has(&self, bit: u64) -> bool {
        self.acked.load(Ordering::Relaxed) & bit != 0
    }

    /// Whether a write has to be stable when it completes (virtio 1.3 §5.2.6.2): the driver
    /// cannot flush, or has turned the cache off.
    pub fn write_through(&self) -> bool {
        let cached = self.writeback.load(Ordering::Relaxed) || !self.has(feature::CONFIG_WCE);
        !(self.has(feature::FLUSH) && cached)
    }

    /// The configuration space (virtio 1.3 §5.2.4).
    pub fn config(&self) -> Config {
        let geometry = self.geometry();
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
        let block = geometry.block_size;
        let ratio = (geometry.physical_block_size / block).max(1);
        let mut config = Config {
            capacity: (geometry.size / SECTOR).into(),
            seg_max: u32::from(
                SEG_MAX
                    .min(self.options.queue_size.saturating_sub(2))
                    .max(1),
            )
            .into(),
            blk_size: block.into(),
            physical_block_exp: ratio.ilog2() as u8,
            min_io_size: u16::try_from(ratio).unwrap_or(u16::MAX).into(),
            opt_io_size: (geometry.optimal_io / block).into(),
            writeback: u8::from(geometry.volatile_cache && self.writeback.load(Ordering::Relaxed)),
            num_queues: self.options.num_queues.into(),
            ..Config::default()
        };
        // A driver that took FLUSH may write through nevertheless, but one that can choose the mode
        // and cannot flush must find it written through (§5.2.5.2).
        if self.has(feature::CONFIG_WCE) && !self.has(feature::FLUSH) {
            config.writeback = 0;
        }
        if let Some(discard) = geometry.discard {
            config.max_discard_sectors = sectors(discard.max).into();
            config.max_discard_seg = 1.into();
            config.discard_sector_alignment = sectors(u64::from(discard.granularity)).into();
        }
        if let Some(zeroes) = geometry.write_zeroes {
            config.max_write_zeroes_sectors = sectors(zeroes.max).into();
            config.max_write_zeroes_seg = 1.into();
            config.write_zeroes_may_unmap = u8::from(zeroes.unmap);
        }
        config
    }

    /// `size` bytes of the configuration space from `offset` on; zeroes where it has ended.
    pub fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config();
        let bytes = config
            .as_bytes()
            .iter()
            .copied()
            .chain(std::iter::repeat(0));
        bytes.skip(offset as usize).take(size as usize).collect()
    }

    /// The driver writes the configuration space; only `writeback` takes it. Says whether it did.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> bool {
        match bytes {
            [value] if offset == WRITEBACK_OFFSET && self.has(feature::CONFIG_WCE) => {
                self.writeback.store(*value != 0, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    /// The identification string, padded with zeroes.
    pub fn id(&self) -> [u8; ID_LEN] {
        let mut id = [0; ID_LEN];
        let serial = self.options.serial.as_bytes();
        let n = serial.len().min(ID_LEN);
        id[..n].copy_from_slice(&serial[..n]);
        id
    }
}
