//! Sizes as people read them.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(512), "512 B");
        assert_eq!(show_size(1 << 30), "1 GiB");
        assert_eq!(show_size((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(show_size(3 << 50), "3 PiB");
    }
}
