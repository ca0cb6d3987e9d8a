//! Folder arrows: `card -> devices -> backend`.
//!
//! A backend never sees a device, a device never sees a concrete kind of volume, and the guest tests know the product only
//! from outside. Dev-dependencies may point anywhere, except from a backend to the card: a crate's tests may stand on
//! what will use it, but must not need the whole.

use std::path::Path;

use crate::metadata::{Dependency, Workspace};

/// The crates of `backend/` that are seams. Every other crate there is a concrete kind, which devices must not name.
const SEAMS: &[&str] = &[
    "bluff-memory",
    "bluff-reactor",
    "bluff-block",
    "bluff-net",
    "bluff-packet",
];

/// All that the guest tests may know.
const GUEST_TESTS_KNOW: &[&str] = &["bluff-qemu", "bluff-api"];

/// The other side of devices and attachments, which shares no code with them: each is the other's check.
const OTHER_SIDE: &[&str] = &[
    "bluff-virtio-driver",
    "bluff-front-end",
    "bluff-vfio-client",
    "bluff-nvme-host",
];

/// The program inside of a guest, whose protocol both sides know.
const AGENT: &str = "guest-agent";

/// What tests ask for. Of what is not a test, only the suite in `bluff-block` that other crates' tests run may need it, and the
/// verified load of the NVMe host; both are features.
const TESTING: &str = "bluff-testing";
const SUITES: &[&str] = &["bluff-block", "bluff-nvme-host"];

/// Says which dependencies point the wrong way.
pub fn complaints(workspace: &Workspace) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in workspace.ours() {
        let folder = workspace.folder(package);
        for dependency in &package.dependencies {
            let Some(other) = workspace.ours().find(|other| other.name == dependency.name) else {
                continue;
            };
            let (from, to) = (
                Place::of(&package.name, &folder),
                Place::of(&other.name, &workspace.folder(other)),
            );
            if let Some(rule) = broken_rule(&from, &to, dependency) {
                complaints.push(format!(
                    "{} depends on {}: {rule}",
                    package.name, other.name
                ));
            }
        }
    }
    complaints
}

/// One of our crates, by what the rules look at.
struct Place {
    name: String,
    area: Area,
}

#[derive(Clone, Copy, PartialEq)]
enum Area {
    Backend,
    Device,
    /// A binary of its own beside `bluffd`, which may name kinds of volumes.
    Reference,
    Card,
    GuestTests,
    /// `qemu/` itself; its `xtask` and `bench` build and run everything, and are bound by nothing.
    Qemu,
    Xtask,
    /// A folder that no rule knows yet.
    Unknown,
}

impl Place {
    fn of(name: &str, folder: &Path) -> Self {
        let area = match folder {
            folder if folder.starts_with("backend") => Area::Backend,
            folder if folder.starts_with("devices/reference") => Area::Reference,
            folder if folder.starts_with("devices") => Area::Device,
            folder if folder.starts_with("card") => Area::Card,
            folder if folder.starts_with("guest-tests") => Area::GuestTests,
            folder if folder.starts_with("qemu/xtask") || folder.starts_with("qemu/bench") => {
                Area::Xtask
            }
            folder if folder.starts_with("qemu") => Area::Qemu,
            _ => Area::Unknown,
        };
        Self {
            name: name.to_owned(),
            area,
        }
    }
}

