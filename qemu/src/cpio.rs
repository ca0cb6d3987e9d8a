//! A writer of cpio archives in the "newc" format that the kernel unpacks as its initial RAM file system
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// Writes one archive. Folders on the way to an entry are made as they are needed.
pub struct Writer<W: Write> {
    out: W,
    folders: BTreeSet<String>,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// An archive without entries.
    pub fn new(out: W) -> Self {
        Self {
            out,
            folders: BTreeSet::new(),
            inode: 0,
        }
    }

    /// A folder, and those above it.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.folders.insert(path.to_string());
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// A regular file with these permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, S_IFREG | mode, (0, 0), content)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Ends the archive. Another one may follow in the same file: the kernel unpacks both.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.inode += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        // inode, mode, owner, group, links, time, size, device of the file (two), device (two), length of the name with its zero, sum
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0,
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(path.as_bytes())?;
        // The name ends in a zero, and name and content are padded to four bytes from the header's beginning.
        self.pad(1 + padding(110 + path.len() + 1))?;
        self.out.write_all(content)?;
        self.pad(padding(content.len()))
    }

    fn pad(&mut self, bytes: usize) -> io::Result<()> {
        self.out.write_all(&[0; 4][..bytes])
    }
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of an entry, found as the kernel finds them: name, mode, content.
    fn read(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + 8 * index..at + 14 + 8 * index])
                    .expect("hex");
                u32::from_str_radix(text, 16).expect("hex")
            };
            let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
            let data = (at + 110 + name).next_multiple_of(4);
            assert_eq!(archive[at + 110 + name - 1], 0);
            let text =
                String::from_utf8(archive[at + 110..at + 110 + name - 1].to_vec()).expect("name");
            entries.push((text, mode, archive[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        entries
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut writer = Writer::new(Vec::new());
        writer
            .file("/usr/bin/tool", 0o755, b"12345")
            .expect("memory");
        writer.file("usr/bin/other", 0o644, b"").expect("memory");
        writer.link("bin", "usr/bin").expect("memory");
        writer.device("dev/console", 5, 1).expect("memory");
        let entries = read(&writer.finish().expect("memory"));
        let expected = [
            ("usr", 0o40755, ""),
            ("usr/bin", 0o40755, ""),
            ("usr/bin/tool", 0o100755, "12345"),
            ("usr/bin/other", 0o100644, ""),
            ("bin", 0o120777, "usr/bin"),
            ("dev", 0o40755, ""),
            ("dev/console", 0o20600, ""),
            ("TRAILER!!!", 0, ""),
        ];
        let expected = expected
            .map(|(name, mode, content)| (name.to_string(), mode, content.as_bytes().to_vec()));
        assert_eq!(entries, expected);
    }
}
