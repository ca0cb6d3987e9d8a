//! The process that serves a session dies at every step, and another goes on with what was recorded.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_vhost_user::keeper::{BOUNDS, Commit, Keeper, Ledger, Progress};
use bluff_vhost_user::session::{Done, Session, Step};
use bluff_vhost_user::state::{Descriptors, SessionState};
use bluff_vhost_user::{
    Attachment, LoopHandle, Options, Resume, SessionLoop, framing, reader, unix,
};
use bluff_virtio::features;

use crate::support::*;

/// A process that serves one session, without a process.
struct Half {
    session: Session,
    control: Control,
    done: Receiver<Done>,
}

impl Half {
    /// Begins, or goes on where the ledger says.
    fn new(ledger: &Ledger) -> Self {
        let (fake, control) = device(2);
        let (tx, done) = channel();
        let completions = Arc::new(move |done| {
            // The test may have ended.
            let _ = tx.send(done);
        });
        let mut session = Session::new(fake, None, Duration::from_secs(1), true, completions);
        match ledger.snapshot().unwrap() {
            None => session.connect(),
            Some((state, files)) => {
                let state = SessionState::from_bytes(&state).unwrap();
                let names: Vec<_> = state.keys().into_iter().collect();
                let have: Vec<_> = files.keys().copied().collect();
                assert_eq!(names, have, "exactly what is needed is kept");
                session.resume(state, files).unwrap();
            }
        }
        Self {
            session,
            control,
            done,
        }
    }
}

struct Killed;

/// The steps at which a process can die.
struct Steps {
    left: Option<usize>,
    seen: usize,
}

