//! The model's reading of PRPs and SGLs (Base 2.1 §4.3), as plain as it can be.

use bluff_nvme_host::HostMemory;

/// Address and bytes of each piece.
pub type Pieces = Vec<(u64, u64)>;

const PAGE: u64 = 4096;

fn word(memory: &HostMemory, at: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.memory().read(at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Where `len` bytes of a command are; none where that breaks a rule.
pub fn pieces(memory: &HostMemory, c: &[u32; 16], len: u64) -> Option<Pieces> {
    let double = |i: usize| u64::from(c[i]) | u64::from(c[i + 1]) << 32;
    match c[0] >> 14 & 3 {
        0 => prps(memory, double(6), double(8), len),
        1 => sgl(memory, double(6), double(8), len),
        _ => None,
    }
}

fn prps(memory: &HostMemory, first: u64, second: u64, len: u64) -> Option<Pieces> {
    let now = len.min(PAGE - first % PAGE);
    let mut found = vec![(first, now)];
    let mut left = len - now;
    if left == 0 {
        return (second == 0).then_some(found);
    }
    if left <= PAGE {
        found.push((second, left));
        return second.is_multiple_of(PAGE).then_some(found);
    }
    let mut at = second;
    while left > 0 {
        let entry = word(memory, at);
        if !entry.is_multiple_of(PAGE) {
            return None;
        }
        // The last one of a page, where that is not the last one of all, leads to the next page.
        if at % PAGE == PAGE - 8 && left > PAGE {
            at = entry;
            continue;
        }
        let now = left.min(PAGE);
        found.push((entry, now));
        left -= now;
        at += 8;
    }
    Some(found)
}

fn sgl(memory: &HostMemory, first: u64, second: u64, len: u64) -> Option<Pieces> {
    let (mut found, mut left) = (Vec::new(), len);
    let mut descriptors = vec![(first, second)];
    let mut is_last = false;
    while !descriptors.is_empty() {
        let count = descriptors.len();
        for (i, (at, rest)) in std::mem::take(&mut descriptors).into_iter().enumerate() {
            let (size, kind) = (rest & 0xffff_ffff, rest >> 60);
            if rest >> 32 & 0xff_ffff != 0 || rest >> 56 & 0xf != 0 {
                return None;
            }
            match kind {
                0 => {
                    found.push((at, size));
                    left = left.checked_sub(size)?;
                }
                2 | 3 if i + 1 == count && !is_last && size > 0 && size % 16 == 0 => {
                    is_last = kind == 3;
                    let entries = (0..size).step_by(16);
                    let read = |o| (word(memory, at + o), word(memory, at + o + 8));
                    descriptors = entries.map(read).collect();
                }
                _ => return None,
            }
        }
    }
    (left == 0).then_some(found)
}
