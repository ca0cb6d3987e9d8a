//! A device that records what is asked of it, and front ends that send anything.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bluff_memory::GuestMemory;
use bluff_vhost_user::framing::{self, HEADER_LEN};
use bluff_vhost_user::{Attachment, AttachmentEvent, Mode, Options, SessionLoop, unix};
use bluff_virtio::{
    DeviceError, DeviceEvent, Position, QueueChange, QueueSetup, Stop, StoppedQueue, VirtioDevice,
    features,
};
use vmm_sys_util::eventfd::EventFd;

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Tests that count descriptors cannot run beside others.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How often a repeated case is repeated.
pub fn times(long: usize) -> usize {
    if std::env::var_os("BLUFF_TEST_LONG").is_some() {
        long
    } else {
        (long / 100).max(10)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Features(u64),
    Start(u16),
    Stop(u16, Stop),
    Memory(u16),
    Log(u16, bool),
    Kick(u16),
    Notifier(u16),
    Err(u16),
    Enable(u16, bool),
    Config(u32, Vec<u8>),
    Reset,
    Load(Vec<u8>),
}

/// What a device does with what takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Done at once.
    Now,
    /// Done by another thread when the bound has passed, as with I/O that never completes.
    AtBound,
    /// Done when the test says so.
    Held,
}

type Done = Box<dyn FnOnce() + Send>;

pub struct Inner {
    pub calls: Vec<Call>,
    pub pace: Pace,
    pub running: BTreeMap<u16, QueueSetup>,
    /// The epoch that each queue uses.
    pub memory: BTreeMap<u16, Arc<GuestMemory>>,
    pub held: VecDeque<Done>,
    pub config: Vec<u8>,
    pub refuse_start: bool,
    listener: Option<Arc<dyn Fn(DeviceEvent) + Send + Sync>>,
}

/// The test's side of a device.
#[derive(Clone)]
pub struct Control(Arc<(Mutex<Inner>, Condvar)>);

pub struct Fake {
    control: Control,
    queues: u16,
    features: u64,
    id: u32,
}

impl Control {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn changed(&self) {
        self.0.1.notify_all();
    }

    /// Waits until the device is in a state.
    pub fn wait(&self, what: &str, mut until: impl FnMut(&mut Inner) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut inner = self.lock();
        while !until(&mut inner) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited for {what}; {:?}", inner.calls);
            inner = self.0.1.wait_timeout(inner, left).unwrap().0;
        }
    }

    /// Lets everything go on that was held.
    pub fn release(&self) {
        let held: Vec<_> = self.lock().held.drain(..).collect();
        held.into_iter().for_each(|done| done());
    }

    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    pub fn event(&self, event: DeviceEvent) {
        let listener = self.lock().listener.clone();
        listener.expect("attached")(event);
    }

    pub fn is_running(&self, index: u16) -> bool {
        self.lock().running.contains_key(&index)
    }
}

pub const FEATURES: u64 =
    features::VERSION_1 | features::EVENT_IDX | features::RING_PACKED | features::INDIRECT_DESC;

pub fn device(queues: u16) -> (Box<Fake>, Control) {
    let inner = Inner {
        calls: Vec::new(),
        pace: Pace::Now,
        running: BTreeMap::new(),
        memory: BTreeMap::new(),
        held: VecDeque::new(),
        config: (0..60).collect(),
        refuse_start: false,
        listener: None,
    };
    let control = Control(Arc::new((Mutex::new(inner), Condvar::new())));
    let fake = Fake {
        control: control.clone(),
        queues,
        features: FEATURES,
        id: 2,
    };
    (Box::new(fake), control)
}

pub fn net_device(queues: u16) -> (Box<Fake>, Control) {
    let (mut fake, control) = device(queues);
    fake.id = 1;
    (fake, control)
}

impl Fake {
    fn later(&self, bound: Duration, done: Done) {
        let pace = self.control.lock().pace;
        match pace {
            Pace::Now => done(),
            Pace::AtBound => {
                std::thread::spawn(move || {
                    std::thread::sleep(bound);
                    done();
                });
            }
            Pace::Held => {
                self.control.lock().held.push_back(done);
                self.control.changed();
            }
        }
    }

    fn call(&self, call: Call) {
        self.control.lock().calls.push(call);
        self.control.changed();
    }
}

