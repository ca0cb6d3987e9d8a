//! A controller from its registers up: enabling, resets, shutdown (Base 2.1 §3.1.4, §3.5 to §3.7), its admin queue, and the I/O queues that
//! are created and deleted with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bluff_vfio_client::Event;

use crate::queue::{Bell, Shadow};
use crate::spec::register as reg;
use crate::{Bar, Command, Completion, Cq, Done, Error, HostMemory, Pages, Queues, Sq};

/// CAP (§3.1.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    const fn field(self, at: u32, bits: u32) -> u64 {
        self.0 >> at & ((1 << bits) - 1)
    }

    /// Entries of an I/O queue at most.
    pub const fn max_entries(self) -> u32 {
        self.field(0, 16) as u32 + 1
    }

    /// Queues have to be contiguous.
    pub const fn contiguous(self) -> bool {
        self.field(16, 1) != 0
    }

    /// How long CSTS.RDY may take.
    pub const fn timeout(self) -> Duration {
        Duration::from_millis(500 * self.field(24, 8))
    }

    /// Bytes from one doorbell to the next.
    pub const fn stride(self) -> u64 {
        4 << self.field(32, 4)
    }

    /// There is a subsystem reset.
    pub const fn subsystem_reset(self) -> bool {
        self.field(36, 1) != 0
    }

    /// Command sets, one bit for each; bit 0 is NVM.
    pub const fn command_sets(self) -> u64 {
        self.field(37, 8)
    }

    /// Bytes of the smallest page.
    pub const fn min_page(self) -> u64 {
        4096 << self.field(48, 4)
    }

    /// Bytes of the largest page.
    pub const fn max_page(self) -> u64 {
        4096 << self.field(52, 4)
    }
}

/// What a controller is enabled with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Entries of the admin submission queue: 2 to 4096.
    pub admin_sq: u32,
    /// Entries of the admin completion queue: 2 to 4096.
    pub admin_cq: u32,
    /// What vector 0 signals; none: the admin queue is polled.
    pub event: Option<Arc<Event>>,
    /// Bits that are set in CC besides those that are needed.
    pub cc: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            admin_sq: 32,
            admin_cq: 32,
            event: None,
            cc: 0,
        }
    }
}

/// A controller, and its admin queue while it is enabled.
#[derive(Debug)]
pub struct Controller<B> {
    bar: Arc<B>,
    memory: Arc<HostMemory>,
    capabilities: Capabilities,
    /// For commands and changes of state; CAP.TO comes on top of it for the latter.
    limit: Duration,
    pub(crate) admin: Option<Queues<B>>,
    /// Kept while the controller may write there, with the pages that back it.
    shadow: Option<(Shadow, Pages, Pages)>,
    /// Asynchronous event requests in flight.
    pub(crate) requests: Vec<u16>,
    /// Those that came back while others were waited for.
    pub(crate) events: Vec<u32>,
}

impl<B: Bar> Controller<B> {
    /// Reads what it can do. Nothing is changed.
    ///
    /// # Errors
    /// Where it has not what a host needs: the NVM command set, pages of the memory's size.
    pub fn new(bar: B, memory: &Arc<HostMemory>) -> Result<Self, Error> {
        let capabilities = Capabilities(bar.read64(reg::CAP)?);
        if capabilities.command_sets() & 1 == 0 {
            return Err(Error::Lacks("do the NVM command set"));
        }
        let pages = capabilities.min_page()..=capabilities.max_page();
        if !pages.contains(&memory.page()) {
            return Err(Error::Lacks("use pages of the memory's size"));
        }
        Ok(Self {
            bar: Arc::new(bar),
            memory: memory.clone(),
            capabilities,
            limit: Duration::from_secs(10),
            admin: None,
            shadow: None,
            requests: Vec::new(),
            events: Vec::new(),
        })
    }

    /// The registers.
    pub fn bar(&self) -> &Arc<B> {
        &self.bar
    }

