//! What a specification may say. The registry refuses what breaks a rule, and the reader of the configuration file points at its line: both
//! in these words.

use super::{Attach, FunctionKind, NAMESPACES_MAX, NSID_MAX, NamespaceSpec, SERIAL_MAX};

/// The longest name of a subsystem, in bytes (NVMe Base 2.1 §4.7).
const NQN_MAX: usize = 223;

/// What is wrong with a name as the NQN of a subsystem (NVMe Base 2.1 §4.7), if anything is.
pub fn nqn_mistake(nqn: &str) -> Option<&'static str> {
    // nqn.YYYY-MM.reverse.domain:whatever
    let form = |rest: &str| {
        let (date, rest) = rest.split_at_checked(8)?;
        let bytes = date.as_bytes();
        let digits = [0, 1, 2, 3, 5, 6]
            .iter()
            .all(|i| bytes[*i].is_ascii_digit());
        let (domain, name) = rest.split_once(':')?;
        let fits = digits && bytes[4] == b'-' && bytes[7] == b'.';
        (fits && !domain.is_empty() && !name.is_empty()).then_some(())
    };
    match nqn.strip_prefix("nqn.").and_then(form) {
        _ if nqn.len() > NQN_MAX => Some("an NQN has at most 223 bytes"),
        None => Some("an NQN is nqn.YYYY-MM.reverse.domain:name, such as nqn.2026-11.example:s0"),
        Some(()) if nqn.chars().any(char::is_control) => Some("an NQN has no control characters"),
        Some(()) => None,
    }
}

/// What is wrong with text as the serial number of a controller (NVMe Base 2.1 §1.4.2: ASCII strings have 20h to 7Eh), if anything is.
pub fn serial_mistake(text: &str) -> Option<String> {
    let fits = (1..=SERIAL_MAX).contains(&text.len())
        && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    (!fits).then(|| format!("a serial number has 1 to {SERIAL_MAX} characters of ASCII"))
}

/// What is wrong with a way in which functions of a kind are to reach hosts, if anything is.
pub fn attach_mistake(kind: FunctionKind, attach: Attach) -> Option<String> {
    let right = kind.attach();
    (attach != right).then(|| format!("a function of kind {kind} attaches by {right}"))
}

/// What is wrong with so many namespaces in a subsystem, if anything is.
pub fn count_mistake(namespaces: usize) -> Option<String> {
    (namespaces > NAMESPACES_MAX)
        .then(|| format!("a subsystem has at most {NAMESPACES_MAX} namespaces"))
}

impl NamespaceSpec {
    /// What is wrong with it beside others of its subsystem.
    pub fn mistakes(&self, others: &[Self]) -> impl Iterator<Item = String> {
        let Self { volume, nsid, .. } = self;
        let numbered = (1..=NSID_MAX).contains(nsid);
        let same_number = others.iter().any(|other| other.nsid == *nsid);
        let same_volume = others.iter().find(|other| other.volume == *volume);
        let mistakes = [
            (!numbered).then(|| format!("a namespace has a number from 1 to {NSID_MAX}")),
            same_number.then(|| format!("there is a namespace {nsid} already")),
            same_volume.map(|other| format!("volume {volume} is namespace {} already", other.nsid)),
        ];
        mistakes.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_subsystems_have_a_date_and_a_domain() {
        for good in [
            "nqn.2026-11.example:s0",
            "nqn.2014-08.org.nvmexpress:uuid:x",
        ] {
            assert_eq!(nqn_mistake(good), None, "{good}");
        }
        let long = format!("nqn.2026-11.example:{}", "a".repeat(NQN_MAX));
        for bad in [
            "",
            "s0",
            "nqn.2026-11.example",
            "nqn.2026-11.:s0",
            "nqn.26-11.example:s0",
            "nqn.2026-11.é\u{7}:s",
            "nqn.20é6-11.example:s0",
            &long,
        ] {
            assert!(nqn_mistake(bad).is_some(), "{bad}");
        }
    }
}
