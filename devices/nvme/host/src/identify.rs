//! What Identify gives, by the offsets of its figures (Base 2.1 §5.1.13.2.1; NVM §4.1.5.1).

/// Identify Controller: 4096 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifyController(pub Vec<u8>);

/// Identify Namespace, of the NVM command set: 4096 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifyNamespace(pub Vec<u8>);

fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("as long as it is")
}

fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let text = String::from_utf8_lossy(&bytes[at..at + len]);
    text.trim_end_matches([' ', '\0']).to_owned()
}

macro_rules! fields {
    ($of:ident: $($(#[$doc:meta])* $name:ident, $at:literal, $type:ty;)*) => {
        impl $of {
            $(
                $(#[$doc])*
                pub fn $name(&self) -> $type {
                    <$type>::from_le_bytes(le(&self.0, $at))
                }
            )*
        }
    };
}

fields! { IdentifyController:
    /// PCI vendor ID.
    vid, 0, u16;
    /// PCI subsystem vendor ID.
    ssvid, 2, u16;
    /// Several ports, controllers; ANA.
    cmic, 76, u8;
    /// Largest transfer: 2^n pages; 0: no limit.
    mdts, 77, u8;
    /// Controller ID.
    cntlid, 78, u16;
    /// Version.
    ver, 80, u32;
    /// Asynchronous events.
    oaes, 92, u32;
    /// Attributes.
    ctratt, 96, u32;
    /// Optional admin commands.
    oacs, 256, u16;
    /// Aborts at a time, less one.
    acl, 258, u8;
    /// Event requests at a time, less one.
    aerl, 259, u8;
    /// Firmware slots.
    frmw, 260, u8;
    /// Log page attributes.
    lpa, 261, u8;
    /// Entries of the error log, less one.
    elpe, 262, u8;
    /// Entry sizes of SQs.
    sqes, 512, u8;
    /// Entry sizes of CQs.
    cqes, 513, u8;
    /// How many namespaces there may be.
    nn, 516, u32;
    /// Optional I/O commands.
    oncs, 520, u16;
    /// Fused operations.
    fuses, 522, u16;
    /// What Format does.
    fna, 524, u8;
    /// Volatile write cache.
    vwc, 525, u8;
    /// Copy descriptor formats.
    ocfs, 534, u16;
    /// SGLs.
    sgls, 536, u32;
}

impl IdentifyController {
    /// Serial number.
    pub fn serial(&self) -> String {
        text(&self.0, 4, 20)
    }

    /// Model number.
    pub fn model(&self) -> String {
        text(&self.0, 24, 40)
    }

    /// Firmware revision.
    pub fn firmware(&self) -> String {
        text(&self.0, 64, 8)
    }

    /// Name of the subsystem.
    pub fn nqn(&self) -> String {
        text(&self.0, 768, 256)
    }

    /// Doorbell Buffer Config is there.
    pub fn has_shadow_doorbells(&self) -> bool {
        self.oacs() & 1 << 8 != 0
    }

    /// Data can be described by SGLs.
    pub fn has_sgls(&self) -> bool {
        self.sgls() & 3 != 0
    }
}

fields! { IdentifyNamespace:
    /// Blocks.
    nsze, 0, u64;
    /// Blocks that can be allocated.
    ncap, 8, u64;
    /// Blocks that are allocated.
    nuse, 16, u64;
    /// Features.
    nsfeat, 24, u8;
    /// LBA formats, less one.
    nlbaf, 25, u8;
    /// The format in use.
    flbas, 26, u8;
    /// Shared between controllers.
    nmic, 30, u8;
    /// What deallocated blocks read as.
    dlfeat, 33, u8;
    /// Longest Copy range.
    mssrl, 74, u16;
    /// Longest Copy.
    mcl, 76, u32;
    /// Ranges of a Copy, less one.
    msrc, 80, u8;
    /// ANA group.
    anagrpid, 92, u32;
}

impl IdentifyNamespace {
    /// Bytes of a block.
    pub fn block(&self) -> u64 {
        let flbas = self.flbas();
        let format = usize::from(flbas & 0xf | flbas >> 1 & 0x30);
        let shift = self.0[128 + 4 * format + 2];
        1u64.checked_shl(u32::from(shift)).unwrap_or(0)
    }

    /// NGUID.
    pub fn nguid(&self) -> [u8; 16] {
        le(&self.0, 104)
    }

    /// EUI-64.
    pub fn eui64(&self) -> [u8; 8] {
        le(&self.0, 120)
    }
}
