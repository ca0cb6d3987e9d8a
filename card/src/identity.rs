//! The card's identity: what names are made of that must be the same after each start, and on no other card.
//!
//! A host tells subsystems apart by their NQN, and takes two with the same name for two ways to one. So names that are left out
//! of the configuration come from a UUID of the card, which is made once and kept in its state directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use bluff_packet::Mac;
use uuid::Uuid;

use crate::spec::Id;

/// The file in the state directory: the UUID as text, and a line feed.
pub const FILE: &str = "card-id";

/// A card's UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(Uuid);

impl Identity {
    /// The one in a state directory, which is made where it is missing, as is the directory.
    ///
    /// # Errors
    /// Where it can be neither read nor written, or is no UUID.
    pub fn of_card(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join(FILE);
        let shown = || format!("the card's identity, {}", path.display());
        if let Some(found) = read(&path).with_context(shown)? {
            return Ok(found);
        }
        let new = Self(Uuid::new_v4());
        match new.write(state_dir, &path) {
            Ok(()) => Ok(new),
            // Another daemon was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = read(&path).with_context(shown)?;
                found.with_context(shown)
            }
            Err(error) => Err(error).with_context(shown),
        }
    }

    /// Written beside its place and linked there, so that it is there as a whole or not at all, and none is replaced.
    fn write(self, state_dir: &Path, path: &Path) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)?;
        let draft = state_dir.join(format!("{FILE}.{}", self.0));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)?;
        let written = writeln!(file, "{}", self.0)
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::hard_link(&draft, path))
            .and_then(|()| File::open(state_dir)?.sync_all());
        std::fs::remove_file(&draft)?;
        written
    }

    /// The name of a subsystem that was given none (NVMe Base 2.1 §4.7).
    pub fn nqn(self, what: &str, id: &Id) -> String {
        let uuid = Uuid::new_v5(&self.0, format!("{what}/{id}").as_bytes());
        format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}")
    }

    /// The address of a network function that was given none: one of a single station, administered locally (IEEE 802 §8.4).
    pub fn mac(self, id: &Id) -> Mac {
        let uuid = Uuid::new_v5(&self.0, format!("mac/{id}").as_bytes());
        let [a, b, c, d, e, f, ..] = *uuid.as_bytes();
        Mac([(a | 2) & !1, b, c, d, e, f])
    }
}

fn read(path: &Path) -> Result<Option<Identity>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(Identity(text.trim().parse()?))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let first = Identity::of_card(&state).unwrap();
        assert_eq!(Identity::of_card(&state).unwrap(), first);
        let other = Identity::of_card(dir.path()).unwrap();
        assert_ne!(first, other);
        let left = std::fs::read_dir(&state).unwrap().count();
        assert_eq!(left, 1, "no draft is left");
    }

    #[test]
    fn what_is_there_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "nonsense").unwrap();
        assert!(Identity::of_card(dir.path()).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nonsense");
        let new = Identity(Uuid::new_v4());
        let again = new.write(dir.path(), &path).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn names_are_the_same_for_ever() {
        let card = Identity(Uuid::from_u128(1));
        let id: Id = "nvme0".parse().unwrap();
        let nqn = card.nqn("function", &id);
        assert_eq!(
            nqn,
            "nqn.2014-08.org.nvmexpress:uuid:62903cb5-957b-595f-8ab4-77cda455e396"
        );
        assert_eq!(crate::spec::nqn_mistake(&nqn), None);
        assert_ne!(nqn, card.nqn("subsystem", &id));
        assert_ne!(nqn, Identity(Uuid::from_u128(2)).nqn("function", &id));
        let mac = card.mac(&id);
        assert_eq!(mac, card.mac(&id));
        assert_eq!(crate::spec::mac_mistake(mac), None);
        assert_eq!(mac.0[0] & 3, 2, "administered locally");
        assert_ne!(mac, card.mac(&"nvme1".parse().unwrap()));
        assert_ne!(mac, Identity(Uuid::from_u128(2)).mac(&id));
    }
}
