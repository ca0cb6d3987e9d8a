//! A data half that is killed again and again, with real front ends on a real `bluffd`: they see a pause and nothing else.

mod card;
mod guest;
#[path = "../../../backend/file/tests/machine/mod.rs"]
#[allow(dead_code)] // It is for the tests of file volumes.
mod machine;
mod steps;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bluff_card::control::Request;
use card::{Card, children, kill, until};
use guest::{Guest, KINDS, Kind};

const BLOCKS: u64 = 1024;

fn times(long: usize) -> usize {
    bluff_testing::times(long / 10, long)
}

fn killed_under_load(kind: Kind) {
    let mut card = Card::start(BLOCKS);
    let mut guest = Guest::connect(&card.socket(), kind, BLOCKS, 7);
    let shared = guest.shared.clone();
    let completed = || shared.completed.load(Ordering::Relaxed);
    let load = std::thread::spawn(move || {
        let shared = guest.shared.clone();
        guest.run(|_| shared.stop.load(Ordering::Relaxed));
        guest
    });
    let mut gaps = Vec::new();
    for round in 0..times(100) as u64 {
        // Killed at any distance from the last time, also before anything was done.
        let wanted = completed() + [0, 1, 50, 3000][round as usize % 4];
        until("requests", || {
            (completed() >= wanted || load.is_finished()).then_some(())
        });
        shared.gap_us.store(0, Ordering::Relaxed);
        card.kill_data_half();
        let before = completed();
        until("a request", || {
            (completed() > before + 64 || load.is_finished()).then_some(())
        });
        assert!(!load.is_finished(), "{:?}", load.join().map(|_| ()));
        gaps.push(shared.gap_us.load(Ordering::Relaxed) / 1000);
    }
    shared.stop.store(true, Ordering::Relaxed);
    let mut guest = load.join().unwrap();
    assert!(guest.is_connected(), "the front end was disconnected");
    assert_eq!(guest.front.config(8).unwrap(), (BLOCKS * 8).to_le_bytes());
    guest.check_disk(&card.disk());
    let session = card.function().session.unwrap();
    let driver = guest.front.features() & !(1 << 30);
    assert_eq!((session.features, session.queues), (driver, 2));
    assert_eq!(card.status().restarts as usize, times(100));
    gaps.sort_unstable();
    println!(
        "{kind:?}: {} kills, {} requests; gap {} ms at most, {} ms in the middle",
        gaps.len(),
        completed(),
        gaps[gaps.len() - 1],
        gaps[gaps.len() / 2],
    );
    card.terminate();
}

#[test]
fn a_data_half_killed_under_load_split() {
    killed_under_load(KINDS[0]);
}

#[test]
fn a_data_half_killed_under_load_split_with_inflight() {
    killed_under_load(KINDS[1]);
}

#[test]
fn a_data_half_killed_under_load_packed() {
    killed_under_load(KINDS[2]);
}

#[test]
fn a_data_half_killed_under_load_packed_with_inflight() {
    killed_under_load(KINDS[3]);
}

/// While one thread kills whatever data half there is as soon as it serves, front ends come, set up, do I/O and go.
#[test]
fn a_data_half_killed_while_front_ends_set_up() {
    let mut card = Card::start(BLOCKS);
    let socket = card.socket();
    let over = AtomicBool::new(false);
    let wanted = times(100) as u32;
    std::thread::scope(|scope| {
        let sessions = scope.spawn(|| {
            let mut count = 0;
            let mut before = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let kind = KINDS[count % KINDS.len()];
                let mut guest = Guest::connect(&socket, kind, BLOCKS, 3 + count as u64);
                guest.go_on_from(&before);
                guest.run(|completed| completed > 100);
                assert!(guest.is_connected());
                before = guest.written();
                for index in 0..2 {
                    guest.front.stop(index).unwrap();
                }
                // Other tests start processes, which hold on to every connection for a moment.
                let stream = guest.front.stream();
                stream.shutdown(std::net::Shutdown::Both).unwrap();
                count += 1;
            }
            count
        });
        let mut round = 0u64;
        while card.status().restarts < wanted && !sessions.is_finished() {
            // More than five in a row that die before they serve a front end are the end of the daemon.
            let lives = round % 4 == 3;
            until("a data half that serves", || {
                let state = card.function().state;
                let is_far = if lives {
                    state == "connected"
                } else {
                    state != "waiting"
                };
                is_far.then_some(())
            });
            // Spread over the set-up, which takes a millisecond or so.
            std::thread::sleep(Duration::from_micros(round % 16 * 300));
            card.kill_data_half();
            round += 1;
        }
        over.store(true, Ordering::Relaxed);
        let count = sessions.join().unwrap();
        println!("{count} sessions while {round} data halves were killed");
        assert!(count > 0);
    });
    card.terminate();
}

