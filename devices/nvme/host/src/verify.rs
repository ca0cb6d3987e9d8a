//! Verified load: any commands anywhere, over many queues and namespaces, each completion judged by what may be read.
//!
//! ```text
//!   Traffic --- any command --> Queues --> controller --> namespace
//!      |                                                      ^
//!      `--- begin, end --> Volume: the judge of the namespace-'   may be shared by hosts on several threads
//! ```
//!
//! It panics where the controller is wrong, as a judge of tests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bluff_testing::Chance;
use bluff_testing::checker::{BLOCK, Checker};
use bluff_vfio_client::Event;

use crate::{Bar, Buffer, Command, Done, Error, HostMemory, Pointer, Queues};

/// What buffers hold before something is read into them.
const POISON: u8 = 0xa5;

/// A namespace, as its judge knows it: in blocks of 4 KiB, whatever its own are.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its identifier.
    pub nsid: u32,
    /// Bytes of a block of its own: 512 or 4096.
    pub block: u32,
    /// What may be read. Shared where several controllers have it.
    pub checker: Arc<Mutex<Checker>>,
}

impl Volume {
    /// Of a namespace of `size` bytes that reads as zeroes.
    pub fn new(nsid: u32, block: u32, size: u64) -> Self {
        let checker = Checker::new(size / BLOCK as u64);
        Self {
            nsid,
            block,
            checker: Arc::new(Mutex::new(checker)),
        }
    }

    /// The judge.
    pub fn judge(&self) -> MutexGuard<'_, Checker> {
        self.checker.lock().expect("no judge has found a fault")
    }

    fn per_block(&self) -> u32 {
        BLOCK as u32 / self.block
    }
}

/// What a load does.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Commands in flight for each CQ.
    pub depth: u16,
    /// Data is described by SGLs too.
    pub sgls: bool,
    /// Write Zeroes is used.
    pub write_zeroes: bool,
    /// Commands may fail.
    pub may_fail: bool,
    /// Of the random numbers.
    pub seed: u64,
    /// Makes this load's commands different from those of others that share a [`Volume`]: as far apart as they have queues.
    pub host: u16,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            depth: 16,
            sgls: false,
            write_zeroes: true,
            may_fail: false,
            seed: 1,
            host: 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write { fua: bool },
    WriteZeroes { deallocate: bool },
    Flush,
}

/// A place for a command: its data in several forms.
#[derive(Debug)]
struct Slot {
    data: Vec<(Buffer, Pointer)>,
    /// The volume and the form of the data of the command in flight.
    pending: Option<(usize, usize)>,
}

/// A CQ with its SQs and the places of its commands.
#[derive(Debug)]
struct Lane<B> {
    queues: Queues<B>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// By SQ identifier and command identifier.
    by_cid: HashMap<(u16, u16), u16>,
}

/// A load over several CQs of one controller.
#[derive(Debug)]
pub struct Traffic<B> {
    lanes: Vec<Lane<B>>,
    volumes: Vec<Volume>,
    shape: Shape,
    chance: Chance,
    /// How the last commands ended, if they are watched.
    pub ended: Option<Vec<Done>>,
}

impl Slot {
    fn new(memory: &Arc<HostMemory>, sgls: bool) -> Result<Self, Error> {
        let len = BLOCK as u64;
        let mut data = Vec::new();
        // One page; two that do not adjoin.
        let mut one = Buffer::new(memory, len)?;
        data.push((one.prp()?, one));
        let mut two = Buffer::scattered(memory, 0x204, len)?;
        data.push((two.prp()?, two));
        if sgls {
            let mut inline = Buffer::new(memory, len)?;
            data.push((inline.sgl(len, 2)?, inline));
            let mut pieces = Buffer::scattered(memory, 0x7, len)?;
            data.push((pieces.sgl(1000, 3)?, pieces));
        }
        Ok(Self {
            data: data.into_iter().map(|(p, b)| (b, p)).collect(),
            pending: None,
        })
    }
}

impl<B: Bar> Traffic<B> {
    /// A load on these queues and namespaces; nothing is sent yet.
    ///
    /// # Errors
    /// Where there is no memory for data.
    pub fn new(
        queues: Vec<Queues<B>>,
        volumes: &[Volume],
        memory: &Arc<HostMemory>,
        shape: Shape,
    ) -> Result<Self, Error> {
        let lane = |queues| {
            let slots = (0..shape.depth).map(|_| Slot::new(memory, shape.sgls));
            Ok(Lane {
                queues,
                slots: slots.collect::<Result<_, Error>>()?,
                free: (0..shape.depth).rev().collect(),
                by_cid: HashMap::new(),
            })
        };
        Ok(Self {
            lanes: queues.into_iter().map(lane).collect::<Result<_, Error>>()?,
            volumes: volumes.to_vec(),
            chance: Chance::new(shape.seed),
            shape,
            ended: None,
        })
    }

