//! Virtio-blk requests on a driver's queue (virtio 1.3 §5.2.6): one by one for tests, or as an endless polled load.
//!
//! Each slot has a cache line for what is not data, so that a request costs one line in each direction and no two
//! requests share one:
//!
//! ```text
//!   0  type, reserved, sector     written by the driver for every request
//!   16 status                     0xff before the request, written by the device
//!   32 sector, count, flags       DISCARD and WRITE_ZEROES
//! ```

use std::sync::Arc;

use crate::memory::{Memory, MemoryError, Span};
use crate::queue::{Buffer, DriverQueue, Error, Fixed};

/// Bytes of a sector, whatever the block size of the device (§5.2.4).
const SECTOR: u32 = 512;
const LINE: u64 = 64;
const HEADER: u64 = 0;
const HEADER_LEN: u32 = 16;
const STATUS: u64 = 16;
const RANGE: u64 = 32;
const RANGE_LEN: u32 = 16;
const ID_LEN: u32 = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const WRITE_ZEROES_F_UNMAP: u32 = 1;

/// No device writes this status: found after completion, it was never written.
const STATUS_UNWRITTEN: u8 = 0xff;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read `request_len` bytes at a sector into the slot's data buffer.
    In {
        /// First sector.
        sector: u64,
    },
    /// Write the slot's data buffer.
    Out {
        /// First sector.
        sector: u64,
    },
    /// Make earlier writes durable.
    Flush,
    /// The device's 20-byte id, into the slot's data buffer.
    GetId,
    /// Sectors are no longer of use.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
    },
    /// Sectors shall read as zeroes.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// Whether the device may deallocate them.
        unmap: bool,
    },
}

/// Status byte of a request (§5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok,
    /// VIRTIO_BLK_S_IOERR
    IoErr,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported,
}

/// A request that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Its slot; free again, its data unchanged until the next submission.
    pub slot: u16,
    /// What was asked.
    pub request: Request,
    /// What the device answered.
    pub status: Status,
    /// The used length: bytes that the device says it wrote, status included.
    pub written: u32,
}

/// Where the load's requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, around the capacity.
    Sequential,
    /// Anywhere, aligned to the request length.
    Random,
}

