//! The end of a session: what is under way ends, rings are stopped, the function is free.

use bluff_virtio::Stop;

use super::{Phase, Session, Step};
use crate::framing::Framer;
use crate::state::{Mapped, SessionState};

impl Session {
    /// The front end has gone, or has to go: stops what runs, within the bound.
    pub fn end(&mut self) -> Step {
        self.orderly = false;
        self.wind_up()
    }

    /// The function goes, and its front end has done nothing wrong: as [`Session::end`], but what ends within the bound
    /// is answered. The connection is to stay until [`Step::Ended`], so that the front end finds the answers
    /// before it finds that it is alone; should it go first, call [`Session::end`].
    pub fn leave(&mut self) -> Step {
        self.orderly = true;
        self.wind_up()
    }

    fn wind_up(&mut self) -> Step {
        match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::Idle => {
                // Also after a resumption that failed half-way.
                self.phase = Phase::Idle;
                self.forget()
            }
            Phase::Working(work) if work.waiting > 0 => {
                // What is under way ends first, within its own bound; then nothing is asked twice.
                let rings = self.state.started().chain(work.plan.next.started());
                self.phase = Phase::Draining(work.waiting, rings.collect());
                // What it drops is dropped.
                self.state.forget = work.plan.next.forget;
                self.mapped.forget = work.plan.mapped.forget;
                Step::Wait
            }
            phase @ (Phase::Draining(..) | Phase::Stopping(_)) => {
                self.phase = phase;
                Step::Wait
            }
            Phase::Ready | Phase::Preparing(_) | Phase::Working(_) | Phase::Committing => {
                self.phase = Phase::Draining(0, self.state.started().collect());
                self.stop_all()
            }
        }
    }

    pub(super) fn stop_all(&mut self) -> Step {
        let Phase::Draining(0, rings) = std::mem::replace(&mut self.phase, Phase::Ready) else {
            panic!("completions are to come");
        };
        if rings.is_empty() {
            return self.forget();
        }
        // Where the front end keeps what is in flight, it may come back and have it done again: what ends
        // within the bound is answered, as it would be if the front end were there. What does not end stays recorded;
        // where nothing is, a front end that is there is told of an error, and one that is not has given it up.
        let recorded = self.state.inflight.is_some();
        let stop = Stop {
            bound: self.bound,
            leave: self.is_recorded(),
            answer: recorded || self.orderly,
        };
        self.op += 1;
        self.phase = Phase::Stopping(rings.len());
        for index in rings {
            self.stop_queue(index, stop, self.op);
        }
        Step::Wait
    }

    pub(super) fn forget(&mut self) -> Step {
        // Nobody takes this connection up any more, so that nothing has to be recorded before.
        self.mapped.forget(&mut self.state);
        self.device.reset();
        self.op += 1;
        // Records are numbered through, so that a late word of the keeper is not taken for another.
        self.state = SessionState {
            seq: self.state.seq,
            ..SessionState::new(self.state.vrings.len() as u16)
        };
        self.mapped = Mapped::default();
        self.files.clear();
        self.kept.clear();
        self.framer = Framer::default();
        self.retire_channel();
        self.stopped = None;
        // What the next front end has read, it may have read long ago.
        self.changed = true;
        self.unsaved = false;
        self.phase = Phase::Idle;
        Step::Ended
    }
}
