//! Sizes and rates as people read and write them.

const SIZES: &[(&str, u32)] = &[
    ("KiB", 10),
    ("MiB", 20),
    ("GiB", 30),
    ("TiB", 40),
    ("PiB", 50),
];

/// Writes a size in the largest unit that leaves at least one whole, with one decimal where it is not exact.
pub fn show_size(bytes: u64) -> String {
    let unit = SIZES.iter().rev().find(|(_, shift)| bytes >= 1 << shift);
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

const RATES: &[(&str, u64)] = &[
    ("Gbit/s", 1_000_000_000),
    ("Mbit/s", 1_000_000),
    ("kbit/s", 1_000),
    ("bit/s", 1),
];

/// Reads bits in a second: a whole number with a unit, such as `5Gbit/s`.
///
/// # Errors
/// What is allowed.
pub fn parse_bit_rate(text: &str) -> Result<u64, String> {
    let parse = || {
        let (number, by) = RATES
            .iter()
            .find_map(|(unit, by)| Some((text.strip_suffix(unit)?, by)))?;
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let number: u64 = digits.then(|| number.parse().ok()).flatten()?;
        number.checked_mul(*by).filter(|rate| *rate > 0)
    };
    parse().ok_or_else(|| {
        format!("{text:?} is no rate: a whole number over 0 with bit/s, kbit/s, Mbit/s or Gbit/s is wanted, such as \"5Gbit/s\"")
    })
}

/// Writes bits in a second in the largest unit of which it is a whole number.
pub fn show_bit_rate(rate: u64) -> String {
    let fits = RATES.iter().find(|(_, by)| rate.is_multiple_of(*by));
    let (unit, by) = fits.unwrap_or(&("bit/s", 1));
    format!("{}{unit}", rate / by)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_they_are_shown() {
        for (text, rate) in [
            ("5Gbit/s", 5_000_000_000),
            ("1500Mbit/s", 1_500_000_000),
            ("64kbit/s", 64_000),
            ("9600bit/s", 9600),
        ] {
            assert_eq!(parse_bit_rate(text), Ok(rate));
            assert_eq!(parse_bit_rate(&show_bit_rate(rate)), Ok(rate));
        }
        for bad in [
            "",
            "5",
            "Gbit/s",
            "5 Gbit/s",
            "+5Gbit/s",
            "0Mbit/s",
            "5Gbps",
            "1.5Gbit/s",
            "20000000000Gbit/s",
        ] {
            assert!(parse_bit_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(512), "512 B");
        assert_eq!(show_size(1 << 30), "1 GiB");
        assert_eq!(show_size((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(show_size(3 << 50), "3 PiB");
    }
}
