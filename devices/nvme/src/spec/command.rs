//! A submission queue entry, and a completion queue entry.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Status;

/// A submission queue entry (Base 2.1 §4.1.1, Figure 92).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Command {
    /// What to do.
    pub opcode: u8,
    /// Fused operation (bits 1:0), PSDT (bits 7:6); the rest is reserved.
    pub flags: u8,
    /// Command identifier.
    pub cid: U16,
    /// Namespace identifier.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata pointer.
    pub mptr: U64,
    /// Data pointer: PRP entry 1 and 2, or an SGL descriptor.
    pub dptr: [U64; 2],
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<Command>() == 64);

/// How a command points at its data (Base 2.1 Figure 91, "PSDT").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Psdt {
    /// PRPs.
    Prp,
    /// An SGL; metadata, where there is any, is a buffer.
    Sgl,
    /// An SGL; metadata, where there is any, has an SGL segment of its own.
    SglMetadata,
}

/// Where the data of a command is, not looked at yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPointer {
    /// PRP entries 1 and 2.
    Prp(u64, u64),
    /// The first SGL descriptor.
    Sgl(SglDescriptor),
}

/// An SGL descriptor (Base 2.1 §4.3.2, Figure 111).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Address (for those that have one).
    pub address: U64,
    /// Length in bytes.
    pub length: U32,
    /// Depends on the type.
    pub reserved: [u8; 3],
    /// Type (bits 7:4) and sub type (bits 3:0).
    pub identifier: u8,
}

const _: () = assert!(size_of::<SglDescriptor>() == 16);

impl Command {
    /// Which of two fused commands it is: 0 for none (Base 2.1 Figure 91).
    pub fn fused(&self) -> u8 {
        self.flags & 0b11
    }

    /// How it points at its data; `None` for the value that is reserved.
    pub fn psdt(&self) -> Option<Psdt> {
        match self.flags >> 6 {
            0 => Some(Psdt::Prp),
            1 => Some(Psdt::Sgl),
            2 => Some(Psdt::SglMetadata),
            _ => None,
        }
    }

    /// Where its data is; `None` for a reserved PSDT.
    pub fn data_pointer(&self) -> Option<DataPointer> {
        Some(match self.psdt()? {
            Psdt::Prp => DataPointer::Prp(self.dptr[0].get(), self.dptr[1].get()),
            Psdt::Sgl | Psdt::SglMetadata => DataPointer::Sgl(zerocopy::transmute!(self.dptr)),
        })
    }
}

/// A completion queue entry (Base 2.1 §4.2.1, Figure 96).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Completion {
    /// Command specific.
    pub dw0: U32,
    /// Command specific.
    pub dw1: U32,
    /// Head of the submission queue: entries before it were taken.
    pub sq_head: U16,
    /// Which submission queue.
    pub sq_id: U16,
    /// Command identifier.
    pub cid: U16,
    /// Phase tag (bit 0) and status.
    pub status: U16,
}

const _: () = assert!(size_of::<Completion>() == 16);

impl Completion {
    /// The field of status and phase.
    pub fn field(status: Status, phase: bool) -> U16 {
        U16::new(status.bits() << 1 | u16::from(phase))
    }
}
