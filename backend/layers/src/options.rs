//! Options of layers, as keys and values.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use bluff_block::{Kind, parse_size};

/// What is wrong with a layer's options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A key that the layer does not have.
    #[error("unknown option {name:?}; there are {allowed}")]
    Unknown {
        /// The key.
        name: String,
        /// What there is instead.
        allowed: String,
    },
    /// A value that does not fit.
    #[error("option {name:?}: {value:?} is not {allowed}")]
    Value {
        /// The key.
        name: String,
        /// The value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A key that must be there.
    #[error("option {0:?} is missing")]
    Missing(&'static str),
}

/// Takes options out one by one.
pub(crate) struct Options(BTreeMap<String, String>);

impl Options {
    pub(crate) fn new(all: &BTreeMap<String, String>) -> Self {
        Self(all.clone())
    }

    pub(crate) fn take<T>(
        &mut self,
        name: &str,
        allowed: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.0.remove(name) else {
            return Ok(None);
        };
        match read(&value) {
            Some(v) => Ok(Some(v)),
            None => Err(OptionError::Value {
                name: name.into(),
                value,
                allowed,
            }),
        }
    }

    pub(crate) fn duration(&mut self, name: &str) -> Result<Option<Duration>, OptionError> {
        self.take(name, "a time such as 200us, 2ms or 1s", parse_duration)
    }

    pub(crate) fn number(&mut self, name: &str) -> Result<Option<u64>, OptionError> {
        self.take(name, "a whole number", |v| v.parse().ok())
    }

    pub(crate) fn rate(&mut self) -> Result<Option<f64>, OptionError> {
        self.take("rate", "a number from 0 to 1", |v| {
            v.parse().ok().filter(|r| (0.0..=1.0).contains(r))
        })
    }

    pub(crate) fn range(&mut self) -> Result<Option<Range<u64>>, OptionError> {
        self.take(
            "range",
            "two sizes such as 0-1MiB, the first below the second",
            |v| {
                let (from, to) = v.split_once('-')?;
                let range = parse_size(from).ok()?..parse_size(to).ok()?;
                (!range.is_empty()).then_some(range)
            },
        )
    }

    pub(crate) fn finish(self, allowed: &[&str]) -> Result<(), OptionError> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(OptionError::Unknown {
                name,
                allowed: allowed.join(", "),
            }),
        }
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match &text[digits..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(unit).map(Duration::from_nanos)
}

/// Whether an operation touches a range; a flush touches everything.
pub(crate) fn touches(range: Option<&Range<u64>>, kind: Kind, offset: u64, len: u64) -> bool {
    match range {
        Some(r) if kind != Kind::Flush => offset < r.end && r.start < offset.saturating_add(len),
        _ => true,
    }
}

/// Reproducible chance: the same seed gives the same sequence.
#[derive(Clone, Debug)]
pub(crate) struct Chance(fastrand::Rng);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        // Channels have neighbouring seeds, and what the generator gives for those is far from independent. A
        // second one, whose seed is the first number, cures that.
        Self(fastrand::Rng::with_seed(seed).fork())
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0.u64(..n.max(1))
    }

    /// True in `rate` of all calls.
    pub(crate) fn hits(&mut self, rate: f64) -> bool {
        rate >= 1.0 || self.0.f64() < rate
    }
}
