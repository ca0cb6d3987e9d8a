//! Crates that are built in several versions, which costs time and size and mixes types that look alike.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::metadata::Workspace;

/// The list of those that are borne, beside this crate's `Cargo.toml`.
const LIST: &str = "duplicates.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    /// What forces the second version, by the crate's name.
    reason: BTreeMap<String, String>,
}

/// Says which crates come in several versions without a reason, and which reasons are no longer needed.
pub fn complaints(workspace: &Workspace) -> Result<Vec<String>> {
    let file = workspace.own_file(LIST);
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let allowed: Allowed = toml::from_str(&text).with_context(|| file.display().to_string())?;
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in &workspace.packages {
        versions
            .entry(&package.name)
            .or_default()
            .insert(&package.version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    Ok(compare(&versions, &allowed.reason))
}

fn compare(
    versions: &BTreeMap<&str, BTreeSet<&str>>,
    reasons: &BTreeMap<String, String>,
) -> Vec<String> {
    let unexplained = versions
        .iter()
        .filter(|(name, _)| !reasons.contains_key(**name))
        .map(|(name, versions)| {
            let versions: Vec<&str> = versions.iter().copied().collect();
            format!(
                "{name} comes as {}; if that cannot be helped, give the reason in {LIST}",
                versions.join(" and ")
            )
        });
    let idle = reasons
        .keys()
        .filter(|name| !versions.contains_key(name.as_str()));
    let idle = idle.map(|name| format!("{name} comes once only; take its reason out of {LIST}"));
    let empty = reasons
        .iter()
        .filter(|(_, reason)| reason.trim().is_empty());
    let empty = empty.map(|(name, _)| format!("{name} has no reason in {LIST}"));
    unexplained.chain(idle).chain(empty).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duplicate_needs_a_reason_and_each_reason_a_duplicate() {
        let versions = BTreeMap::from([("syn", BTreeSet::from(["2.0.0", "3.0.0"]))]);
        assert_eq!(compare(&versions, &BTreeMap::new()).len(), 1);
        let reason = |name: &str, text: &str| BTreeMap::from([(name.to_owned(), text.to_owned())]);
        assert!(compare(&versions, &reason("syn", "a derive macro is behind")).is_empty());
        assert_eq!(compare(&versions, &reason("syn", " ")).len(), 1);
        assert_eq!(compare(&versions, &reason("quote", "a reason")).len(), 2);
    }
}
