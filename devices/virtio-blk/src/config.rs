//! What the device says of itself: features and configuration space.

use bluff_block::Geometry;
use bluff_virtio::features;

use crate::spec::{Config, SECTOR, feature};

/// Most segments in a request.
pub(crate) const SEG_MAX: u16 = 254;
/// Most bytes in a segment. Together with [`SEG_MAX`] it keeps a request under 16 MiB, so that it is
/// one operation on any volume.
pub(crate) const SIZE_MAX: u32 = 64 << 10;
/// Most ranges in a DISCARD or WRITE_ZEROES.
pub(crate) const RANGES: u32 = 16;

/// Every feature that a device on such a volume offers.
pub(crate) fn offered(g: &Geometry) -> u64 {
    let when = |on: bool, bit: u64| if on { bit } else { 0 };
    features::RING
        | feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::MQ
        // Without a volatile cache the device is write-through, and must not say otherwise (§5.2.5.2).
        | when(g.volatile_cache, feature::FLUSH | feature::CONFIG_WCE)
        | when(g.read_only, feature::RO)
        | when(g.discard.is_some() && !g.read_only, feature::DISCARD)
        | when(g.write_zeroes.is_some() && !g.read_only, feature::WRITE_ZEROES)
}

/// Configuration space of a device with `queues` queues on such a volume.
pub(crate) fn config(g: &Geometry, queues: u16, writeback: bool) -> Config {
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    let physical = (g.physical_block_size / g.block_size).max(1);
    let mut c = Config::default();
    c.capacity.set(g.size / SECTOR);
    c.size_max.set(SIZE_MAX);
    c.seg_max.set(u32::from(SEG_MAX));
    c.blk_size.set(g.block_size);
    c.physical_block_exp = physical.ilog2() as u8;
    c.min_io_size.set(u16::try_from(physical).unwrap_or(1));
    c.opt_io_size.set(g.optimal_io / g.block_size);
    c.writeback = u8::from(writeback);
    c.num_queues.set(queues);
    if let Some(d) = g.discard.filter(|_| !g.read_only) {
        c.max_discard_sectors.set(sectors(d.max));
        c.max_discard_seg.set(RANGES);
        c.discard_sector_alignment
            .set(sectors(u64::from(d.granularity)).max(1));
    }
    if let Some(z) = g.write_zeroes.filter(|_| !g.read_only) {
        c.max_write_zeroes_sectors.set(sectors(z.max));
        c.max_write_zeroes_seg.set(RANGES);
        c.write_zeroes_may_unmap = u8::from(z.unmap);
    }
    c
}
