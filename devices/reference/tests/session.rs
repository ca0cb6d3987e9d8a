//! Whole sessions over a socket, driven by the `vhost` crate's front end.

mod ring;
mod vm;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bluff_block::{
    BlockError, Cancel, Channel, Completion, Events, Geometry, Op, OpenContext, Volume,
};
use bluff_reactor::Waker;
use bluff_reference::spec::{WRITEBACK_OFFSET, feature, request_type};
use bluff_reference::{DeviceOptions, Endpoint, Server, ServerError, Stop, open_volume};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm::{LONG, Vm};

struct Service {
    folder: TempDir,
    stop: Stop,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Service {
    fn new(volume: Arc<dyn Volume>, options: DeviceOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut server = Server::new(volume, options, Endpoint::Path(path)).unwrap();
        let stop = server.stop();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self {
            folder,
            stop,
            thread,
        }
    }

    fn ram(num_queues: u16, poll: bool) -> Self {
        let options = DeviceOptions {
            num_queues,
            poll,
            ..DeviceOptions::default()
        };
        Self::new(open_volume("ram:?size=8MiB").unwrap(), options)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }

    fn end(&mut self) {
        self.stop.stop();
        let thread = self.thread.take().expect("ended once");
        thread.join().unwrap().unwrap();
        assert!(!self.path().exists(), "it removes its socket");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.end();
        }
    }
}

/// Where the requests of queue `i` live.
fn area(i: usize) -> u64 {
    0x40_0000 + 0x10_0000 * i as u64
}

const STEP: u64 = 0x2000;

/// Adds request number `n` of queue `i`: a block of 4 KiB, with header and status around it.
fn add(vm: &mut Vm, i: usize, n: u64, kind: u32, sector: u64, fill: Option<u8>) {
    let at = area(i) + n * STEP;
    let ring = &mut vm.lanes[i].ring;
    ring.header(at, kind, sector);
    ring.fill(at + 16, 1, 0xee);
    if let Some(byte) = fill {
        ring.fill(at + 0x1000, 4096, byte);
    }
    let data = (at + 0x1000, 4096, kind == request_type::IN);
    ring.add(&[(at, 16, false), data, (at + 16, 1, true)]);
}

/// Writes and reads back, 32 requests at a time.
fn exercise(vm: &mut Vm, rounds: u64) {
    let queues = vm.lanes.len();
    for round in 0..rounds {
        for kind in [request_type::OUT, request_type::IN] {
            for i in 0..queues {
                for n in 0..32 {
                    let sector = 8 * (32 * i as u64 + n);
                    let byte = (round * 7 + n + i as u64) as u8;
                    let fill = if kind == request_type::OUT { byte } else { 0 };
                    add(vm, i, n, kind, sector, Some(fill));
                    // Batches of different lengths.
                    if n % (1 + round % 5) == 0 {
                        vm.publish(i);
                    }
                }
                vm.publish(i);
            }
            for i in 0..queues {
                for _ in 0..32 {
                    let (_, len) = vm.wait(i);
                    let want = if kind == request_type::IN { 4097 } else { 1 };
                    assert_eq!(len, want);
                }
            }
        }
        for i in 0..queues {
            for n in 0..32 {
                let at = area(i) + n * STEP;
                assert_eq!(vm.lanes[i].ring.byte(at + 16), 0);
                let byte = (round * 7 + n + i as u64) as u8;
                let got = vm.lanes[i].ring.bytes(at + 0x1000, 4096);
                assert!(
                    got.iter().all(|&b| b == byte),
                    "round {round}, queue {i}, {n}"
                );
            }
        }
    }
}

#[test]
fn two_queues_with_event_index() {
    let service = Service::ram(2, false);
    let mut vm = Vm::new(service.connect(), 2, 128, 0);
    assert!(vm.event_idx);
    exercise(&mut vm, 50);
}

#[test]
fn one_queue_without_event_index_and_indirect() {
    let service = Service::ram(1, false);
    let without = feature::EVENT_IDX | feature::INDIRECT_DESC;
    let mut vm = Vm::new(service.connect(), 1, 256, without);
    exercise(&mut vm, 50);
}

#[test]
fn polled_queues_need_no_kicks() {
    let service = Service::ram(2, true);
    let mut vm = Vm::new(service.connect(), 2, 128, 0);
    exercise(&mut vm, 50);
    add(&mut vm, 0, 0, request_type::IN, 0, None);
    vm.lanes[0].ring.publish();
    assert_eq!(vm.wait(0).1, 4097);
    // Polling leaves the session room: a queue is stopped and started.
    let base = vm.stop(1);
    vm.start(1, base);
    exercise(&mut vm, 5);
}