    /// The queues; everything must have come back.
    pub fn into_queues(self) -> Vec<Queues<B>> {
        assert_eq!(self.in_flight(), 0, "data is in use");
        self.lanes.into_iter().map(|l| l.queues).collect()
    }

    /// The queues of one CQ.
    pub fn queues(&self, lane: usize) -> &Queues<B> {
        &self.lanes[lane].queues
    }

    /// The namespaces.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// Lets commands fail from now on, or not.
    pub fn set_may_fail(&mut self, may: bool) {
        self.shape.may_fail = may;
    }

    /// How many commands are in flight.
    pub fn in_flight(&self) -> usize {
        self.lanes.iter().map(|l| l.by_cid.len()).sum()
    }

    fn token(&self, lane: usize, slot: u16) -> (u16, u16) {
        (self.shape.host + lane as u16, slot)
    }

    /// Keeps `depth` commands in flight for each CQ, or as many as there is room for.
    ///
    /// # Errors
    /// What the transport says.
    pub fn fill(&mut self, depth: u16) -> Result<(), Error> {
        for lane in 0..self.lanes.len() {
            while self.lanes[lane].by_cid.len() < usize::from(depth) {
                let (volume, block, kind) = self.any();
                if !self.send(lane, volume, block, kind)? {
                    break;
                }
            }
            self.lanes[lane].queues.ring()?;
        }
        Ok(())
    }

    fn any(&mut self) -> (usize, u64, Kind) {
        let volume = self.chance.below(self.volumes.len() as u64) as usize;
        let blocks = self.volumes[volume].judge().blocks();
        // A part of them goes where others go, so that they meet.
        let span = if self.chance.percent(25) {
            blocks.min(16)
        } else {
            blocks
        };
        let block = self.chance.below(span);
        let kind = match self.chance.below(100) {
            0..5 => Kind::Flush,
            5..10 if self.shape.write_zeroes => Kind::WriteZeroes {
                deallocate: self.chance.percent(50),
            },
            10..55 => Kind::Read,
            _ => Kind::Write {
                fua: self.chance.percent(10),
            },
        };
        (volume, block, kind)
    }

    /// Adds a command; whether there was room.
    fn send(&mut self, lane: usize, volume: usize, block: u64, kind: Kind) -> Result<bool, Error> {
        let sqs = self.lanes[lane].queues.sqs.len();
        let sq = self.chance.below(sqs as u64) as usize;
        if self.lanes[lane].queues.sqs[sq].room() == 0 {
            return Ok(false);
        }
        let Some(slot) = self.lanes[lane].free.pop() else {
            return Ok(false);
        };
        let token = self.token(lane, slot);
        let Lane {
            queues,
            slots,
            by_cid,
            ..
        } = &mut self.lanes[lane];
        let place = &mut slots[usize::from(slot)];
        let form = self.chance.below(place.data.len() as u64) as usize;
        let (buffer, pointer) = &place.data[form];
        let of = &self.volumes[volume];
        let (slba, blocks) = (block * u64::from(of.per_block()), of.per_block());
        let mut judge = of.judge();
        let command = match kind {
            Kind::Read => {
                buffer.fill(POISON);
                judge.begin_read(token, block);
                Command::read(of.nsid, slba, blocks).data(*pointer)
            }
            Kind::Write { fua } => {
                buffer.write(&judge.begin_write(token, block));
                let command = Command::write(of.nsid, slba, blocks).data(*pointer);
                if fua { command.fua() } else { command }
            }
            Kind::WriteZeroes { deallocate } => {
                judge.begin_zeroes(token, block);
                Command::write_zeroes(of.nsid, slba, blocks, deallocate)
            }
            Kind::Flush => {
                judge.begin_flush(token);
                Command::flush(of.nsid)
            }
        };
        drop(judge);
        place.pending = Some((volume, form));
        let cid = queues.submit(sq, &command)?;
        by_cid.insert((queues.sqs[sq].id(), cid), slot);
        Ok(true)
    }

