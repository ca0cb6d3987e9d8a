//! The controller's registers as a state machine, without queues, threads or clocks (Base 2.1 §3.1.4, §3.5.1, §3.6, §3.7).
//!
//! ```text
//!                 EN=1, fits                 started
//!   Disabled ------------------> Enabling ------------> Ready ----+ fail
//!      ^  |  EN=1, does not fit     |  EN=0               | EN=0  v
//!      |  +----> Failed <-----------|--- not started      |    Failed: CSTS.CFS
//!      |            | EN=0          v                     v       | EN=0
//!      +------------+----------- Stopping <---------------+-------+
//!                 stopped     (RDY stays until then)
//!
//!   beside it, SHST:  None ---CC.SHN---> Occurring ---stopped---> Complete ---EN=0---> None
//! ```
//!
//! What a write begins is told as [`Effect`]s, in the order to be carried out. The device answers [`Registers::started`] for a start and
//! [`Registers::stopped`] for a stop, when no queue uses memory any more.
//!
//! Accesses (§3.1.4, PCIe Transport 1.1 §3.1): registers are accessed in their own width, those of 64 bits also by halves; what else a host
//! tries is undefined. Reading has no side effect anywhere, so a read of any width gives the bytes as they stand. A write takes effect where it is just one register of 4 bytes, one of 8, or
//! an aligned half of one; any other is dropped, since a part of CC or of a queue's address is nothing that a host can mean.

mod saved;
#[cfg(test)]
mod tests;

use crate::spec::registers::{
    Aqa, Cap, Cc, IOCQES, IOSQES, NSSR_RESET, QUEUE_BASE, ShutdownKind, VERSION, csts, offset,
};

/// What of the registers is fixed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Capabilities.
    pub cap: Cap,
}

/// Which time it was enabled. What is reported of an earlier one is not about this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run(pub u64);

/// The admin queues, checked as far as can be without memory: sizes are 2 to 4096 entries, and addresses are aligned to `page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AdminQueues {
    /// Address of the submission queue.
    pub sq: u64,
    /// Its entries.
    pub sq_entries: u16,
    /// Address of the completion queue.
    pub cq: u64,
    /// Its entries.
    pub cq_entries: u16,
    /// A memory page in bytes, for all that runs now.
    pub page: u64,
}

/// Why all queues end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// CC.EN was cleared. Queues are forgotten.
    Disabled,
    /// CC.SHN, also where EN was cleared with it. With `Normal` what volumes have in a volatile cache is written to their media before it is over.
    Shutdown(ShutdownKind),
    /// The function, or the subsystem, is reset.
    Reset,
}

/// What the device is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Begin: features and logs as after a controller level reset, then these queues; then [`Registers::started`] with this run.
    Start(Run, AdminQueues),
    /// Go on with a run that another process began; where that cannot be, [`Registers::fail`].
    Resume(Run, AdminQueues),
    /// End all queues within the bound, also those of a start that is not over; then [`Registers::stopped`], once. It is not given again before that.
    Stop(Stop),
    /// Reset all controllers of the subsystem, this one among them, by [`Registers::subsystem_reset`].
    SubsystemReset,
    /// Which of the 32 vectors are masked; for INTx and MSI only.
    Mask(u32),
}

/// Where it is in being enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// CC.EN is 0 and nothing runs.
    Disabled,
    /// Admin queues are being made.
    Enabling(Run),
    /// Commands are taken, unless it is shut down.
    Ready(Run),
    /// Queues are ending; `ready` is what RDY says until they have.
    Stopping { ready: bool },
    /// It cannot go on.
    Failed { ready: bool, running: bool },
}

/// CSTS.SHST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shutdown {
    None,
    Occurring,
    Complete,
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Registers {
    limits: Limits,
    cc: Cc,
    aqa: Aqa,
    asq: u64,
    acq: u64,
    masked: u32,
    subsystem_reset: bool,
    state: State,
    shutdown: Shutdown,
    /// A stop was told and is not over.
    stopping: bool,
    runs: u64,
}

