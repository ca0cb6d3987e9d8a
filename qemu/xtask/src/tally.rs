//! Counting tests.

use std::fmt;
use std::ops::AddAssign;

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed, and stages that came to no result.
    pub failed: usize,
}

impl Tally {
    /// The outcome of something that failed before it could count.
    pub const BROKEN: Self = Self {
        passed: 0,
        failed: 1,
    };

    /// Reads the closing line of one test binary: `test result: ok. 12 passed; 0 failed; …`.
    pub fn of_line(line: &str) -> Option<Self> {
        let line = line.trim_start();
        let counts = line
            .strip_prefix("test result: ")
            .or_else(|| line.strip_prefix("guest tests: "))?
            .split_once(". ")?
            .1;
        let count = |word: &str| {
            let part = counts
                .split(';')
                .map(str::trim)
                .find_map(|part| part.strip_suffix(word))?;
            part.trim().parse().ok()
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_closing_line_of_a_test_binary() {
        let line = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s";
        assert_eq!(
            Tally::of_line(line),
            Some(Tally {
                passed: 12,
                failed: 0
            })
        );
        let line = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(
            Tally::of_line(line),
            Some(Tally {
                passed: 3,
                failed: 2
            })
        );
        assert_eq!(Tally::of_line("test reads_the_closing_line ... ok"), None);
        assert_eq!(
            Tally::of_line("test result: ok. many passed; 0 failed"),
            None
        );
    }

    #[test]
    fn shows_the_closing_line_of_the_project() {
        let mut tally = Tally {
            passed: 4,
            failed: 0,
        };
        tally += Tally::BROKEN;
        assert_eq!(tally.to_string(), "4 passed, 1 failed");
    }
}
