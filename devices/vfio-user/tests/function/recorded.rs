//! Sessions that are recorded: the process that serves one dies at each step, and another goes on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use bluff_vfio_user::keeper::{BOUNDS, Commit, Keeper, Ledger, Progress};
use bluff_vfio_user::{Limits, PciTarget, Record, Resume, Session};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::*;

type Shared = Arc<Mutex<Ledger>>;

fn unrecorded() -> Shared {
    Arc::new(Mutex::new(Ledger::new(BOUNDS)))
}

/// When the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// The effect of this step is done, and not recorded.
    Before(u64),
    /// It is recorded, and the process does not know.
    After(u64),
}

/// A ledger whose process dies. It does nothing from then on, as one that was killed.
struct Dying {
    ledger: Shared,
    death: Option<Death>,
    steps: u64,
    told: Sender<()>,
}

impl Keeper for Dying {
    fn connected(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.ledger.connected(socket)
    }

    fn keeps(&self) -> bool {
        true
    }

    fn commit(&mut self, socket: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress> {
        self.steps += 1;
        if self.death == Some(Death::Before(self.steps)) {
            self.told.send(()).unwrap();
            return Ok(Progress::Later);
        }
        let progress = self.ledger.commit(socket, commit)?;
        if self.death == Some(Death::After(self.steps)) {
            self.told.send(()).unwrap();
            return Ok(Progress::Later);
        }
        Ok(progress)
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        self.ledger.flush(socket)
    }

    fn ended(&mut self) {
        self.ledger.ended();
    }
}

/// What was recorded, for another process.
fn snapshot(ledger: &Shared) -> Option<(Record, bluff_vfio_user::keeper::Descriptors)> {
    let (state, files) = ledger.lock().unwrap().snapshot().unwrap()?;
    let record = Record::from_bytes(&state).unwrap();
    let names: Vec<_> = record.keys().into_iter().collect();
    let have: Vec<_> = files.keys().copied().collect();
    assert_eq!(names, have, "exactly what is needed is kept");
    Some((record, files))
}

/// Serves a client, first in a process that dies, then in another. What is seen of the last one is sent when it begins.
fn serve(death: Death, ledger: Shared, socket: UnixStream) -> Receiver<(Card, Port)> {
    let (told, died) = channel();
    let (tx, rx) = channel();
    let dying = Dying {
        ledger: ledger.clone(),
        death: Some(death),
        steps: 0,
        told,
    };
    let card = Card::new();
    let port = card.add_kept("a", Some(Box::new(dying)));
    let theirs = socket.try_clone().unwrap();
    port.handle.connection("a", theirs.into());
    std::thread::spawn(move || {
        if died.recv().is_err() {
            return;
        }
        // What is dead does nothing more, and least of all does it hang up.
        std::mem::forget((card, port));
        let next = Card::new();
        let port = next.add_kept("a", Some(Box::new(ledger.clone())));
        let resume = Resume {
            socket,
            recorded: snapshot(&ledger),
        };
        port.handle.connection("a", resume);
        let _ = tx.send((next, port));
    });
    rx
}

/// A session with everything in it; everything is as it has to be, however often something was done.
fn script(client: &mut Client) -> usize {
    let file = memory(8 * PAGE);
    set_word(&file, 7 * PAGE, 4711);
    client.negotiate();
    assert_eq!(client.map(0, 4 * PAGE, &file, 0), 0);
    assert_eq!(client.map_for(1, 16 * PAGE, PAGE, &file, 7 * PAGE), 0);
    assert_eq!(
        client.ask(command::DMA_MAP, &map(32 * PAGE, PAGE, 1)).errno,
        0
    );
    let vectors = client.vectors(0, 4);
    let level = [EventFd::new(EFD_NONBLOCK).unwrap()];
    assert_eq!(client.set_irqs(irq::INTX, 0, &level), 0);
    let mask = irqs(irq::DATA_NONE | irq::ACTION_MASK, irq::INTX, 0, 1);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &mask).errno, 0);
    client.command(MEMORY | MASTER);
    client.device_writes(8, 77);
    assert!(heard(&vectors[0]) >= 1);
    assert_eq!(word_of(&file, 8), 77);
    assert_eq!(client.device_reads(16 * PAGE), 4711);
    client.write_u64(LEVEL, 1);
    // A message in pieces, with a descriptor with the first.
    let message = client.message(command::DMA_MAP, 0, &map_at(48 * PAGE, PAGE, 3, 5 * PAGE));
    client.give(&message[..20], &[file.as_fd()]);
    client.give(&message[20..], &[]);
    assert_eq!(client.next().unwrap().errno, 0);
    client.device_writes(48 * PAGE, 78);
    assert_eq!(word_of(&file, 5 * PAGE), 78);
    assert_eq!(client.unmap(16 * PAGE, PAGE), 0);
    assert_eq!(client.device_reads(16 * PAGE), u64::MAX);
    // What is refused is, and the session goes on.
    assert_eq!(client.unmap(0, PAGE), EINVAL);
    let writes = [
        small(0, DATA, 8, 5),
        small(region::PCI_CONFIG, COMMAND, 2, MEMORY.into()),
        small(region::PCI_CONFIG, COMMAND, 2, (MEMORY | MASTER).into()),
    ];
    let reply = client.ask(command::REGION_WRITE_MULTI, &multi(&writes));
    assert_eq!(reply.body, 3u64.as_bytes());
    assert_eq!(client.read_u64(DATA), 5);
    assert!(level[0].read().is_err(), "masked all the time");
    client.device_writes(16, 79);
    assert_eq!(word_of(&file, 16), 79);
    assert_eq!(client.ask(command::DEVICE_RESET, &[]).errno, 0);
    assert_eq!(client.read(region::PCI_CONFIG, COMMAND, 2), [0, 0]);
    client.command(MEMORY | MASTER);
    // Memory and interrupts stay over a reset, as they were.
    client.device_writes(24, 80);
    assert_eq!(word_of(&file, 24), 80);
    assert!(heard(&vectors[0]) >= 1);
    mapped(&file)
}