#[test]
fn queues_stop_and_start_where_they_were() {
    let service = Service::ram(1, false);
    let mut vm = Vm::new(service.connect(), 1, 128, 0);
    for round in 1..=20u16 {
        exercise(&mut vm, 1);
        let base = vm.stop(0);
        assert_eq!(base, round * 64);
        vm.start(0, base);
    }
    // What was published while it was stopped is done at the start.
    let base = vm.stop(0);
    add(&mut vm, 0, 0, request_type::IN, 0, None);
    vm.lanes[0].ring.publish();
    vm.start(0, base);
    assert_eq!(vm.wait(0).1, 4097);
    // The same memory again, under way.
    vm.map();
    exercise(&mut vm, 3);
}

#[test]
fn a_broken_ring_waits_for_a_new_start() {
    let service = Service::ram(2, false);
    let mut vm = Vm::new(service.connect(), 2, 128, 0);
    for _ in 0..200 {
        vm.lanes[0].ring.offer(0);
    }
    vm.publish(0);
    // The other queue does not mind.
    add(&mut vm, 1, 0, request_type::IN, 0, None);
    vm.publish(1);
    assert_eq!(vm.wait(1).1, 4097);
    assert_eq!(vm.stop(0), 0);
    vm.lanes[0].ring = ring::Ring::new(vm.mem.clone(), 0x1_0000, 128);
    vm.start(0, 0);
    add(&mut vm, 0, 0, request_type::IN, 0, None);
    vm.lanes[0].ring.publish();
    vm.lanes[0].kick.write(1).unwrap();
    assert_eq!(vm.wait(0).1, 4097);
}

#[test]
fn front_ends_come_and_go() {
    let service = Service::ram(2, false);
    for i in 0..12 {
        let mut vm = Vm::new(service.connect(), 2, 128, 0);
        exercise(&mut vm, 1);
        if i % 2 == 0 {
            // Gone in the middle of things.
            add(&mut vm, 0, 0, request_type::IN, 0, None);
            vm.publish(0);
        }
        if i % 3 == 0 {
            vm.stop(0);
            vm.stop(1);
        }
    }
}

#[test]
fn the_configuration_space_over_the_session() {
    let (mut service, _) = slow(usize::MAX, 2);
    let mut vm = Vm::new(service.connect(), 1, 128, 0);
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, bytes) = vm.frontend.get_config(0, 60, flags, &[0; 60]).unwrap();
    assert_eq!(bytes[..8], (8u64 << 11).to_le_bytes());
    assert_eq!(bytes[WRITEBACK_OFFSET as usize], 1);
    vm.frontend
        .set_config(WRITEBACK_OFFSET, flags, &[0])
        .unwrap();
    let (_, bytes) = vm
        .frontend
        .get_config(WRITEBACK_OFFSET, 1, flags, &[0; 1])
        .unwrap();
    assert_eq!(bytes, [0]);
    // A stop while a front end is there.
    service.end();
}

#[test]
fn a_socket_in_use_is_left_alone() {
    let service = Service::ram(1, false);
    let volume = || open_volume("ram:?size=1MiB").unwrap();
    let new = |path: PathBuf| {
        Server::new(volume(), DeviceOptions::default(), Endpoint::Path(path)).map(drop)
    };
    assert!(matches!(new(service.path()), Err(ServerError::InUse(_))));
    let file = service.folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(new(file.clone()), Err(ServerError::NoSocket(_))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let stale = service.folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    new(stale).unwrap();
}

/// A volume whose operations end when the test says so, on another thread than they came from.
#[derive(Debug)]
struct Slow {
    events: Events,
    gate: Arc<Gate>,
    channels: usize,
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    submitted: usize,
    wakers: Vec<Waker>,
}

impl Gate {
    fn open(&self) {
        let mut state = self.state.lock().unwrap();
        state.open = true;
        state.wakers.iter().for_each(Waker::wake);
    }

    fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, LONG, |s| s.submitted < count);
        assert!(!waited.unwrap().1.timed_out(), "{count} operations");
    }
}

struct SlowChannel {
    gate: Arc<Gate>,
    held: Vec<Op>,
}

impl Volume for Slow {
    fn geometry(&self) -> Geometry {
        Geometry::new(512, 8 << 20)
    }
    fn max_channels(&self) -> usize {
        self.channels
    }
    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        let mut state = self.gate.state.lock().unwrap();
        state.wakers.push(context.waker.clone());
        Ok(Box::new(SlowChannel {
            gate: self.gate.clone(),
            held: Vec::new(),
        }))
    }
    fn events(&self) -> &Events {
        &self.events
    }
}

