//! Storage that is full, that hangs, that loses writes, that somebody else uses.

mod machine;

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_block::conformance::{self, Line, Memory, Profile, Rig, TestVolume};
use bluff_block::{BlockError, Cancel, InUse, Kind, Op, Tag, Uri, Volume};
use bluff_reactor::UringUse;
use bluff_testing::is_emulated;

const WRITE: Kind = Kind::Write { fua: false };
const BOTH: [UringUse; 2] = [UringUse::Auto, UringUse::Off];

fn open(path: &Path, options: &str) -> Arc<dyn Volume> {
    let uri = Uri::parse(&format!("file:{}?{options}", path.display())).unwrap();
    bluff_file::open(uri).unwrap()
}

fn write(rig: &mut Rig, line: &mut Line, at: u64, byte: u8, len: usize) -> Result<(), BlockError> {
    let memory = Memory::whole(len);
    memory.set(&vec![byte; len]);
    rig.one(line, memory.op(1, WRITE, at))
}

fn read(rig: &mut Rig, line: &mut Line, at: u64, len: usize) -> Vec<u8> {
    let memory = Memory::whole(len);
    assert_eq!(rig.one(line, memory.op(1, Kind::Read, at)), Ok(()));
    memory.get()
}

/// Fills the storage, makes space, writes the same again.
fn fills_up(folder: &Path, options: &str, uring: UringUse) {
    const STEP: usize = 64 << 10;
    let path = folder.join("disk.raw");
    let ballast = folder.join("ballast");
    // The file system may give the space of the round before back a little later.
    let until = Instant::now() + Duration::from_secs(10);
    while let Err(e) = std::fs::write(&ballast, vec![1; 1 << 20]) {
        assert!(Instant::now() < until, "no room for the ballast: {e}");
    }
    std::fs::File::open(&ballast).unwrap().sync_all().unwrap();
    let volume = open(&path, &format!("size=64MiB{options}"));
    let mut rig = Rig::new(uring);
    let mut line = rig.open(&*volume);
    let mut good = 0;
    let refused = loop {
        match write(&mut rig, &mut line, good, 7, STEP) {
            Ok(()) => good += STEP as u64,
            Err(e) => break e,
        }
        assert!(good < 64 << 20, "it never got full");
    };
    assert_eq!(refused, BlockError::NoSpace);
    assert!(good > 0);
    assert_eq!(
        rig.plain(&mut line, Kind::Flush, 0, 0),
        Ok(()),
        "nothing was lost"
    );
    std::fs::remove_file(&ballast).unwrap();
    // The file system may give the space back a little later.
    let until = Instant::now() + Duration::from_secs(10);
    while write(&mut rig, &mut line, good, 8, STEP) != Ok(()) {
        assert!(Instant::now() < until, "no space although there is");
        rig.step(Duration::from_millis(10));
    }
    assert_eq!(rig.plain(&mut line, Kind::Flush, 0, 0), Ok(()));
    for at in (0..good).step_by(STEP) {
        assert!(read(&mut rig, &mut line, at, STEP).iter().all(|&b| b == 7));
    }
    assert!(
        read(&mut rig, &mut line, good, STEP)
            .iter()
            .all(|&b| b == 8)
    );
    drop(line);
    drop(volume);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn r18_no_space_on_tmpfs() {
    machine::with_mounts(|folder| {
        let at = machine::tmpfs(folder, "small", "4m");
        fills_up(&at, "", UringUse::Auto);
        fills_up(&at, "", UringUse::Off);
    });
}

#[test]
fn r18_no_space_on_a_disk() {
    machine::with_mounts(|folder| {
        let fs = machine::Ext4::new(folder, 16 << 20);
        for options in ["&direct=off", "&direct=on"] {
            for uring in BOTH {
                fills_up(&fs.at, options, uring);
            }
        }
    });
}

/// A write that hangs in the kernel is cancelled at once; what comes after waits for it.
fn hangs(folder: &Path, options: &str, uring: UringUse) {
    let fs = machine::Ext4::new(folder, 32 << 20);
    let path = fs.at.join("disk.raw");
    let volume = open(&path, &format!("size=8MiB{options}"));
    let rival = open(&path, "");
    volume.lock().unwrap();
    let mut rig = Rig::new(uring);
    let (mut a, mut b) = (rig.open(&*volume), rig.open(&*volume));
    assert_eq!(write(&mut rig, &mut a, 0, 1, 1 << 20), Ok(()));
    assert_eq!(rig.plain(&mut a, Kind::Flush, 0, 0), Ok(()));

    let Some(frozen) = fs.freeze() else { return };
    let old = Memory::whole(8192);
    old.set(&[2; 8192]);
    let start = Instant::now();
    a.submit(&[old.op(5, WRITE, 4096), old.op(6, WRITE, 512 << 10)]);
    a.kick();
    rig.step(Duration::from_millis(50));
    assert_eq!(a.poll(Instant::now()), 0, "it hangs");
    assert_eq!(a.cancel(Tag(5)), Cancel::Soon);
    assert_eq!(a.poll(Instant::now()), 1);
    assert_eq!(a.take()[0].result, Err(BlockError::Cancelled));
    assert_eq!(a.cancel(Tag(5)), Cancel::Unknown);
    // What it holds is ours again.
    old.set(&[9; 8192]);
    // The other one goes with its channel.
    a.abandon();
    assert!(start.elapsed() < Duration::from_secs(1), "nobody waited");

    let new = Memory::whole(4096);
    new.set(&[3; 4096]);
    let got = Memory::whole(4096);
    b.submit(&[
        new.op(1, WRITE, 8192),
        got.op(2, Kind::Read, 512 << 10),
        got.op(3, Kind::Read, 64 << 10),
    ]);
    b.kick();
    rig.wait(&mut b, 1);
    let first = b.take();
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].tag, Tag(3), "what touches no such range goes on");
    assert_eq!(got.get(), [1; 4096]);
    rig.step(Duration::from_millis(50));
    assert_eq!(b.in_flight(), 2, "what does waits");
    // The lock stays while a write may land.
    volume.unlock();
    assert_eq!(rival.lock(), Err(BlockError::Locked));
    volume.lock().unwrap();

    drop(frozen);
    rig.wait(&mut b, usize::MAX);
    assert!(b.take().iter().all(|c| c.result.is_ok()));
    assert!(
        read(&mut rig, &mut b, 8192, 4096) == [3; 4096],
        "the new one stands"
    );
    let late = read(&mut rig, &mut b, 4096, 4096);
    assert!([1, 2].contains(&late[0]) && late.iter().all(|&x| x == late[0]));
    volume.unlock();
    rival.lock().unwrap();
    rival.unlock();
}