/// Where a fake queue is when it stops.
pub fn stopped_at(index: u16) -> Position {
    Position {
        avail: 7 + index,
        avail_wrap: true,
        used: 7 + index,
        used_wrap: false,
    }
}

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        self.id
    }
    fn queues(&self) -> u16 {
        self.queues
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn set_features(&mut self, features: u64) {
        assert!(self.control.lock().running.is_empty(), "queues run");
        self.call(Call::Features(features));
    }
    fn config_len(&self) -> u32 {
        self.control.lock().config.len() as u32
    }
    fn read_config(&self, offset: u32, to: &mut [u8]) {
        let inner = self.control.lock();
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = inner.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError> {
        // The first half is read-only.
        if offset < 30 {
            return Err(DeviceError::Config {
                offset,
                len: from.len(),
            });
        }
        self.call(Call::Config(offset, from.to_vec()));
        self.control.lock().config[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), DeviceError> {
        let mut inner = self.control.lock();
        if inner.refuse_start {
            return Err(DeviceError::Backend("not today".into()));
        }
        let index = setup.index;
        inner.calls.push(Call::Start(index));
        inner.memory.insert(index, setup.memory.clone());
        let old = inner.running.insert(index, setup);
        assert!(old.is_none(), "queue {index} is started already");
        drop(inner);
        self.control.changed();
        Ok(())
    }
    fn change_queue(&mut self, index: u16, change: QueueChange) {
        assert!(self.control.is_running(index), "queue {index} does not run");
        match change {
            QueueChange::Memory {
                memory,
                bound,
                done,
            } => {
                self.call(Call::Memory(index));
                let control = self.control.clone();
                self.later(
                    bound,
                    Box::new(move || {
                        let mut inner = control.lock();
                        inner.memory.insert(index, memory.clone());
                        if let Some(setup) = inner.running.get_mut(&index) {
                            setup.memory = memory;
                        }
                        drop(inner);
                        done();
                    }),
                );
            }
            QueueChange::Kick(kick) => {
                self.control.lock().running.get_mut(&index).unwrap().kick = kick;
                self.call(Call::Kick(index));
            }
            QueueChange::Call(call) => {
                self.control.lock().running.get_mut(&index).unwrap().call = call;
                self.call(Call::Notifier(index));
            }
            QueueChange::Error(_) => self.call(Call::Err(index)),
            QueueChange::Log { log, done } => {
                self.call(Call::Log(index, log.is_some()));
                self.later(Duration::ZERO, done);
            }
            QueueChange::Enable(on) => {
                self.control.lock().running.get_mut(&index).unwrap().enabled = on;
                self.call(Call::Enable(index, on));
            }
        }
    }
    fn stop_queue(
        &mut self,
        index: u16,
        stop: Stop,
        done: Box<dyn FnOnce(Option<StoppedQueue>) + Send>,
    ) {
        self.call(Call::Stop(index, stop));
        if !self.control.is_running(index) {
            return done(None);
        }
        let control = self.control.clone();
        self.later(
            stop.bound,
            Box::new(move || {
                let mut inner = control.lock();
                inner.running.remove(&index);
                inner.memory.remove(&index);
                drop(inner);
                control.changed();
                done(Some(StoppedQueue {
                    position: stopped_at(index),
                    in_flight: 0,
                }));
            }),
        );
    }
    fn reset(&mut self) {
        assert!(self.control.lock().running.is_empty(), "queues run");
        self.call(Call::Reset);
    }
    fn save(&self) -> Vec<u8> {
        vec![4, 2]
    }
    fn load(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(state, [4, 2]);
        self.call(Call::Load(state.to_vec()));
        Ok(())
    }
    fn on_event(&mut self, listener: Arc<dyn Fn(DeviceEvent) + Send + Sync>) {
        self.control.lock().listener = Some(listener);
    }
}

/// Reads guest memory as a device would.
pub fn touch(memory: &GuestMemory) -> u8 {
    let mut byte = [0];
    memory.read(memory.end() - 1, &mut byte).unwrap();
    byte[0]
}

/// A function on a loop of its own.
pub struct Function {
    pub control: Control,
    pub path: std::path::PathBuf,
    pub events: Arc<(Mutex<Vec<AttachmentEvent>>, Condvar)>,
    pub sessions: Option<SessionLoop>,
    _dir: tempfile::TempDir,
}

impl Drop for Function {
    fn drop(&mut self) {
        // What explains a failure.
        println!("{:?}", self.events.0.lock().unwrap());
    }
}

impl Function {
    pub fn new(queues: u16) -> Self {
        Self::with(device(queues), Duration::from_millis(300), |_| {})
    }

    pub fn with(
        (fake, control): (Box<Fake>, Control),
        bound: Duration,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.sock");
        let sessions = SessionLoop::spawn().unwrap();
        let mut options = Options::new(Mode::Server(unix::listen(&path).unwrap()));
        options.bound = bound;
        change(&mut options);
        let events: Arc<(Mutex<Vec<_>>, Condvar)> = Arc::default();
        let told = events.clone();
        let listener = Arc::new(move |name: &str, event| {
            assert_eq!(name, "f");
            told.0.lock().unwrap().push(event);
            told.1.notify_all();
        });
        sessions
            .handle()
            .add(Attachment::new("f", fake, options, listener))
            .unwrap();
        Self {
            control,
            path,
            events,
            sessions: Some(sessions),
            _dir: dir,
        }
    }

    pub fn connect(&self) -> Raw {
        Raw::new(UnixStream::connect(&self.path).unwrap())
    }

    /// Waits until `n` events of a kind have come in all.
    pub fn wait_events(&self, n: usize, kind: impl Fn(&AttachmentEvent) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut events = self.events.0.lock().unwrap();
        while events.iter().filter(|e| kind(e)).count() < n {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited for {n} events; {events:?}");
            events = self.events.1.wait_timeout(events, left).unwrap().0;
        }
    }

    pub fn wait_gone(&self, n: usize) {
        self.wait_events(n, |e| matches!(e, AttachmentEvent::Disconnected(_)));
    }

    pub fn count(&self, kind: impl Fn(&AttachmentEvent) -> bool) -> usize {
        let events = self.events.0.lock().unwrap();
        events.iter().filter(|e| kind(e)).count()
    }
}

/// A front end that sends whatever a test wants.
pub struct Raw {
    pub socket: UnixStream,
    /// Ask for acknowledgements.
    pub ack: bool,
}

pub type Answer = Option<(Vec<u8>, Vec<OwnedFd>)>;

impl Raw {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { socket, ack: true }
    }

    /// Sends a request; `false` where the connection is closed.
    pub fn send(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.bytes(&framing::request(request, self.ack, payload), files)
    }

    pub fn bytes(&self, mut bytes: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut files = files;
        let end = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match unix::send(self.socket.as_fd(), bytes, files) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    files = &[];
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < end, "the back end does not read");
                    std::thread::yield_now();
                }
                Err(_) => return false,
            }
        }
        true
    }

    fn exactly(&self, len: usize) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = vec![0; len];
        let mut files = Vec::new();
        let mut at = 0;
        while at < len {
            match unix::take(self.socket.as_fd(), &mut bytes[at..]) {
                Ok(got) if got.len == 0 => return None,
                Ok(got) => {
                    at += got.len;
                    files.extend(got.files);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    wait_readable(self.socket.as_fd());
                }
                Err(_) => return None,
            }
        }
        Some((bytes, files))
    }

    /// The next reply to `request`; `None` where the connection is closed.
    pub fn reply(&self, request: u32) -> Answer {
        let (head, mut files) = self.exactly(HEADER_LEN)?;
        let (answered, len) = framing::parse_reply(head.try_into().unwrap()).unwrap();
        assert_eq!(answered, request, "a reply to another request");
        if len == 0 {
            return Some((Vec::new(), files));
        }
        let (body, more) = self.exactly(len)?;
        files.extend(more);
        Some((body, files))
    }

    /// Whether nothing has come.
    pub fn is_quiet(&self) -> bool {
        let mut buf = [0];
        matches!(unix::peek(self.socket.as_fd(), &mut buf, false),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    }

    pub fn ask(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> Answer {
        if !self.send(request, payload, files) {
            return None;
        }
        self.reply(request)
    }

    /// Whether a request is acknowledged. `false` also where the connection is closed.
    pub fn ok(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.ask(request, payload, files)
            .is_some_and(|(body, _)| body == [0; 8])
    }

    pub fn number(&self, request: u32) -> u64 {
        let (body, _) = self.ask(request, &[], &[]).expect("an answer");
        u64::from_ne_bytes(body.try_into().unwrap())
    }

    pub fn set(&self, request: u32, number: u64) -> bool {
        self.ok(request, &number.to_ne_bytes(), &[])
    }

    /// Whether the connection is closed, waiting for it.
    pub fn is_closed(&self) -> bool {
        let mut buf = [0; 256];
        loop {
            match unix::take(self.socket.as_fd(), &mut buf) {
                Ok(got) if got.len == 0 => return true,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if !wait_readable(self.socket.as_fd()) {
                        return false;
                    }
                }
                Err(_) => return true,
            }
        }
    }

    /// As QEMU begins.
    pub fn negotiate(&self) {
        let features = self.number(GET_FEATURES);
        assert_ne!(features & F_PROTOCOL, 0);
        let protocol = self.number(GET_PROTOCOL_FEATURES);
        assert!(self.set(SET_PROTOCOL_FEATURES, protocol));
        assert!(self.ok(SET_OWNER, &[], &[]));
        assert!(self.set(
            SET_FEATURES,
            features & !features::LOG_ALL & !features::RING_PACKED
        ));
    }

    /// One region of memory at guest address 0.
    pub fn memory(&self) -> OwnedFd {
        let file = unix::sealed_memory(c"guest", MEMORY).unwrap();
        assert!(self.ok(
            SET_MEM_TABLE,
            &table(&[(0, MEMORY, USER, 0)]),
            &[file.as_fd()]
        ));
        file
    }

    /// Everything of a ring but its start.
    pub fn ring(&self, index: u32, size: u32) {
        assert!(self.ok(SET_VRING_NUM, &words(&[index, size]), &[]));
        assert!(self.ok(SET_VRING_BASE, &words(&[index, 0]), &[]));
        assert!(self.ok(SET_VRING_ADDR, &addr(index, 0), &[]));
    }

    pub fn kick(&self, index: u32) -> EventFd {
        let (file, event) = eventfd();
        assert!(self.ok(
            SET_VRING_KICK,
            &u64::from(index).to_ne_bytes(),
            &[file.as_fd()]
        ));
        event
    }

    pub fn start(&self, index: u32) {
        self.ring(index, 128);
        self.kick(index);
        assert!(self.ok(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
    }

    pub fn base(&self, index: u32) -> u32 {
        let (body, _) = self
            .ask(GET_VRING_BASE, &words(&[index, 0]), &[])
            .expect("an answer");
        assert_eq!(body[..4], index.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }
}

/// Waits for bytes or the end; `false` where nothing comes.
pub fn wait_readable(socket: BorrowedFd<'_>) -> bool {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, socket.as_raw_fd(), event)
        .unwrap();
    let mut ready = [EpollEvent::default()];
    epoll.wait(PATIENCE.as_millis() as i32, &mut ready).unwrap() == 1
}

pub fn eventfd() -> (OwnedFd, EventFd) {
    let event = EventFd::new(0).unwrap();
    let clone = event.try_clone().unwrap();
    // SAFETY: the clone gives its descriptor away.
    #[allow(unsafe_code)]
    let file = unsafe { OwnedFd::from_raw_fd(clone.into_raw_fd()) };
    (file, event)
}

pub const MEMORY: u64 = 1 << 20;
pub const USER: u64 = 0x7f00_0000_0000;
pub const F_PROTOCOL: u64 = 1 << 30;

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// guest, size, user, offset
pub type RegionRow = (u64, u64, u64, u64);

pub fn table(regions: &[RegionRow]) -> Vec<u8> {
    let mut out = words(&[regions.len() as u32, 0]);
    for (guest, size, user, offset) in regions {
        out.extend(longs(&[*guest, *size, *user, *offset]));
    }
    out
}

pub fn single(r: RegionRow) -> Vec<u8> {
    longs(&[0, r.0, r.1, r.2, r.3])
}

/// A ring at 64 KiB times its index.
pub fn addr(index: u32, flags: u32) -> Vec<u8> {
    let at = USER + u64::from(index) * 0x1_0000;
    addr_at(index, flags, at, at + 0x8000, at + 0x4000)
}

pub fn addr_at(index: u32, flags: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut out = words(&[index, flags]);
    out.extend(longs(&[desc, used, avail, used.wrapping_sub(USER)]));
    out
}

pub fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut out = longs(&[size, offset]);
    out.extend(queues.to_ne_bytes());
    out.extend(queue_size.to_ne_bytes());
    out.extend([0; 4]);
    out
}

macro_rules! codes {
    ($($name:ident = $code:literal,)*) => { $(pub const $name: u32 = $code;)* };
}
codes! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SEND_RARP = 19,
    NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    SET_STATUS = 39,
    GET_STATUS = 40,
}
