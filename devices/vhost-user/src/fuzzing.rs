//! What fuzzers and property tests share: bytes become a front end's behaviour, played against a
//! device that checks its contract.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bluff_virtio::{
    DeviceError, DeviceEvent, Position, QueueChange, QueueSetup, Stop, StoppedQueue, VirtioDevice,
    features,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::framing::{self, HEADER_LEN, MAX_PAYLOAD};
use crate::message::files_wanted;
use crate::reader::Piece;
use crate::session::{Done, Session, Step};
use crate::state::{Descriptors, SessionState};
use crate::unix;

const QUEUES: u16 = 3;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 1 << 18;

type Held = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Seen {
    running: BTreeMap<u16, QueueSetup>,
    stopping: Vec<u16>,
    held: VecDeque<Held>,
    /// Completions wait until the front end has done something else.
    hold: bool,
}

/// A device that panics where the attachment breaks its side of the contract.
struct Strict(Arc<Mutex<Seen>>);

impl Strict {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn later(&self, done: Held) {
        let mut seen = self.seen();
        if seen.hold {
            seen.held.push_back(done);
        } else {
            drop(seen);
            done();
        }
    }
}

impl VirtioDevice for Strict {
    fn device_id(&self) -> u32 {
        2
    }
    fn queues(&self) -> u16 {
        QUEUES
    }
    fn features(&self) -> u64 {
        features::VERSION_1 | features::EVENT_IDX | features::RING_PACKED
    }
    fn set_features(&mut self, bits: u64) {
        assert_eq!(bits & !self.features(), 0, "features not offered");
        assert!(self.seen().running.is_empty(), "features of rings that run");
    }
    fn config_len(&self) -> u32 {
        16
    }
    fn read_config(&self, _offset: u32, to: &mut [u8]) {
        to.fill(0);
    }
    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError> {
        assert!(offset as usize + from.len() <= 16, "past the end");
        if offset < 8 {
            let len = from.len();
            return Err(DeviceError::Config { offset, len });
        }
        Ok(())
    }
    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), DeviceError> {
        assert!(setup.index < QUEUES && setup.size > 0);
        let packed = setup.features & features::RING_PACKED != 0;
        assert!(packed || setup.size.is_power_of_two());
        let space = setup.addresses.space;
        let ring = 16 * u64::from(setup.size);
        let desc = setup
            .memory
            .contiguous(space, setup.addresses.desc, ring, 16);
        if let Err(e) = desc {
            // Only after a death: the front end took the memory of a ring away before.
            return Err(DeviceError::Ring(e.into()));
        }
        if let Some(part) = &setup.inflight {
            assert!(part.offset + part.len <= part.region.len());
        }
        let old = self.seen().running.insert(setup.index, setup);
        assert!(old.is_none(), "started twice");
        Ok(())
    }
    fn change_queue(&mut self, index: u16, change: QueueChange) {
        let mut seen = self.seen();
        assert!(!seen.stopping.contains(&index), "changed while it stops");
        let Some(setup) = seen.running.get_mut(&index) else {
            drop(seen);
            // A ring that is broken.
            match change {
                QueueChange::Memory { done, .. } | QueueChange::Log { done, .. } => done(),
                _ => {}
            }
            return;
        };
        match change {
            QueueChange::Memory { memory, done, .. } => {
                setup.memory = memory;
                drop(seen);
                self.later(done);
            }
            QueueChange::Log { log, done } => {
                setup.log = log;
                drop(seen);
                self.later(done);
            }
            QueueChange::Kick(kick) => setup.kick = kick,
            QueueChange::Call(call) => setup.call = call,
            QueueChange::Error(error) => setup.error = error,
            QueueChange::Enable(on) => setup.enabled = on,
        }
    }
    fn stop_queue(
        &mut self,
        index: u16,
        stop: Stop,
        done: Box<dyn FnOnce(Option<StoppedQueue>) + Send>,
    ) {
        let mut seen = self.seen();
        assert!(!seen.stopping.contains(&index), "stopped twice");
        let Some(setup) = seen.running.get(&index) else {
            drop(seen);
            return done(None);
        };
        assert!(!stop.leave || setup.inflight.is_some(), "nowhere to leave");
        seen.stopping.push(index);
        drop(seen);
        let all = self.0.clone();
        self.later(Box::new(move || {
            let mut seen = all.lock().unwrap_or_else(PoisonError::into_inner);
            seen.running.remove(&index);
            seen.stopping.retain(|i| *i != index);
            drop(seen);
            done(Some(StoppedQueue {
                position: Position::START,
                in_flight: 0,
            }));
        }));
    }
    fn reset(&mut self) {
        assert!(self.seen().running.is_empty(), "reset while rings run");
    }
    fn save(&self) -> Vec<u8> {
        vec![1]
    }
    fn load(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(state, [1]);
        Ok(())
    }
    fn on_event(&mut self, _listener: Arc<dyn Fn(DeviceEvent) + Send + Sync>) {}
}