/// How to generate requests.
#[derive(Debug, Clone, Copy)]
pub struct BlkConfig {
    /// Requests in flight at most.
    pub depth: u16,
    /// Data bytes of an IN or OUT; a multiple of 512.
    pub request_len: u32,
    /// Descriptors that the data is spread over; sizes are multiples of 512 but for nothing to spare.
    pub segments: u16,
    /// Device capacity in sectors.
    pub capacity: u64,
    /// Where the load goes.
    pub pattern: Pattern,
    /// Share of IN in the load; 0 and 100 use fixed chains, all else writes each chain anew.
    pub read_percent: u8,
    /// Each request as one indirect descriptor.
    pub indirect: bool,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for BlkConfig {
    /// Random 4 KiB reads of 1 GiB, one at a time.
    fn default() -> Self {
        Self {
            depth: 1,
            request_len: 4096,
            segments: 1,
            capacity: 1 << 21,
            pattern: Pattern::Random,
            read_percent: 100,
            indirect: false,
            seed: 1,
        }
    }
}

/// Why a request could not be made, or what came back wrong.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The queue refused, or the device broke it.
    #[error("virtqueue")]
    Queue(#[from] Error),
    /// No room for headers and data.
    #[error("no memory for requests")]
    Memory(#[from] MemoryError),
    /// Depth, length, segments or capacity make no sense together, or do not fit the queue.
    #[error("bad block load")]
    BadConfig,
    /// All slots are in flight.
    #[error("all requests are in flight")]
    Busy,
    /// A used chain whose token is no request in flight.
    #[error("completion of slot {0}, which is free")]
    Stray(u64),
    /// The status byte is not one that the specification knows; 0xff: it was not written.
    #[error("status {status:#04x} of {request:?}")]
    BadStatus {
        /// The byte.
        status: u8,
        /// What was asked.
        request: Request,
    },
    /// A request of the load failed.
    #[error("{request:?} ended with {status:?}")]
    Failed {
        /// What was asked.
        request: Request,
        /// What the device answered.
        status: Status,
    },
}

/// What a [`Blk::step`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Requests that came back.
    pub completed: u32,
    /// Requests published.
    pub submitted: u32,
    /// Whether the device must be notified.
    pub kick: bool,
}

/// A virtio-blk request generator.
#[derive(Debug)]
pub struct Blk<Q> {
    queue: Q,
    config: BlkConfig,
    lines: Span,
    lines_addr: u64,
    data_addr: u64,
    /// By slot: the request in flight.
    requests: Box<[Option<Request>]>,
    free: Vec<u16>,
    /// By slot, once a load of one direction runs.
    fixed: Vec<Fixed>,
    /// The chain being built.
    chain: Vec<Buffer>,
    /// Requests of `request_len` that fit the capacity.
    blocks: u64,
    next_block: u64,
    random: u64,
}

impl<Q: DriverQueue> Blk<Q> {
    /// Allocates headers and data of all slots. Data is left as it is.
    pub fn new(memory: &Arc<Memory>, queue: Q, config: BlkConfig) -> Result<Self, BlkError> {
        let sectors = config.request_len / SECTOR;
        let chain = config.segments.saturating_add(2);
        let ring = u32::from(config.depth) * if config.indirect { 1 } else { u32::from(chain) };
        let sound = config.depth != 0
            && config.segments != 0
            && sectors != 0
            && config.request_len.is_multiple_of(SECTOR)
            && sectors >= u32::from(config.segments)
            && config.read_percent <= 100
            && config.capacity >= u64::from(sectors)
            && ring <= u32::from(queue.size());
        if !sound {
            return Err(BlkError::BadConfig);
        }
        let lines_len = u64::from(config.depth) * LINE;
        let lines_addr = memory.alloc(lines_len, 128)?;
        let data_addr = memory.alloc(
            u64::from(config.depth) * u64::from(config.request_len),
            4096,
        )?;
        Ok(Self {
            queue,
            lines: memory.span(lines_addr, lines_len)?,
            lines_addr,
            data_addr,
            requests: vec![None; usize::from(config.depth)].into(),
            free: (0..config.depth).rev().collect(),
            fixed: Vec::new(),
            chain: Vec::with_capacity(usize::from(chain)),
            blocks: config.capacity / u64::from(sectors),
            next_block: 0,
            random: config.seed,
            config,
        })
    }

    /// The queue: its positions, interrupts, restart. Chains added or popped behind the generator's back confuse it.
    pub fn queue(&mut self) -> &mut Q {
        &mut self.queue
    }

    /// Guest address of a slot's data buffer, `request_len` bytes.
    pub fn data_addr(&self, slot: u16) -> u64 {
        self.data_addr + u64::from(slot) * u64::from(self.config.request_len)
    }

