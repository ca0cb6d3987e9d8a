//! The control queue: commands in, answers out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_reactor::{Actor, Context, Event, Handle, Turn, Waker};
use bluff_virtio::{
    Chain, DeviceEvent, Line, Message, Pop, Queue, QueueChange, Ring, RingError, Tell, Wiring,
    with_ring,
};

use crate::control::{COMMAND_MAX, Effect};
use crate::device::State as Device;
use crate::shared::Shared;
use crate::spec::{ACK_ERR, ACK_OK};
use crate::transmit::{State, apply};

/// Commands of one turn.
const COMMANDS: usize = 8;

/// Settings are recorded no more often.
const RECORDED: Duration = Duration::from_millis(10);

/// Asks reactors whether they are done with what was in force. Each has a share of it; when the last is gone, whether it was used or dropped, the worker is woken.
struct Fence {
    passed: Arc<AtomicBool>,
    waker: Waker,
}

impl Drop for Fence {
    fn drop(&mut self) {
        // Release: what the reactors did before is done for who sees it.
        self.passed.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A command that was obeyed, and is answered when everybody obeys it.
struct Waiting {
    passed: Arc<AtomicBool>,
    answer: Answer,
}

/// What the driver is given.
#[derive(Clone, Copy)]
struct Answer {
    bytes: [u8; 9],
    len: usize,
}

/// The worker of the control queue.
pub(crate) struct Commands {
    line: Line,
    mailbox: Receiver<Message>,
    queue: Queue,
    state: State,
    enabled: bool,
    device: Arc<Mutex<Device>>,
    shared: Arc<Shared>,
    tell: Tell,
    chain: Chain,
    bytes: Box<[u8]>,
    /// Of the other queues.
    reactors: Vec<Handle>,
    waker: Waker,
    /// What `chain` waits for.
    waiting: Option<Waiting>,
    /// Something was set that nobody who records it was told of.
    unsaved: bool,
    /// Before then they are not told again.
    quiet_until: Option<Instant>,
}

/// What the control queue works on.
pub(crate) struct Whole {
    pub(crate) device: Arc<Mutex<Device>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) tell: Tell,
    /// The reactors of the other queues.
    pub(crate) reactors: Vec<Handle>,
}

impl Commands {
    pub(crate) fn new(
        wiring: Wiring,
        queue: Queue,
        enabled: bool,
        whole: Whole,
        waker: Waker,
    ) -> Self {
        let Whole {
            device,
            shared,
            tell,
            reactors,
        } = whole;
        let Wiring { line, mailbox } = wiring;
        Self {
            line,
            mailbox,
            queue,
            state: State::Running,
            enabled,
            device,
            shared,
            tell,
            chain: Chain::default(),
            // One more than the longest, so that a longer one is seen to be.
            bytes: vec![0; COMMAND_MAX + 1].into(),
            reactors,
            waker,
            waiting: None,
            unsaved: false,
            quiet_until: None,
        }
    }

    /// Has what was set recorded: at once, and then no more often than makes sense, whatever the driver does.
    fn tell_changed(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if !self.unsaved || self.quiet_until.is_some_and(|until| now < until) {
            return;
        }
        self.unsaved = false;
        (self.tell)(DeviceEvent::StateChanged);
        let until = now + RECORDED;
        self.quiet_until = Some(until);
        cx.timer(cx.id(), until, 0);
    }

    fn serve(&mut self, cx: &mut Context<'_>) -> Result<bool, RingError> {
        let mut worked = false;
        if let Some(waiting) = &self.waiting {
            // Acquire: see `Fence`.
            if !waiting.passed.load(Ordering::Acquire) {
                return Ok(false);
            }
            worked = true;
            self.finish();
        }
        for _ in 0..COMMANDS {
            let chain = &mut self.chain;
            match with_ring!(&mut self.queue, ring => ring.pop(chain))? {
                Pop::Empty => break,
                Pop::Chain => {
                    let (answer, changed) = self.obey();
                    worked = true;
                    self.tell_changed(cx);
                    if changed && !self.reactors.is_empty() {
                        self.waiting = Some(self.fence(answer));
                        break;
                    }
                    self.answer(answer);
                }
                Pop::Bad(e) => {
                    log::debug!("bad chain: {e}");
                    worked = true;
                    let chain = &self.chain;
                    with_ring!(&mut self.queue, ring => ring.complete(chain, 0));
                }
            }
        }
        self.publish();
        Ok(worked)
    }

