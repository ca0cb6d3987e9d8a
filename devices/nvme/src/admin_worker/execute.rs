//! Admin commands: fetched, their data copied, executed, and answered.
//!
//! Unsafe, because admin data is copied from and to memory that a host shares.
#![allow(unsafe_code)]

use bluff_block::Buffers;
use bluff_memory::{Access, IoVec};
use bluff_pci::Dma;
use bluff_reactor::Context;

use super::AdminWorker;
use crate::admin::{BadDoorbell, ErrorReport, Outcome, Transfer};
use crate::queue::{InvalidValue, completion};
use crate::spec::{Command, Status, admin as opcode};

/// Admin commands taken in one turn.
const COMMANDS: usize = 8;

impl AdminWorker {
    /// Takes commands; says whether there were any.
    pub(super) fn serve(&mut self, cx: &mut Context<'_>) -> bool {
        let mut worked = false;
        for _ in 0..COMMANDS {
            let Some(run) = &mut self.run else {
                return worked;
            };
            if !run.takes() {
                return worked;
            }
            let (looked, room) = (run.sq.look(), run.cq.room());
            if let Err(InvalidValue(value)) = looked.map(|_| ()) {
                log::debug!("admin queue: tail doorbell {value}");
                self.admin.report_doorbell(BadDoorbell::Value, Some(0));
            }
            let room = match room {
                Ok(room) => room,
                Err(InvalidValue(value)) => {
                    log::debug!("admin queue: head doorbell {value}");
                    self.admin.report_doorbell(BadDoorbell::Value, None);
                    return true;
                }
            };
            if room == 0 {
                return worked;
            }
            let run = self.run.as_mut().expect("it was there");
            let next = run.again.pop_front().or_else(|| run.sq.fetch());
            let Some(command) = next else {
                break;
            };
            run.cq.reserve();
            worked = true;
            self.execute(cx, &command);
        }
        worked |= self.tell_events();
        worked
    }

    pub(super) fn execute(&mut self, cx: &mut Context<'_>, command: &Command) {
        // What workers have failed is in the log before the host can ask for it.
        for error in self.shared.errors.take() {
            self.admin.report_error(&ErrorReport {
                sqid: Some(error.sqid),
                command: Some((error.cid, error.opcode)),
                status: error.status,
                location: None,
                lba: error.lba,
                nsid: error.nsid,
            });
        }
        if let Err(status) = self.try_execute(cx, command) {
            self.refuse(command, status);
        }
    }

    pub(super) fn refuse(&mut self, command: &Command, status: Status) {
        self.admin
            .report_error(&ErrorReport::of(0, command, status));
        self.complete(command.cid.get(), 0, status.more());
    }

    fn try_execute(&mut self, cx: &mut Context<'_>, command: &Command) -> Result<(), Status> {
        let transfer = self.admin.transfer(command)?;
        let mut pieces = Vec::new();
        let mut data = Vec::new();
        let (Transfer::FromHost(len) | Transfer::ToHost(len)) = transfer else {
            return self.dispatch(cx, command, &data, &pieces);
        };
        if len > 0 {
            let memory = match &self.dma {
                Dma::Off => return Err(Status::DATA_TRANSFER_ERROR),
                Dma::On(memory) => memory,
            };
            let access = match transfer {
                Transfer::FromHost(_) => Access::Read,
                _ => Access::Write,
            };
            let run = self.run.as_mut().expect("else nothing is taken");
            run.resolver
                .resolve(memory, access, command, len as u32, &mut pieces)?;
        }
        if let Transfer::FromHost(len) = transfer {
            data.resize(len, 0);
            // SAFETY: resolved in the epoch that `self.dma` keeps; the name does not leave this function.
            unsafe { Buffers::new(&pieces) }.copy_to(&mut data);
            pieces.clear();
        }
        self.dispatch(cx, command, &data, &pieces)
    }

    fn dispatch(
        &mut self,
        cx: &mut Context<'_>,
        command: &Command,
        data: &[u8],
        pieces: &[IoVec],
    ) -> Result<(), Status> {
        let cid = command.cid.get();
        match self.admin.execute(command, data, cx.now()) {
            Outcome::Done { dw0, data } => {
                // SAFETY: as above; nothing has changed the epoch meanwhile.
                unsafe { Buffers::new(pieces) }.copy_from(&data);
                if command.opcode == opcode::SET_FEATURES {
                    self.apply_settings();
                }
                self.complete(cid, dw0, Status::SUCCESS);
                Ok(())
            }
            Outcome::Failed(status) => Err(status),
            Outcome::Held => {
                // Its completion is reserved when there is one.
                self.run.as_mut().expect("it has a command").cq.release();
                Ok(())
            }
            Outcome::Queue(queue) => {
                self.answer_later(command);
                self.queue(command, queue)
            }
            Outcome::Format(format) => {
                self.answer_later(command);
                self.begin_format(command, &format)
            }
        }
    }

    fn answer_later(&mut self, command: &Command) {
        let run = self.run.as_mut().expect("it has a command");
        run.pending.push(*command);
    }

    /// Answers event requests, as far as there is room.
    fn tell_events(&mut self) -> bool {
        let mut told = false;
        while let Some(run) = &mut self.run
            && run.cq.is_on()
            && matches!(run.cq.room(), Ok(1..))
            && let Some((cid, dw0)) = self.admin.poll_event()
        {
            run.cq.reserve();
            self.complete(cid, dw0, Status::SUCCESS);
            told = true;
        }
        told
    }

    /// Answers a command whose completion is reserved.
    pub(super) fn complete(&mut self, cid: u16, dw0: u32, status: Status) {
        if let Some(run) = &mut self.run {
            let answered = run.pending.iter().position(|c| c.cid.get() == cid);
            answered.map(|at| run.pending.remove(at));
            let entry = completion(0, run.sq.head(), cid.into(), dw0, status);
            run.outbox.push_back(entry);
        }
    }
}
