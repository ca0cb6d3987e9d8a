//! What a host has formatted a namespace to outlives the daemon.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bluff_card::control::{NamespacesEntry, Request, Response};
use bluff_card::formats;
use bluff_nvme_host::spec::status;
use bluff_nvme_host::{Buffer, ClientBar, Command as Nvme, Error, Queues};
use rustix::fs::FlockOperation;

use crate::nvme::{CHANGED, Host, SIZE, namespaces, place};
use crate::support::daemon::{Daemon, Place};
use crate::support::{LIMIT, until};

/// An end is over by then.
const SOON: Duration = Duration::from_secs(2);

fn list(daemon: &Daemon) -> NamespacesEntry {
    let function = "nvme0".parse().unwrap();
    namespaces(daemon, Request::ListNamespaces { function }).unwrap()
}

/// What `bluffctl` says of the blocks of each namespace.
fn listed(daemon: &Daemon) -> Vec<(u32, Option<u32>)> {
    let id = "nvme1".parse().unwrap();
    let shown = match daemon.ask(Request::ShowFunction { id }).unwrap() {
        Response::Function(function) => function.namespaces,
        other => panic!("{other:?}"),
    };
    let all = list(daemon).namespaces;
    assert_eq!(shown, all);
    all.iter().map(|n| (n.nsid, n.block_size)).collect()
}

fn block(host: &mut Host, nsid: u32) -> u64 {
    host.controller.identify_namespace(nsid).unwrap().block()
}

fn queues(host: &mut Host) -> Queues<ClientBar> {
    host.controller.set_queue_count(1, 1).unwrap();
    host.controller.create_queues(1, 1, 16, None).unwrap()
}

/// The first 4 KiB, in blocks of this size.
fn read(host: &mut Host, queues: &mut Queues<ClientBar>, nsid: u32, block: u64) -> Vec<u8> {
    let mut data = Buffer::holding(&host.memory, &[0x55; 4096]).unwrap();
    let blocks = 4096 / block as u32;
    let read = Nvme::read(nsid, 0, blocks).data(data.prp().unwrap());
    queues.run(0, &read, LIMIT).unwrap();
    data.read()
}

/// Fills 4 KiB at a block.
fn write(host: &mut Host, queues: &mut Queues<ClientBar>, nsid: u32, at: u64, byte: u8) {
    let block = block(host, nsid);
    let mut data = Buffer::holding(&host.memory, &[byte; 4096]).unwrap();
    let blocks = 4096 / block as u32;
    let write = Nvme::write(nsid, at, blocks).data(data.prp().unwrap());
    queues.run(0, &write, LIMIT).unwrap();
    queues.run(0, &Nvme::flush(nsid), LIMIT).unwrap();
}

