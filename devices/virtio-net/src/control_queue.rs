//! The control queue: commands in, answers out.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use bluff_reactor::{Actor, Context, Event, Turn};
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
}

impl Commands {
    pub(crate) fn new(
        wiring: Wiring,
        queue: Queue,
        enabled: bool,
        device: Arc<Mutex<Device>>,
        shared: Arc<Shared>,
        tell: Tell,
    ) -> Self {
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
        }
    }

    fn serve(&mut self) -> Result<bool, RingError> {
        let mut worked = false;
        for _ in 0..COMMANDS {
            let chain = &mut self.chain;
            let written = match with_ring!(&mut self.queue, ring => ring.pop(chain))? {
                Pop::Empty => break,
                Pop::Chain => self.obey(),
                Pop::Bad(e) => {
                    log::debug!("bad chain: {e}");
                    0
                }
            };
            let chain = &self.chain;
            with_ring!(&mut self.queue, ring => ring.complete(chain, written));
            worked = true;
        }
        if worked && with_ring!(&mut self.queue, ring => ring.publish()) {
            self.line.notify();
        }
        Ok(worked)
    }

    /// Obeys the command in the chain; says how many bytes were written.
    fn obey(&mut self) -> u32 {
        // Read once: what is checked is what is obeyed.
        let len = self.chain.read_front(&mut self.bytes);
        let (answer, news, pairs) = {
            let mut device = self.device.lock().expect("nothing panics with it");
            let before = device.control.settings();
            let (mac, used) = (before.mac, before.transmit());
            match device.control.command(&self.bytes[..len]) {
                Ok(effect) => {
                    let announced = effect == Effect::Announced;
                    device.announce &= !announced;
                    let after = device.control.settings();
                    let news = announced || after.mac != mac;
                    let pairs = (after.transmit() != used).then(|| after.transmit());
                    (Ok(effect), news, pairs)
                }
                Err(e) => (Err(e), false, None),
            }
        };
        if let Some(pairs) = pairs {
            // In force before the driver sees that it was obeyed.
            self.shared.set_used(Some(pairs));
        }
        if news {
            (self.tell)(DeviceEvent::ConfigChanged);
        }
        let mut bytes = [0; 9];
        let len = match answer {
            Ok(Effect::Answer(c)) => {
                bytes[0] = ACK_OK;
                bytes[1..5].copy_from_slice(&c.max_packets.to_le_bytes());
                bytes[5..].copy_from_slice(&c.max_usecs.to_le_bytes());
                9
            }
            Ok(Effect::Settings | Effect::Announced) => {
                bytes[0] = ACK_OK;
                1
            }
            Err(e) => {
                log::debug!("a command is refused: {e}");
                bytes[0] = ACK_ERR;
                1
            }
        };
        self.chain.write_front(&bytes[..len]) as u32
    }

    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(QueueChange::Enable(on)) => self.enabled = on,
                Message::Change(change) => {
                    if let Err(e) = apply(cx, &mut self.line, &mut self.queue, change) {
                        self.broken(&e);
                    }
                }
                Message::Stop(_, done) => {
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

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        match self.state {
            State::Stopped => return Turn::Done,
            State::Running if self.enabled => {}
            State::Running | State::Waiting(_) | State::Broken => return Turn::Idle,
        }
        match self.serve() {
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
        self.line.doze(cx);
        !with_ring!(&mut self.queue, ring => ring.enable_notifications())
    }
}
