//! What a URI asks for and what is there.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Instant;

use bluff_block::conformance::{Memory, Rig};
use bluff_block::{BlockError, Kind, OpenError, Uri, UriError, Volume};
use bluff_file::{Direct, FileOptions, FileVolume};
use bluff_reactor::UringUse;
use rustix::fs::{FileType, Mode};

fn open(path: &Path, options: &str) -> Result<std::sync::Arc<dyn Volume>, OpenError> {
    bluff_file::open(Uri::parse(&format!("file:{}?{options}", path.display())).unwrap())
}

#[test]
fn made_with_a_size() {
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().join("new.raw");
    assert!(matches!(open(&path, ""), Err(OpenError::Storage { .. })));
    assert!(!path.exists());
    let volume = open(&path, "size=1MiB").unwrap();
    assert_eq!(volume.geometry().size, 1 << 20);
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(
        (meta.len(), meta.permissions().mode() & 0o777),
        (1 << 20, 0o600)
    );
    // There already: the size must be the same.
    open(&path, "size=1MiB").unwrap();
    let grown = open(&path, "size=2MiB").unwrap();
    assert_eq!(
        grown.geometry().size,
        1 << 20,
        "one that is there keeps its size"
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn mistakes() {
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().join("disk.raw");
    std::fs::write(&path, vec![0; 8192]).unwrap();
    for (options, wrong) in [
        ("direct=maybe", "direct"),
        ("read_only=yes", "read_only"),
        ("block_size=520", "block_size"),
        ("size=12x", "size"),
    ] {
        match open(&path, options) {
            Err(OpenError::Uri(UriError::Value { name, .. })) => assert_eq!(name, wrong),
            other => panic!("{options}: {other:?}"),
        }
    }
    let unknown = open(&path, "cache=none");
    assert!(matches!(
        unknown,
        Err(OpenError::Uri(UriError::Unknown { .. }))
    ));
    let relative = bluff_file::open(Uri::parse("file:disk.raw").unwrap());
    assert!(matches!(relative, Err(OpenError::Uri(UriError::Path(_)))));
    assert!(open(keep.path(), "").is_err(), "a folder");
    assert!(open(keep.path(), "read_only=on").is_err(), "a folder");
    std::fs::write(&path, [0; 100]).unwrap();
    assert!(matches!(open(&path, ""), Err(OpenError::Shape(_))));
    let pipe = keep.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let opened = open(&pipe, "");
    assert!(
        matches!(opened, Err(OpenError::Shape(_))),
        "a pipe, and it does not hang"
    );
    assert!(
        open(Path::new("/dev/null"), "").is_err(),
        "a character device"
    );
}

#[test]
fn the_rest_after_the_last_block_cannot_be_reached() {
    let keep = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = keep.path().join("disk.raw");
    std::fs::write(&path, vec![9; 8192 + 700]).unwrap();
    let volume = open(&path, "block_size=4096").unwrap();
    assert_eq!(volume.geometry().size, 8192);
    let mut rig = Rig::new(UringUse::Auto);
    let mut line = rig.open(&*volume);
    let memory = Memory::new(4096, || 77);
    assert_eq!(rig.one(&mut line, memory.op(1, Kind::Read, 4096)), Ok(()));
    assert_eq!(memory.get(), [9; 4096]);
    assert_eq!(
        rig.one(&mut line, memory.op(1, Kind::Read, 8192)),
        Err(BlockError::OutOfRange)
    );
}

/// What it can do is found out without touching what is there, also where somebody else just made it longer.
#[test]
fn opening_changes_nothing() {
    for folder in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        let keep = tempfile::tempdir_in(folder).unwrap();
        let path = keep.path().join("disk.raw");
        // The rest is less than a block.
        let bytes = vec![9; (1 << 20) + 188];
        std::fs::write(&path, &bytes).unwrap();
        let volume = open(&path, "").unwrap();
        assert_eq!(volume.geometry().size % 512, 0);
        assert!(volume.geometry().discard.is_some());
        assert!(std::fs::read(&path).unwrap() == bytes, "in {folder}");
    }
}

#[test]
fn read_only() {
    let keep = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = keep.path().join("disk.raw");
    std::fs::write(&path, vec![5; 65536]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    let volume = open(&path, "read_only=on").unwrap();
    let g = volume.geometry();
    assert!(g.read_only && g.discard.is_none() && g.write_zeroes.is_none());
    let mut rig = Rig::new(UringUse::Auto);
    let mut line = rig.open(&*volume);
    let memory = Memory::new(4096, || 100);
    memory.set(&[1; 4096]);
    let write = memory.op(1, Kind::Write { fua: false }, 0);
    assert_eq!(rig.one(&mut line, write), Err(BlockError::ReadOnly));
    assert_eq!(rig.plain(&mut line, Kind::Flush, 0, 0), Ok(()));
    assert_eq!(rig.one(&mut line, memory.op(1, Kind::Read, 0)), Ok(()));
    assert_eq!(memory.get(), [5; 4096]);
    assert_eq!(volume.resize(131_072), Err(BlockError::ReadOnly));
    // What another program added is seen when it is asked for.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[6; 65536], 65536).unwrap();
    assert_eq!(volume.geometry().size, 65536);
    volume.resize(131_072).unwrap();
    assert_eq!(rig.one(&mut line, memory.op(1, Kind::Read, 65536)), Ok(()));
    assert_eq!(memory.get(), [6; 4096]);
}

#[test]
fn busy_after_its_budget() {
    let keep = tempfile::tempdir_in("/dev/shm").unwrap();
    let volume = open(&keep.path().join("disk.raw"), "size=4MiB").unwrap();
    let mut rig = Rig::new(UringUse::Off);
    let mut line = rig.open(&*volume);
    let (small, large) = (Memory::whole(16 << 10), Memory::whole(1 << 20));
    let ops = [
        small.op(1, Kind::Read, 0),
        small.op(2, Kind::Read, 0),
        large.op(3, Kind::Read, 0),
        small.op(4, Kind::Read, 0),
    ];
    let mut rest = &ops[..];
    for n in [2, 1, 1] {
        assert_eq!(line.submit(rest), n);
        assert_eq!(line.poll(Instant::now()), n, "what was taken is done");
        rest = &rest[n..];
    }
}

#[test]
fn direct_where_it_can_be() {
    let on_disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let open = |folder: &Path, direct| {
        let options = FileOptions {
            size: Some(1 << 20),
            direct,
            ..FileOptions::default()
        };
        FileVolume::open(&folder.join("disk.raw"), &options).unwrap()
    };
    assert!(open(on_disk.path(), Direct::Auto).is_direct());
    assert!(open(on_disk.path(), Direct::On).is_direct());
    assert!(!open(on_disk.path(), Direct::Off).is_direct());
    assert!(!open(in_memory.path(), Direct::Auto).is_direct());
}
