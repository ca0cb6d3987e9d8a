//! Bytes as choices.

/// What is left of the input; zeroes follow it. What the bytes mean in more detail is with each target.
pub(super) struct Choices<'a>(pub(super) &'a [u8]);

impl Choices<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn u8(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.u8(), self.u8(), self.u8(), self.u8()])
    }

    /// Mostly one of the values that make sense.
    pub(super) fn of(&mut self, sensible: &[u32]) -> u32 {
        match self.u8() {
            0xff => self.u32(),
            n => sensible[usize::from(n) % sensible.len()],
        }
    }
}
