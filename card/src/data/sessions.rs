//! The data half's side of sessions: front ends that control hands over, steps that control records.
//!
//! Going on where a data half was killed needs a fence: what the dead one had given to the kernel may still be under way, and
//! must not land after what is done again. The volume's lock is that fence. An io_uring holds the open file until each of
//! its operations has ended, also when its process is long gone, as does a thread that is killed within a system call; and a lock of an open file
//! description lives as long as that. So a queue, which takes no request off its ring before it has the lock, waits for the
//! dead process's last operation. What is not in the kernel died with the process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bluff_attachment::keeper::{Commit, Keeper, Progress};
use bluff_vhost_user::keeper::{BOUNDS, Direct};
use bluff_vhost_user::limit::Limit;
use bluff_vhost_user::{
    Attachment, AttachmentEvent, Negotiated, NetControl, Options, Resume, SessionState,
};
use bluff_virtio::VirtioDevice;

use super::{Data, Stands, Teller};
use crate::message::{FromData, SessionInfo, record};
use crate::spec::Id;

impl Data {
    /// Gives a device to the loop of sessions.
    pub(super) fn present(
        &self,
        id: &Id,
        device: Box<dyn VirtioDevice>,
        net: Option<Box<dyn NetControl>>,
        bound: Duration,
        descriptors: u32,
    ) -> Result<()> {
        let (teller, function) = (self.teller.clone(), id.clone());
        let limit = Mutex::new(Limit::default());
        let listener = Arc::new(move |_: &str, event| {
            let warn = |line| {
                let mut limit = limit.lock().expect("logging does not panic");
                limit.warn(Instant::now(), format_args!("function {function}"), line);
            };
            let function = function.clone();
            match event {
                // What is negotiated, if only nothing, is told right after it.
                AttachmentEvent::Connected => {}
                AttachmentEvent::Negotiated(negotiated) => {
                    let session = negotiated.into();
                    teller.tell(0, FromData::FrontEnd { function, session });
                }
                AttachmentEvent::Disconnected(reason) => {
                    teller.tell(0, FromData::FrontEndGone { function, reason });
                }
                AttachmentEvent::Refused => {
                    warn("a front end too many was handed over");
                }
                AttachmentEvent::NeedsReset => warn("its driver has to reset it"),
            }
        });
        let keeper: Box<dyn Keeper> = match self.keeps {
            true => Box::new(self.recorder(id)),
            false => Box::new(Direct::default()),
        };
        let options = Options {
            bound,
            descriptors: descriptors as usize,
            net,
            keeper,
        };
        let attachment = Attachment::new(id.to_string(), device, options, listener);
        let added = self.sessions.handle().add(attachment);
        added.context("the thread of sessions")
    }

    /// Who has control record a function's sessions.
    pub(super) fn recorder(&self, id: &Id) -> Recorder {
        Recorder {
            teller: self.teller.clone(),
            function: id.clone(),
        }
    }

    /// Takes a front end up, in mid-session where something is recorded.
    pub(super) fn connect(&mut self, id: &Id, descriptors: Vec<OwnedFd>) -> Result<()> {
        let restored = match self.functions.get_mut(id).context("it is not attached")? {
            Stands::Blk(blk) => &mut blk.restored,
            Stands::Net(net) => &mut net.restored,
            Stands::Nvme(nvme) => {
                let resume = nvme.resume(descriptors)?;
                self.vfio.handle().connection(id.as_str(), resume);
                return Ok(());
            }
        };
        let files = std::mem::take(restored);
        let mut descriptors = descriptors.into_iter();
        let socket = descriptors.next().context("no connection came along")?;
        let recorded = match descriptors.next() {
            None => None,
            Some(state) => {
                let state = record::read(state.as_fd(), BOUNDS.record);
                let state = state.context("the record of its session")?;
                Some((SessionState::from_bytes(&state)?, files))
            }
        };
        let resume = Resume {
            socket: UnixStream::from(socket),
            recorded,
        };
        self.sessions.handle().connection(id.as_str(), resume);
        Ok(())
    }
}

/// Has control record, consume and reply.
pub(super) struct Recorder {
    teller: Teller,
    function: Id,
}

impl Keeper for Recorder {
    fn connected(&mut self, _: BorrowedFd<'_>) -> io::Result<()> {
        // It came from control.
        Ok(())
    }

    fn keeps(&self) -> bool {
        true
    }

    fn commit(&mut self, _: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress> {
        let (bytes, files) = commit.encode();
        let record = record::write(&bytes)?;
        let mut descriptors = vec![record.as_fd()];
        descriptors.extend(files);
        let message = FromData::Commit {
            function: self.function.clone(),
            files: descriptors.len() - 1,
        };
        let sent = self.teller.send(0, message, &descriptors);
        sent.map_err(io::Error::other)?;
        Ok(Progress::Later)
    }

    fn flush(&mut self, _: BorrowedFd<'_>) -> io::Result<Progress> {
        // Control waits for a front end that does not read.
        Ok(Progress::Later)
    }

    fn ended(&mut self) {
        // Control hears of it, and drops what it kept.
    }
}

impl From<Negotiated> for SessionInfo {
    fn from(negotiated: Negotiated) -> Self {
        let Negotiated {
            features,
            status,
            queues,
        } = negotiated;
        Self {
            features,
            status,
            queues,
        }
    }
}