#[test]
fn a_session_goes_on_wherever_its_process_dies() {
    // How many steps there are.
    let ledger = unrecorded();
    let card = Card::new();
    let port = card.add_kept("a", Some(Box::new(ledger.clone())));
    let mut client = port.fresh();
    assert_eq!(script(&mut client), 1);
    let steps = ledger.lock().unwrap().seq();
    assert!(steps >= 30, "{steps}");
    // One file, and five interrupts.
    assert_eq!(ledger.lock().unwrap().descriptors(), 6);
    snapshot(&ledger);
    drop(client);
    assert_eq!(port.gone(), None);
    let nothing = ledger.lock().unwrap().descriptors();
    assert_eq!(nothing, 0, "a session that is over is not kept");
    // A late word of the keeper about the last session is not one about this.
    let _next = port.client();
    assert_eq!(ledger.lock().unwrap().seq(), steps + 1);

    for step in 1..=steps {
        for death in [Death::Before(step), Death::After(step)] {
            let ledger = unrecorded();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let next = serve(death, ledger.clone(), theirs);
            let mut client = Client::over(ours);
            script(&mut client);
            let (card, port) = next.recv_timeout(PATIENCE).expect("it died");
            assert_eq!(ledger.lock().unwrap().descriptors(), 6, "{death:?}");
            drop(client);
            assert_eq!(port.gone(), None, "{death:?}");
            drop(card);
        }
    }
}

