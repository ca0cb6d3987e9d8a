//! Sizes and durations as people write them.

use std::time::Duration;

const SIZES: &[(&str, u32)] = &[
    ("KiB", 10),
    ("MiB", 20),
    ("GiB", 30),
    ("TiB", 40),
    ("PiB", 50),
    ("B", 0),
    ("", 0),
];
const DURATIONS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
];

/// Text that is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a size is a whole number of bytes, or one with KiB, MiB, GiB, TiB or PiB")]
pub struct BadSize;

/// Text that is no duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a duration is a whole number with ns, us, ms or s")]
pub struct BadDuration;

/// Reads a size such as `256MiB` or `4096`, in bytes.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let (number, unit) = split(text).ok_or(BadSize)?;
    let (_, shift) = SIZES
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(BadSize)?;
    number.checked_mul(1 << shift).ok_or(BadSize)
}

/// Reads a duration such as `2ms`.
pub fn parse_duration(text: &str) -> Result<Duration, BadDuration> {
    let (number, unit) = split(text).ok_or(BadDuration)?;
    let (_, nanos) = DURATIONS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(BadDuration)?;
    number
        .checked_mul(*nanos)
        .map(Duration::from_nanos)
        .ok_or(BadDuration)
}

/// Writes a size in the largest unit that leaves at least one whole, with one decimal where it is not exact.
pub fn show_size(bytes: u64) -> String {
    let unit = SIZES
        .iter()
        .take(5)
        .rev()
        .find(|(_, shift)| bytes >= 1 << shift);
    let Some((name, shift)) = unit else {
        return format!("{bytes} B");
    };
    let one = 1u64 << shift;
    if bytes.is_multiple_of(one) {
        format!("{} {name}", bytes >> shift)
    } else {
        format!("{:.1} {name}", bytes as f64 / one as f64)
    }
}

fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1TiB"), Ok(1 << 40));
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        for bad in [
            "",
            "MiB",
            "1 MiB",
            "1MB",
            "-1",
            "1.5GiB",
            "99999999PiB",
            "99999999999999999999",
        ] {
            assert_eq!(parse_size(bad), Err(BadSize), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("2ms"), Ok(Duration::from_millis(2)));
        assert_eq!(parse_duration("50us"), Ok(Duration::from_micros(50)));
        for bad in ["", "2", "ms", "2 ms", "2min", "-2s", "99999999999999999s"] {
            assert_eq!(parse_duration(bad), Err(BadDuration), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(512), "512 B");
        assert_eq!(show_size(1 << 30), "1 GiB");
        assert_eq!(show_size((1 << 30) + (1 << 29)), "1.5 GiB");
    }
}
