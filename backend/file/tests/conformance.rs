//! The suite over every way that a file volume can work.

use std::path::Path;

use bluff_block::Uri;
use bluff_block::conformance::{self, Profile, TestVolume};
use bluff_reactor::UringUse;

fn make(folder: &Path, options: &str) -> TestVolume {
    let keep = tempfile::tempdir_in(folder).unwrap();
    let path = keep.path().join("disk.raw");
    let uri = format!("file:{}?size=8MiB{options}", path.display());
    let volume = bluff_file::open(Uri::parse(&uri).unwrap()).unwrap();
    TestVolume {
        volume,
        keep: Box::new(keep),
    }
}

fn run(folder: &Path, options: &str, uring: UringUse) {
    let _ = env_logger::builder().is_test(true).try_init();
    let profile = Profile {
        uring,
        ..Profile::default()
    };
    conformance::run(&profile, &|| make(folder, options));
}

/// A folder on a disk: the one where this is built.
fn disk() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn tmpfs() -> &'static Path {
    Path::new("/dev/shm")
}

#[test]
fn tmpfs_with_uring() {
    run(tmpfs(), "", UringUse::Auto);
}

#[test]
fn tmpfs_with_threads() {
    run(tmpfs(), "&block_size=4096", UringUse::Off);
}

#[test]
fn page_cache_with_uring() {
    run(disk(), "&direct=off", UringUse::Auto);
}

#[test]
fn page_cache_with_threads() {
    run(disk(), "&direct=off", UringUse::Off);
}

#[test]
fn page_cache_4096_with_uring() {
    run(disk(), "&direct=off&block_size=4096", UringUse::Auto);
}

#[test]
fn direct_with_uring() {
    run(disk(), "&direct=on", UringUse::Auto);
}

#[test]
fn direct_4096_with_uring() {
    run(disk(), "&direct=on&block_size=4096", UringUse::Auto);
}

#[test]
fn direct_with_threads() {
    run(disk(), "&direct=on", UringUse::Off);
}