#[test]
fn a_hung_write_through_the_page_cache_with_uring() {
    machine::with_mounts(|f| hangs(f, "&direct=off", UringUse::Auto));
}

#[test]
fn a_hung_write_through_the_page_cache_with_threads() {
    machine::with_mounts(|f| hangs(f, "&direct=off", UringUse::Off));
}

#[test]
fn a_hung_direct_write_with_uring() {
    machine::with_mounts(|f| hangs(f, "&direct=on", UringUse::Auto));
}

/// The disk loses what the page cache gives it: the flush that finds out fails, and all later ones.
#[test]
fn r6_a_flush_that_failed_stays_failed() {
    machine::with_mounts(|folder| {
        for (i, uring) in BOTH.into_iter().enumerate() {
            let small = machine::tmpfs(folder, &format!("small{i}"), "1m");
            let image = small.join("image");
            std::fs::File::create(&image)
                .unwrap()
                .set_len(16 << 20)
                .unwrap();
            let device = machine::Loop::new(&image);
            let volume = open(&device.0, "direct=off");
            let mut rig = Rig::new(uring);
            let mut line = rig.open(&*volume);
            assert_eq!(rig.plain(&mut line, Kind::Flush, 0, 0), Ok(()));
            for at in 0..4 {
                assert_eq!(write(&mut rig, &mut line, at << 20, 5, 1 << 20), Ok(()));
            }
            for _ in 0..3 {
                let got = rig.plain(&mut line, Kind::Flush, 0, 0);
                assert_eq!(got, Err(BlockError::Io));
            }
            let mut other = rig.open(&*volume);
            assert_eq!(
                rig.plain(&mut other, Kind::Flush, 0, 0),
                Err(BlockError::Io)
            );
            drop((line, other, volume));
            let volume = open(&device.0, "direct=off");
            let mut line = rig.open(&*volume);
            assert_eq!(
                rig.plain(&mut line, Kind::Flush, 0, 0),
                Ok(()),
                "opened again"
            );
        }
    });
}

