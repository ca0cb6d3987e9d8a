//! QEMU as a library: everything that puts a real guest in front of a function, on a machine that has none of it yet.
//!
//! ```text
//!   packages  what apt-get must install          debian ── mmdebstrap ──> cache (~/.cache/diamond-bluff)
//!                                                   │
//!            hostdir: programs run out of a folder ─┤ QEMU 11.1, QEMU 7.2, User-Mode Linux 6.1, guest tools
//!                                                   │
//!   kernel: vmlinux, modules ──┐                    │
//!   cpio: the agent, tools ────┴─> image ──> guest (emulator, device, qmp)   or   uml
//!                      firmware: OVMF, a disk ──┘
//!                                                   └── agent: scripts in, status and output out
//!   namespace: two network namespaces and a cable between them, for back ends that send to each other
//! ```
//!
//! A guest is up in three seconds under emulation. It runs from memory alone, so that the disks which it sees are the disks under
//! test. What is started ends with its owner, by its process id, and leaves no file behind.
//!
//! Variables: [`emulator::QEMU_VARIABLE`], [`emulator::ACCEL_VARIABLE`], [`debian::MIRROR_VARIABLE`], `XDG_CACHE_HOME`.
//!
//! QMP as of QEMU 11.1; boot by PVH (Xen's `start_info`) and by Linux's boot protocol 2.08; archives in cpio's newc format.
//!
//! What it does not do: guests of other architectures than x86-64, networks of QEMU's own, displays, migration and removal of vfio-user devices (QEMU has no
//! migration of them, and aborts when one with MSI-X is removed).

pub mod agent;
mod builder;
pub mod cache;
pub mod cpio;
pub mod debian;
pub mod device;
pub mod emulator;
pub mod firmware;
pub mod guest;
pub mod hostdir;
pub mod image;
pub mod kernel;
pub mod namespace;
pub mod packages;
pub mod process;
pub mod qmp;
pub mod uml;
