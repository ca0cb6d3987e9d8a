//! Who records a session, consumes its messages and replies ([`bluff_attachment::keeper`]).

pub use bluff_attachment::keeper::{Bounds, Commit, Descriptors, Keeper, Key, Ledger, Progress};

use crate::framing::MAX_FILES;
use crate::function::MAX_MAPPINGS;

/// Interrupts of a function: MSI-X (PCIe §7.7.2.2), INTx, ERR.
const INTERRUPTS: usize = 2048 + 2;

/// What a session may have recorded, with the limits that a server has if nothing else is said: a [`Ledger`]'s bounds.
pub const BOUNDS: Bounds = Bounds {
    message: 2 << 20,
    files: MAX_FILES,
    // Of a message that is not whole, and of one more.
    kept: MAX_MAPPINGS + INTERRUPTS + 2 * MAX_FILES,
    // All mappings that there can be, as text.
    record: 32 << 20,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, Mapping, Record};

    #[test]
    fn the_largest_record_is_within_the_bounds() {
        let limits = Limits::default();
        let most = u64::MAX;
        let mapping = Mapping {
            address: most,
            size: most,
            offset: most,
            read: false,
            write: false,
            file: false,
        };
        let maps = limits.max_dma_maps as usize;
        let vectors = INTERRUPTS as u32;
        let mut record = Record::default();
        record.mappings = vec![(mapping, Some(most)); maps];
        record.interrupts = (0..vectors).map(|v| (2, v, most)).collect();
        record.masked = (0..vectors).map(|v| (2, v)).collect();
        // Configuration space and an MSI-X table, and as much of its own.
        record.function = vec![0xff; 2 * (4096 + 17 * 2048)];
        record.partial.bytes = vec![0xff; limits.max_message()];
        let step = record.to_bytes().len() + BOUNDS.message + 16 * BOUNDS.kept;
        assert!(step < BOUNDS.record, "{step}");
        assert!(limits.max_message() <= BOUNDS.message);
    }
}
