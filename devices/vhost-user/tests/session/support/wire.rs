//! Payloads and codes of messages.

pub const MEMORY: u64 = 1 << 20;
pub const USER: u64 = 0x7f00_0000_0000;
pub const F_PROTOCOL: u64 = 1 << 30;

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// guest, size, user, offset
pub type RegionRow = (u64, u64, u64, u64);

pub fn table(regions: &[RegionRow]) -> Vec<u8> {
    let mut out = words(&[regions.len() as u32, 0]);
    for (guest, size, user, offset) in regions {
        out.extend(longs(&[*guest, *size, *user, *offset]));
    }
    out
}

pub fn single(r: RegionRow) -> Vec<u8> {
    longs(&[0, r.0, r.1, r.2, r.3])
}

/// A ring at 64 KiB times its index.
pub fn addr(index: u32, flags: u32) -> Vec<u8> {
    let at = USER + u64::from(index) * 0x1_0000;
    addr_at(index, flags, at, at + 0x8000, at + 0x4000)
}

pub fn addr_at(index: u32, flags: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut out = words(&[index, flags]);
    out.extend(longs(&[desc, used, avail, used.wrapping_sub(USER)]));
    out
}

pub fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut out = longs(&[size, offset]);
    out.extend(queues.to_ne_bytes());
    out.extend(queue_size.to_ne_bytes());
    out.extend([0; 4]);
    out
}

macro_rules! codes {
    ($($name:ident = $code:literal,)*) => { $(pub const $name: u32 = $code;)* };
}
codes! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SEND_RARP = 19,
    NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    SET_STATUS = 39,
    GET_STATUS = 40,
}