/// Two flushes at once over one lost write. The kernel tells one of them, and neither succeeds.
#[test]
fn r6_flushes_at_once_fail_together() {
    machine::with_mounts(|folder| {
        for round in 0..6 {
            let uring = BOTH[round % 2];
            let small = machine::tmpfs(folder, &format!("small{round}"), "1m");
            let image = small.join("image");
            std::fs::File::create(&image)
                .unwrap()
                .set_len(16 << 20)
                .unwrap();
            let device = machine::Loop::new(&image);
            let volume = open(&device.0, "direct=off");
            let (mut here, mut there) = (Rig::new(uring), Rig::new(uring));
            let (mut a, mut b) = (here.open(&*volume), there.open(&*volume));
            for at in 0..4 {
                assert_eq!(write(&mut here, &mut a, at << 20, 5, 1 << 20), Ok(()));
            }
            let flush = |tag| Op::without_data(Tag(tag), Kind::Flush, 0, 0);
            for line in [&mut a, &mut b] {
                line.submit(&[flush(1), flush(2)]);
                line.kick();
                // These come while the first ones may be under way.
                line.submit(&[flush(3)]);
                line.kick();
            }
            let until = Instant::now() + Duration::from_secs(30);
            while a.in_flight() + b.in_flight() > 0 {
                assert!(Instant::now() < until, "flushes that wait for each other");
                here.step(Duration::from_millis(5));
                there.step(Duration::from_millis(5));
            }
            let all: Vec<_> = a.take().into_iter().chain(b.take()).collect();
            assert_eq!(all.len(), 6);
            for c in all {
                assert_eq!(c.result, Err(BlockError::Io), "round {round}, {:?}", c.tag);
            }
        }
    });
}

/// A write with the flush built in hears of the lost write first, and nobody has asked for its result yet: a
/// flush on another reactor is told too.
#[test]
fn r6_a_durable_write_does_not_take_the_error_of_a_flush() {
    machine::with_mounts(|folder| {
        for (i, uring) in BOTH.into_iter().enumerate() {
            let small = machine::tmpfs(folder, &format!("small{i}"), "1m");
            let image = small.join("image");
            std::fs::File::create(&image)
                .unwrap()
                .set_len(16 << 20)
                .unwrap();
            let device = machine::Loop::new(&image);
            let volume = open(&device.0, "direct=on");
            let (mut here, mut there) = (Rig::new(uring), Rig::new(uring));
            let (mut a, mut b) = (here.open(&*volume), there.open(&*volume));
            assert_eq!(write(&mut here, &mut a, 0, 5, 4096), Ok(()));
            let cached = std::fs::OpenOptions::new().write(true).open(&device.0);
            let cached = cached.unwrap();
            cached.write_all_at(&[7; 4 << 20], 4 << 20).unwrap();
            assert!(cached.sync_data().is_err(), "more than there is room for");
            let memory = Memory::whole(4096);
            a.submit(&[memory.op(1, Kind::Write { fua: true }, 0)]);
            a.kick();
            there.step(Duration::from_millis(50));
            let got = there.plain(&mut b, Kind::Flush, 0, 0);
            assert_eq!(got, Err(BlockError::Io));
            // Its own bytes are there, whatever it says.
            here.wait(&mut a, 1);
        }
    });
}

/// Who syncs for others may give up or go: theirs end all the same.
#[test]
fn a_flush_that_others_wait_for_is_given_up() {
    for uring in BOTH {
        for goes in [false, true] {
            let keep = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let volume = open(&keep.path().join("disk.raw"), "size=4MiB&direct=off");
            let mut rig = Rig::new(uring);
            let (mut a, mut b) = (rig.open(&*volume), rig.open(&*volume));
            let flush = |tag| Op::without_data(Tag(tag), Kind::Flush, 0, 0);
            for round in 0..20 {
                assert_eq!(write(&mut rig, &mut a, 0, round, 1 << 20), Ok(()));
                a.submit(&[flush(1), flush(2)]);
                b.submit(&[flush(1), flush(2)]);
                if round % 2 == 0 {
                    a.kick();
                    b.kick();
                }
                if goes {
                    std::mem::replace(&mut a, rig.open(&*volume)).abandon();
                } else {
                    assert_eq!(a.cancel(Tag(1)), Cancel::Soon);
                    a.poll(Instant::now());
                    assert_eq!(a.take()[0].result, Err(BlockError::Cancelled));
                }
                b.kick();
                rig.wait(&mut b, usize::MAX);
                let done = b.take();
                assert!(done.len() == 2 && done.iter().all(|c| c.result == Ok(())));
                rig.wait(&mut a, usize::MAX);
                assert!(a.take().iter().all(|c| c.result == Ok(())));
            }
        }
    }
}

/// The suite on a block device.
#[test]
fn block_device() {
    machine::with_mounts(|folder| {
        for (options, uring) in [
            ("direct=on", UringUse::Auto),
            ("direct=off", UringUse::Auto),
            ("direct=on", UringUse::Off),
        ] {
            let count = Cell::new(0);
            let profile = Profile {
                resizes: false,
                uring,
                ..Profile::default()
            };
            conformance::run(&profile, &|| {
                // A file for each: the device before may still be closing, and write what it has.
                count.set(count.get() + 1);
                let image = folder.join(format!("{options}-{uring:?}-{}", count.get()));
                std::fs::File::create(&image)
                    .unwrap()
                    .set_len(8 << 20)
                    .unwrap();
                let device = machine::Loop::new(&image);
                let volume = open(&device.0, options);
                assert!(volume.geometry().discard.is_some());
                TestVolume {
                    volume,
                    keep: Box::new(device),
                }
            });
        }
    });
}

