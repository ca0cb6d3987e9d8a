//! A completion queue with the submission queues that post to it, on one thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Bar, Command, Completion, Cq, Error, Sq, Violation};

/// A command that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Of the command.
    pub opcode: u8,
    /// What the controller said.
    pub completion: Completion,
}

impl Done {
    /// The completion, or the error that it is.
    ///
    /// # Errors
    /// [`Error::Failed`].
    pub fn ok(self) -> Result<Completion, Error> {
        if self.completion.status.is_ok() {
            return Ok(self.completion);
        }
        Err(Error::Failed {
            opcode: self.opcode,
            status: self.completion.status,
        })
    }
}

/// One CQ and its SQs. It can be moved to a thread of its own.
#[derive(Debug)]
pub struct Queues<B> {
    bar: Arc<B>,
    /// The completion queue.
    pub cq: Cq,
    /// Its submission queues; commands are submitted by index.
    pub sqs: Vec<Sq>,
    /// Came while another was waited for.
    kept: Vec<Done>,
}

impl<B: Bar> Queues<B> {
    /// Puts them together.
    pub fn new(bar: &Arc<B>, cq: Cq, sqs: Vec<Sq>) -> Self {
        Self {
            bar: bar.clone(),
            cq,
            sqs,
            kept: Vec::new(),
        }
    }

    /// The registers.
    pub fn bar(&self) -> &Arc<B> {
        &self.bar
    }

    /// How many commands are in flight.
    pub fn in_flight(&self) -> usize {
        self.sqs.iter().map(Sq::in_flight).sum()
    }

    /// Adds a command to the SQ of that index; its identifier.
    ///
    /// # Errors
    /// [`Error::Full`].
    #[inline(always)]
    pub fn submit(&mut self, sq: usize, command: &Command) -> Result<u16, Error> {
        self.sqs[sq].submit(command)
    }

    /// Tells the controller of everything that was submitted and taken.
    ///
    /// # Errors
    /// What the transport says.
    #[inline(always)]
    pub fn ring(&mut self) -> Result<(), Error> {
        // The CQ first: what is submitted may need the places that it gives back.
        self.cq.ring(&*self.bar)?;
        for sq in &mut self.sqs {
            sq.ring(&*self.bar)?;
        }
        Ok(())
    }

    /// Takes the next command that came back, whatever its status. Its place in the CQ is given back by [`Queues::ring`].
    ///
    /// # Errors
    /// [`Error::Violation`].
    #[inline(always)]
    pub fn poll(&mut self) -> Result<Option<Done>, Error> {
        if let Some(done) = self.kept.pop() {
            return Ok(Some(done));
        }
        self.poll_ring()
    }

    #[inline(always)]
    fn poll_ring(&mut self) -> Result<Option<Done>, Error> {
        Ok(self.poll_indexed()?.map(|(_, done)| done))
    }

    /// The next one from the ring, whatever is kept, with the index of its SQ.
    #[inline(always)]
    pub(crate) fn poll_indexed(&mut self) -> Result<Option<(usize, Done)>, Error> {
        let Some(completion) = self.cq.pop() else {
            return Ok(None);
        };
        let index = self.sqs.iter().position(|sq| sq.id() == completion.sq);
        let index = index.ok_or(Violation::ForeignQueue {
            sq: completion.sq,
            cq: self.cq.id(),
        })?;
        let opcode = self.sqs[index].completed(&completion)?;
        Ok(Some((index, Done { opcode, completion })))
    }

    /// Sleeps until there is something to take: until the CQ's event, where it has one, and then an interrupt that does not come is
    /// as if there were nothing. Whether there is something within `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        !self.kept.is_empty() || self.sleep(limit)
    }

    fn sleep(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while !self.cq.is_ready() {
            let rest = end.saturating_duration_since(Instant::now());
            match self.cq.event() {
                // The event is taken before the ring is looked at again, so nothing is slept through.
                Some(event) if event.wait(rest) => drop(event.take()),
                None if !rest.is_zero() => std::thread::yield_now(),
                _ => return false,
            }
        }
        true
    }

    /// As [`Queues::wait`], and only an event wakes it: whether one came before there was anything else to see.
    pub fn wait_for_event(&self, limit: Duration) -> bool {
        let event = self.cq.event().expect("a CQ with an event");
        event.wait(limit) && event.take() > 0
    }

    /// Does one command, and waits for it; what comes back meanwhile is kept for [`Queues::poll`].
    ///
    /// # Errors
    /// [`Error::Failed`] where it ends with an error; [`Error::Late`]; what is wrong with the queue.
    pub fn run(
        &mut self,
        sq: usize,
        command: &Command,
        limit: Duration,
    ) -> Result<Completion, Error> {
        let cid = self.submit(sq, command)?;
        self.ring()?;
        self.finish(sq, cid, limit)?.ok()
    }

    /// Waits for one command.
    ///
    /// # Errors
    /// [`Error::Late`]; what is wrong with the queue.
    pub fn finish(&mut self, sq: usize, cid: u16, limit: Duration) -> Result<Done, Error> {
        let id = self.sqs[sq].id();
        let is = |d: &Done| (d.completion.sq, d.completion.cid) == (id, cid);
        if let Some(i) = self.kept.iter().position(is) {
            return Ok(self.kept.remove(i));
        }
        let end = Instant::now() + limit;
        loop {
            while let Some(done) = self.poll_ring()? {
                if is(&done) {
                    self.ring()?;
                    return Ok(done);
                }
                self.kept.push(done);
            }
            self.ring()?;
            let rest = end.saturating_duration_since(Instant::now());
            if !self.sleep(rest) {
                let what = "a command";
                return Err(Error::Late { what, limit });
            }
        }
    }
}
