//! What a function keeps over the death of its process.
//!
//! ```text
//!   version | Message Control told | INTx asserted | configuration space | entries: 16 bytes, flags | the device's
//!      1              1                    1                4096                   17 a vector           the rest
//! ```

use crate::msix::{Entry, Msix};
use crate::spec::{CONFIG_SIZE, ENTRY};
use crate::{ConfigSpace, Error, Intx};

const VERSION: u8 = 1;
const HEADER: usize = 3;
const RECORD: usize = ENTRY as usize + 1;
/// Flags of an entry: its mask bit was written.
const TOLD: u8 = 1;
/// Its vector is pending.
const PENDING: u8 = 1 << 1;

pub(crate) struct State<'a> {
    pub(crate) msix_told: bool,
    pub(crate) intx: bool,
    pub(crate) config: &'a [u8; CONFIG_SIZE],
    pub(crate) entries: Vec<Entry>,
    pub(crate) pending: Vec<u16>,
    pub(crate) device: &'a [u8],
}

impl<'a> State<'a> {
    pub(crate) fn save(
        config: &ConfigSpace,
        msix: Option<&Msix>,
        intx: Option<&Intx>,
        device: Vec<u8>,
    ) -> Vec<u8> {
        let (bytes, told) = config.save();
        let asserted = intx.is_some_and(Intx::is_asserted);
        let mut state = vec![VERSION, u8::from(told), u8::from(asserted)];
        state.extend_from_slice(bytes);
        if let Some(msix) = msix {
            for (entry, vector) in msix.entries().iter().zip(msix.vectors()) {
                state.extend_from_slice(&entry.bytes);
                let pending = u8::from(vector.is_pending()) * PENDING;
                state.push((u8::from(entry.told) * TOLD) | pending);
            }
        }
        state.extend(device);
        state
    }

    pub(crate) fn parse(state: &'a [u8], vectors: u16) -> Result<Self, Error> {
        let short = Error::State("too short");
        let [VERSION, told @ (0 | 1), intx @ (0 | 1), rest @ ..] = state else {
            return Err(match state.len() < HEADER {
                true => short,
                false => Error::State("another version"),
            });
        };
        let (config, rest) = rest.split_first_chunk().ok_or(short.clone())?;
        let len = usize::from(vectors) * RECORD;
        let (records, device) = rest.split_at_checked(len).ok_or(short)?;
        let mut entries = Vec::with_capacity(vectors.into());
        let mut pending = Vec::new();
        for (index, record) in (0..).zip(records.chunks_exact(RECORD)) {
            let (bytes, flags) = record.split_first_chunk().expect("of this length");
            if flags[0] & !(TOLD | PENDING) != 0 {
                return Err(Error::State("flags that no vector has"));
            }
            entries.push(Entry::of(*bytes, flags[0] & TOLD != 0));
            if flags[0] & PENDING != 0 {
                pending.push(index);
            }
        }
        Ok(Self {
            msix_told: *told == 1,
            intx: *intx == 1,
            config,
            entries,
            pending,
            device,
        })
    }
}