/// A block device may be another host's too, which does not see our page cache: it is used only where that was
/// asked for, not because O_DIRECT fails just now.
#[test]
fn no_page_cache_on_a_block_device_unless_it_is_asked_for() {
    machine::with_mounts(|folder| {
        let image = folder.join("image");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(8 << 20).unwrap();
        let device = machine::Loop::new(&image);
        let at = |options: &str| {
            let uri = format!("file:{}?{options}", device.0.display());
            bluff_file::open(Uri::parse(&uri).unwrap())
        };
        at("").unwrap();
        file.set_len(0).unwrap();
        let Err(e) = at("") else {
            panic!("it went to the page cache by itself")
        };
        assert!(e.to_string().contains("O_DIRECT"), "{e}");
        at("direct=off").unwrap();
    });
}

/// Somebody cuts the file off under us: an error for what is gone, the rest goes on.
#[test]
fn a_file_that_shrinks() {
    for (folder, options) in [
        (Path::new("/dev/shm"), ""),
        (Path::new(env!("CARGO_TARGET_TMPDIR")), "&direct=on"),
        (Path::new(env!("CARGO_TARGET_TMPDIR")), "&direct=off"),
    ] {
        for uring in BOTH {
            let keep = tempfile::tempdir_in(folder).unwrap();
            let path = keep.path().join("disk.raw");
            let volume = open(&path, &format!("size=4MiB{options}"));
            let mut rig = Rig::new(uring);
            let mut line = rig.open(&*volume);
            assert_eq!(write(&mut rig, &mut line, 0, 1, 4096), Ok(()));
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(1 << 20).unwrap();
            let memory = Memory::whole(8192);
            for at in [2 << 20, (1 << 20) - 4096] {
                let got = rig.one(&mut line, memory.op(1, Kind::Read, at));
                assert_eq!(got, Err(BlockError::Io), "{options} {at}");
            }
            assert!(read(&mut rig, &mut line, 0, 4096) == [1; 4096]);
        }
    }
}

#[test]
fn one_writer_at_a_time() {
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().join("disk.raw");
    let first = open(&path, "size=1MiB");
    let second = open(&path, "");
    first.lock().unwrap();
    first.lock().unwrap();
    assert_eq!(second.lock(), Err(BlockError::Locked));
    first.unlock();
    assert_eq!(second.lock(), Err(BlockError::Locked), "one of two is left");
    // A partner of a migration that lets go a little later.
    std::thread::scope(|s| {
        let waits = s.spawn(|| InUse::within(second.clone(), Duration::from_secs(10)));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waits.is_finished(), "it waits");
        first.unlock();
        let taken = waits.join().unwrap().unwrap();
        assert_eq!(first.lock(), Err(BlockError::Locked));
        drop(taken);
    });
    second.lock().unwrap();
    assert_eq!(first.lock(), Err(BlockError::Locked));
    second.unlock();
    // Readers do not disturb each other, but a writer disturbs them.
    let readers = [open(&path, "read_only=on"), open(&path, "read_only=on")];
    readers[0].lock().unwrap();
    readers[1].lock().unwrap();
    assert_eq!(first.lock(), Err(BlockError::Locked));
    readers[0].unlock();
    readers[1].unlock();
    first.lock().unwrap();
    assert_eq!(readers[0].lock(), Err(BlockError::Locked));
}

/// QEMU and we refuse each other.
#[test]
fn qemu_on_the_same_file() {
    // As for mounts: it starts programs.
    if is_emulated() || Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("not run: there is no qemu-io");
        return;
    }
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().join("disk.raw");
    let volume = open(&path, "size=1MiB");
    let qemu = || {
        let out = Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write -P 3 0 512"])
            .arg(&path)
            .output()
            .unwrap();
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    volume.lock().unwrap();
    let (well, said) = qemu();
    assert!(!well && said.contains("lock"), "refused: {said}");
    volume.unlock();
    let (well, said) = qemu();
    assert!(well, "let in: {said}");

    let mut child = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its answer tells that it has opened the file.
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "length").unwrap();
    let mut answer = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut answer).unwrap();
    assert!(answer.contains("1 MiB"), "{answer}");
    assert_eq!(volume.lock(), Err(BlockError::Locked));
    drop(stdin);
    child.wait().unwrap();
    volume.lock().unwrap();
    volume.unlock();
}
