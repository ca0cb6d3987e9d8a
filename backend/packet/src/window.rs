//! The part of a frame that is at hand, and where the layer in question ends. Every header is read through it.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::Malformed;

#[derive(Clone, Copy)]
pub(crate) struct Window<'a> {
    head: &'a [u8],
    /// Where the layer ends, counted from the beginning of `head`. It may lie past it.
    end: usize,
}

impl<'a> Window<'a> {
    /// `head` begins something that has `len` bytes in all. What `head` has beyond that is no part of it: every read looks at the end first.
    #[inline(always)]
    pub fn new(head: &'a [u8], len: usize) -> Self {
        Self { head, end: len }
    }

    #[inline(always)]
    pub fn end(&self) -> usize {
        self.end
    }

    /// The same bytes with an end that is nearer.
    #[inline(always)]
    pub fn until(self, end: usize) -> Self {
        Self {
            end: self.end.min(end),
            ..self
        }
    }

    /// The header at `at`: `past` where the layer ends before it does, `Truncated` where only the part at hand does.
    #[inline(always)]
    pub fn get<T>(&self, at: usize, past: Malformed) -> Result<&'a T, Malformed>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        // Not `at + size`: `at` may be a sum of what the sender wrote.
        if self
            .end
            .checked_sub(at)
            .is_none_or(|left| left < size_of::<T>())
        {
            return Err(past);
        }
        match self.head.get(at..).map(T::ref_from_prefix) {
            Some(Ok((header, _))) => Ok(header),
            _ => Err(Malformed::Truncated),
        }
    }

    /// `len` bytes at `at`, or why not.
    #[inline]
    pub fn bytes(&self, at: usize, len: usize, past: Malformed) -> Result<&'a [u8], Malformed> {
        if self.end.checked_sub(at).is_none_or(|left| left < len) {
            return Err(past);
        }
        // In the layer, so no overflow.
        self.head.get(at..at + len).ok_or(Malformed::Truncated)
    }
}
