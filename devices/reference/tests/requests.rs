//! What each request does, and what each malformed one is answered with (virtio 1.3 §5.2.6).

mod ring;

use std::sync::Arc;

use bluff_reference::spec::{feature, request_type};
use bluff_reference::{Device, DeviceOptions, Oracle, open_volume};
use ring::{INDIRECT, NEXT, Part, Ring, WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const HEADER: u64 = 0x2_0000;
const SEGMENT: u64 = 0x2_1000;
const TABLE: u64 = 0x2_2000;
const DATA: u64 = 0x3_0000;
const STATUS: u64 = 0x2_3000;
const MEMORY: usize = 32 << 20;
const NOWHERE: u64 = 1 << 40;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNTOUCHED: u8 = 0xee;

struct Bench {
    device: Arc<Device>,
    oracle: Oracle,
    ring: Ring,
    queue: Queue,
}

impl Bench {
    fn new(uri: &str, read_only: bool) -> Self {
        let options = DeviceOptions {
            read_only,
            serial: "serial-0123456789".into(),
            ..DeviceOptions::default()
        };
        let volume = open_volume(uri).unwrap();
        let device = Arc::new(Device::new(volume, options));
        device.set_acked(device.features());
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let ring = Ring::new(Arc::new(mem), 0x1_0000, 16);
        Self {
            oracle: Oracle::new(device.clone()).unwrap(),
            queue: ring.queue(256),
            device,
            ring,
        }
    }

    fn ram() -> Self {
        Self::new("ram:?size=64MiB", false)
    }

    /// Has one chain done; its used length and the byte at `STATUS`.
    fn run(&mut self) -> (u32, u8) {
        self.ring.fill(STATUS, 1, UNTOUCHED);
        self.ring.publish();
        let mem = self.ring.mem.clone();
        let (count, _) = self.oracle.process(&mut self.queue, &*mem).unwrap();
        assert_eq!(count, 1);
        let (_, len) = self.ring.take_used().expect("given back");
        assert_eq!(self.ring.take_used(), None);
        (len, self.ring.byte(STATUS))
    }

    fn parts(&mut self, parts: &[Part]) -> (u32, u8) {
        self.ring.add(parts);
        self.run()
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u32, u8) {
        self.ring.header(HEADER, kind, sector);
        let mut parts = vec![(HEADER, 16, false)];
        parts.extend_from_slice(data);
        parts.push((STATUS, 1, true));
        self.parts(&parts)
    }

    fn write(&mut self, sector: u64, len: u32) -> (u32, u8) {
        self.request(request_type::OUT, sector, &[(DATA, len, false)])
    }

    fn read(&mut self, sector: u64, len: u32) -> (u32, u8) {
        self.request(request_type::IN, sector, &[(DATA, len, true)])
    }

    fn segment(&mut self, kind: u32, sector: u64, n: u32, flags: u32) -> (u32, u8) {
        self.ring.segment(SEGMENT, sector, n, flags);
        self.request(kind, 0, &[(SEGMENT, 16, false)])
    }
}

#[test]
fn what_is_written_is_read() {
    let mut b = Bench::ram();
    b.ring.fill(DATA, 4096, 0x5a);
    b.ring.fill(DATA + 4096, 512, 0xa5);
    let data = [(DATA, 4096, false), (DATA + 4096, 512, false)];
    assert_eq!(b.request(request_type::OUT, 7, &data), (1, OK));
    b.ring.fill(DATA, 8192, 0);
    let data = [(DATA, 512, true), (DATA + 512, 4096, true)];
    assert_eq!(b.request(request_type::IN, 7, &data), (4609, OK));
    assert_eq!(b.ring.bytes(DATA, 4096), [0x5a; 4096]);
    assert_eq!(b.ring.bytes(DATA + 4096, 512), [0xa5; 512]);
    assert_eq!(b.ring.bytes(DATA + 4608, 512), [0; 512]);
    assert_eq!(b.request(request_type::FLUSH, 0, &[]), (1, OK));
}

#[test]
fn requests_longer_than_a_transfer_are_cut() {
    let mut b = Bench::ram();
    let max = b.device.geometry().max_transfer as usize;
    let len = max + 4096;
    assert!(len < MEMORY - DATA as usize, "it fits the test's memory");
    b.ring.fill(DATA, max, 1);
    b.ring.fill(DATA + max as u64, 4096, 2);
    assert_eq!(b.write(8, len as u32), (1, OK));
    b.ring.fill(DATA, len, 0);
    assert_eq!(b.read(8, len as u32), (len as u32 + 1, OK));
    assert_eq!(b.ring.byte(DATA), 1);
    assert_eq!(b.ring.byte(DATA + max as u64 - 1), 1);
    assert_eq!(b.ring.bytes(DATA + max as u64, 4096), [2; 4096]);
}

#[test]
fn any_layout_of_descriptors_will_do() {
    let mut b = Bench::ram();
    // Header and data in one, status behind; then a header in pieces, and data with the status.
    b.ring.header(DATA, request_type::OUT, 3);
    b.ring.fill(DATA + 16, 512, 0x77);
    assert_eq!(b.parts(&[(DATA, 528, false), (STATUS, 1, true)]), (1, OK));
    b.ring.header(HEADER, request_type::IN, 3);
    let at = STATUS - 512;
    let parts = [
        (HEADER, 3, false),
        (HEADER + 3, 0, false),
        (HEADER + 3, 13, false),
        (at, 513, true),
        (0, 0, true),
    ];
    assert_eq!(b.parts(&parts), (513, OK));
    assert_eq!(b.ring.bytes(at, 512), [0x77; 512]);
}

#[test]
fn indirect_chains_may_be_longer_than_the_ring() {
    let mut b = Bench::ram();
    b.ring.header(HEADER, request_type::IN, 0);
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend((0..126).map(|i| (DATA + 512 * i, 512, true)));
    parts.push((STATUS, 1, true));
    b.ring.fill(DATA, 126 * 512, 9);
    b.ring.add_indirect(TABLE, &parts);
    assert_eq!(b.run(), (126 * 512 + 1, OK));
    assert_eq!(b.ring.bytes(DATA, 126 * 512), vec![0; 126 * 512]);
}

#[test]
fn the_identification_string() {
    let mut b = Bench::ram();
    b.ring.fill(DATA, 32, 0xff);
    let answer = b.request(request_type::GET_ID, 0, &[(DATA, 20, true)]);
    assert_eq!(answer, (21, OK));
    assert_eq!(b.ring.bytes(DATA, 20), b"serial-0123456789\0\0\0");
    assert_eq!(b.ring.byte(DATA + 20), 0xff);
    b.ring.fill(DATA, 32, 0xff);
    let answer = b.request(request_type::GET_ID, 0, &[(DATA, 6, true)]);
    assert_eq!(answer, (7, OK));
    assert_eq!(b.ring.bytes(DATA, 7), b"serial\xff");
}

#[test]
fn discard_and_write_zeroes() {
    let mut b = Bench::ram();
    b.ring.fill(DATA, 8192, 3);
    assert_eq!(b.write(0, 8192), (1, OK));
    let zeroes = request_type::WRITE_ZEROES;
    assert_eq!(b.segment(zeroes, 1, 2, 0), (1, OK));
    assert_eq!(b.segment(zeroes, 8, 8, 1), (1, OK));
    assert_eq!(b.read(0, 8192), (8193, OK));
    assert_eq!(b.ring.bytes(DATA, 512), [3; 512]);
    assert_eq!(b.ring.bytes(DATA + 512, 1024), [0; 1024]);
    assert_eq!(b.ring.bytes(DATA + 1536, 2560), [3; 2560]);
    assert_eq!(b.ring.bytes(DATA + 4096, 4096), [0; 4096]);

    let discard = request_type::DISCARD;
    let end = b.device.geometry().size / 512;
    assert_eq!(b.segment(discard, 0, 8, 0), (1, OK));
    assert_eq!(b.segment(discard, 0, 8, 1), (1, UNSUPP));
    assert_eq!(b.segment(discard, 0, 8, 2), (1, UNSUPP));
    assert_eq!(b.segment(zeroes, 0, 8, 2), (1, UNSUPP));
    assert_eq!(b.segment(discard, end - 4, 8, 0), (1, IOERR));
    assert_eq!(b.segment(zeroes, u64::MAX / 512, 8, 0), (1, IOERR));
    assert_eq!(b.segment(zeroes, 0, 0, 0), (1, OK));
    // Half a segment, and two.
    let answer = b.request(discard, 0, &[(SEGMENT, 8, false)]);
    assert_eq!(answer, (1, IOERR));
    let answer = b.request(discard, 0, &[(SEGMENT, 32, false)]);
    assert_eq!(answer, (1, IOERR));
}

#[test]
fn a_volume_that_is_read_only_is_not_written() {
    let mut b = Bench::new("ram:?size=1MiB", true);
    let features = b.device.features();
    assert_ne!(features & feature::RO, 0);
    assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    b.ring.fill(DATA, 512, 1);
    assert_eq!(b.write(0, 512), (1, IOERR));
    assert_eq!(b.segment(request_type::DISCARD, 0, 8, 0), (1, IOERR));
    assert_eq!(b.segment(request_type::WRITE_ZEROES, 0, 8, 0), (1, IOERR));
    assert_eq!(b.read(0, 512), (513, OK));
    assert_eq!(b.ring.bytes(DATA, 512), [0; 512]);
}

#[test]
fn wrong_requests_are_answered() {
    let mut b = Bench::ram();
    let end = b.device.geometry().size / 512;
    assert_eq!(b.request(99, 0, &[]), (1, UNSUPP));
    assert_eq!(b.read(end - 1, 512), (513, OK));
    assert_eq!(b.read(end, 512), (1, IOERR));
    assert_eq!(b.read(end - 1, 1024), (1, IOERR));
    assert_eq!(b.read(u64::MAX, 512), (1, IOERR));
    assert_eq!(b.read(u64::MAX / 512, 512), (1, IOERR));
    assert_eq!(b.read(0, 511), (1, IOERR));
    assert_eq!(b.write(0, 513), (1, IOERR));
    let nowhere = [(NOWHERE, 512, true)];
    assert_eq!(b.request(request_type::IN, 0, &nowhere), (1, IOERR));
    let over = [(MEMORY as u64 - 256, 512, true)];
    assert_eq!(b.request(request_type::IN, 0, &over), (1, IOERR));
    // A header that is too short, one that is not there, one behind what the device writes.
    let status = (STATUS, 1, true);
    assert_eq!(b.parts(&[(HEADER, 15, false), status]), (1, IOERR));
    assert_eq!(b.parts(&[(NOWHERE, 16, false), status]), (1, IOERR));
    b.ring.header(HEADER, request_type::FLUSH, 0);
    let behind = [(DATA, 512, true), (HEADER, 16, false), status];
    assert_eq!(b.parts(&behind), (1, IOERR));
}

#[test]
fn blocks_of_4096_bytes_are_not_divided() {
    let mut b = Bench::new("ram:?size=1MiB&block_size=4096", false);
    assert_eq!(b.device.config().blk_size.get(), 4096);
    assert_eq!(b.read(8, 4096), (4097, OK));
    assert_eq!(b.read(4, 4096), (1, IOERR));
    assert_eq!(b.read(8, 512), (1, IOERR));
}

#[test]
fn chains_without_a_status_are_given_back() {
    let mut b = Bench::ram();
    b.ring.header(HEADER, request_type::IN, 0);
    let header = (HEADER, 16, false);
    assert_eq!(b.parts(&[header]), (0, UNTOUCHED));
    assert_eq!(b.parts(&[header, (STATUS, 0, true)]), (0, UNTOUCHED));
    assert_eq!(b.parts(&[header, (NOWHERE, 1, true)]), (0, UNTOUCHED));
    // Chains that are cut: a next past the table, a loop, a nested table, half a descriptor.
    let ring = &mut b.ring;
    ring.descriptor(ring.base, 0, HEADER, 16, NEXT, 16);
    ring.offer(0);
    assert_eq!(b.run(), (0, UNTOUCHED));
    let ring = &mut b.ring;
    ring.descriptor(ring.base, 0, STATUS, 1, NEXT | WRITE, 0);
    ring.offer(0);
    assert_eq!(b.run(), (0, UNTOUCHED));
    let ring = &mut b.ring;
    ring.descriptor(TABLE, 0, TABLE, 16, INDIRECT, 0);
    ring.descriptor(ring.base, 0, TABLE, 16, INDIRECT, 0);
    ring.offer(0);
    assert_eq!(b.run(), (0, UNTOUCHED));
    let ring = &mut b.ring;
    ring.descriptor(ring.base, 0, TABLE, 24, INDIRECT, 0);
    ring.offer(0);
    assert_eq!(b.run(), (0, UNTOUCHED));
    // It goes on.
    assert_eq!(b.request(request_type::FLUSH, 0, &[]), (1, OK));
}

#[test]
fn an_index_that_goes_too_far_breaks_the_ring() {
    let mut b = Bench::ram();
    for _ in 0..17 {
        b.ring.offer(0);
    }
    b.ring.publish();
    let mem = b.ring.mem.clone();
    assert_eq!(b.oracle.process(&mut b.queue, &*mem), None);
    assert_eq!(b.ring.take_used(), None);
}

#[test]
fn notifications_follow_the_driver() {
    let mut b = Bench::ram();
    let mem = b.ring.mem.clone();
    let flush = |b: &mut Bench| {
        b.ring.header(HEADER, request_type::FLUSH, 0);
        b.ring.add(&[(HEADER, 16, false), (STATUS, 1, true)]);
        b.ring.publish();
        let (_, notify) = b.oracle.process(&mut b.queue, &*mem).unwrap();
        b.ring.take_used().unwrap();
        notify
    };
    assert!(flush(&mut b));
    let flags = GuestAddress(b.ring.avail_at());
    vm_memory::Bytes::write_obj(&*b.ring.mem, 1u16, flags).unwrap();
    assert!(!flush(&mut b));
    b.queue.set_event_idx(true);
    b.ring.set_used_event(1);
    assert!(!flush(&mut b), "not at the first one");
    assert!(flush(&mut b), "at the second one");
    assert!(!flush(&mut b), "once");
}

#[test]
fn the_cache_is_as_the_driver_wants_it() {
    let volume = open_volume("ram:?size=1MiB").unwrap();
    let device = Device::new(volume, DeviceOptions::default());
    device.set_acked(feature::VERSION_1);
    assert!(device.write_through(), "who cannot flush needs no flush");
    device.set_acked(feature::FLUSH);
    assert!(!device.write_through());
    assert!(!device.write_config(32, &[0]), "not negotiated");
    device.set_acked(feature::FLUSH | feature::CONFIG_WCE);
    assert!(device.write_config(32, &[0]));
    assert!(device.write_through());
    assert_eq!(device.read_config(32, 1), [0]);
    assert!(device.write_config(32, &[1]));
    assert!(!device.write_through());
    assert!(!device.write_config(0, &[1]));
    device.set_acked(feature::CONFIG_WCE);
    assert!(device.write_through());
    assert_eq!(device.read_config(32, 1), [0]);
}

#[test]
fn the_configuration_space() {
    let volume = open_volume("ram:?size=1MiB").unwrap();
    let options = DeviceOptions {
        num_queues: 3,
        ..DeviceOptions::default()
    };
    let device = Device::new(volume, options);
    assert_ne!(device.features() & feature::MQ, 0);
    let bytes = device.read_config(0, 80);
    assert_eq!(bytes.len(), 80);
    assert_eq!(bytes[..8], 2048u64.to_le_bytes());
    assert_eq!(bytes[12..16], 126u32.to_le_bytes());
    assert_eq!(bytes[20..24], 512u32.to_le_bytes());
    assert_eq!(bytes[34..36], 3u16.to_le_bytes());
    assert_eq!(bytes[60..], [0; 20]);
    assert_eq!(device.read_config(34, 2), 3u16.to_le_bytes());
}