impl Channel for SlowChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        // Busy beyond 5: what is left comes again.
        let n = ops.len().min(5 - self.held.len());
        self.held.extend_from_slice(&ops[..n]);
        self.gate.state.lock().unwrap().submitted += n;
        self.gate.changed.notify_all();
        n
    }
    fn kick(&mut self) {}
    fn poll(&mut self, _: Instant, done: &mut Vec<Completion>) {
        if !self.gate.state.lock().unwrap().open {
            return;
        }
        // Out of order.
        done.extend(self.held.drain(..).rev().map(|op| Completion {
            tag: op.tag,
            result: Err(BlockError::NoSpace),
        }));
    }
    fn cancel(&mut self, _: bluff_block::Tag) -> Cancel {
        Cancel::Never
    }
}

fn slow(channels: usize, num_queues: u16) -> (Service, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let volume = Slow {
        events: Events::default(),
        gate: gate.clone(),
        channels,
    };
    let options = DeviceOptions {
        num_queues,
        ..DeviceOptions::default()
    };
    (Service::new(Arc::new(volume), options), gate)
}

#[test]
fn completions_from_other_threads_wake_the_queue() {
    let (service, gate) = slow(usize::MAX, 1);
    let mut vm = Vm::new(service.connect(), 1, 128, 0);
    for n in 0..20 {
        add(&mut vm, 0, n, request_type::OUT, 0, None);
    }
    vm.publish(0);
    gate.wait_for(5);
    assert_eq!(vm.lanes[0].ring.take_used(), None);
    gate.open();
    let mut heads: Vec<_> = (0..20).map(|_| vm.wait(0)).collect();
    heads.sort_unstable();
    let want: Vec<_> = (0..20).map(|n| (3 * n, 1)).collect();
    assert_eq!(heads, want);
    for n in 0..20 {
        assert_eq!(vm.lanes[0].ring.byte(area(0) + n * STEP + 16), 1);
    }
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let (service, gate) = slow(usize::MAX, 1);
    let mut vm = Vm::new(service.connect(), 1, 128, 0);
    for n in 0..3 {
        add(&mut vm, 0, n, request_type::IN, 0, None);
    }
    vm.publish(0);
    gate.wait_for(3);
    let opener = std::thread::spawn({
        let gate = gate.clone();
        move || {
            // Time for a stop that does not wait to show itself: the used ring would be empty.
            std::thread::sleep(Duration::from_millis(50));
            gate.open();
        }
    });
    assert_eq!(vm.stop(0), 3);
    // All of it stands in the used ring when the reply comes.
    for _ in 0..3 {
        assert!(vm.lanes[0].ring.take_used().is_some());
    }
    opener.join().unwrap();
}

#[test]
fn a_volume_of_one_channel_has_one_thread_for_all_queues() {
    let (service, gate) = slow(1, 3);
    gate.open();
    let mut vm = Vm::new(service.connect(), 3, 128, 0);
    for round in 0..20 {
        for i in 0..3 {
            for n in 0..10 {
                add(&mut vm, i, n, request_type::IN, round, None);
            }
            vm.publish(i);
        }
        for i in 0..3 {
            for _ in 0..10 {
                assert_eq!(vm.wait(i).1, 1);
            }
        }
    }
    assert_eq!(gate.state.lock().unwrap().wakers.len(), 1);
}

/// A volume whose operations end just after the thread has looked for them: it is woken on its way to sleep.
#[derive(Debug, Default)]
struct Late(Events);

struct LateChannel {
    waker: Waker,
    /// Operations, and how often somebody has looked for them.
    held: Vec<(Op, u32)>,
}

impl Volume for Late {
    fn geometry(&self) -> Geometry {
        Geometry::new(512, 8 << 20)
    }
    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Ok(Box::new(LateChannel {
            waker: context.waker.clone(),
            held: Vec::new(),
        }))
    }
    fn events(&self) -> &Events {
        &self.0
    }
}

impl Channel for LateChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        self.held.extend(ops.iter().map(|op| (*op, 0)));
        ops.len()
    }
    fn kick(&mut self) {}
    fn poll(&mut self, _: Instant, done: &mut Vec<Completion>) {
        self.held.retain_mut(|(op, looks)| {
            *looks += 1;
            match looks {
                // In the turn that took it; another turn follows that one.
                1 => true,
                // In the last turn before sleep.
                2 => {
                    self.waker.wake();
                    true
                }
                _ => {
                    let (tag, result) = (op.tag, Ok(()));
                    done.push(Completion { tag, result });
                    false
                }
            }
        });
    }
    fn cancel(&mut self, _: bluff_block::Tag) -> Cancel {
        Cancel::Never
    }
}

#[test]
fn what_ends_on_the_way_to_sleep_is_not_lost() {
    let service = Service::new(Arc::new(Late::default()), DeviceOptions::default());
    let mut vm = Vm::new(service.connect(), 1, 128, 0);
    for _ in 0..20 {
        add(&mut vm, 0, 0, request_type::IN, 0, None);
        vm.publish(0);
        assert_eq!(vm.wait(0).1, 4097);
    }
}