    /// The memory that queues and lists are taken from.
    pub fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// CAP.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// How long a command may take: 10 s unless it is set.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Sets how long a command may take.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// CSTS.
    ///
    /// # Errors
    /// What the transport says.
    pub fn status(&self) -> Result<u32, Error> {
        Ok(self.bar.read32(reg::CSTS)?)
    }

    /// VS: major, minor, tertiary.
    ///
    /// # Errors
    /// What the transport says.
    pub fn version(&self) -> Result<(u16, u8, u8), Error> {
        let vs = self.bar.read32(reg::VS)?;
        Ok(((vs >> 16) as u16, (vs >> 8) as u8, vs as u8))
    }

    /// Waits until bits of CSTS are as wanted, for CAP.TO and the limit.
    ///
    /// # Errors
    /// [`Error::Late`]; [`Error::Fatal`] where CFS comes up and is not waited for.
    pub fn wait_status(&self, mask: u32, want: u32, what: &'static str) -> Result<(), Error> {
        let limit = self.capabilities.timeout() + self.limit;
        let end = Instant::now() + limit;
        loop {
            let status = self.status()?;
            if status & mask == want {
                return Ok(());
            }
            if status & reg::CFS & !mask != 0 && want != 0 {
                return Err(Error::Fatal);
            }
            if Instant::now() > end {
                return Err(Error::Late { what, limit });
            }
            std::thread::yield_now();
        }
    }

    /// Enables it, from disabled (§3.5.1): with new admin queues, in zeroed memory.
    ///
    /// # Errors
    /// Where it does not become ready.
    pub fn enable(&mut self, setup: &Setup) -> Result<(), Error> {
        let (sq, cq) = self.admin_queues(setup)?;
        let at = |pages: &Pages| pages.address();
        self.bar
            .write32(reg::AQA, (setup.admin_sq - 1) | (setup.admin_cq - 1) << 16)?;
        self.bar.write64(reg::ASQ, at(&sq))?;
        self.bar.write64(reg::ACQ, at(&cq))?;
        let (sq_bell, cq_bell) = (self.bell(0, 0), self.bell(0, 1));
        let cq = Cq::new(0, setup.admin_cq, cq, cq_bell, setup.event.clone());
        let sq = Sq::new(0, 0, setup.admin_sq, sq, sq_bell);
        // Kept before the controller is told of it: its memory must not be another's while it may write there.
        self.admin = Some(Queues::new(&self.bar, cq, vec![sq]));
        let page = self.memory.page().ilog2() - 12;
        let cc = setup.cc | reg::CC_ENTRIES | page << 7 | reg::CC_EN;
        self.bar.write32(reg::CC, cc)?;
        self.wait_status(reg::RDY, reg::RDY, "CSTS.RDY after CC.EN")
    }

    fn admin_queues(&self, setup: &Setup) -> Result<(Pages, Pages), Error> {
        let sizes = 2..=4096;
        if !sizes.contains(&setup.admin_sq) || !sizes.contains(&setup.admin_cq) {
            return Err(Error::Request("an admin queue has 2 to 4096 entries"));
        }
        let sq = self.memory.alloc(u64::from(setup.admin_sq) * 64)?;
        let cq = self.memory.alloc(u64::from(setup.admin_cq) * 16)?;
        Ok((sq, cq))
    }

    /// Resets it by CC.EN = 0, whatever is in flight (§3.7.2). The admin queue and everything that was set up is gone; I/O queues
    /// are to be dropped.
    ///
    /// # Errors
    /// Where CSTS.RDY does not go.
    pub fn disable(&mut self) -> Result<(), Error> {
        self.begin_disable()?;
        self.end_disable()
    }

    /// Writes CC.EN = 0 and does not wait.
    ///
    /// # Errors
    /// What the transport says.
    pub fn begin_disable(&mut self) -> Result<(), Error> {
        let cc = self.bar.read32(reg::CC)?;
        Ok(self.bar.write32(reg::CC, cc & !reg::CC_EN)?)
    }

