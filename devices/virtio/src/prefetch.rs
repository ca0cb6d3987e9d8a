//! Hints to the processor that memory is about to be used. What another core has just written takes a hundred nanoseconds to come; asked for
//! early, many lines come at the same time.
//!
//! Unsafe, because there is no other way to these instructions. They access nothing: any address will do.
#![allow(unsafe_code)]

/// A line that will be read.
#[inline(always)]
pub(crate) fn read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// A line that will be written.
#[inline(always)]
pub(crate) fn write(at: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, and no operation on processors that do not have it.
    unsafe {
        std::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