impl Registers {
    /// As after power on.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            cc: Cc(0),
            aqa: Aqa(0),
            asq: 0,
            acq: 0,
            masked: 0,
            subsystem_reset: false,
            state: State::Disabled,
            shutdown: Shutdown::None,
            stopping: false,
            runs: 0,
        }
    }

    /// CC as it is; workers look at the entry sizes when I/O queues are made.
    pub fn cc(&self) -> Cc {
        self.cc
    }

    /// CSTS.
    pub fn csts(&self) -> u32 {
        let state = match self.state {
            State::Disabled | State::Enabling(_) | State::Stopping { ready: false } => 0,
            State::Ready(_) | State::Stopping { ready: true } => csts::RDY,
            State::Failed { ready, .. } => csts::CFS | if ready { csts::RDY } else { 0 },
        };
        let shutdown = match self.shutdown {
            Shutdown::None => 0,
            Shutdown::Occurring => csts::SHST_OCCURRING,
            Shutdown::Complete => csts::SHST_COMPLETE,
        };
        let reset = if self.subsystem_reset { csts::NSSRO } else { 0 };
        state | shutdown | reset
    }

    /// Whether doorbells mean something: it is ready, and not shut down.
    pub fn takes_commands(&self) -> bool {
        matches!(self.state, State::Ready(_)) && self.shutdown == Shutdown::None
    }

    /// Whether power may go without a loss: it was shut down, or never ran.
    pub fn is_safe(&self) -> bool {
        self.shutdown == Shutdown::Complete || self.state == State::Disabled
    }

    /// The dword at `at`, which is a multiple of 4.
    fn dword(&self, at: u64) -> u32 {
        let half = |register: u64, start: u64| (register >> ((at - start) * 8)) as u32;
        match at {
            offset::CAP | 0x04 => half(self.limits.cap.bits(), offset::CAP),
            offset::VS => VERSION,
            offset::INTMS | offset::INTMC => self.masked,
            offset::CC => self.cc.0,
            offset::CSTS => self.csts(),
            offset::AQA => self.aqa.0,
            offset::ASQ | 0x2c => half(self.asq, offset::ASQ),
            offset::ACQ | 0x34 => half(self.acq, offset::ACQ),
            // Media is ready with the controller (CRWMT); CRIMS is 0, and so is CRIMT (§3.1.4.21).
            offset::CRTO => u32::from(self.limits.cap.timeout),
            // NSSR reads as 0 (§3.1.4.7). There is no CMB, boot partition, subsystem shutdown or PMR.
            _ => 0,
        }
    }

    /// Reads; `at` is an offset of any alignment. Doorbells, and what is reserved, read as zeroes.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        for (i, byte) in to.iter_mut().enumerate() {
            let at = at.saturating_add(i as u64);
            let dword = self.dword(at & !3).to_le_bytes();
            *byte = dword[(at & 3) as usize];
        }
    }

    /// Writes; `at` is below the doorbells. What is told is to be carried out in order.
    #[must_use]
    pub fn write(&mut self, at: u64, from: &[u8]) -> Vec<Effect> {
        match from {
            [a, b, c, d] if at.is_multiple_of(4) => {
                self.write_dword(at, u32::from_le_bytes([*a, *b, *c, *d]))
            }
            &[a, b, c, d, e, f, g, h] if at == offset::ASQ || at == offset::ACQ => {
                let low = u32::from_le_bytes([a, b, c, d]);
                let high = u32::from_le_bytes([e, f, g, h]);
                self.write_dword(at, low);
                self.write_dword(at + 4, high)
            }
            _ => Vec::new(),
        }
    }

    fn write_dword(&mut self, at: u64, value: u32) -> Vec<Effect> {
        // The admin queues must not change while the controller is enabled (§3.1.4.8): it has them already, and a host that reads them
        // back sees what they are.
        let fixed = self.cc.enable();
        let low = |register: u64| register & !0xffff_ffff | u64::from(value) & QUEUE_BASE;
        let high = |register: u64| register & 0xffff_ffff | u64::from(value) << 32;
        match at {
            offset::INTMS => return self.mask(self.masked | value),
            offset::INTMC => return self.mask(self.masked & !value),
            offset::CC => return self.configure(Cc::written(value)),
            offset::CSTS if value & csts::NSSRO != 0 => self.subsystem_reset = false,
            offset::NSSR if value == NSSR_RESET => return vec![Effect::SubsystemReset],
            offset::AQA if !fixed => self.aqa = Aqa::written(value),
            offset::ASQ if !fixed => self.asq = low(self.asq),
            0x2c if !fixed => self.asq = high(self.asq),
            offset::ACQ if !fixed => self.acq = low(self.acq),
            0x34 if !fixed => self.acq = high(self.acq),
            _ => {}
        }
        Vec::new()
    }

    fn mask(&mut self, masked: u32) -> Vec<Effect> {
        if self.masked == masked {
            return Vec::new();
        }
        self.masked = masked;
        vec![Effect::Mask(masked)]
    }

    /// A write of CC: an edge of EN first, then what SHN asks for.
    fn configure(&mut self, new: Cc) -> Vec<Effect> {
        let old = self.cc;
        // A shutdown begins when SHN is updated. One that is not cleared when EN is set asks for it again: the way back is to clear it
        // in that write (§3.1.4.6, SHST).
        let begins = !old.enable() && new.enable();
        let asked = new
            .shutdown()
            .filter(|_| begins || new.shutdown() != old.shutdown());
        let mut effects = Vec::new();
        match (old.enable(), new.enable()) {
            (false, true) => {
                self.cc = new;
                self.enable(&mut effects);
            }
            (true, false) => {
                // All but the admin queues' registers is as after a reset (§3.7.2). CC is what the host has just written: one that
                // clears EN in what it has read, and sets it again later, keeps its settings.
                self.cc = new;
                effects.extend(self.mask(0));
                self.disable(asked.map_or(Stop::Disabled, Stop::Shutdown), &mut effects);
            }
            (true, true) => self.cc = old.with_live_fields(new),
            (false, false) => self.cc = new,
        }
        if let Some(kind) = asked {
            self.shut_down(kind, &mut effects);
        }
        effects
    }

    fn enable(&mut self, effects: &mut Vec<Effect>) {
        // A host has to wait for RDY to fall before it sets EN again. One that does not gets what it wants then.
        if let State::Stopping { .. } = self.state {
            return;
        }
        self.shutdown = Shutdown::None;
        let Some(queues) = self.admin_queues() else {
            self.state = State::Failed {
                ready: false,
                running: false,
            };
            return;
        };
        self.runs += 1;
        let run = Run(self.runs);
        self.state = State::Enabling(run);
        effects.push(Effect::Start(run, queues));
    }

    /// What CC and the queues' registers ask for; `None` where the controller has no such thing.
    fn admin_queues(&self) -> Option<AdminQueues> {
        let (cc, cap) = (self.cc, self.limits.cap);
        // The entry sizes are to be set before the first I/O queue, and can be 0 until then (§3.1.4.5).
        let fits = matches!(cc.css(), 0 | 0b110)
            && (cap.mps_min..=cap.mps_max).contains(&cc.mps())
            && cc.ams() == 0
            && matches!(cc.iosqes(), 0 | IOSQES)
            && matches!(cc.iocqes(), 0 | IOCQES);
        let (sq_entries, cq_entries) = (self.aqa.sq_entries(), self.aqa.cq_entries());
        let page = cc.page();
        let aligned = (self.asq | self.acq).is_multiple_of(page);
        // A queue has two entries at least (§3.3.3.1).
        (fits && sq_entries >= 2 && cq_entries >= 2 && aligned).then_some(AdminQueues {
            sq: self.asq,
            sq_entries,
            cq: self.acq,
            cq_entries,
            page,
        })
    }

    /// From any state towards Disabled.
    fn disable(&mut self, why: Stop, effects: &mut Vec<Effect>) {
        let ready = self.csts() & csts::RDY != 0;
        let running = match self.state {
            State::Disabled => false,
            State::Failed { running, .. } => running,
            // After a shutdown nothing runs any more.
            State::Enabling(_) | State::Ready(_) => self.shutdown != Shutdown::Complete,
            State::Stopping { .. } => true,
        };
        if !running {
            self.state = State::Disabled;
            self.shutdown = Shutdown::None;
            return;
        }
        self.state = State::Stopping { ready };
        self.stop(why, effects);
    }

    fn stop(&mut self, why: Stop, effects: &mut Vec<Effect>) {
        if !std::mem::replace(&mut self.stopping, true) {
            effects.push(Effect::Stop(why));
        }
    }

    fn shut_down(&mut self, kind: ShutdownKind, effects: &mut Vec<Effect>) {
        if self.shutdown != Shutdown::None {
            return;
        }
        match self.state {
            // Nothing runs, so it is safe to take power away, whatever EN is.
            State::Disabled | State::Failed { running: false, .. } => {
                self.shutdown = Shutdown::Complete;
            }
            State::Stopping { .. } => self.shutdown = Shutdown::Occurring,
            State::Enabling(_) | State::Ready(_) | State::Failed { running: true, .. } => {
                self.shutdown = Shutdown::Occurring;
                self.stop(Stop::Shutdown(kind), effects);
            }
        }
    }

    /// The admin queues of this run are there, or cannot be: what ASQ or ACQ names is no memory.
    pub fn started(&mut self, run: Run, well: bool) {
        if self.state == State::Enabling(run) {
            self.state = match well {
                true => State::Ready(run),
                // The actor that was to have the queues may be there.
                false => State::Failed {
                    ready: false,
                    running: true,
                },
            };
        }
    }

    /// All queues have ended: nothing uses memory.
    ///
    /// # Panics
    /// Where no [`Effect::Stop`] was told.
    #[must_use]
    pub fn stopped(&mut self) -> Vec<Effect> {
        assert!(
            std::mem::take(&mut self.stopping),
            "nobody asked for a stop"
        );
        let mut effects = Vec::new();
        match self.state {
            State::Stopping { .. } => {
                // A shutdown that the host has not taken back is over, too; one that it has was aborted by the reset (§3.1.4.6, SHST).
                let asked = match std::mem::replace(&mut self.shutdown, Shutdown::None) {
                    Shutdown::None => None,
                    Shutdown::Occurring | Shutdown::Complete => self.cc.shutdown(),
                };
                self.state = State::Disabled;
                if self.cc.enable() {
                    self.enable(&mut effects);
                }
                if let Some(kind) = asked {
                    self.shut_down(kind, &mut effects);
                }
            }
            State::Failed { ready, .. } => {
                self.state = State::Failed {
                    ready,
                    running: false,
                };
                self.shutdown = Shutdown::Complete;
            }
            _ => self.shutdown = Shutdown::Complete,
        }
        effects
    }

    /// The controller cannot go on (CSTS.CFS): its admin queue is broken, or its memory has gone. Queues may still run.
    pub fn fail(&mut self, run: Run) {
        match self.state {
            State::Enabling(r) | State::Ready(r) if r == run => {
                self.state = State::Failed {
                    ready: matches!(self.state, State::Ready(_)),
                    running: self.shutdown != Shutdown::Complete,
                };
            }
            _ => {}
        }
    }

    /// The function is reset: all is as after power on, but for queues that are still ending.
    #[must_use]
    pub fn reset(&mut self) -> Vec<Effect> {
        self.subsystem_reset = false;
        self.forget()
    }

    /// The subsystem was reset, by this controller or another (§3.7.1): as [`Registers::reset`], and CSTS says so.
    #[must_use]
    pub fn subsystem_reset(&mut self) -> Vec<Effect> {
        self.subsystem_reset = true;
        self.forget()
    }

    fn forget(&mut self) -> Vec<Effect> {
        let mut effects = self.mask(0);
        (self.cc, self.aqa, self.asq, self.acq) = (Cc(0), Aqa(0), 0, 0);
        self.disable(Stop::Reset, &mut effects);
        self.shutdown = Shutdown::None;
        effects
    }

    /// Whether a stop is going on.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }
}