fn broken_rule(from: &Place, to: &Place, dependency: &Dependency) -> Option<&'static str> {
    if from.area == Area::Backend && to.area == Area::Card {
        return Some("a backend never depends on the card, not even in its tests");
    }
    if dependency.is_dev() {
        return None;
    }
    if to.name == TESTING && !(SUITES.contains(&from.name.as_str()) && dependency.optional) {
        return Some("what is for tests is a dev-dependency");
    }
    let is = |name: &String| OTHER_SIDE.contains(&name.as_str());
    match (from.area, to.area) {
        (Area::Device, _) if to.name == TESTING => None,
        (Area::Unknown, _) => {
            Some("it stands in a folder that has no rule; give it one in check/arrows.rs")
        }
        (Area::Xtask, _) | (Area::Backend, Area::Backend) | (Area::Reference, Area::Backend) => {
            None
        }
        (Area::GuestTests, _) if GUEST_TESTS_KNOW.contains(&to.name.as_str()) => None,
        (Area::GuestTests, Area::GuestTests) => None,
        (Area::GuestTests, _) => Some("the guest tests know only qemu and the API"),
        (Area::Backend, _) => Some("a backend never depends on what stands above it"),
        (Area::Device, Area::Backend) if SEAMS.contains(&to.name.as_str()) => None,
        (Area::Device, Area::Backend) => Some("a device never names a concrete backend"),
        (Area::Device, Area::Device) if is(&from.name) && !is(&to.name) => {
            Some("the other side shares no code with the device")
        }
        (Area::Device | Area::Reference, Area::Device) => None,
        (Area::Device | Area::Reference, _) => {
            Some("a device depends on devices and backends only")
        }
        (Area::Card, Area::Card | Area::Device | Area::Backend) => None,
        (Area::Card, _) => Some("the card depends on devices and backends only"),
        // What runs in a guest, and speaks with QEMU's side of it.
        (Area::Qemu, Area::GuestTests) if to.name == AGENT => None,
        (Area::Qemu, _) => Some("qemu knows nothing of the product"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(from: (&str, &str), to: (&str, &str), kind: Option<&str>) -> bool {
        let (from, to) = (
            Place::of(from.0, Path::new(from.1)),
            Place::of(to.0, Path::new(to.1)),
        );
        let dependency = Dependency {
            name: to.name.clone(),
            kind: kind.map(str::to_owned),
            optional: false,
        };
        broken_rule(&from, &to, &dependency).is_none()
    }

    const CARD: (&str, &str) = ("bluff-card", "card");
    const VIRTIO: (&str, &str) = ("bluff-virtio", "devices/virtio");
    const DRIVER: (&str, &str) = ("bluff-virtio-driver", "devices/virtio/driver");
    const CLIENT: (&str, &str) = ("bluff-vfio-client", "devices/vfio-user/client");
    const HOST: (&str, &str) = ("bluff-nvme-host", "devices/nvme/host");
    const NVME: (&str, &str) = ("bluff-nvme", "devices/nvme");
    const REFERENCE: (&str, &str) = ("bluff-reference", "devices/reference");
    const BLOCK: (&str, &str) = ("bluff-block", "backend/block");
    const FILE: (&str, &str) = ("bluff-file", "backend/file");
    const TESTS: (&str, &str) = (TESTING, "backend/testing");
    const GUEST: (&str, &str) = ("guest-tests", "guest-tests");
    const QEMU: (&str, &str) = ("bluff-qemu", "qemu");

    #[test]
    fn arrows_run_from_card_to_devices_to_backend() {
        assert!(
            allowed(CARD, VIRTIO, None)
                && allowed(CARD, FILE, None)
                && allowed(VIRTIO, BLOCK, None)
        );
        assert!(
            !allowed(BLOCK, VIRTIO, None)
                && !allowed(BLOCK, CARD, None)
                && !allowed(VIRTIO, CARD, None)
        );
        assert!(!allowed(BLOCK, VIRTIO, Some("build")));
    }

    #[test]
    fn only_the_reference_and_the_card_name_kinds_of_volumes() {
        assert!(!allowed(VIRTIO, FILE, None));
        assert!(allowed(REFERENCE, FILE, None));
        assert!(allowed(FILE, BLOCK, None));
    }

    #[test]
    fn tests_may_point_anywhere_but_from_backend_to_card() {
        assert!(allowed(BLOCK, VIRTIO, Some("dev")) && allowed(VIRTIO, FILE, Some("dev")));
        assert!(!allowed(BLOCK, CARD, Some("dev")));
    }

    #[test]
    fn only_tests_and_the_suite_know_what_is_for_tests() {
        assert!(allowed(FILE, TESTS, Some("dev")) && allowed(CARD, TESTS, Some("dev")));
        assert!(!allowed(FILE, TESTS, None) && !allowed(CARD, TESTS, None));
        let optional = |from: (&str, &str)| {
            let [from, to] = [from, TESTS].map(|(name, folder)| Place::of(name, Path::new(folder)));
            let dependency = Dependency {
                name: to.name.clone(),
                kind: None,
                optional: true,
            };
            broken_rule(&from, &to, &dependency).is_none()
        };
        assert!(optional(BLOCK) && !allowed(BLOCK, TESTS, None));
        assert!(optional(HOST) && !allowed(HOST, TESTS, None) && !optional(VIRTIO));
        assert!(!optional(FILE) && !optional(CARD));
    }

    #[test]
    fn guest_tests_know_only_qemu_and_the_api() {
        assert!(allowed(GUEST, QEMU, None) && allowed(GUEST, ("bluff-api", "card/api"), None));
        assert!(!allowed(GUEST, CARD, None) && !allowed(GUEST, BLOCK, None));
        assert!(!allowed(QEMU, CARD, None) && !allowed(CARD, QEMU, None));
    }

    #[test]
    fn the_two_sides_of_a_device_share_nothing() {
        assert!(!allowed(DRIVER, VIRTIO, None));
        assert!(allowed(VIRTIO, DRIVER, Some("dev")));
        assert!(!allowed(HOST, NVME, None) && allowed(NVME, HOST, Some("dev")));
        assert!(allowed(HOST, CLIENT, None) && allowed(HOST, DRIVER, None));
    }

    #[test]
    fn a_folder_without_a_rule_is_refused() {
        assert!(!allowed(("bluff-new", "new"), BLOCK, None));
    }
}
