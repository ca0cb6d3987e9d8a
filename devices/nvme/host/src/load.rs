//! An endless polled load: reads or writes of one length, as many in flight as is asked for, no allocation for any of them.

use crate::spec::io;
use crate::{Bar, Buffer, Command, Error, Queues};

/// Where the requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, around the end.
    Sequential,
    /// Anywhere, aligned to the length.
    Random,
}

/// What a load does.
#[derive(Debug, Clone, Copy)]
pub struct LoadConfig {
    /// The namespace.
    pub nsid: u32,
    /// Its blocks.
    pub capacity: u64,
    /// Bytes of one block.
    pub block: u32,
    /// Bytes of a request, whole blocks.
    pub len: u32,
    /// Requests in flight, spread evenly over the SQs.
    pub depth: u16,
    /// Where they go.
    pub pattern: Pattern,
    /// Write in place of Read.
    pub write: bool,
    /// Of the random numbers.
    pub seed: u64,
}

/// What a [`Load::step`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Requests that came back.
    pub completed: u32,
    /// Requests that were sent.
    pub submitted: u32,
}

/// A generator of reads or writes on queues of its own.
#[derive(Debug)]
pub struct Load<B> {
    queues: Queues<B>,
    /// By slot: the command but for its place and identifier, and the SQ that it goes to.
    slots: Vec<(Command, usize)>,
    /// By SQ and command identifier: the slot.
    by_cid: Vec<Vec<u16>>,
    idle: Vec<u16>,
    /// Requests that fit the namespace.
    places: u64,
    blocks: u64,
    pattern: Pattern,
    next: u64,
    random: u64,
    // The commands point there.
    _buffers: Vec<Buffer>,
}

impl<B: Bar> Load<B> {
    /// Prepares a command and data for each request in flight. The queues must be idle.
    ///
    /// # Errors
    /// [`Error::Request`] where the shape makes no sense or does not fit the queues; where there is no memory.
    pub fn new(
        queues: Queues<B>,
        memory: &std::sync::Arc<crate::HostMemory>,
        config: LoadConfig,
    ) -> Result<Self, Error> {
        let count = queues.sqs.len();
        let blocks = u64::from(config.len / config.block.max(1));
        let each = usize::from(config.depth).div_ceil(count.max(1)) as u32;
        let sound = config.depth > 0
            && blocks > 0
            && blocks <= 1 << 16
            && config.len.is_multiple_of(config.block)
            && config.capacity >= blocks
            && queues.in_flight() == 0
            && queues.sqs.iter().all(|sq| each < sq.entries())
            && u32::from(config.depth) < queues.cq.entries();
        if !sound {
            return Err(Error::Request("the load makes no sense, or does not fit"));
        }
        let opcode = if config.write { io::WRITE } else { io::READ };
        let (mut slots, mut buffers) = (Vec::new(), Vec::new());
        for slot in 0..usize::from(config.depth) {
            let mut buffer = Buffer::new(memory, u64::from(config.len))?;
            let command = Command::blocks(opcode, config.nsid, 0, blocks as u32);
            slots.push((command.data(buffer.prp()?), slot % count));
            buffers.push(buffer);
        }
        let cids = |sq: &crate::Sq| vec![0; sq.entries() as usize];
        Ok(Self {
            by_cid: queues.sqs.iter().map(cids).collect(),
            queues,
            slots,
            idle: (0..config.depth).rev().collect(),
            places: config.capacity / blocks,
            blocks,
            pattern: config.pattern,
            next: 0,
            random: config.seed,
            _buffers: buffers,
        })
    }

    /// The queues.
    pub fn queues(&mut self) -> &mut Queues<B> {
        &mut self.queues
    }

    /// The queues, without the load; nothing must be in flight.
    pub fn into_queues(self) -> Queues<B> {
        assert_eq!(self.queues.in_flight(), 0, "data is in use");
        self.queues
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.idle.len()
    }

    /// One turn: takes all that came back, checks each status, sends as many again, rings each doorbell once.
    ///
    /// # Errors
    /// [`Error::Failed`] for a request that failed; what is wrong with the queues.
    #[inline]
    pub fn step(&mut self) -> Result<Step, Error> {
        let mut step = Step {
            completed: self.take()?,
            submitted: 0,
        };
        while let Some(slot) = self.idle.pop() {
            self.send(slot)?;
            step.submitted += 1;
        }
        self.queues.ring()?;
        Ok(step)
    }

    /// Takes all that came back and sends nothing: what ends a load, called until [`Load::in_flight`] is 0.
    ///
    /// # Errors
    /// As [`Load::step`].
    pub fn drain(&mut self) -> Result<u32, Error> {
        let taken = self.take()?;
        self.queues.ring()?;
        Ok(taken)
    }

    #[inline(always)]
    fn take(&mut self) -> Result<u32, Error> {
        let mut taken = 0;
        while let Some((sq, done)) = self.queues.poll_indexed()? {
            let cid = done.ok()?.cid;
            self.idle.push(self.by_cid[sq][usize::from(cid)]);
            taken += 1;
        }
        Ok(taken)
    }

    #[inline(always)]
    fn send(&mut self, slot: u16) -> Result<(), Error> {
        let slba = self.place() * self.blocks;
        let (command, sq) = &mut self.slots[usize::from(slot)];
        command.0[10] = slba as u32;
        command.0[11] = (slba >> 32) as u32;
        let cid = self.queues.submit(*sq, command)?;
        self.by_cid[*sq][usize::from(cid)] = slot;
        Ok(())
    }

    #[inline(always)]
    fn place(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let place = self.next;
                self.next = if place + 1 == self.places {
                    0
                } else {
                    place + 1
                };
                place
            }
            Pattern::Random => {
                // Knuth's generator for 64 bits; its upper bits are the good ones, and a multiplication scales them.
                self.random = self
                    .random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                ((u128::from(self.random) * u128::from(self.places)) >> 64) as u64
            }
        }
    }
}
