//! What fuzzers and property tests share: bytes become a host's behaviour.

mod admin;
mod registers;

pub use admin::fuzz_admin;
pub use registers::fuzz_registers;

/// Bytes as choices; zero for ever when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_ne_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Mostly one of the values that make sense.
    fn of(&mut self, sensible: &[u32]) -> u32 {
        match self.byte() {
            0xff => self.word(),
            n => sensible[usize::from(n) % sensible.len()],
        }
    }
}
