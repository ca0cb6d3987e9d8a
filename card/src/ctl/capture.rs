//! A capture on its way into a file. Only whole blocks of pcapng are written, so that the file can be read wherever it ends.

use std::io::{BufReader, Read, Write};

use anyhow::{Context, Result, ensure};

/// Most bytes of a block: those of the longest frame are 66,000 or so.
const BLOCK_MAX: usize = 1 << 20;
/// Bytes of a block beside what stands in it.
const AROUND: usize = 12;
/// A packet.
const PACKET: u32 = 6;
/// What the file ends with: statistics of the interface.
const STATISTICS: u32 = 5;
/// Their count of dropped packets.
const DROPPED: u16 = 5;

/// What a file has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Frames in it.
    pub frames: u64,
    /// Frames that there was no room for; `None` where the end of the file is missing.
    pub missed: Option<u64>,
}

/// Copies a capture until it ends.
///
/// # Errors
/// Where what comes is no pcapng, or the file cannot be written.
pub fn copy(from: impl Read, mut to: impl Write) -> Result<Copied> {
    let mut from = BufReader::with_capacity(64 << 10, from);
    let mut copied = Copied::default();
    let mut block = Vec::new();
    loop {
        block.resize(8, 0);
        // It may break off anywhere, where the data half dies.
        if from.read_exact(&mut block).is_err() {
            break;
        }
        let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four"));
        let (kind, len) = (word(0), word(4) as usize);
        let makes_sense = len >= AROUND && len.is_multiple_of(4) && len <= BLOCK_MAX;
        ensure!(makes_sense, "what bluffd sends is no capture");
        block.resize(len, 0);
        if from.read_exact(&mut block[8..]).is_err() {
            break;
        }
        to.write_all(&block).context("the file")?;
        match kind {
            PACKET => copied.frames += 1,
            STATISTICS => copied.missed = Some(dropped(&block).unwrap_or(0)),
            _ => {}
        }
        if from.buffer().is_empty() {
            // Whoever reads the file as it grows sees the newest frame.
            to.flush().context("the file")?;
        }
    }
    to.flush().context("the file")?;
    Ok(copied)
}

/// What a block of statistics says was dropped.
fn dropped(block: &[u8]) -> Option<u64> {
    let mut options = block.get(8 + 12..block.len() - 4)?;
    loop {
        let (head, rest) = options.split_at_checked(4)?;
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let (code, len) = (half(0), usize::from(half(2)));
        if code == DROPPED {
            let value = rest.get(..len)?;
            return Some(u64::from_le_bytes(value.try_into().ok()?));
        }
        if code == 0 {
            return None;
        }
        options = rest.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use bluff_net::capture::Captured;
    use bluff_net::capture::pcapng::{LinkType, begin, end};

    use super::*;

    #[test]
    fn only_whole_blocks_are_copied() {
        let mut file = begin("a test", "net0", LinkType::Ethernet, 100);
        let first = file.len();
        // A packet of four bytes and no options.
        for word in [6, 36, 0, 0, 0, 4, 4, 0x0403_0201, 36_u32] {
            file.extend(word.to_le_bytes());
        }
        let packet = file.len();
        let captured = Captured { kept: 1, missed: 7 };
        file.extend(end((1, 2), captured));
        for len in 0..=file.len() {
            let mut to = Vec::new();
            let copied = copy(&file[..len], &mut to).unwrap();
            assert!(to.len() <= len && file.starts_with(&to));
            let frames = u64::from(len >= packet);
            let missed = (len == file.len()).then_some(7);
            assert_eq!(copied, Copied { frames, missed }, "{len}");
            assert!(len < first || to.len() >= first);
        }
    }

    #[test]
    fn what_is_no_capture_is_refused() {
        for bad in [11_u32, 14, 1 << 21, u32::MAX, 0] {
            let mut block = [0; 40];
            block[4..8].copy_from_slice(&bad.to_le_bytes());
            assert!(copy(&block[..], Vec::new()).is_err(), "{bad}");
        }
        // Statistics whose options run past them say nothing, and break nothing.
        for len in 0..40_u32 {
            let mut block = vec![0xff; 4 * len as usize + 12];
            block[..4].copy_from_slice(&5_u32.to_le_bytes());
            let whole = block.len() as u32;
            block[4..8].copy_from_slice(&whole.to_le_bytes());
            assert_eq!(copy(&block[..], Vec::new()).unwrap().missed, Some(0));
        }
    }
}