    /// Slot that the next [`Blk::submit`] takes, to fill its data buffer before.
    pub fn next_slot(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u16 {
        self.config.depth - self.free.len() as u16
    }

    /// Adds a request; [`Blk::publish`] makes it visible. Returns its slot.
    pub fn submit(&mut self, request: Request) -> Result<u16, BlkError> {
        let slot = self.next_slot().ok_or(BlkError::Busy)?;
        self.write_request(slot, request);
        self.build_chain(slot, request);
        self.queue
            .add(&self.chain, self.config.indirect, u64::from(slot))?;
        self.requests[usize::from(slot)] = Some(request);
        self.free.pop();
        Ok(slot)
    }

    /// Publishes what was submitted. Returns whether the device must be notified.
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// Takes the next request that came back, whatever its status.
    pub fn poll(&mut self) -> Result<Option<Completion>, BlkError> {
        let Some(used) = self.queue.pop_used()? else {
            return Ok(None);
        };
        let (slot, request, status) = self.complete(used.token)?;
        self.requests[usize::from(slot)] = None;
        self.free.push(slot);
        Ok(Some(Completion {
            slot,
            request,
            status,
            written: used.written,
        }))
    }

    /// One turn of the load: takes all that came back, checks each status, sends as many again, publishes once. The first
    /// turns fill the queue up to the depth. A load of one direction sets descriptors aside for all slots, for good.
    #[inline]
    pub fn step(&mut self) -> Result<Step, BlkError> {
        let mut step = Step::default();
        while let Some(used) = self.queue.pop_used()? {
            let slot = self.complete_ok(used.token)?;
            self.send(slot)?;
            step.completed += 1;
        }
        step.submitted = step.completed;
        if !self.free.is_empty() {
            step.submitted += self.fill()?;
        }
        step.kick = self.queue.publish();
        Ok(step)
    }

    /// Takes all that came back and sends nothing: what ends a load, called until [`Blk::in_flight`] is 0.
    pub fn drain(&mut self) -> Result<u32, BlkError> {
        let mut completed = 0;
        while let Some(used) = self.queue.pop_used()? {
            let slot = self.complete_ok(used.token)?;
            self.requests[usize::from(slot)] = None;
            self.free.push(slot);
            completed += 1;
        }
        Ok(completed)
    }

    /// Forgets all requests and restarts the queue, after a reset. Returns how many were in flight.
    pub fn restart(&mut self) -> u16 {
        self.requests.fill(None);
        self.free.clear();
        self.free.extend((0..self.config.depth).rev());
        self.queue.restart()
    }

    #[cold]
    fn fill(&mut self) -> Result<u32, BlkError> {
        let one_direction = matches!(self.config.read_percent, 0 | 100);
        if one_direction && self.fixed.is_empty() {
            for slot in 0..self.config.depth {
                let sector = 0;
                let reads = self.config.read_percent == 100;
                self.build_chain(
                    slot,
                    if reads {
                        Request::In { sector }
                    } else {
                        Request::Out { sector }
                    },
                );
                self.fixed.push(self.queue.fix(
                    &self.chain,
                    self.config.indirect,
                    u64::from(slot),
                )?);
            }
        }
        let mut sent = 0;
        while let Some(slot) = self.next_slot() {
            self.send(slot)?;
            self.free.pop();
            sent += 1;
        }
        Ok(sent)
    }

    /// Sends the load's next request in a slot.
    #[inline]
    fn send(&mut self, slot: u16) -> Result<(), BlkError> {
        let request = self.generate();
        self.write_request(slot, request);
        self.requests[usize::from(slot)] = Some(request);
        match self.fixed.get(usize::from(slot)) {
            Some(fixed) => self.queue.resubmit(*fixed)?,
            None => {
                self.build_chain(slot, request);
                self.queue
                    .add(&self.chain, self.config.indirect, u64::from(slot))?;
            }
        }
        Ok(())
    }

    #[inline]
    fn generate(&mut self) -> Request {
        let block = match self.config.pattern {
            Pattern::Sequential => {
                let block = self.next_block;
                self.next_block = if block + 1 == self.blocks {
                    0
                } else {
                    block + 1
                };
                block
            }
            Pattern::Random => below(self.next_random(), self.blocks),
        };
        let sector = block * u64::from(self.config.request_len / SECTOR);
        let reads = match self.config.read_percent {
            100 => true,
            0 => false,
            percent => below(self.next_random(), 100) < u64::from(percent),
        };
        if reads {
            Request::In { sector }
        } else {
            Request::Out { sector }
        }
    }

    /// splitmix64: a sequence of 2^64 with good high bits, in a few instructions.
    #[inline]
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Writes the header, what goes with it, and a status that no device writes.
    #[inline]
    fn write_request(&mut self, slot: u16, request: Request) {
        let line = usize::from(slot) * LINE as usize;
        let (kind, sector) = match request {
            Request::In { sector } => (T_IN, sector),
            Request::Out { sector } => (T_OUT, sector),
            // The sector of all others is reserved (§5.2.6).
            Request::Flush => (T_FLUSH, 0),
            Request::GetId => (T_GET_ID, 0),
            Request::Discard { sector, sectors } => {
                self.write_range(line, sector, sectors, 0);
                (T_DISCARD, 0)
            }
            Request::WriteZeroes {
                sector,
                sectors,
                unmap,
            } => {
                self.write_range(
                    line,
                    sector,
                    sectors,
                    if unmap { WRITE_ZEROES_F_UNMAP } else { 0 },
                );
                (T_WRITE_ZEROES, 0)
            }
        };
        // Plain writes, all of them: the queue's publication releases them.
        self.lines
            .write_u64(line + HEADER as usize, u64::from(kind));
        self.lines.write_u64(line + HEADER as usize + 8, sector);
        self.lines
            .write_u8(line + STATUS as usize, STATUS_UNWRITTEN);
    }

    fn write_range(&mut self, line: usize, sector: u64, sectors: u32, flags: u32) {
        self.lines.write_u64(line + RANGE as usize, sector);
        self.lines.write_u32(line + RANGE as usize + 8, sectors);
        self.lines.write_u32(line + RANGE as usize + 12, flags);
    }

    fn build_chain(&mut self, slot: u16, request: Request) {
        let line = self.lines_addr + u64::from(slot) * LINE;
        let data = self.data_addr(slot);
        self.chain.clear();
        self.chain.push(Buffer::readable(line + HEADER, HEADER_LEN));
        match request {
            Request::In { .. } | Request::Out { .. } => {
                let device_writable = matches!(request, Request::In { .. });
                let segments = u32::from(self.config.segments);
                // Whole sectors each; the last one takes the rest.
                let each = self.config.request_len / SECTOR / segments * SECTOR;
                for i in 0..segments {
                    let len = if i + 1 == segments {
                        self.config.request_len - each * i
                    } else {
                        each
                    };
                    self.chain.push(Buffer {
                        addr: data + u64::from(each * i),
                        len,
                        device_writable,
                    });
                }
            }
            Request::Flush => {}
            Request::GetId => self.chain.push(Buffer::writable(data, ID_LEN)),
            Request::Discard { .. } | Request::WriteZeroes { .. } => {
                self.chain.push(Buffer::readable(line + RANGE, RANGE_LEN));
            }
        }
        self.chain.push(Buffer::writable(line + STATUS, 1));
    }

    /// The slot, request and status behind a token.
    #[inline]
    fn complete(&self, token: u64) -> Result<(u16, Request, Status), BlkError> {
        let request = self
            .requests
            .get(token as usize)
            .copied()
            .flatten()
            .ok_or(BlkError::Stray(token))?;
        // Plain read: `pop_used` acquired what the device released.
        let status = match self
            .lines
            .read_u8(token as usize * LINE as usize + STATUS as usize)
        {
            0 => Status::Ok,
            1 => Status::IoErr,
            2 => Status::Unsupported,
            status => return Err(BlkError::BadStatus { status, request }),
        };
        Ok((token as u16, request, status))
    }

    #[inline]
    fn complete_ok(&self, token: u64) -> Result<u16, BlkError> {
        match self.complete(token)? {
            (slot, _, Status::Ok) => Ok(slot),
            (_, request, status) => Err(BlkError::Failed { request, status }),
        }
    }
}

/// Maps a random number to 0..n, by the high half of the product: no division.
#[inline]
fn below(random: u64, n: u64) -> u64 {
    ((u128::from(random) * u128::from(n)) >> 64) as u64
}
