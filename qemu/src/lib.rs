//! scratch
pub mod agent;
pub mod cache;
pub mod cpio;
pub mod debian;
pub mod device;
pub mod emulator;
pub mod guest;
pub mod hostdir;
pub mod image;
pub mod kernel;
pub mod packages;
pub mod process;
pub mod qmp;
