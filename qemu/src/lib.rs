//! scratch
pub mod cache; pub mod cpio; pub mod debian; pub mod hostdir; pub mod image; pub mod kernel; pub mod packages;