    /// Takes what came back; how much that was.
    ///
    /// # Errors
    /// A command that failed and may not; a controller that breaks the rules of queues.
    ///
    /// # Panics
    /// Where something is read that cannot be there.
    pub fn take(&mut self) -> Result<u64, Error> {
        let mut taken = 0;
        for lane in 0..self.lanes.len() {
            while let Some(done) = self.lanes[lane].queues.poll()? {
                self.end(lane, done)?;
                taken += 1;
            }
            self.lanes[lane].queues.ring()?;
        }
        Ok(taken)
    }

    fn end(&mut self, lane: usize, done: Done) -> Result<(), Error> {
        let key = (done.completion.sq, done.completion.cid);
        let of = &mut self.lanes[lane];
        let slot = of.by_cid.remove(&key).expect("the queue has tracked it");
        of.free.push(slot);
        let pending = of.slots[usize::from(slot)].pending.take();
        let (volume, form) = pending.expect("a slot in flight");
        let token = self.token(lane, slot);
        let ok = done.completion.status.is_ok();
        let buffer = &self.lanes[lane].slots[usize::from(slot)].data[form].0;
        self.volumes[volume]
            .judge()
            .end(token, ok, || buffer.read());
        if let Some(ended) = &mut self.ended {
            ended.push(done);
        }
        if !self.shape.may_fail {
            done.ok()?;
        }
        Ok(())
    }

    /// Takes at least one command that came back.
    ///
    /// # Errors
    /// [`Error::Late`] where none does within `limit`; as [`Traffic::take`].
    pub fn take_some(&mut self, limit: Duration) -> Result<u64, Error> {
        let end = Instant::now() + limit;
        loop {
            let taken = self.take()?;
            if taken > 0 {
                return Ok(taken);
            }
            if !self.wait(end.saturating_duration_since(Instant::now())) {
                let what = "every command, or its interrupt,";
                return Err(Error::Late { what, limit });
            }
        }
    }

    /// Sleeps until an interrupt comes, and nothing else; whether one did within `limit`. Where a CQ is polled it only lets
    /// others run, for as long as there is time.
    pub fn wait(&self, limit: Duration) -> bool {
        let events = self.lanes.iter().map(|l| l.queues.cq.event());
        let Some(events) = events.collect::<Option<Vec<_>>>() else {
            std::thread::yield_now();
            return !limit.is_zero();
        };
        let events: Vec<_> = events.into_iter().map(|e| &**e).collect();
        let came = Event::wait_any(&events, limit);
        // Taken before the rings are looked at, so nothing is slept through.
        for event in &events {
            event.take();
        }
        came
    }

    /// Runs until so many commands have come back.
    ///
    /// # Errors
    /// As [`Traffic::take_some`].
    pub fn run(&mut self, commands: u64, depth: u16, limit: Duration) -> Result<(), Error> {
        let mut done = 0;
        while done < commands {
            self.fill(depth)?;
            done += self.take_some(limit)?;
        }
        Ok(())
    }

    /// Waits until everything has come back.
    ///
    /// # Errors
    /// As [`Traffic::take_some`].
    pub fn settle(&mut self, limit: Duration) -> Result<(), Error> {
        while self.in_flight() > 0 {
            self.take_some(limit)?;
        }
        Ok(())
    }

    /// Waits until everything has come back, and reads every block.
    ///
    /// # Errors
    /// As [`Traffic::take_some`].
    pub fn verify(&mut self, limit: Duration) -> Result<(), Error> {
        self.settle(limit)?;
        for volume in 0..self.volumes.len() {
            let blocks = self.volumes[volume].judge().blocks();
            for block in 0..blocks {
                let lane = (block % self.lanes.len() as u64) as usize;
                while !self.send(lane, volume, block, Kind::Read)? {
                    self.lanes[lane].queues.ring()?;
                    self.take_some(limit)?;
                }
            }
        }
        for lane in &mut self.lanes {
            lane.queues.ring()?;
        }
        self.settle(limit)
    }

    /// All that is in flight has ended, and nobody knows how: the controller was reset. The queues are gone with it.
    pub fn abandon(mut self) {
        for lane in 0..self.lanes.len() {
            for (_, slot) in std::mem::take(&mut self.lanes[lane].by_cid) {
                let (volume, _) = self.lanes[lane].slots[usize::from(slot)]
                    .pending
                    .take()
                    .expect("a slot in flight");
                let token = self.token(lane, slot);
                self.volumes[volume].judge().abandon_one(token);
            }
        }
    }
}
