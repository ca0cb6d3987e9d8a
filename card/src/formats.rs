//! What hosts have formatted namespaces to: the block size of each, kept in the state directory.
//!
//! A volume does not know in which blocks a host counts on it, so this is as much a part of the host's data as the volume is: with another block size the host finds everything elsewhere.
//! So nothing is guessed here. What cannot be understood is an error, and what was written is there after a loss of power.
//!
//! ```text
//!   {"version":1,"namespaces":[{"nqn":"nqn.2026-11.example:s0","volume":"disk0","block_size":4096}]}
//! ```
//!
//! An entry is about what a host takes for one namespace, wherever it finds it: the NQN and the volume's ID, of which its identifiers are made too. Its number may change, and it may be gone for
//! a while. Who has no entry was never formatted, and has its volume's blocks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::spec::{Id, nqn_mistake};

/// The file in the state directory.
pub const FILE: &str = "namespace-formats.json";
/// Where it is written before it takes its place.
pub const DRAFT: &str = "namespace-formats.json.new";
/// The version of the file.
const VERSION: u32 = 1;
/// Most bytes of it: a hundred thousand namespaces, so more is something else.
const SIZE_MAX: u64 = 32 << 20;
/// What a host can format to.
const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// What makes a namespace the same one to a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The name of its subsystem.
    pub nqn: String,
    /// The volume that it stands on.
    pub volume: Id,
}

/// The block sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Formats(BTreeMap<Key, u32>);

/// Why formats could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// All is as it was before.
    #[error("formats could not be recorded")]
    Unchanged(#[source] anyhow::Error),
    /// They may be there or not after a loss of power.
    #[error("it is not known whether formats were recorded")]
    Unknown(#[source] anyhow::Error),
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    namespaces: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    nqn: String,
    volume: Id,
    block_size: u32,
}

/// Whether a host can format a namespace on a volume of this block to this block.
pub fn is_possible(block_size: u32, of_volume: u32) -> bool {
    BLOCK_SIZES.contains(&block_size) && of_volume != 0 && block_size.is_multiple_of(of_volume)
}

impl Formats {
    /// Those in a state directory, which are there to stay: what is written in a format must not outlive its entry.
    ///
    /// # Errors
    /// As [`Formats::read`]; also where the directory cannot be made durable.
    pub fn take_up(state_dir: &Path) -> Result<Self> {
        let all = Self::read(state_dir)?;
        // Whoever has put the file there may have died before it was durable.
        let synced = File::open(state_dir).and_then(|dir| dir.sync_all());
        synced.with_context(|| format!("the state directory, {}", state_dir.display()))?;
        if all.0.is_empty() {
            // The directory may have been made just now, and so may those that it stands in. Some of them may be closed to us, or stand in what has no disk.
            let path = std::fs::canonicalize(state_dir).unwrap_or_default();
            for above in path.ancestors().skip(1) {
                let _ = File::open(above).and_then(|dir| dir.sync_all());
            }
        }
        Ok(all)
    }

    /// Those in a state directory; none, where there is no file.
    ///
    /// # Errors
    /// Where it cannot be read, or not be understood as a whole.
    pub fn read(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join(FILE);
        let shown = || format!("the formats of namespaces, {}", path.display());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(shown),
        };
        Self::from_file(&file).with_context(shown)
    }

    fn from_file(file: &File) -> Result<Self> {
        let mut text = String::new();
        file.take(SIZE_MAX + 1).read_to_string(&mut text)?;
        ensure!(text.len() as u64 <= SIZE_MAX, "it is too long");
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self> {
        // Another version may say it all in other words.
        let Version { version } = serde_json::from_str(text)?;
        if version != VERSION {
            bail!("it is of version {version}, and this bluffd understands {VERSION}");
        }
        let contents: Contents = serde_json::from_str(text)?;
        let mut all = BTreeMap::new();
        for Entry {
            nqn,
            volume,
            block_size,
        } in contents.namespaces
        {
            if let Some(mistake) = nqn_mistake(&nqn) {
                bail!("`{nqn}`: {mistake}");
            }
            if !BLOCK_SIZES.contains(&block_size) {
                bail!("volume {volume} in {nqn}: no namespace has blocks of {block_size} bytes");
            }
            let key = Key { nqn, volume };
            let shown = format!("volume {} in {}", key.volume, key.nqn);
            ensure!(
                all.insert(key, block_size).is_none(),
                "{shown} stands there twice"
            );
        }
        Ok(Self(all))
    }

    /// What a namespace was formatted to.
    pub fn get(&self, key: &Key) -> Option<u32> {
        self.0.get(key).copied()
    }

    /// Records more, durably, beside what the file holds by then; gives all.
    ///
    /// # Errors
    /// Where the file is what it was, and where that is not known.
    pub fn record(state_dir: &Path, more: &[(Key, u32)]) -> Result<Self, RecordError> {
        let unchanged = |error: anyhow::Error| {
            RecordError::Unchanged(error.context(state_dir.display().to_string()))
        };
        let (dir, all, has_draft) = Self::draft(state_dir, more).map_err(unchanged)?;
        if has_draft {
            let moved = rustix::fs::renameat(&dir, DRAFT, &dir, FILE);
            moved.map_err(|error| unchanged(error.into()))?;
        }
        // Where nothing was to be changed, who has written it may have died before this.
        match dir.sync_all() {
            Ok(()) => Ok(all),
            Err(error) => {
                let error = anyhow::Error::from(error).context(state_dir.display().to_string());
                Err(RecordError::Unknown(error))
            }
        }
    }

    /// The directory, locked until it is dropped; all that is to be in the file; and whether that is a draft, whole and durable, or there already.
    fn draft(state_dir: &Path, more: &[(Key, u32)]) -> Result<(File, Self, bool)> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = File::from(rustix::fs::open(state_dir, flags, Mode::empty())?);
        // Another daemon may keep its own here, which must not be lost.
        rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
        let mut all = Self::read(state_dir)?;
        let before = all.clone();
        all.0.extend(more.iter().cloned());
        if all == before {
            return Ok((dir, all, false));
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let draft = rustix::fs::openat(&dir, DRAFT, flags, Mode::RUSR | Mode::WUSR);
        let mut draft = File::from(draft.context(DRAFT)?);
        let written = draft
            .write_all(all.to_text()?.as_bytes())
            .and_then(|()| draft.sync_all());
        written.context(DRAFT)?;
        Ok((dir, all, true))
    }

    fn to_text(&self) -> Result<String> {
        let namespaces = self.0.iter().map(|(key, block_size)| Entry {
            nqn: key.nqn.clone(),
            volume: key.volume.clone(),
            block_size: *block_size,
        });
        let contents = Contents {
            version: VERSION,
            namespaces: namespaces.collect(),
        };
        Ok(serde_json::to_string_pretty(&contents)? + "\n")
    }
}

#[cfg(test)]
mod tests;