/// Every message of a session takes effect once and is answered once, wherever the data half dies.
fn killed_at_each_step(kind: Kind) {
    let whole = steps::session(kind, None);
    assert!(whole.steps > 20, "{whole:?}");
    let stride = bluff_testing::times(4, 1);
    for (offset, step) in steps::STEPS.into_iter().enumerate() {
        for at in (1 + offset as u64 % stride..=whole.steps).step_by(stride as usize) {
            let outcome = steps::session(kind, Some((step, at)));
            assert_eq!(outcome, whole, "{step:?} of {at}");
        }
    }
}

#[test]
fn a_kill_at_each_step_of_a_session_split() {
    killed_at_each_step(KINDS[0]);
}

#[test]
fn a_kill_at_each_step_of_a_session_packed_with_inflight() {
    killed_at_each_step(KINDS[3]);
}

#[test]
fn what_the_kernel_still_writes_for_a_dead_data_half_is_waited_for() {
    machine::with_mounts(|folder| {
        let fs = machine::Ext4::new(folder, 32 << 20);
        steps::dies_with_writes_under_way(folder, &fs.at.join("disk"), || fs.freeze());
    });
}

#[test]
fn a_data_half_that_never_gets_to_work_ends_the_daemon() {
    let mut card = Card::start(BLOCKS);
    let pid = card.pid();
    let daemon = std::thread::spawn(move || {
        let status = card.wait();
        (status, card.log())
    });
    until("the daemon's end", || {
        children(pid).into_iter().for_each(kill);
        daemon.is_finished().then_some(())
    });
    let (status, log) = daemon.join().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("bluffd: 6 data halves in a row died"), "{log}");
}

#[test]
fn a_volume_that_is_away_for_a_while_is_opened_again() {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    let mut card = Card::start(BLOCKS);
    let away = card.disk().with_extension("away");
    std::fs::rename(card.disk(), &away).unwrap();
    let mut before = UnixStream::connect(card.socket()).unwrap();
    before.set_read_timeout(Some(card::LIMIT)).unwrap();
    until("its session", || {
        (card.function().state == "connected").then_some(())
    });
    card.kill_data_half();
    // Neither the one that was there nor one that comes is left without an answer.
    assert_eq!(before.read(&mut [0; 1]).unwrap_or(0), 0);
    let mut next = UnixStream::connect(card.socket()).unwrap();
    next.set_read_timeout(Some(card::LIMIT)).unwrap();
    assert_eq!(next.read(&mut [0; 1]).unwrap_or(0), 0);
    std::fs::rename(&away, card.disk()).unwrap();
    until("the volume", || {
        (card.function().state == "idle").then_some(())
    });
    drop(Guest::connect(&card.socket(), KINDS[0], BLOCKS, 1));
    card.terminate();
}

#[test]
fn a_change_of_size_is_told_after_a_kill() {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::VhostUserProtocolFeatures as P;

    let mut card = Card::start(BLOCKS);
    let mut guest = Guest::connect(&card.socket(), KINDS[0], BLOCKS, 1);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let all = P::MQ | P::REPLY_ACK | P::CONFIG | P::BACKEND_REQ;
    guest.front.frontend().set_protocol_features(all).unwrap();
    guest
        .front
        .frontend()
        .set_backend_request_fd(&theirs)
        .unwrap();
    drop(theirs);
    ours.set_read_timeout(Some(card::LIMIT)).unwrap();
    let mut told = |what: &str| {
        let mut header = [0; 12];
        ours.read_exact(&mut header)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        // CONFIG_CHANGE_MSG; whether an acknowledgement is wanted is of no matter here.
        assert_eq!(header[..4], 2u32.to_ne_bytes());
        if header[4] & 8 != 0 {
            use std::io::Write;
            let reply: Vec<u8> = [2u32, 5, 8, 0, 0]
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect();
            ours.write_all(&reply).unwrap();
        }
    };
    for round in 1..=3 {
        card.kill_data_half();
        told("a change that the dead one may have kept to itself");
        let size = (BLOCKS + round) * 4096;
        let volume = "disk0".parse().unwrap();
        until("the volume", || {
            let request = Request::ListVolumes;
            matches!(card.ask(request), bluff_card::control::Response::Volumes(v) if v[0].state == "open")
                .then_some(())
        });
        card.ask(Request::ResizeVolume { id: volume, size });
        told("the change");
        assert_eq!(guest.front.config(8).unwrap(), (size / 512).to_le_bytes());
    }
    assert!(guest.is_connected());
    card.terminate();
}