/// A look at a message may show the descriptors of the next one.
#[test]
fn descriptors_stay_with_their_message() {
    let ledger = unrecorded();
    let card = Card::new();
    let port = card.add_kept("a", Some(Box::new(ledger.clone())));
    let mut client = port.fresh();
    client.negotiate();
    client.command(MEMORY | MASTER);
    let file = memory(4 * PAGE);
    // The loop does not come to look before all are there.
    port.seen.hold(true);
    let off = write(region::PCI_CONFIG, COMMAND, &MEMORY.to_le_bytes());
    client.send(command::REGION_WRITE, 0, &off, &[]);
    let waiting = port.seen.next();
    client.send(command::DMA_MAP, 0, &map(0, PAGE, 1), &[]);
    client.send(command::DMA_MAP, 0, &map(PAGE, PAGE, 3), &[file.as_fd()]);
    client.send(command::DEVICE_GET_INFO, 0, &words(&[16, 0, 0, 0]), &[]);
    client.send(
        command::DMA_MAP,
        0,
        &map_at(2 * PAGE, PAGE, 3, PAGE),
        &[file.as_fd()],
    );
    port.seen.hold(false);
    (waiting.done)();
    for _ in 0..5 {
        assert_eq!(client.next().unwrap().errno, 0);
    }
    client.command(MEMORY | MASTER);
    set_word(&file, 0, 1);
    set_word(&file, PAGE, 2);
    let words: Vec<_> = (0..3).map(|p| client.device_reads(p * PAGE)).collect();
    assert_eq!(words, [u64::MAX, 1, 2]);
    assert_eq!(ledger.lock().unwrap().descriptors(), 1);
}

#[test]
fn a_client_that_does_not_read_is_waited_for() {
    let ledger = unrecorded();
    let card = Card::new();
    let port = card.add_kept("a", Some(Box::new(ledger.clone())));
    let mut client = port.fresh();
    client.negotiate();
    let ask = client.message(command::REGION_READ, 0, &access(0, 0, BAR0 as u32));
    let count = 200;
    for _ in 0..count {
        client.give(&ask, &[]);
    }
    for _ in 0..count {
        assert_eq!(client.next().unwrap().body.len() as u64, 16 + BAR0);
    }
    // One that is not understood is told so, and then closed.
    client.give(&[0xff; 64], &[]);
    assert!(client.is_closed());
    port.gone().expect("it was us");
}

#[test]
fn records_that_lie_are_refused() {
    let ledger = unrecorded();
    let card = Card::new();
    let port = card.add_kept("a", Some(Box::new(ledger.clone())));
    let mut client = port.fresh();
    script(&mut client);
    let (state, files) = ledger.lock().unwrap().snapshot().unwrap().unwrap();
    let good: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let resume = |value: &serde_json::Value| {
        let target = PciTarget::new(
            Box::new(function().0),
            Limits::default(),
            BOUND,
            Arc::new(|_| {}),
        );
        let mut session = Session::new(target, Limits::default());
        let record = Record::from_bytes(&serde_json::to_vec(value).unwrap())?;
        let resumed = session.resume(&record, &files);
        let _ = session.end();
        assert!(session.is_idle());
        resumed
    };
    resume(&good).unwrap();
    let lies: [fn(&mut serde_json::Value); 11] = [
        |v| v["version"] = 2.into(),
        |v| v["seq"] = "x".into(),
        |v| v["agreed"]["client_fds"] = 17.into(),
        |v| v["agreed"]["max_dma_maps"] = 1_000_000.into(),
        |v| v["agreed"]["max_dma_maps"] = 1.into(),
        |v| v["mappings"][0][1] = 999.into(),
        |v| v["mappings"][0][1] = serde_json::Value::Null,
        |v| v["mappings"][0][0]["size"] = (1u64 << 62).into(),
        |v| v["mappings"][1] = v["mappings"][0].clone(),
        |v| v["interrupts"][0][1] = 5000.into(),
        |v| v["function"] = serde_json::json!([1, 2, 3]),
    ];
    for (i, lie) in lies.into_iter().enumerate() {
        let mut value = good.clone();
        lie(&mut value);
        assert!(resume(&value).is_err(), "lie {i}");
    }
}
