//! Storage that is full, and requests on parts of blocks (R18, R19).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bluff_testing::{Chance, times};
use bluff_virtio_driver::{Completion, Request, Status};

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::{Daemon, Place, function};
use crate::support::guest::{Guest, SECTORS, Shape};

/// A folder of the daemon's own on a tmpfs of 4 MiB, which only it and who looks through `/proc` can see.
fn start_with_tmpfs(place: &Place) -> Daemon {
    let at = place.path("small");
    fs::create_dir(&at).unwrap();
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg(
        "mount -t tmpfs -o size=4m none \"$0\"; truncate -s 8M \"$0/disk0.raw\"; \
         head -c 3M /dev/zero > \"$0/ballast\"; exec \"$@\"",
    );
    command.arg(&at).args(place.arguments());
    place.start_by(command)
}

/// A path of the daemon's, as it sees it.
fn seen_by(daemon: &Daemon, path: &Path) -> PathBuf {
    let path = path.strip_prefix("/").unwrap();
    Path::new(&format!("/proc/{}/root", daemon.pid())).join(path)
}

#[test]
fn r18_no_space_on_the_volume() {
    let blocks = (8 << 20) / BLOCK as u64;
    let place = Place::new(&format!(
        "[volume.disk0]\nuri = \"file:$DIR/small/disk0.raw\"\n{}",
        function("blk0", "disk0")
    ));
    let mut daemon = start_with_tmpfs(&place);
    for shape in Shape::BOTH {
        let mut checker = Checker::new(blocks);
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        guest.may_fail = true;
        guest.ended = Some(Vec::new());
        // Twice what there is room for.
        for block in 0..512 {
            let sector = block * SECTORS;
            guest.submit(&mut checker, (block % 2) as u16, Request::Out { sector });
            guest.publish();
            if block % 32 == 31 {
                guest.settle(&mut checker);
            }
        }
        let failed: Vec<Request> = guest
            .ended
            .take()
            .unwrap()
            .into_iter()
            .filter(|c: &Completion| c.status != Status::Ok)
            .inspect(|c| assert_eq!(c.status, Status::IoErr))
            .map(|c| c.request)
            .collect();
        assert!((100..512).contains(&failed.len()), "{}", failed.len());
        // Nothing is corrupt; what can be read is as it was.
        guest.may_fail = false;
        guest.verify(&mut checker);
        let ballast = seen_by(&daemon, &place.path("small/ballast"));
        fs::remove_file(&ballast).unwrap();
        for request in &failed {
            guest.submit(&mut checker, 0, *request);
            guest.publish();
            guest.settle(&mut checker);
        }
        guest.verify(&mut checker);
        // For the next round: all is given back, and taken again.
        for block in 0..512 {
            let sector = block * SECTORS;
            let sectors = SECTORS as u32;
            let unmap = true;
            let zeroes = Request::WriteZeroes {
                sector,
                sectors,
                unmap,
            };
            guest.submit(&mut checker, 0, zeroes);
            guest.publish();
            guest.settle(&mut checker);
        }
        guest.verify(&mut checker);
        fs::write(&ballast, vec![0; 3 << 20]).unwrap();
    }
    daemon.assert_alive();
    daemon.terminate();
}

/// What a disk of 512-byte sectors holds.
struct Model(Vec<u8>);

impl Model {
    fn sectors(&mut self, first: u64, count: u64) -> &mut [u8] {
        &mut self.0[first as usize * 512..][..count as usize * 512]
    }
}

/// One request at a time, unjudged but for its status.
fn ask(guest: &mut Guest, request: Request) {
    let blk = &mut guest.blks[0];
    blk.submit(request).unwrap();
    guest.publish();
    loop {
        if let Some(completion) = guest.blks[0].poll().unwrap() {
            assert_eq!(completion.status, Status::Ok, "{request:?}");
            return;
        }
        assert!(guest.wait(crate::support::LIMIT), "{request:?}");
    }
}

fn write(guest: &mut Guest, model: &mut Model, sector: u64, chance: &mut Chance) {
    let bytes: Vec<u8> = (0..BLOCK / 8)
        .flat_map(|_| chance.word().to_le_bytes())
        .collect();
    let slot = guest.blks[0].next_slot().unwrap();
    let at = guest.blks[0].data_addr(slot);
    guest.memory.write(at, &bytes).unwrap();
    ask(guest, Request::Out { sector });
    model.sectors(sector, SECTORS).copy_from_slice(&bytes);
}

fn read(guest: &mut Guest, sector: u64) -> Vec<u8> {
    let slot = guest.blks[0].next_slot().unwrap();
    let at = guest.blks[0].data_addr(slot);
    guest.memory.write(at, &[0xa5; BLOCK]).unwrap();
    ask(guest, Request::In { sector });
    let mut bytes = vec![0; BLOCK];
    guest.memory.read(at, &mut bytes).unwrap();
    bytes
}

fn r19(uri: &str) {
    const DISK: u64 = 256;
    let place = Place::new(&format!(
        "[volume.disk0]\nuri = \"{uri}\"\n{}",
        function("blk0", "disk0")
    ));
    place.make_file("disk0.raw", DISK * 512);
    let daemon = place.start();
    let mut chance = Chance::new(77);
    for shape in Shape::BOTH {
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        let mut model = Model(vec![0; DISK as usize * 512]);
        for sector in (0..DISK).step_by(SECTORS as usize) {
            write(&mut guest, &mut model, sector, &mut chance);
        }
        for _ in 0..times(300, 20_000) {
            // Not along blocks or pages.
            let sector = chance.below(DISK - SECTORS);
            let sectors = 1 + chance.below((DISK - sector).min(40));
            let (range, zero) = (sectors as u32, chance.below(3));
            match zero {
                0 => ask(
                    &mut guest,
                    Request::WriteZeroes {
                        sector,
                        sectors: range,
                        unmap: chance.below(2) == 0,
                    },
                ),
                1 => ask(
                    &mut guest,
                    Request::Discard {
                        sector,
                        sectors: range,
                    },
                ),
                _ => {
                    write(&mut guest, &mut model, sector, &mut chance);
                    continue;
                }
            }
            let mut now = Vec::new();
            for sector in (0..DISK).step_by(SECTORS as usize) {
                now.extend(read(&mut guest, sector));
            }
            if zero == 1 {
                // A discarded sector may be anything; with us it is zeroes, or as it was.
                for i in sector..sector + sectors {
                    let found = &now[i as usize * 512..][..512];
                    let kept = found == &*model.sectors(i, 1);
                    assert!(kept || found.iter().all(|b| *b == 0), "sector {i}");
                    model.sectors(i, 1).copy_from_slice(found);
                }
            } else {
                model.sectors(sector, sectors).fill(0);
            }
            let wrong = now.chunks(512).zip(model.0.chunks(512));
            let wrong = wrong.enumerate().find(|(_, (a, b))| a != b);
            assert!(
                wrong.is_none(),
                "sector {:?} after {sectors} from {sector}",
                wrong.map(|(i, _)| i)
            );
        }
        drop(guest);
    }
    daemon.terminate();
}

#[test]
fn r19_partial_discard_and_write_zeroes_on_a_file() {
    r19("file:$DIR/disk0.raw?direct=off");
    r19("file:$DIR/disk0.raw");
}

#[test]
fn r19_partial_discard_and_write_zeroes_on_ram() {
    r19("ram:?size=128KiB");
}
