//! The user's cache folder: what was fetched or found out once is kept under a key that says what was asked for.
//!
//! Entries are built beside their place and renamed into it, under a lock: a build that is cut short leaves nothing that looks whole,
//! and two tests that start together build once.

use std::fs::{self, File};
use std::hash::Hasher;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// `$XDG_CACHE_HOME/diamond-bluff`, or the same under `~/.cache`; made if it is not there.
pub fn folder() -> Result<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = match (absolute("XDG_CACHE_HOME"), absolute("HOME")) {
        (Some(cache), _) => cache,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => {
            bail!("neither XDG_CACHE_HOME nor HOME is set: no place for what is fetched")
        }
    };
    let folder = base.join("diamond-bluff");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// A short name for what was asked for: 64-bit FNV-1a, as hex. The standard library's hashes may change between its versions.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn finish(&self) -> u64 {
            self.0
        }
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
    }
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    for part in parts {
        hash.write(part.as_bytes());
        hash.write(b"\0");
    }
    format!("{:016x}", hash.finish())
}

/// Held while an entry is built; let go when dropped, also by a process that dies.
pub struct Lock(#[expect(dead_code, reason = "the lock lives as long as its file is open")] File);

/// Takes the lock for one entry, and waits for whoever has it.
pub fn lock(name: &str) -> Result<Lock> {
    let path = folder()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    file.lock()
        .with_context(|| format!("lock {} (fd {})", path.display(), file.as_raw_fd()))?;
    Ok(Lock(file))
}

/// The entry of this name; `build` fills the path that it is given (a file or a folder, which is not there yet) when there is none.
pub fn entry(name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = folder()?;
    let path = folder.join(name);
    if path.exists() {
        return Ok(path);
    }
    let _lock = lock(name)?;
    if path.exists() {
        return Ok(path);
    }
    let work = tempfile::Builder::new()
        .prefix(&format!("{name}."))
        .tempdir_in(&folder)?;
    let unfinished = work.path().join("entry");
    build(&unfinished)?;
    fs::rename(&unfinished, &path).with_context(|| format!("put {} into place", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_lists_apart() {
        assert_eq!(key(["a", "b"]), key(["a", "b"]));
        assert_ne!(key(["a", "b"]), key(["ab"]));
        assert_ne!(key(["a", "b"]), key(["b", "a"]));
    }
}