    /// Waits until CSTS.RDY is gone.
    ///
    /// # Errors
    /// Where it does not go.
    pub fn end_disable(&mut self) -> Result<(), Error> {
        self.wait_status(reg::RDY, 0, "CSTS.RDY to go")?;
        self.forget();
        Ok(())
    }

    /// Forgets what a reset has ended; for resets that happen outside of the controller's registers, when they are over.
    pub fn forget(&mut self) {
        self.admin = None;
        self.shadow = None;
        self.requests.clear();
        self.events.clear();
    }

    /// Shuts it down, and waits until that is complete (§3.6.1). I/O queues should have been deleted before a normal one.
    ///
    /// # Errors
    /// Where it does not complete.
    pub fn shut_down(&mut self, abrupt: bool) -> Result<(), Error> {
        let shn = if abrupt {
            reg::CC_SHN_ABRUPT
        } else {
            reg::CC_SHN_NORMAL
        };
        let cc = self.bar.read32(reg::CC)? & !reg::CC_SHN;
        self.bar.write32(reg::CC, cc | shn)?;
        self.wait_status(reg::SHST, reg::SHST_COMPLETE, "CSTS.SHST to be complete")
    }

    /// Resets the subsystem (§3.7.1), and waits until the controller is no longer ready.
    ///
    /// # Errors
    /// [`Error::Lacks`]; where CSTS.RDY does not go.
    pub fn subsystem_reset(&mut self) -> Result<(), Error> {
        if !self.capabilities.subsystem_reset() {
            return Err(Error::Lacks("reset its subsystem"));
        }
        self.bar.write32(reg::NSSR, reg::NSSR_RESET)?;
        self.end_disable()
    }

    pub(crate) fn bell(&self, id: u16, completion: u64) -> Bell {
        let index = 2 * u64::from(id) + completion;
        let offset = index * self.capabilities.stride();
        // §5.2.5: the buffers are laid out as the doorbells are; those of the admin queue are not used.
        let shadow = self.shadow.as_ref().filter(|_| id != 0);
        Bell {
            register: reg::DOORBELLS + offset,
            offset: offset as usize,
            shadow: shadow.map(|s| s.0.clone()),
        }
    }

    /// The doorbell of a queue that is about to be created. Its shadow may hold what a queue before it has left.
    fn fresh_bell(&self, id: u16, completion: u64) -> Bell {
        let bell = self.bell(id, completion);
        if let Some(shadow) = &bell.shadow {
            shadow
                .doorbells
                .store_u32(bell.offset, 0, Ordering::Release);
        }
        bell
    }

    /// The admin queue.
    ///
    /// # Errors
    /// Where the controller is not enabled.
    pub fn admin_queue(&mut self) -> Result<&mut Queues<B>, Error> {
        self.admin
            .as_mut()
            .ok_or(Error::Request("the controller is not enabled"))
    }

    /// Does an admin command.
    ///
    /// # Errors
    /// [`Error::Failed`] where it ends with an error, and those of the queue.
    pub fn admin(&mut self, command: &Command) -> Result<Completion, Error> {
        self.admin_done(command)?.ok()
    }

    /// Does an admin command, however it ends.
    ///
    /// # Errors
    /// Those of the queue.
    pub fn admin_done(&mut self, command: &Command) -> Result<Done, Error> {
        let limit = self.limit;
        let queue = self.admin_queue()?;
        let cid = queue.submit(0, command)?;
        queue.ring()?;
        let done = queue.finish(0, cid, limit);
        // Events that came meanwhile are put where `poll_events` finds them.
        self.keep_events()?;
        done
    }

