//! Licences: ours is Apache-2.0, and everything that we link is compatible with it.

use crate::check::spdx::Expression;
use crate::metadata::{Package, Workspace};

/// The licence of every crate of ours.
const OURS: &str = "Apache-2.0";

/// Licences under which a dependency may come. None of them asks anything of our own code.
const ALLOWED: &[&str] = &[
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "Unlicense",
    "0BSD",
];

/// Weak copyleft by file: fine for a crate that is used as its authors published it, and only then.
const ALLOWED_UNCHANGED: &[&str] = &["MPL-2.0"];

/// Says which crates come under a licence that does not fit.
pub fn complaints(workspace: &Workspace) -> Vec<String> {
    let ours = workspace
        .ours()
        .filter(|package| package.license.as_deref() != Some(OURS))
        .map(|package| {
            let stated = package.license.as_deref().unwrap_or("nothing");
            format!("{} states {stated}, not {OURS}", package.name)
        });
    ours.chain(workspace.theirs().filter_map(complaint))
        .collect()
}

fn complaint(package: &Package) -> Option<String> {
    let name = format!("{} {}", package.name, package.version);
    let Some(text) = &package.license else {
        return Some(format!("{name} states no licence"));
    };
    let is_unchanged = package
        .source
        .as_deref()
        .is_some_and(|source| source.starts_with("registry+"));
    let accept = |licence: &str| {
        ALLOWED.contains(&licence) || is_unchanged && ALLOWED_UNCHANGED.contains(&licence)
    };
    match Expression::parse(text) {
        Ok(expression) if expression.is_satisfied(&accept) => None,
        Ok(_) => Some(format!("{name} comes under {text}, which is not allowed")),
        Err(error) => Some(format!("{name}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(license: Option<&str>, source: Option<&str>) -> Package {
        Package {
            name: "other".to_owned(),
            version: "1.0.0".to_owned(),
            id: String::new(),
            license: license.map(str::to_owned),
            source: source.map(str::to_owned),
            manifest_path: "Cargo.toml".into(),
            dependencies: Vec::new(),
        }
    }

    const REGISTRY: Option<&str> = Some("registry+https://example.org/index");

    #[test]
    fn copyleft_and_silence_are_refused() {
        assert!(complaint(&package(Some("MIT OR Apache-2.0"), REGISTRY)).is_none());
        assert!(complaint(&package(Some("GPL-3.0-only"), REGISTRY)).is_some());
        assert!(complaint(&package(Some("MIT AND AGPL-3.0-only"), REGISTRY)).is_some());
        assert!(complaint(&package(None, REGISTRY)).is_some());
    }

    #[test]
    fn mpl_only_as_it_was_published() {
        assert!(complaint(&package(Some("MPL-2.0"), REGISTRY)).is_none());
        assert!(
            complaint(&package(
                Some("MPL-2.0"),
                Some("git+https://example.org/fork")
            ))
            .is_some()
        );
        assert!(complaint(&package(Some("MPL-2.0"), None)).is_some());
    }
}
