//! Admin commands with data, features, logs and events.

use crate::spec::{admin, cns, feature};
use crate::{
    Bar, Buffer, Command, Completion, Controller, Error, IdentifyController, IdentifyNamespace,
};

impl<B: Bar> Controller<B> {
    /// Does a command that gives `len` bytes.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn admin_read(&mut self, command: &Command, len: u64) -> Result<Vec<u8>, Error> {
        let mut buffer = Buffer::new(self.memory(), len)?;
        // So that what the controller does not write is seen.
        buffer.fill(0xa5);
        let command = command.data(buffer.prp()?);
        self.admin(&command)?;
        Ok(buffer.read())
    }

    /// Does a command that takes these bytes.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn admin_write(&mut self, command: &Command, data: &[u8]) -> Result<Completion, Error> {
        let mut buffer = Buffer::holding(self.memory(), data)?;
        let command = command.data(buffer.prp()?);
        self.admin(&command)
    }

    /// Identify: the whole structure.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn identify(&mut self, cns: u8, nsid: u32) -> Result<Vec<u8>, Error> {
        self.admin_read(&Command::identify(cns, nsid), 4096)
    }

    /// Identify Controller.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn identify_controller(&mut self) -> Result<IdentifyController, Error> {
        Ok(IdentifyController(self.identify(cns::CONTROLLER, 0)?))
    }

    /// Identify Namespace.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn identify_namespace(&mut self, nsid: u32) -> Result<IdentifyNamespace, Error> {
        Ok(IdentifyNamespace(self.identify(cns::NAMESPACE, nsid)?))
    }

    /// Identifiers of the active namespaces above `after`.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn active_namespaces(&mut self, after: u32) -> Result<Vec<u32>, Error> {
        let bytes = self.identify(cns::ACTIVE_NAMESPACES, after)?;
        let words = bytes.chunks_exact(4);
        let words = words.map(|w| u32::from_le_bytes(w.try_into().expect("four bytes")));
        Ok(words.take_while(|nsid| *nsid != 0).collect())
    }

    /// Get Log Page: `len` bytes from `offset` on.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn log_page(
        &mut self,
        lid: u8,
        nsid: u32,
        offset: u64,
        len: u32,
    ) -> Result<Vec<u8>, Error> {
        let command = Command::log_page(lid, nsid, offset, len);
        self.admin_read(&command, u64::from(len))
    }

    /// Get Features, of those that have no data.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn feature(&mut self, fid: u8, nsid: u32) -> Result<u32, Error> {
        Ok(self.admin(&Command::get_features(fid, nsid))?.dw0())
    }

    /// Set Features, of those that have no data.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn set_feature(&mut self, fid: u8, nsid: u32, value: u32) -> Result<u32, Error> {
        Ok(self.admin(&Command::set_features(fid, nsid, value))?.dw0())
    }

    /// Asks for so many I/O submission and completion queues; how many of each there are.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn set_queue_count(&mut self, sqs: u16, cqs: u16) -> Result<(u32, u32), Error> {
        let zero_based = |n: u16| u32::from(n.wrapping_sub(1));
        let value = zero_based(sqs) | zero_based(cqs) << 16;
        let got = self.set_feature(feature::QUEUES, 0, value)?;
        Ok(((got & 0xffff) + 1, (got >> 16) + 1))
    }

    /// Aborts a command; whether it was.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn abort(&mut self, sq: u16, cid: u16) -> Result<bool, Error> {
        Ok(self.admin(&Command::abort(sq, cid))?.dw0() & 1 == 0)
    }

    /// Formats a namespace, or all with `u32::MAX`.
    ///
    /// # Errors
    /// As [`Controller::admin`].
    pub fn format(&mut self, nsid: u32, lba_format: u8, erase: u8) -> Result<(), Error> {
        self.admin(&Command::format(nsid, lba_format, erase))
            .map(drop)
    }

    /// Sends an asynchronous event request, which stays until there is something to tell.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn request_event(&mut self) -> Result<(), Error> {
        let queue = self.admin_queue()?;
        let cid = queue.submit(0, &Command::new(admin::ASYNC_EVENT, 0))?;
        queue.ring()?;
        self.requests.push(cid);
        Ok(())
    }

    /// How many event requests the controller has.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Takes the next event: dword 0 of its completion.
    ///
    /// # Errors
    /// [`Error::Failed`] where a request was refused; what is wrong with the queue.
    pub fn poll_event(&mut self) -> Result<Option<u32>, Error> {
        self.keep_events()?;
        Ok((!self.events.is_empty()).then(|| self.events.remove(0)))
    }

    /// Takes whatever the admin queue has; it can be nothing but event requests, since all other commands are waited for.
    pub(crate) fn keep_events(&mut self) -> Result<(), Error> {
        let queue = self.admin_queue()?;
        let mut came = Vec::new();
        while let Some(done) = queue.poll()? {
            came.push(done);
        }
        queue.ring()?;
        for done in came {
            let cid = done.completion.cid;
            let asked = self.requests.iter().position(|r| *r == cid);
            // One that a caller submitted by itself, whose completion it has to take by itself too.
            let Some(asked) = asked else {
                return Err(Error::Request("a command of the admin queue is nobody's"));
            };
            self.requests.remove(asked);
            self.events.push(done.ok()?.dw0());
        }
        Ok(())
    }
}