    /// Asks for shadow doorbells (§5.2.5): I/O queues that are created from now on have them, and so have `there`, which have to be all that
    /// there are (Linux creates its queues first). Their doorbells' values are in the shadows before the controller is told.
    ///
    /// # Errors
    /// Where the controller refuses; then nothing has changed.
    pub fn shadow_doorbells(&mut self, there: &mut [&mut Queues<B>]) -> Result<(), Error> {
        let page = self.memory.page();
        let (doorbells, events) = (self.memory.alloc(page)?, self.memory.alloc(page)?);
        let command = Command::doorbell_buffers(doorbells.address(), events.address());
        let shadow = Shadow {
            doorbells: doorbells.span(),
            events: events.span(),
        };
        for queues in there.iter() {
            queues.cq.fill_shadow(&shadow);
            queues.sqs.iter().for_each(|sq| sq.fill_shadow(&shadow));
        }
        self.admin(&command)?;
        for queues in there {
            queues.cq.bell_mut().shadow = Some(shadow.clone());
            for sq in &mut queues.sqs {
                sq.bell_mut().shadow = Some(shadow.clone());
            }
        }
        self.shadow = Some((shadow, doorbells, events));
        Ok(())
    }

    /// The page of shadow doorbells and that of event indices.
    pub fn shadow_pages(&self) -> Option<(u64, u64)> {
        let (_, doorbells, events) = self.shadow.as_ref()?;
        Some((doorbells.address(), events.address()))
    }

    /// Creates a completion queue of `entries`; `vector` and what it signals, or none where it is polled.
    ///
    /// # Errors
    /// Where the controller refuses.
    pub fn create_cq(
        &mut self,
        id: u16,
        entries: u32,
        vector: Option<(u16, Arc<Event>)>,
    ) -> Result<Cq, Error> {
        let pages = self.memory.alloc(u64::from(entries) * 16)?;
        let number = vector.as_ref().map(|v| v.0);
        let bell = self.fresh_bell(id, 1);
        self.admin(&Command::create_cq(id, entries, pages.address(), number))?;
        let event = vector.map(|v| v.1);
        Ok(Cq::new(id, entries, pages, bell, event))
    }

    /// Creates a submission queue of `entries` that posts to the CQ of that identifier.
    ///
    /// # Errors
    /// Where the controller refuses.
    pub fn create_sq(&mut self, id: u16, entries: u32, cq: u16) -> Result<Sq, Error> {
        let pages = self.memory.alloc(u64::from(entries) * 64)?;
        let bell = self.fresh_bell(id, 0);
        self.admin(&Command::create_sq(id, entries, pages.address(), cq))?;
        Ok(Sq::new(id, cq, entries, pages, bell))
    }

    /// Creates a CQ of that identifier and `sqs` submission queues on it, whose identifiers begin with the same number.
    ///
    /// # Errors
    /// Where the controller refuses.
    pub fn create_queues(
        &mut self,
        id: u16,
        sqs: u16,
        entries: u32,
        vector: Option<(u16, Arc<Event>)>,
    ) -> Result<Queues<B>, Error> {
        // A completion of each SQ's entries must fit, or the controller has to wait for the host.
        let cq_entries = (entries * u32::from(sqs)).min(self.capabilities.max_entries());
        let cq = self.create_cq(id, cq_entries, vector)?;
        let create = |i| self.create_sq(id + i, entries, id);
        let sqs = (0..sqs).map(create).collect::<Result<_, _>>()?;
        Ok(Queues::new(&self.bar, cq, sqs))
    }

    /// Deletes queues, the SQs first. What is in flight comes back aborted or done before.
    ///
    /// # Errors
    /// Where the controller refuses; then the others are there still.
    pub fn delete_queues(&mut self, queues: Queues<B>) -> Result<(), Error> {
        for sq in &queues.sqs {
            self.admin(&Command::delete_sq(sq.id()))?;
        }
        self.admin(&Command::delete_cq(queues.cq.id()))?;
        Ok(())
    }
}
