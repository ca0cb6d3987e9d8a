//! File systems and devices of a test's own: mounted in a mount namespace that ends with the test.
//!
//! Unsafe, because it calls into the kernel.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

// linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;

/// Runs a program; its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// Runs `test` on a thread with a mount namespace and an empty folder. Only root may mount; for
/// others the test is not run, and says so. Nor is it under emulation: it starts programs, and qemu-user (7.2) now and then stands still in the child of a
/// process that has threads.
pub fn with_mounts(test: impl FnOnce(&Path) + Send) {
    if bluff_testing::is_emulated() {
        eprintln!("not run: it starts programs, which hangs at times under emulation");
        return;
    }
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("not run: only root can mount file systems");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|s| {
        let thread = s.spawn(|| {
            // SAFETY: it concerns this thread, and the ones that it starts.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
            run("mount", &["--make-rprivate", "/"]);
            test(folder.path());
            // The namespace and its mounts end with the thread.
        });
        if let Err(e) = thread.join() {
            std::panic::resume_unwind(e);
        }
    });
}

/// A tmpfs of `size` (as mount takes it) at `folder/name`.
pub fn tmpfs(folder: &Path, name: &str, size: &str) -> PathBuf {
    let at = folder.join(name);
    std::fs::create_dir(&at).unwrap();
    let size = format!("size={size}");
    run(
        "mount",
        &["-t", "tmpfs", "-o", &size, "none", at.to_str().unwrap()],
    );
    at
}

/// A loop device, detached when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn new(file: &Path) -> Self {
        let name = run("losetup", &["-f", "--show", file.to_str().unwrap()]);
        Self(name.into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// An ext4 of its own, unmounted when dropped.
pub struct Ext4 {
    pub at: PathBuf,
    _device: Loop,
}

impl Ext4 {
    pub fn new(folder: &Path, size: u64) -> Self {
        let image = folder.join("ext4.img");
        File::create(&image).unwrap().set_len(size).unwrap();
        run(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-m", "0", image.to_str().unwrap()],
        );
        let device = Loop::new(&image);
        let at = folder.join("ext4");
        std::fs::create_dir(&at).unwrap();
        run("mount", &[device.0.to_str().unwrap(), at.to_str().unwrap()]);
        Self {
            at,
            _device: device,
        }
    }

    /// Stops all writes to it, until the answer is dropped. `None` under an emulation of the kernel
    /// that does not have it.
    pub fn freeze(&self) -> Option<Frozen> {
        let folder = File::open(&self.at).unwrap();
        // SAFETY: the request takes no memory.
        let rc = unsafe { libc::ioctl(folder.as_raw_fd(), FIFREEZE, 0) };
        let e = std::io::Error::last_os_error();
        if rc != 0 && e.raw_os_error() == Some(libc::ENOSYS) {
            eprintln!("not run: file systems cannot be frozen here");
            return None;
        }
        assert_eq!(rc, 0, "FIFREEZE: {e}");
        Some(Frozen(folder))
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Thawed when dropped.
pub struct Frozen(File);

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::ioctl(self.0.as_raw_fd(), FITHAW, 0) };
    }
}
