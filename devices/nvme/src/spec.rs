//! Wire types and constants (NVMe Base 2.1, NVM Command Set 1.1, NVMe over PCIe 1.1). Little-endian.
//!
//! A field whose name ends in `_z` is zero's based: 0 means one.

pub mod admin;
mod command;
pub mod feature;
pub mod identify;
pub mod log;
pub mod nvm;
pub mod registers;
mod status;

pub use command::{Command, Completion, DataPointer, Psdt, SglDescriptor};
pub use status::Status;

/// Opcodes of I/O commands (NVM Command Set 1.1 §3.1.2, Figure 18; Base 2.1 Figure 555).
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Copy.
    pub const COPY: u8 = 0x19;
}

/// The namespace ID that stands for all of them (Base 2.1 §3.2.1.2).
pub const ALL_NAMESPACES: u32 = 0xffff_ffff;
