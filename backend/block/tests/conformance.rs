//! The suite over the kinds that this crate has, and what these promise beyond it.

use std::sync::Arc;
use std::time::Instant;

use bluff_block::conformance::{self, Memory, Profile, Rig, TestVolume};
use bluff_block::{Kind, OpenError, Uri, UriError, null, ram};

fn ram(uri: &str) -> TestVolume {
    TestVolume::new(ram::open(Uri::parse(uri).unwrap()).unwrap())
}

#[test]
fn ram_512() {
    conformance::run(&Profile::default(), &|| ram("ram:?size=8MiB"));
}

#[test]
fn ram_4096() {
    conformance::run(&Profile::default(), &|| {
        ram("ram:?size=8MiB&block_size=4096")
    });
}

/// Its pieces do not begin at pages.
#[test]
fn ram_of_odd_size() {
    conformance::run(&Profile::default(), &|| {
        let made = ram("ram:?size=1536");
        for size in [1 << 20, (1 << 20) + 512, (3 << 20) + 1024, (5 << 20) + 512] {
            made.volume.resize(size).unwrap();
        }
        made
    });
}

#[test]
fn null() {
    let profile = Profile {
        keeps_data: false,
        ..Profile::default()
    };
    conformance::run(&profile, &|| {
        TestVolume::new(null::open(Uri::parse("null:?size=1GiB").unwrap()).unwrap())
    });
}

#[test]
fn null_leaves_buffers() {
    let volume = null::Null::new(512, 1 << 40);
    let mut rig = Rig::new(bluff_reactor::UringUse::Off);
    let mut line = rig.open(&volume);
    let memory = Memory::new(512, || 100);
    memory.set(&[7; 512]);
    assert_eq!(rig.one(&mut line, memory.op(1, Kind::Read, 0)), Ok(()));
    assert_eq!(memory.get(), [7; 512]);
}

#[test]
fn ram_is_busy_after_its_budget() {
    let made = ram("ram:?size=8MiB");
    let mut rig = Rig::new(bluff_reactor::UringUse::Off);
    let mut line = rig.open(&*made.volume);
    let memory = Memory::whole(16 << 10);
    let ops = [1, 2, 3, 4].map(|tag| memory.op(tag, Kind::Read, 0));
    assert_eq!(line.submit(&ops), 2);
    assert_eq!(line.submit(&ops[2..]), 0);
    line.poll(Instant::now());
    assert_eq!(line.submit(&ops[2..]), 2);
    line.poll(Instant::now());
    assert_eq!(line.take().len(), 4);
    // What is larger than the budget is taken, alone.
    let large = Memory::whole(1 << 20);
    let ops = [large.op(1, Kind::Read, 0), memory.op(2, Kind::Read, 0)];
    assert_eq!(line.submit(&ops), 1);
    assert_eq!(line.poll(Instant::now()), 1);
    assert_eq!(line.submit(&ops[1..]), 1);
    assert_eq!(line.poll(Instant::now()), 1);
}

#[test]
fn mistakes_in_uris() {
    let open = |text: &str| {
        let uri = Uri::parse(text).unwrap();
        match uri.kind() {
            "ram" => ram::open(uri),
            _ => null::open(uri),
        }
    };
    for (text, wrong) in [
        ("ram:", "size"),
        ("ram:?size=0", "size"),
        ("ram:?size=1000", "size"),
        ("ram:?size=512&block_size=4096", "size"),
        ("ram:?size=1MiB&block_size=1024", "block_size"),
        ("null:?size=many", "size"),
    ] {
        match open(text) {
            Err(OpenError::Uri(UriError::Value { name, .. })) => assert_eq!(name, wrong, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(
        open("null:?direct=on"),
        Err(OpenError::Uri(UriError::Unknown { .. }))
    ));
    assert!(matches!(
        open("ram:/tmp/x?size=1MiB"),
        Err(OpenError::Uri(UriError::Path(_)))
    ));
    assert!(matches!(
        open("ram:?size=9000000TiB"),
        Err(OpenError::Storage { .. })
    ));
}

#[test]
fn two_channels_share_one_memory() {
    let made = ram("ram:?size=8MiB");
    let volume = Arc::clone(&made.volume);
    let mut rig = Rig::new(bluff_reactor::UringUse::Off);
    let (mut a, mut b) = (rig.open(&*volume), rig.open(&*volume));
    let from = Memory::whole(4096);
    from.set(&[9; 4096]);
    let to = Memory::whole(4096);
    assert_eq!(
        rig.one(&mut a, from.op(1, Kind::Write { fua: false }, 8192)),
        Ok(())
    );
    assert_eq!(rig.one(&mut b, to.op(1, Kind::Read, 8192)), Ok(()));
    assert_eq!(to.get(), [9; 4096]);
}