/// Bytes as choices; one byte for ever when they are used up.
struct Choices<'a>(&'a [u8], u8);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return self.1;
        };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_ne_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Mostly one of the values that make sense.
    fn of(&mut self, sensible: &[u64]) -> u64 {
        match self.byte() {
            0xff => u64::from(self.word()) << 32 | u64::from(self.word()),
            0xfe => u64::from(self.word()),
            n => sensible[usize::from(n) % sensible.len()],
        }
    }

    fn payload(&mut self, request: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |words: &[u64], size: usize| {
            for word in words {
                out.extend_from_slice(&word.to_ne_bytes()[..size]);
            }
        };
        let region = |c: &mut Self| {
            let at = c.of(&[0, 0, MEMORY, 2 * MEMORY]);
            [
                at,
                c.of(&[MEMORY]),
                USER.wrapping_add(at),
                c.of(&[0, 0, 4096]),
            ]
        };
        match request {
            2 => put(
                &[self.of(&[0x1_6000_0000, 0x1_4000_0000, 0x1_6400_0000, 0x5_4000_0000])],
                8,
            ),
            16 => put(&[self.of(&[0x11_b22b, 0x11_b223, 0x01_022b])], 8),
            5 => {
                let count = self.of(&[1, 1, 1, 2]);
                put(&[count, 0], 4);
                for _ in 0..count.min(9) {
                    put(&region(self), 8);
                }
            }
            6 => put(&[self.of(&[4096, 8]), self.of(&[0, 64])], 8),
            8 => put(&[self.of(&[0, 1, 2]), self.of(&[16, 32, 100, 256])], 4),
            9 => {
                let index = self.of(&[0, 1, 2]);
                put(&[index, self.of(&[0, 0, 1])], 4);
                let at = USER + (index & 3) * 0x4000;
                put(&[self.of(&[at]), self.of(&[at + 0x3000])], 8);
                put(&[self.of(&[at + 0x2000]), self.of(&[0x3000])], 8);
            }
            10 | 11 | 18 => put(&[self.of(&[0, 1, 2]), self.of(&[0, 1, 1])], 4),
            12..=14 => put(&[self.of(&[0, 1, 2, 0x100, 0x101])], 8),
            24 | 25 => {
                let size = self.of(&[1, 4, 8, 16]);
                put(&[self.of(&[0, 8, 12]), size, self.of(&[0, 1])], 4);
                put(&vec![0; size.min(64) as usize], 1);
            }
            31 | 32 => {
                let per_queue = 32 + 32 * 32;
                put(&[self.of(&[8192, per_queue]), self.of(&[0, 64])], 8);
                put(&[self.of(&[1, 2, 3]), self.of(&[16, 32, 128])], 2);
                put(&[0], 4);
            }
            37 | 38 => {
                put(&[0], 8);
                put(&region(self), 8);
            }
            19 | 20 | 39 => put(&[self.of(&[0, 1, 15])], 8),
            _ => {}
        }
        match self.byte() {
            0xff => out.truncate(usize::from(self.byte())),
            0xfe => out.resize(self.word() as usize % MAX_PAYLOAD, 0x41),
            _ => {}
        }
        out
    }

    fn file(&mut self, request: u32) -> Option<OwnedFd> {
        let kind = match (self.byte(), request) {
            (0xff, _) => self.byte() % 4,
            (_, 12..=14) => 1,
            (_, 21) => 2,
            _ => 0,
        };
        match kind {
            0 => unix::sealed_memory(c"fuzz", 4 * MEMORY).ok(),
            1 => {
                let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
                Some(owned(event))
            }
            2 => Some(std::os::unix::net::UnixStream::pair().ok()?.0.into()),
            _ => Some(std::fs::File::open("/dev/null").ok()?.into()),
        }
    }
}