/// Sends a format, and does not wait for its end.
fn begin(host: &mut Host, nsid: u32, format: u8) -> u16 {
    let admin = host.controller.admin_queue().unwrap();
    let cid = admin.submit(0, &Nvme::format(nsid, format, 0)).unwrap();
    admin.ring().unwrap();
    cid
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> bluff_nvme_host::Status {
    result.expect_err("refused").status().unwrap()
}

/// A daemon that does not come to be: what it said.
fn fails_to_start(place: &Place) -> String {
    let arguments = place.arguments();
    let mut command = Command::new(&arguments[0]);
    command.args(&arguments[1..]).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

fn change_config(place: &Place, from: &str, to: &str) {
    let path = place.path("card.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    assert!(config.contains(from), "{config}");
    std::fs::write(path, config.replace(from, to)).unwrap();
}

#[test]
fn a_format_outlives_the_daemon() {
    let place = place();
    let mut daemon = place.start();
    assert_eq!(listed(&daemon), [(1, Some(512)), (5, Some(4096))]);
    for (format, before, after) in [(1, 512, 4096), (1, 4096, 4096), (0, 4096, 512)] {
        let mut host = Host::connect(&place.socket("nvme0"));
        let mut other = Host::connect(&place.socket("nvme1"));
        other.controller.set_feature(0x0b, 0, 1 << 8).unwrap();
        other.controller.request_event().unwrap();
        let mut queue = queues(&mut host);
        assert_eq!(block(&mut host, 1), before);
        write(&mut host, &mut queue, 1, 0, 0x77);
        host.controller.format(1, format, 0).unwrap();
        // All who share it see it, at once.
        assert_eq!(other.next_event(), CHANGED);
        assert_eq!([&mut host, &mut other].map(|h| block(h, 1)), [after; 2]);
        assert_eq!(listed(&daemon), [(1, Some(after as u32)), (5, Some(4096))]);
        daemon.kill();
        daemon = place.start();
        assert_eq!(listed(&daemon), [(1, Some(after as u32)), (5, Some(4096))]);
        let mut host = Host::connect(&place.socket("nvme0"));
        let mut other = Host::connect(&place.socket("nvme1"));
        assert_eq!([&mut host, &mut other].map(|h| block(h, 1)), [after; 2]);
        assert_eq!(block(&mut host, 5), 4096);
        let mut queue = queues(&mut host);
        assert_eq!(read(&mut host, &mut queue, 1, after), [0; 4096]);
        // What is written then is found where it was, too.
        write(&mut host, &mut queue, 1, 0, 0x11);
        write(&mut host, &mut queue, 1, 4096 / after, 0x22);
        daemon.kill();
        daemon = place.start();
        let mut host = Host::connect(&place.socket("nvme1"));
        assert_eq!(block(&mut host, 1), after);
        let mut queue = queues(&mut host);
        assert_eq!(read(&mut host, &mut queue, 1, after), [0x11; 4096]);
        let raw = std::fs::read(place.path("disk0.raw")).unwrap();
        assert_eq!(raw[4096..8192], [0x22; 4096]);
    }
    daemon.terminate();
}

/// Formats are recorded when it is dropped.
struct Hold {
    _dir: File,
}

impl Hold {
    fn new(place: &Place) -> Self {
        let dir = File::open(place.path("state")).unwrap();
        rustix::fs::flock(&dir, FlockOperation::LockExclusive).unwrap();
        Self { _dir: dir }
    }

    /// Waits until a format is erased, and about to be recorded.
    fn until_struck(&self, daemon: &Daemon) {
        let waits = format!("-> FLOCK  ADVISORY  WRITE {} ", daemon.pid());
        until("a format that is to be recorded", || {
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            locks.contains(&waits).then_some(())
        });
    }
}

#[test]
fn a_daemon_that_dies_before_the_record_leaves_the_old_format() {
    let place = place();
    let mut daemon = place.start();
    for _ in 0..3 {
        let hold = Hold::new(&place);
        let mut host = Host::connect(&place.socket("nvme0"));
        let mut queue = queues(&mut host);
        write(&mut host, &mut queue, 1, 0, 0x77);
        begin(&mut host, 1, 1);
        hold.until_struck(&daemon);
        let raw = std::fs::read(place.path("disk0.raw")).unwrap();
        assert!(raw.iter().all(|byte| *byte == 0));
        // Others are served meanwhile.
        assert_eq!(listed(&daemon), [(1, Some(512)), (5, Some(4096))]);
        let mut other = Host::connect(&place.socket("nvme1"));
        assert_eq!(block(&mut other, 1), 512);
        let mut queue = queues(&mut other);
        write(&mut other, &mut queue, 5, 0, 0x99);
        daemon.kill();
        drop(hold);
        daemon = place.start();
        let mut host = Host::connect(&place.socket("nvme0"));
        assert_eq!(block(&mut host, 1), 512);
        let mut queue = queues(&mut host);
        assert_eq!(read(&mut host, &mut queue, 1, 512), [0; 4096]);
    }
    let mut host = Host::connect(&place.socket("nvme1"));
    host.controller.format(1, 1, 0).unwrap();
    assert_eq!(block(&mut host, 1), 4096);
    daemon.terminate();
}

/// A host that has begun anew sees the old format, and cannot use it, until what is recorded holds.
#[test]
fn a_host_does_not_wait_for_the_state_directory_to_reset() {
    for kept in [true, false] {
        for way in 0..3 {
            let place = place();
            let daemon = place.start();
            let mut host = Host::connect(&place.socket("nvme0"));
            let mut queue = queues(&mut host);
            write(&mut host, &mut queue, 1, 0, 0x77);
            if !kept {
                std::fs::create_dir(place.path("state").join(formats::DRAFT)).unwrap();
            }
            let hold = Hold::new(&place);
            begin(&mut host, 1, 1);
            hold.until_struck(&daemon);
            let began = Instant::now();
            match way {
                0 => host.controller.disable().unwrap(),
                1 => host.controller.shut_down(false).unwrap(),
                _ => {}
            }
            drop((queue, host));
            let mut host = Host::connect(&place.socket("nvme0"));
            assert!(began.elapsed() < SOON, "{kept} {way}");
            host.controller.set_feature(0x0b, 0, 1 << 8).unwrap();
            host.controller.request_event().unwrap();
            let mut queue = queues(&mut host);
            assert_eq!(block(&mut host, 1), 512);
            let done = queue.run(0, &Nvme::read(1, 0, 1), LIMIT);
            assert_eq!(refused(done), status::FORMAT_IN_PROGRESS);
            let remove = Request::RemoveNamespace {
                function: "nvme0".parse().unwrap(),
                volume: "disk0".parse().unwrap(),
            };
            let removed = namespaces(&daemon, remove).unwrap_err();
            assert!(removed.contains("being formatted"), "{removed}");
            drop(hold);
            if kept {
                assert_eq!(host.next_event(), CHANGED);
            } else {
                until("the end of the format", || {
                    let done = queue.run(0, &Nvme::flush(1), LIMIT);
                    let in_progress = |e: &Error| e.status() == Some(status::FORMAT_IN_PROGRESS);
                    (!done.as_ref().is_err_and(in_progress)).then(|| done.unwrap())
                });
            }
            let expected = if kept { 4096 } else { 512 };
            assert_eq!(block(&mut host, 1), expected);
            assert_eq!(read(&mut host, &mut queue, 1, expected), [0; 4096]);
            daemon.terminate();
        }
    }
}

/// It ends like any other, and what is not recorded then has not happened.
#[test]
fn a_daemon_ends_while_a_format_waits() {
    let place = place();
    let daemon = place.start();
    let mut host = Host::connect(&place.socket("nvme0"));
    let hold = Hold::new(&place);
    begin(&mut host, 1, 1);
    hold.until_struck(&daemon);
    let began = Instant::now();
    daemon.terminate();
    assert!(began.elapsed() < SOON);
    drop(hold);
    let daemon = place.start();
    assert_eq!(listed(&daemon), [(1, Some(512)), (5, Some(4096))]);
    daemon.terminate();
}

#[test]
fn a_format_that_cannot_be_recorded_fails() {
    let place = place();
    let daemon = place.start();
    std::fs::create_dir(place.path("state").join(formats::DRAFT)).unwrap();
    let mut host = Host::connect(&place.socket("nvme0"));
    let mut queue = queues(&mut host);
    for _ in 0..3 {
        write(&mut host, &mut queue, 1, 0, 0x77);
        let failed = host.controller.format(1, 1, 0);
        assert_eq!(refused(failed), status::INTERNAL_ERROR);
        assert_eq!(block(&mut host, 1), 512);
        assert_eq!(read(&mut host, &mut queue, 1, 512), [0; 4096]);
    }
    assert_eq!(listed(&daemon), [(1, Some(512)), (5, Some(4096))]);
    let log = daemon.log();
    assert!(log.contains("a format is not recorded"), "{log}");
    daemon.terminate();
}

#[test]
fn a_namespace_that_comes_back_is_what_it_was() {
    let place = place();
    let daemon = place.start();
    let mut host = Host::connect(&place.socket("nvme0"));
    let of = |host: &mut Host, nsid| {
        let identify = host.controller.identify_namespace(nsid).unwrap();
        (identify.block(), identify.nguid())
    };
    let before = of(&mut host, 1);
    host.controller.format(1, 1, 0).unwrap();
    let [function, volume] = ["nvme0", "disk0"];
    let remove = Request::RemoveNamespace {
        function: function.parse().unwrap(),
        volume: volume.parse().unwrap(),
    };
    namespaces(&daemon, remove).unwrap();
    let add = Request::AddNamespace {
        function: function.parse().unwrap(),
        volume: volume.parse().unwrap(),
        nsid: Some(9),
    };
    namespaces(&daemon, add).unwrap();
    assert_eq!(listed(&daemon), [(5, Some(4096)), (9, Some(4096))]);
    until("the namespace", || {
        let active = host.controller.active_namespaces(0).unwrap();
        (active == [5, 9]).then_some(())
    });
    let after = of(&mut host, 9);
    assert_eq!(after, (4096, before.1), "also to its host");
    daemon.terminate();
    // Another name is another namespace, and the one of before is not forgotten.
    for (from, to, size) in [
        ("example:s0", "example:s1", 512),
        ("example:s1", "example:s0", 4096),
    ] {
        change_config(&place, from, to);
        let daemon = place.start();
        assert_eq!(listed(&daemon), [(1, Some(size)), (5, Some(4096))]);
        daemon.terminate();
    }
    // Nor where it is not configured for a while.
    let all = r#""disk0", { volume = "disk1", nsid = 5 }"#;
    let one = r#"{ volume = "disk1", nsid = 5 }"#;
    for (from, to) in [(all, one), (one, all)] {
        change_config(&place, from, to);
        place.start().terminate();
    }
    let daemon = place.start();
    assert_eq!(listed(&daemon), [(1, Some(4096)), (5, Some(4096))]);
    assert_eq!(list(&daemon).namespaces[0].info.unwrap().size, SIZE);
    daemon.terminate();
}

#[test]
fn no_other_format_is_presented() {
    let place = place();
    let daemon = place.start();
    let mut host = Host::connect(&place.socket("nvme0"));
    host.controller.format(1, 0, 0).unwrap();
    daemon.terminate();
    let [small, large] = [512, 4096].map(|size| format!("disk0.raw?block_size={size}"));
    change_config(&place, &small, &large);
    let said = fails_to_start(&place);
    assert!(said.contains("function nvme0: namespace 1:"), "{said}");
    assert!(said.contains("volume disk0 cannot have any more"), "{said}");
    change_config(&place, &large, &small);
    place.start().terminate();

    let file = place.path("state").join(formats::FILE);
    let text = std::fs::read_to_string(&file).unwrap();
    for bad in [
        "",
        "{",
        &text.replace("512", "1024"),
        &text.replacen('1', "2", 1),
    ] {
        std::fs::write(&file, bad).unwrap();
        let said = fails_to_start(&place);
        assert!(said.contains(file.to_str().unwrap()), "{said}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), bad);
    }
    std::fs::write(&file, text).unwrap();
    place.start().terminate();
}
