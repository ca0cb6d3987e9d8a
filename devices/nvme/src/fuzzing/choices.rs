//! Bytes as choices.

/// Bytes as choices; zero for ever when they are used up.
pub(super) struct Choices<'a>(pub(super) &'a [u8]);

impl Choices<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(super) fn word(&mut self) -> u32 {
        u32::from_ne_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Mostly one of the values that make sense.
    pub(super) fn of(&mut self, sensible: &[u32]) -> u32 {
        match self.byte() {
            0xff => self.word(),
            n => sensible[usize::from(n) % sensible.len()],
        }
    }
}