fn owned(event: EventFd) -> OwnedFd {
    let fd = event.into_raw_fd();
    // SAFETY: the event descriptor has just given it away.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

/// A process that serves, and what is kept for the next one.
struct Run {
    session: Session,
    seen: Arc<Mutex<Seen>>,
    done: Receiver<Done>,
    kept: Option<(Vec<u8>, Descriptors)>,
    keep: bool,
}

impl Run {
    fn new(keep: bool) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let (tx, done) = channel();
        let session = Session::new(
            Box::new(Strict(seen.clone())),
            None,
            Duration::from_secs(1),
            keep,
            Arc::new(move |done| drop(tx.send(done))),
        );
        Self {
            session,
            seen,
            done,
            kept: None,
            keep,
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(&mut self, mut step: Step) {
        let now = Instant::now();
        loop {
            step = match step {
                Step::Ready | Step::Ended => return,
                Step::Wait => match self.done.try_recv() {
                    Ok(done) => self.session.done(done, now),
                    Err(_) => return,
                },
                Step::Commit(commit) => {
                    assert!(commit.reply.len() <= HEADER_LEN + MAX_PAYLOAD);
                    if self.keep {
                        let (state, files) = self.kept.get_or_insert_default();
                        *state = commit.state;
                        files.extend(commit.files);
                        for key in commit.dropped {
                            assert!(files.remove(&key).is_some(), "dropped twice");
                        }
                    }
                    self.session.committed(commit.seq, now)
                }
                Step::Close(_) => {
                    self.kept = None;
                    self.session.end()
                }
            };
        }
    }

    fn release(&mut self) {
        let held = std::mem::take(&mut self.seen().held);
        held.into_iter().for_each(|done| done());
        self.drive(Step::Wait);
    }

    /// Ends the session, and checks that nothing is left of it.
    fn end(&mut self) {
        self.kept = None;
        let step = self.session.end();
        self.drive(step);
        // What was under way, and then what stopping takes.
        for _ in 0..2 {
            self.release();
        }
        assert!(self.session.is_idle(), "a session that does not end");
        let seen = self.seen();
        assert!(seen.running.is_empty() && seen.held.is_empty());
    }

    /// The process dies; another goes on.
    fn kill(&mut self) {
        let Some((state, files)) = self.kept.take() else {
            return;
        };
        let mut dup = Descriptors::new();
        for (key, file) in &files {
            match file.try_clone() {
                Ok(file) => drop(dup.insert(*key, file)),
                Err(_) => return,
            }
        }
        let parsed = SessionState::from_bytes(&state).expect("what was recorded");
        // What the device has not said yet is never said; it holds the device, which holds it.
        let unsaid = std::mem::take(&mut self.seen().held);
        drop(unsaid);
        *self = Self::new(self.keep);
        self.kept = Some((state, files));
        let resumed = self.session.resume(parsed, dup);
        resumed.expect("what was recorded can be taken up");
    }
}

/// Plays bytes as a front end: messages that make sense and messages that do not, completions that
/// come late, disconnections, deaths of the process.
///
/// # Panics
/// Where the session breaks the device's contract, or does not end.
pub fn fuzz_messages(data: &[u8]) {
    let mut choices = Choices(data, 0);
    let mut run = Run::new(choices.byte() & 1 == 1);
    // Far more than a fuzzer finds interesting, so that a long input ends.
    for _ in 0..300 {
        if choices.0.is_empty() {
            break;
        }
        if run.session.is_idle() {
            run.session.connect();
        }
        match choices.byte() {
            0..=215 => {
                let request = u32::from(choices.byte()) % 48;
                message(&mut run, &mut choices, request);
            }
            216..=223 => set_up_ring(&mut run, &mut choices),
            224..=227 => raw(&mut run, &mut choices),
            228..=235 => run.seen().hold ^= true,
            236..=243 => run.release(),
            244 => {
                run.session.device_event(DeviceEvent::ConfigChanged);
            }
            245..=246 => {
                let step = run.session.state_changed();
                run.drive(step);
            }
            247..=249 => {
                run.session.device_event(DeviceEvent::QueueBroken {
                    queue: 0,
                    cause: "fuzzed".into(),
                });
            }
            250..=252 => run.kill(),
            _ => run.end(),
        }
    }
    run.end();
}

fn message(run: &mut Run, choices: &mut Choices<'_>, request: u32) {
    let payload = choices.payload(request);
    send(run, choices, request, &payload);
}

fn send(run: &mut Run, choices: &mut Choices<'_>, request: u32, payload: &[u8]) {
    let bytes = framing::request(request, choices.byte() & 3 != 3, payload);
    let count = match choices.byte() {
        0xff => usize::from(choices.byte() % 9),
        _ => files_wanted(request, payload),
    };
    let mut files: Vec<_> = (0..count).filter_map(|_| choices.file(request)).collect();
    let cut = match choices.byte() {
        n @ 0xf0.. => usize::from(n - 0xef),
        _ => bytes.len(),
    };
    for part in bytes.chunks(cut) {
        if !run.session.is_ready() {
            // The front end waits: what it has sent stays in the socket.
            run.release();
        }
        if !run.session.is_ready() {
            return;
        }
        let piece = Piece {
            bytes: part.to_vec(),
            files: std::mem::take(&mut files),
            truncated: false,
            consume: part.len(),
        };
        let Ok(missing) = run.session.framer().missing(part) else {
            // The session says so itself.
            let step = run.session.receive(piece, Instant::now());
            return run.drive(step);
        };
        if part.len() > missing {
            return;
        }
        let step = run.session.receive(piece, Instant::now());
        run.drive(step);
    }
}

/// What it takes to start a ring, so that it is not left to chance: mostly nothing but the features is
/// chosen, and a short input gets that far.
fn set_up_ring(run: &mut Run, choices: &mut Choices<'_>) {
    let kind = choices.byte();
    for request in [15, 16, 2, 5, 8, 10, 9, 12, 18] {
        match (kind, request) {
            (0xe0.., _) | (_, 2) => message(run, choices, request),
            // The first of what makes sense everywhere, or the second.
            _ => message(run, &mut Choices(&[], kind & 1), request),
        }
    }
}

fn raw(run: &mut Run, choices: &mut Choices<'_>) {
    if !run.session.is_ready() {
        return;
    }
    let bytes: Vec<u8> = (0..HEADER_LEN).map(|_| choices.byte()).collect();
    let len = match run.session.framer().missing(&bytes) {
        Ok(missing) => missing.min(bytes.len()),
        Err(_) => bytes.len(),
    };
    let piece = Piece {
        bytes: bytes[..len].to_vec(),
        files: Vec::new(),
        truncated: choices.byte() == 0xff,
        consume: len,
    };
    let step = run.session.receive(piece, Instant::now());
    run.drive(step);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sensible_choices_start_a_ring() {
        for keep in [false, true] {
            for kind in [0, 1, 0xe0] {
                let mut run = Run::new(keep);
                run.session.connect();
                set_up_ring(&mut run, &mut Choices(&[kind], 0));
                assert_eq!(run.seen().running.len(), 1);
                run.kill();
                assert_eq!(run.seen().running.len(), 1);
                run.end();
            }
        }
    }

    /// Found by the fuzzer: what a process held when it died is gone with it.
    #[test]
    fn nothing_is_left_of_a_process_that_died() {
        let mut run = Run::new(true);
        run.session.connect();
        set_up_ring(&mut run, &mut Choices(&[], 0));
        run.seen().hold = true;
        // Ring 0 is to stop, and does not.
        message(&mut run, &mut Choices(&[], 0), 11);
        assert_eq!(run.seen().held.len(), 1);
        let before = Arc::downgrade(&run.seen);
        run.kill();
        assert!(before.upgrade().is_none());
        run.end();
    }

    /// Both rings, each by a few bytes.
    #[test]
    fn a_short_input_starts_two_rings() {
        let mut run = Run::new(true);
        run.session.connect();
        for kind in [0, 1] {
            set_up_ring(&mut run, &mut Choices(&[kind], 0));
        }
        assert_eq!(run.seen().running.len(), 2);
        run.end();
    }

    /// Found by the fuzzer: a region near the end of all addresses.
    #[test]
    fn a_region_at_the_end_of_all_addresses_is_survived() {
        fuzz_messages(&[0xff, 0x46, 0x05, 0xac, 0xff, 0xac, 0xac, 0xff, 0xff]);
    }
}
