//! The registers as words, from which another process goes on.

use super::{Effect, Registers, Run, Shutdown, State, Stop};
use crate::journal::REGISTERS;
use crate::spec::registers::{Aqa, Cc};

// Word 3, upper half.
const SUBSYSTEM_RESET: u64 = 1;
const STOPPING: u64 = 1 << 1;
const READY: u64 = 1 << 2;
const RUNNING: u64 = 1 << 3;
const SHUTDOWN: u32 = 4;
const STATE: u32 = 8;

impl Registers {
    /// What there is to be written down.
    pub fn save(&self) -> [u64; REGISTERS] {
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let (state, run) = match self.state {
            State::Disabled => (0, 0),
            State::Enabling(Run(run)) => (1 << STATE, run),
            State::Ready(Run(run)) => (2 << STATE, run),
            State::Stopping { ready } => (3 << STATE | flag(ready, READY), 0),
            State::Failed { ready, running } => {
                let flags = flag(ready, READY) | flag(running, RUNNING);
                (4 << STATE | flags, 0)
            }
        };
        let shutdown = match self.shutdown {
            Shutdown::None => 0,
            Shutdown::Occurring => 1,
            Shutdown::Complete => 2,
        };
        let flags = state
            | shutdown << SHUTDOWN
            | flag(self.subsystem_reset, SUBSYSTEM_RESET)
            | flag(self.stopping, STOPPING);
        [
            u64::from(self.cc.0) | u64::from(self.aqa.0) << 32,
            self.asq,
            self.acq,
            u64::from(self.masked) | flags << 32,
            run,
            self.runs,
        ]
    }

    /// Takes up what another process has written down; says what is to be done then. `None`: it is nothing that this one writes.
    ///
    /// Of a stop that was under way everything ended with the process: it is told again, and over when the device says so.
    #[must_use]
    pub fn load(&mut self, words: [u64; REGISTERS]) -> Option<Vec<Effect>> {
        let [control, asq, acq, flags, run, runs] = words;
        let (masked, flags) = (flags as u32, flags >> 32);
        let is = |bit: u64| flags & bit != 0;
        let ready = is(READY);
        let state = match flags >> STATE {
            0 => State::Disabled,
            1 => State::Enabling(Run(run)),
            2 => State::Ready(Run(run)),
            3 => State::Stopping { ready },
            4 => State::Failed {
                ready,
                running: is(RUNNING),
            },
            _ => return None,
        };
        let shutdown = match flags >> SHUTDOWN & 0b1111 {
            0 => Shutdown::None,
            1 => Shutdown::Occurring,
            2 => Shutdown::Complete,
            _ => return None,
        };
        let cc = Cc::written(control as u32);
        let possible = match state {
            State::Disabled => !cc.enable(),
            State::Stopping { .. } => true,
            State::Enabling(_) | State::Ready(_) | State::Failed { .. } => cc.enable(),
        };
        // Counted up from 0, and there is no time to come that far.
        if !possible || run > runs || runs > u64::MAX / 2 {
            return None;
        }
        *self = Self {
            limits: self.limits,
            cc,
            aqa: Aqa::written((control >> 32) as u32),
            asq,
            acq,
            masked,
            subsystem_reset: is(SUBSYSTEM_RESET),
            state,
            shutdown,
            stopping: is(STOPPING) || matches!(state, State::Stopping { .. }),
            runs,
        };
        Some(self.go_on())
    }

    fn go_on(&mut self) -> Vec<Effect> {
        if self.stopping {
            let asked = match self.shutdown {
                Shutdown::Occurring => self.cc.shutdown(),
                _ => None,
            };
            return vec![Effect::Stop(asked.map_or(Stop::Disabled, Stop::Shutdown))];
        }
        let again = match self.state {
            State::Enabling(run) => self.admin_queues().map(|q| Effect::Start(run, q)),
            State::Ready(run) if self.shutdown == Shutdown::None => {
                self.admin_queues().map(|q| Effect::Resume(run, q))
            }
            _ => return Vec::new(),
        };
        match again {
            Some(effect) => vec![effect],
            None => {
                // They were there before: somebody has written what cannot be.
                self.state = State::Failed {
                    ready: true,
                    running: false,
                };
                Vec::new()
            }
        }
    }
}
