//! Guest kernels: the uncompressed kernel for PVH boot, and the modules that an image loads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};

use crate::cache;
use crate::hostdir::HostDir;

/// A kernel and the folder of its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// What `uname -r` says in the guest.
    pub release: String,
    /// What is booted directly.
    pub image: PathBuf,
    /// The same for boot loaders, where one can start it: a bzImage, which is an EFI application as well.
    pub compressed: Option<PathBuf>,
    modules: HashMap<String, PathBuf>,
    tools: HostDir,
}

impl Kernel {
    /// Debian 13's cloud kernel, as the uncompressed ELF file that QEMU boots by PVH: that skips the firmware's loader and the
    /// kernel's own decompression, which are slow in emulation.
    pub fn debian_13(guest: &HostDir) -> Result<Self> {
        let name = one_entry(&guest.path().join("boot"), "vmlinuz-")?;
        let release = name.trim_start_matches("vmlinuz-").to_string();
        let compressed = guest.path().join("boot").join(&name);
        let image = cache::entry(&format!("vmlinux-{release}"), |path| {
            extract(guest, &compressed, path)
        })?;
        let modules = find_modules(&guest.path().join("usr/lib/modules").join(&release))?;
        Ok(Self {
            release,
            image,
            compressed: Some(compressed),
            modules,
            tools: guest.clone(),
        })
    }

    /// Debian 12's User-Mode Linux. `tools` is a folder with `xz`.
    pub fn user_mode_linux(debian_12: &HostDir, tools: &HostDir) -> Result<Self> {
        let folder = debian_12.path().join("usr/lib/uml/modules");
        let release = one_entry(&folder, "")?;
        Ok(Self {
            modules: find_modules(&folder.join(&release))?,
            release,
            image: debian_12.find("linux.uml")?,
            compressed: None,
            tools: tools.clone(),
        })
    }

    /// The modules of these names and all that they depend on, unpacked, in an order in which they can be loaded. What is built into
    /// the kernel has no file and must not be named.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order = Vec::new();
        for name in names {
            self.visit(name, &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>, depth: usize) -> Result<()> {
        let name = name.replace('-', "_");
        if order.iter().any(|(done, _)| *done == name) {
            return Ok(());
        }
        ensure!(
            depth < 32,
            "modules depend on each other in a circle: {name}"
        );
        let path = self
            .modules
            .get(&name)
            .with_context(|| format!("kernel {} has no module {name}", self.release))?;
        let module = match path.extension().is_some_and(|extension| extension == "xz") {
            true => unpack(&self.tools, "xz", fs::read(path)?)?,
            false => fs::read(path)?,
        };
        for needed in dependencies(&module) {
            self.visit(&needed, order, depth + 1)?;
        }
        order.push((name, module));
        Ok(())
    }
}

/// The only entry of a folder whose name begins so.
fn one_entry(folder: &Path, prefix: &str) -> Result<String> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    match names
        .iter()
        .filter(|name| name.starts_with(prefix))
        .collect::<Vec<_>>()[..]
    {
        [name] => Ok(name.clone()),
        ref found => bail!(
            "expected one {prefix}* in {}, found {}",
            folder.display(),
            found.len()
        ),
    }
}

/// Module files by the name that the kernel knows them by: without suffix, dashes as underscores.
fn find_modules(folder: &Path) -> Result<HashMap<String, PathBuf>> {
    let mut modules = HashMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .with_context(|| format!("read {}", folder.display()))?
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if let Some((stem, "ko" | "ko.xz")) = name.split_once('.') {
                modules.insert(stem.replace('-', "_"), entry.path());
            }
        }
    }
    Ok(modules)
}

/// What a module says that it needs: the `depends=` string of its `.modinfo` section, which `depmod` reads too.
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let text = module[start + key.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_string)
        .collect()
}

/// Takes the kernel out of a bzImage (Linux `Documentation/arch/x86/boot.rst`, protocol 2.08 and later).
fn extract(tools: &HostDir, bzimage: &Path, to: &Path) -> Result<()> {
    let image = fs::read(bzimage).with_context(|| format!("read {}", bzimage.display()))?;
    let (format, payload) =
        payload(&image).with_context(|| format!("find the kernel in {}", bzimage.display()))?;
    let kernel = unpack(tools, format, payload.to_vec())?;
    ensure!(
        kernel.starts_with(b"\x7fELF"),
        "{} holds no ELF kernel",
        bzimage.display()
    );
    fs::write(to, kernel).with_context(|| format!("write {}", to.display()))
}

/// The compressed kernel within a bzImage, and the program that unpacks it.
fn payload(image: &[u8]) -> Result<(&'static str, &[u8])> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image
            .get(at..at + 4)
            .context("the image ends in its header")?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage");
    let setup = image
        .get(0x1f1)
        .copied()
        .context("the image ends in its header")?;
    // The boot sector, then the setup sectors (none means four); the payload's offset counts from their end.
    let start = (if setup == 0 { 4 } else { usize::from(setup) } + 1) * 512 + word(0x248)?;
    let payload = image
        .get(start..start + word(0x24c)?)
        .context("the image ends in its payload")?;
    match payload {
        // The build appends the unpacked size to all formats but gzip; zstd and xz would report it as trailing rubbish.
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(("zstd", &payload[..payload.len() - 4])),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(("xz", &payload[..payload.len() - 4])),
        _ => bail!("the kernel is packed neither with zstd nor with xz"),
    }
}

fn unpack(tools: &HostDir, format: &str, packed: Vec<u8>) -> Result<Vec<u8>> {
    let mut command = tools.command(format)?;
    let mut child = command
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().expect("piped");
    // Written by another thread: the program can fill its output before it has read its input.
    let writer = std::thread::spawn(move || input.write_all(&packed));
    let output = child.wait_with_output()?;
    let written = writer.join().expect("the writer does not panic");
    ensure!(
        output.status.success() && written.is_ok(),
        "{format} -d failed ({})",
        output.status
    );
    Ok(output.stdout)
}

/// Makes a file of this many bytes that has no blocks yet.
pub fn sparse_file(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(bytes)
        .with_context(|| format!("set the size of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(
            dependencies(b"x\0license=GPL\0depends=a,b-c\0name=z\0"),
            ["a", "b-c"]
        );
        assert!(dependencies(b"x\0depends=\0name=z\0").is_empty());
        assert!(dependencies(b"x\0name=z\0").is_empty());
    }

    #[test]
    fn a_payload_is_found_by_its_header() {
        let mut image = vec![0; 0x2000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 3;
        image[0x248..0x24c].copy_from_slice(&0x10u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        image[2048 + 0x10..2048 + 0x14].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        let (format, payload_) = payload(&image).expect("a payload");
        assert_eq!((format, payload_.len()), ("zstd", 8));
        image[0x24c..0x250].copy_from_slice(&0x4000u32.to_le_bytes());
        assert!(payload(&image).is_err());
        assert!(payload(b"short").is_err());
    }
}