impl Steps {
    fn step(&mut self) -> Result<(), Killed> {
        self.seen += 1;
        match &mut self.left {
            Some(0) => {
                self.left = None;
                Err(Killed)
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Serves until nothing is left to read.
fn serve(
    half: &mut Half,
    socket: &UnixStream,
    ledger: &mut Ledger,
    steps: &mut Steps,
) -> Result<(), Killed> {
    let now = Instant::now();
    loop {
        steps.step()?; // before the message is seen
        let framer = half.session.framer();
        let Some(piece) = reader::look(socket.as_fd(), framer).unwrap() else {
            return Ok(());
        };
        assert!(!piece.bytes.is_empty(), "the front end has gone");
        steps.step()?; // seen
        let mut step = half.session.receive(piece, now);
        loop {
            step = match step {
                Step::Ready => break,
                Step::Wait => {
                    steps.step()?; // its effects are under way
                    let done = half.done.try_recv().expect("a completion");
                    half.session.done(done, now)
                }
                Step::Commit(commit) => {
                    steps.step()?; // its effects are done, and not recorded
                    let seq = commit.seq;
                    ledger.apply(socket.as_fd(), commit).unwrap();
                    steps.step()?; // recorded, and the process does not know
                    half.session.committed(seq, now)
                }
                Step::Close(e) => panic!("{e}"),
                Step::Ended => panic!("it ended"),
            };
        }
    }
}

type Line = (u32, Vec<u8>, Vec<OwnedFd>);

/// A session with everything in it.
fn script(in_flight: bool) -> Vec<Line> {
    let memory = || unix::sealed_memory(c"guest", MEMORY).unwrap();
    let event = || eventfd().0;
    let mut s: Vec<Line> = Vec::new();
    let mut line =
        |code, payload: &[u8], files: Vec<OwnedFd>| s.push((code, payload.to_vec(), files));
    let bits = FEATURES & !features::RING_PACKED | F_PROTOCOL;
    line(GET_FEATURES, &[], vec![]);
    line(SET_PROTOCOL_FEATURES, &0x11_b22bu64.to_ne_bytes(), vec![]);
    line(SET_OWNER, &[], vec![]);
    line(SET_VRING_CALL, &[0; 8], vec![event()]);
    line(SET_FEATURES, &bits.to_ne_bytes(), vec![]);
    line(SET_FEATURES, &(1u64 << 63).to_ne_bytes(), vec![]);
    if in_flight {
        let region = unix::sealed_memory(c"inflight", 2 * 4160).unwrap();
        line(
            SET_INFLIGHT_FD,
            &inflight(2 * 4160, 0, 2, 128),
            vec![region],
        );
    }
    line(
        SET_MEM_TABLE,
        &table(&[(0, MEMORY, USER, 0)]),
        vec![memory()],
    );
    for i in 0..2u32 {
        line(SET_VRING_NUM, &words(&[i, 128]), vec![]);
        line(SET_VRING_BASE, &words(&[i, 5]), vec![]);
        line(SET_VRING_ADDR, &addr(i, 0), vec![]);
        line(SET_VRING_KICK, &u64::from(i).to_ne_bytes(), vec![event()]);
        line(SET_VRING_ENABLE, &words(&[i, 1]), vec![]);
    }
    line(SET_VRING_KICK, &[0; 8], vec![event()]);
    line(SET_VRING_CALL, &0x101u64.to_ne_bytes(), vec![]);
    line(SET_VRING_NUM, &words(&[0, 64]), vec![]);
    line(
        ADD_MEM_REG,
        &single((MEMORY, MEMORY, USER + MEMORY, 0)),
        vec![memory()],
    );
    line(
        REM_MEM_REG,
        &single((MEMORY, MEMORY, USER + MEMORY, 0)),
        vec![],
    );
    let log = unix::sealed_memory(c"log", 4096).unwrap();
    line(SET_LOG_BASE, &longs(&[4096, 0]), vec![log]);
    line(
        SET_FEATURES,
        &(bits | features::LOG_ALL).to_ne_bytes(),
        vec![],
    );
    line(SET_VRING_ADDR, &addr(1, 1), vec![]);
    line(SET_VRING_ENABLE, &words(&[0, 0]), vec![]);
    line(GET_VRING_BASE, &words(&[0, 0]), vec![]);
    line(SET_VRING_KICK, &[0; 8], vec![event()]);
    line(GET_VRING_BASE, &words(&[0, 0]), vec![]);
    line(GET_INFLIGHT_FD, &inflight(0, 0, 2, 128), vec![]);
    s
}

/// What a run of the script leaves.
#[derive(Debug, PartialEq)]
struct Outcome {
    replies: Vec<Vec<u8>>,
    state: SessionState,
    running: Vec<u16>,
}

/// Plays a script and kills the serving half at these steps (each counted from the last death on).
fn play(script: &[Line], cut: usize, kills: &[usize]) -> (Outcome, usize) {
    let (front, back) = UnixStream::pair().unwrap();
    let front = Raw::new(front);
    let mut ledger = Ledger::new(BOUNDS);
    let mut half = Half::new(&ledger);
    let mut kills = kills.iter();
    let mut steps = Steps {
        left: kills.next().copied(),
        seen: 0,
    };
    let mut replies = Vec::new();
    for (code, payload, files) in script {
        let bytes = framing::request(*code, true, payload);
        let mut files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        for part in bytes.chunks(cut) {
            assert!(front.bytes(part, &files));
            files.clear();
            while serve(&mut half, &back, &mut ledger, &mut steps).is_err() {
                // As a process dies: nothing is said to anybody.
                drop(half);
                half = Half::new(&ledger);
                steps.left = kills.next().copied();
            }
        }
        let (reply, _) = front.reply(*code).expect("a reply");
        assert!(front.is_quiet(), "two replies to {code}");
        replies.push(reply);
    }
    assert_eq!(ledger.replies(), script.len() as u64);
    let running = half.control.lock().running.keys().copied().collect();
    let mut state = half.session.state().clone();
    state.seq = 0;
    state.device.clear();
    // Keys are names only, and a repeated message gives out others.
    let rename = |key: &mut u64| *key = 0;
    state.regions.iter_mut().for_each(|r| rename(&mut r.file));
    state.log.iter_mut().for_each(|l| rename(&mut l.file));
    state.inflight.iter_mut().for_each(|l| rename(&mut l.file));
    for ring in &mut state.vrings {
        if let Some(bluff_vhost_user::state::Kick::File(key)) = &mut ring.kick {
            rename(key);
        }
        let files = ring.call.iter_mut().chain(&mut ring.err);
        files.chain(&mut ring.own_inflight).for_each(rename);
    }
    state.next_key = 0;
    let outcome = Outcome {
        replies,
        state,
        running,
    };
    (outcome, steps.seen)
}

#[test]
fn killed_at_every_step() {
    let _beside = beside();
    for in_flight in [false, true] {
        let script = script(in_flight);
        for cut in [100_000, 7] {
            let (want, steps) = play(&script, cut, &[]);
            assert_eq!(want.running, [1]);
            assert!(steps > 100, "{steps} steps");
            for at in 0..steps {
                let (got, _) = play(&script, cut, &[at]);
                assert_eq!(got, want, "killed at step {at} of {steps}, cut {cut}");
            }
        }
    }
}

#[test]
fn killed_again_while_going_on() {
    let _beside = beside();
    let script = script(false);
    let (want, steps) = play(&script, 100_000, &[]);
    for at in (0..steps).step_by(bluff_testing::times(7, 1)) {
        for again in 0..6 {
            let (got, _) = play(&script, 100_000, &[at, again, 0, again]);
            assert_eq!(got, want, "killed at {at}, then {again} steps later");
        }
    }
}

#[test]
fn what_a_ring_had_in_flight_is_there_for_the_next_process() {
    let _beside = beside();
    let script = script(false);
    let (front, back) = UnixStream::pair().unwrap();
    let front = Raw::new(front);
    let mut ledger = Ledger::new(BOUNDS);
    let mut half = Half::new(&ledger);
    let mut steps = Steps {
        left: None,
        seen: 0,
    };
    let mut regions = Vec::new();
    for (code, payload, files) in &script[..script.len() - 3] {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        front.send(*code, payload, &files);
        assert!(serve(&mut half, &back, &mut ledger, &mut steps).is_ok());
        front.reply(*code).unwrap();
        // Between any two messages.
        let before: Vec<_> = region_files(&half);
        drop(half);
        half = Half::new(&ledger);
        assert_eq!(region_files(&half), before);
        regions.extend(before);
    }
    assert!(!regions.is_empty());
    // A ring that is started again after it was stopped has nothing in flight: another region.
    let first = regions.iter().find(|(i, _)| *i == 0).unwrap().1;
    for (code, payload, files) in &script[script.len() - 3..] {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        front.send(*code, payload, &files);
        assert!(serve(&mut half, &back, &mut ledger, &mut steps).is_ok());
        front.reply(*code).unwrap();
        assert!(!region_files(&half).contains(&(0, first)));
    }
}

/// Until it is recorded that a ring was dropped the next process goes on with it, and needs what was in flight; after that, the
/// requests are void.
#[test]
fn what_was_in_flight_is_forgotten_when_the_reset_is_recorded() {
    use std::os::unix::fs::FileExt;
    let script = script(true);
    // Up to where both rings run.
    let count = script.iter().position(|l| l.0 == SET_VRING_ENABLE);
    let script = &script[..count.unwrap() + 6];
    let region = script.iter().find(|l| l.0 == SET_INFLIGHT_FD).unwrap();
    let region: std::fs::File = region.2[0].try_clone().unwrap().into();
    let versions = || {
        [0, 4160].map(|part| {
            let mut version = [0; 2];
            region.read_exact_at(&mut version, part + 8).unwrap();
            u16::from_le_bytes(version)
        })
    };
    let mut deaths = 0;
    for at in 0.. {
        for part in [0, 4160] {
            region.write_all_at(&[1, 0], part + 8).unwrap();
        }
        let (front, back) = UnixStream::pair().unwrap();
        let front = Raw::new(front);
        let mut ledger = Ledger::new(BOUNDS);
        let mut half = Half::new(&ledger);
        let mut steps = Steps {
            left: None,
            seen: 0,
        };
        for (code, payload, files) in script {
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            front.send(*code, payload, &files);
            assert!(serve(&mut half, &back, &mut ledger, &mut steps).is_ok());
            front.reply(*code).unwrap();
        }
        assert_eq!(half.control.lock().running.len(), 2);
        assert_eq!(versions(), [1, 1]);
        front.send(RESET_DEVICE, &[], &[]);
        steps.left = Some(at);
        let killed = serve(&mut half, &back, &mut ledger, &mut steps).is_err();
        if killed {
            deaths += 1;
            drop(half);
            let state = ledger.snapshot().unwrap().unwrap().0;
            let runs = SessionState::from_bytes(&state).unwrap().started().count();
            half = Half::new(&ledger);
            match runs {
                0 => assert_eq!(versions(), [0, 0], "{at}"),
                _ => assert_eq!((runs, versions()), (2, [1, 1]), "{at}"),
            }
            assert!(serve(&mut half, &back, &mut ledger, &mut steps).is_ok());
        }
        front.reply(RESET_DEVICE).unwrap();
        assert_eq!(versions(), [0, 0]);
        steps.left = None;
        // Nothing is kept any more that was only to be forgotten.
        front.send(GET_FEATURES, &[], &[]);
        assert!(serve(&mut half, &back, &mut ledger, &mut steps).is_ok());
        front.reply(GET_FEATURES).unwrap();
        assert_eq!(half.session.state().forget, None);
        drop(Half::new(&ledger));
        if !killed {
            break;
        }
    }
    assert!(deaths >= 5, "{deaths}");
}

/// A front end that goes in the middle of a reset: what it gave up does not come back with it.
#[test]
fn a_reset_that_is_cut_short_forgets_too() {
    use std::os::unix::fs::FileExt;
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
    let region = unix::sealed_memory(c"inflight", 4160).unwrap();
    let row = inflight(4160, 0, 1, 128);
    assert!(front.ok(SET_INFLIGHT_FD, &row, &[region.as_fd()]));
    let _memory = front.memory();
    front.start(0);
    let region = std::fs::File::from(region);
    region.write_all_at(&[1, 0], 8).unwrap();
    function.control.lock().pace = Pace::Held;
    front.send(RESET_DEVICE, &[], &[]);
    function.control.wait("the stop", |i| !i.held.is_empty());
    drop(front);
    function.control.release();
    function.wait_gone(1);
    let mut version = [7; 2];
    region.read_exact_at(&mut version, 8).unwrap();
    assert_eq!(version, [0, 0]);
}

fn region_files(half: &Half) -> Vec<(u16, bluff_memory::FileId)> {
    let inner = half.control.lock();
    let all = inner.running.iter();
    all.map(|(i, setup)| (*i, setup.inflight.as_ref().expect("a region").region.id()))
        .collect()
}

#[test]
fn records_that_do_not_fit_are_refused() {
    let _beside = beside();
    let fresh = || {
        let (fake, control) = device(2);
        let done = Arc::new(|_| {});
        let session = Session::new(fake, None, Duration::from_secs(1), true, done);
        (session, control)
    };
    let resume = |state: SessionState| {
        let (mut session, control) = fresh();
        let result = session.resume(state, Descriptors::new());
        assert!(matches!(session.end(), Step::Ended | Step::Wait));
        assert!(control.lock().running.is_empty());
        result
    };
    assert!(resume(SessionState::new(2)).is_ok());
    assert!(resume(SessionState::new(3)).is_err(), "another device");
    let mut state = SessionState::new(2);
    state.features = Some(1 << 63);
    assert!(resume(state).is_err());
    let mut state = SessionState::new(2);
    state.vrings[0].kick = Some(bluff_vhost_user::state::Kick::File(3));
    assert!(resume(state).is_err(), "a descriptor is missing");
    let mut state = SessionState::new(2);
    state.partial.bytes = framing::request(1, false, &[]);
    assert!(
        resume(state).is_err(),
        "a message that should have been served"
    );
}

/// What a device changes by itself, as a driver has it do by a queue, is recorded without a message.
#[test]
fn what_a_device_changes_by_itself_is_recorded() {
    let _beside = beside();
    let commit = |step| match step {
        Step::Commit(commit) => commit,
        other => panic!("{other:?}"),
    };
    let mut half = Half::new(&Ledger::new(BOUNDS));
    let (session, now) = (&mut half.session, Instant::now());
    let first = commit(session.state_changed());
    assert_eq!((first.consume, first.reply.len()), (0, 0));
    assert!(SessionState::from_bytes(&first.state).unwrap().device == [4, 2]);
    // Twice while that is being recorded: once more is enough.
    for _ in 0..2 {
        assert!(matches!(session.state_changed(), Step::Wait));
    }
    let second = commit(session.committed(first.seq, now));
    assert!(second.seq > first.seq);
    assert!(matches!(session.committed(second.seq, now), Step::Ready));
    // Where nothing is recorded, nothing has to be.
    let done = Arc::new(|_| {});
    let mut session = Session::new(device(2).0, None, Duration::from_secs(1), false, done);
    session.connect();
    assert!(matches!(session.state_changed(), Step::Wait));
    assert!(session.is_ready());
}

/// A keeper that sends every commit to another process, which is a thread here.
struct Remote {
    wire: UnixStream,
}

impl Keeper for Remote {
    fn connected(&mut self, socket: BorrowedFd<'_>) -> std::io::Result<()> {
        unix::send(self.wire.as_fd(), &0u64.to_ne_bytes(), &[socket]).map(drop)
    }
    fn keeps(&self) -> bool {
        true
    }
    fn commit(&mut self, _: BorrowedFd<'_>, commit: Commit) -> std::io::Result<Progress> {
        let (bytes, files) = commit.encode();
        // A stream here, so the length goes first; a seqpacket socket keeps messages apart by itself.
        unix::send(
            self.wire.as_fd(),
            &(bytes.len() as u64).to_ne_bytes(),
            &files,
        )?;
        unix::send(self.wire.as_fd(), &bytes, &[])?;
        Ok(Progress::Later)
    }
    fn flush(&mut self, _: BorrowedFd<'_>) -> std::io::Result<Progress> {
        Ok(Progress::Later)
    }
    fn ended(&mut self) {}
}

/// What the control process holds.
struct Kept {
    ledger: Ledger,
    socket: Option<OwnedFd>,
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            ledger: Ledger::new(BOUNDS),
            socket: None,
        }
    }
}

fn control_process(wire: UnixStream, kept: Arc<Mutex<Kept>>, handle: LoopHandle) {
    let exactly = |len: usize| {
        let (mut bytes, mut files) = (vec![0; len], Vec::new());
        let mut at = 0;
        while at < len {
            match unix::take(wire.as_fd(), &mut bytes[at..]) {
                Ok(got) if got.len == 0 => return None,
                Ok(got) => {
                    at += got.len;
                    files.extend(got.files);
                }
                Err(_) => {
                    wait_readable(wire.as_fd());
                }
            }
        }
        Some((bytes, files))
    };
    while let Some((len, mut files)) = exactly(8) {
        let len = u64::from_ne_bytes(len.try_into().unwrap());
        let mut kept = kept.lock().unwrap();
        if len == 0 {
            *kept = Kept {
                ledger: Ledger::new(BOUNDS),
                socket: files.pop(),
            };
            continue;
        }
        let Some((bytes, _)) = exactly(len as usize) else {
            return;
        };
        let commit = Commit::decode(&bytes, files).unwrap();
        let seq = commit.seq;
        let Kept { ledger, socket } = &mut *kept;
        let socket = socket.as_ref().unwrap().as_fd();
        assert_eq!(ledger.apply(socket, commit).unwrap(), Progress::Done);
        handle.committed("f", seq);
    }
}

#[test]
fn another_process_records_and_a_third_goes_on() {
    let _beside = beside();
    let kept: Arc<Mutex<Kept>> = Arc::default();
    let (front, back) = UnixStream::pair().unwrap();
    let front = Raw::new(front);
    let mut back = Some(back);
    let mut guest = None;
    for life in 0..5 {
        let sessions = SessionLoop::spawn().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = {
            let (kept, handle) = (kept.clone(), sessions.handle());
            std::thread::spawn(move || control_process(theirs, kept, handle))
        };
        let (fake, device) = device(2);
        let keeper = Box::new(Remote { wire: ours });
        let resume = match back.take() {
            Some(socket) => Resume {
                socket,
                recorded: None,
            },
            None => {
                let kept = kept.lock().unwrap();
                let (state, files) = kept.ledger.snapshot().unwrap().unwrap();
                let state = SessionState::from_bytes(&state).unwrap();
                let socket = kept.socket.as_ref().unwrap().try_clone().unwrap();
                Resume {
                    socket: socket.into(),
                    recorded: Some((state, files)),
                }
            }
        };
        let options = Options {
            keeper,
            ..Options::default()
        };
        let listener = Arc::new(|_: &str, _| {});
        sessions
            .handle()
            .add(Attachment::new("f", fake, options, listener))
            .unwrap();
        sessions.handle().connection("f", resume);
        if life == 0 {
            front.negotiate();
            guest = Some(front.memory());
            front.start(0);
        } else {
            device.wait("the ring", |inner| inner.running.contains_key(&0));
            assert_eq!(device.lock().calls[0], Call::Load(vec![4, 2]));
            front.kick(0);
        }
        assert_ne!(front.number(GET_FEATURES), 0);
        // The serving process ends; its connection stays open, as control holds it too.
        drop(sessions);
        control.join().unwrap();
        assert!(front.is_quiet());
    }
    assert!(guest.is_some());
}