    fn publish(&mut self) {
        if with_ring!(&mut self.queue, ring => ring.publish()) {
            self.line.notify();
        }
    }

    /// A command is in force before the driver sees that it was obeyed (§5.1.6.5): what a reactor does, it does with what it saw when it began.
    fn fence(&self, answer: Answer) -> Waiting {
        let passed = Arc::new(AtomicBool::new(false));
        let fence = Arc::new(Fence {
            passed: passed.clone(),
            waker: self.waker.clone(),
        });
        for reactor in &self.reactors {
            let share = fence.clone();
            reactor.send(move |_| drop(share));
        }
        Waiting { passed, answer }
    }

    /// Answers the command that waits, if one does.
    fn finish(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.answer(waiting.answer);
        }
    }

    fn answer(&mut self, answer: Answer) {
        let written = self.chain.write_front(&answer.bytes[..answer.len]) as u32;
        let chain = &self.chain;
        with_ring!(&mut self.queue, ring => ring.complete(chain, written));
    }

    /// Obeys the command in the chain; says what the answer is, and whether anything is different now.
    fn obey(&mut self) -> (Answer, bool) {
        // Read once: what is checked is what is obeyed.
        let len = self.chain.read_front(&mut self.bytes);
        let (answer, news, changed) = {
            let mut device = self.device.lock().expect("nothing panics with it");
            let mac = device.control.settings().mac;
            match device.control.command(&self.bytes[..len]) {
                Ok(effect) => {
                    let announced = effect == Effect::Announced;
                    device.announce &= !announced;
                    let settings = device.control.settings();
                    let news = announced || settings.mac != mac;
                    let changed = effect == Effect::Settings;
                    if changed {
                        // With the lock, so that nobody puts older ones in their place.
                        self.shared.obey(settings, device.control.steers());
                    }
                    (Ok(effect), news, changed)
                }
                Err(e) => (Err(e), false, false),
            }
        };
        if news {
            (self.tell)(DeviceEvent::ConfigChanged);
        }
        let mut bytes = [0; 9];
        bytes[0] = ACK_OK;
        let len = match answer {
            Ok(Effect::Answer(c)) => {
                bytes[1..5].copy_from_slice(&c.max_packets.to_le_bytes());
                bytes[5..].copy_from_slice(&c.max_usecs.to_le_bytes());
                9
            }
            Ok(Effect::Settings | Effect::Announced) => 1,
            Err(e) => {
                log::debug!("a command is refused: {e}");
                bytes[0] = ACK_ERR;
                1
            }
        };
        self.unsaved |= changed || news;
        (Answer { bytes, len }, changed)
    }

    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(QueueChange::Enable(on)) => self.enabled = on,
                Message::Change(change) => {
                    // Its buffers are of the memory that there was.
                    if self.state == State::Running && self.waiting.is_some() {
                        self.finish();
                        self.publish();
                    }
                    if let Err(e) = apply(cx, &mut self.line, &mut self.queue, change) {
                        self.broken(&e);
                    }
                }
                Message::Stop(stop, done) => {
                    // After a reset nothing is written any more.
                    if stop.answer && self.state == State::Running && self.waiting.is_some() {
                        self.finish();
                        self.publish();
                    }
                    self.state = State::Stopped;
                    self.line.hang_up(cx);
                    done(Some(with_ring!(&self.queue, ring => ring.position())));
                }
            }
        }
    }

    fn broken(&mut self, e: &RingError) {
        self.state = State::Broken;
        self.line.broken(e);
    }
}

impl Actor for Commands {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        match event {
            Event::Ready { .. } => self.line.kicked(),
            Event::Woken => self.take_messages(cx),
            Event::Timer { .. } => {}
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        self.tell_changed(cx);
        match self.state {
            State::Stopped => return Turn::Done,
            State::Running if self.enabled => {}
            State::Running | State::Waiting(_) | State::Broken => return Turn::Idle,
        }
        match self.serve(cx) {
            Ok(true) => Turn::Worked,
            Ok(false) => Turn::Idle,
            Err(e) => {
                self.broken(&e);
                Turn::Worked
            }
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        if self.state != State::Running || !self.enabled {
            return true;
        }
        if self.waiting.is_some() {
            // It is woken.
            return true;
        }
        self.line.doze(cx);
        !with_ring!(&mut self.queue, ring => ring.enable_notifications())
    }
}
