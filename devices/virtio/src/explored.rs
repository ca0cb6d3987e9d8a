//! The rings under every interleaving and every stale value that C11 allows, on rings of two. The driver is
//! written out here by the specification; what it does wrong would be this file's fault.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p bluff-virtio --release --lib explored`
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use bluff_memory::{GuestMemory, Region, RegionSpec, Space};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

use crate::sync::modelled::{self, Bug, seed};
use crate::sync::need_event;
use crate::{Chain, Limits, Pop, Position, QueueSetup, Ring, RingAddresses, features};

const SIZE: u16 = 2;
/// Guest address of the buffers.
const AT: u64 = 0x1000;

/// Memory that the buffers lie in. The rings' own parts are loom's.
static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(|| {
    // SAFETY: a literal name; the descriptor is new.
    let file = unsafe {
        let fd = libc::memfd_create(c"explored".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0 && libc::ftruncate(fd, 4096) == 0);
        OwnedFd::from_raw_fd(fd)
    };
    let spec = RegionSpec {
        guest: AT,
        len: 4096,
        user: AT,
        offset: 0,
        file,
    };
    GuestMemory::new(vec![Region::new(spec, &GuestMemory::empty()).unwrap()]).unwrap()
});

fn setup(packed: bool, event_idx: bool) -> QueueSetup {
    let when = |on: bool, bit: u64| if on { bit } else { 0 };
    QueueSetup {
        index: 0,
        size: SIZE,
        features: features::VERSION_1
            | when(packed, features::RING_PACKED)
            | when(event_idx, features::EVENT_IDX),
        addresses: RingAddresses {
            space: Space::Guest,
            desc: AT,
            driver: AT,
            device: AT,
        },
        position: Position::START,
        memory: MEMORY.clone(),
        kick: None,
        call: None,
        error: None,
        inflight: None,
        log: None,
        enabled: true,
    }
}

/// Takes the next chain; it must be the buffer of 16 bytes at `offset`.
fn take(ring: &mut impl Ring, offset: u64) -> Option<Chain> {
    let mut chain = Chain::default();
    match ring.pop(&mut chain).expect("the driver breaks no rule") {
        Pop::Empty => None,
        Pop::Bad(e) => panic!("a stale descriptor: {e}"),
        Pop::Chain => {
            let host = MEMORY
                .contiguous(Space::Guest, AT + offset, 16, 1)
                .expect("inside");
            let first = chain.writable().first().map(bluff_memory::IoVec::ptr);
            assert_eq!(first, Some(host), "a stale descriptor");
            Some(chain)
        }
    }
}

fn take_waiting(ring: &mut impl Ring, offset: u64) -> Chain {
    loop {
        match take(ring, offset) {
            Some(chain) => return chain,
            None => thread::yield_now(),
        }
    }
}

macro_rules! cell {
    ($name:ident) => {
        modelled::$name($name::new(0))
    };
}

/// What a driver does on either kind of ring.
trait Driver: Send + Sync + 'static {
    type Ring: Ring + Send + 'static;

    fn new(event_idx: bool) -> (Arc<Self>, Self::Ring);

    /// Makes the `n`th buffer available, at `offset`; says whether the device is to be notified.
    fn offer(&self, n: u16, offset: u64) -> bool;

    /// Whether the `n`th buffer was used, with this length.
    fn used(&self, n: u16) -> Option<u32>;

    /// Asks for an interrupt for the `n`th buffer; says whether it was used already.
    fn enable(&self, n: u16) -> bool;

    fn disable(&self);
}

struct Split {
    desc: Vec<[modelled::AtomicU64; 2]>,
    avail_flags: modelled::AtomicU16,
    avail_idx: modelled::AtomicU16,
    avail_ring: Vec<modelled::AtomicU16>,
    used_event: modelled::AtomicU16,
    used_flags: modelled::AtomicU16,
    used_idx: modelled::AtomicU16,
    used_ring: Vec<[modelled::AtomicU32; 2]>,
    avail_event: modelled::AtomicU16,
    event_idx: bool,
}

impl Driver for Split {
    type Ring = crate::split::Ring;

    fn new(event_idx: bool) -> (Arc<Self>, Self::Ring) {
        let this = Arc::new(Self {
            desc: (0..SIZE)
                .map(|_| [cell!(AtomicU64), cell!(AtomicU64)])
                .collect(),
            avail_flags: cell!(AtomicU16),
            avail_idx: cell!(AtomicU16),
            avail_ring: (0..SIZE).map(|_| cell!(AtomicU16)).collect(),
            used_event: cell!(AtomicU16),
            used_flags: cell!(AtomicU16),
            used_idx: cell!(AtomicU16),
            used_ring: (0..SIZE)
                .map(|_| [cell!(AtomicU32), cell!(AtomicU32)])
                .collect(),
            avail_event: cell!(AtomicU16),
            event_idx,
        });
        let parts = crate::split::Parts {
            desc: this.desc.as_ptr(),
            avail_flags: &raw const this.avail_flags,
            avail_idx: &raw const this.avail_idx,
            avail_ring: this.avail_ring.as_ptr(),
            used_event: &raw const this.used_event,
            used_flags: &raw const this.used_flags,
            used_idx: &raw const this.used_idx,
            used_ring: this.used_ring.as_ptr(),
            avail_event: &raw const this.avail_event,
        };
        let limits = Limits { indirect: 4 };
        let ring = crate::split::Ring::with_parts(parts, &setup(false, event_idx), limits);
        (this, ring.unwrap())
    }

    fn offer(&self, n: u16, offset: u64) -> bool {
        let slot = usize::from(n % SIZE);
        self.desc[slot][0].0.store(AT + offset, Ordering::Relaxed);
        // 16 bytes, device-writable.
        self.desc[slot][1].0.store(16 | 2 << 32, Ordering::Relaxed);
        self.avail_ring[slot]
            .0
            .store(slot as u16, Ordering::Relaxed);
        // §2.7.13.3.1: a barrier before the index.
        self.avail_idx.0.store(n + 1, Ordering::Release);
        // §2.7.13.4.1: a barrier before the device's wish is read.
        fence(Ordering::SeqCst);
        match self.event_idx {
            true => need_event(self.avail_event.0.load(Ordering::Relaxed), n + 1, n),
            false => self.used_flags.0.load(Ordering::Relaxed) & 1 == 0,
        }
    }

    fn used(&self, n: u16) -> Option<u32> {
        if self.used_idx.0.load(Ordering::Acquire) == n {
            return None;
        }
        let entry = &self.used_ring[usize::from(n % SIZE)];
        assert_eq!(entry[0].0.load(Ordering::Relaxed), u32::from(n % SIZE));
        Some(entry[1].0.load(Ordering::Relaxed))
    }

    fn enable(&self, n: u16) -> bool {
        match self.event_idx {
            true => self.used_event.0.store(n, Ordering::Relaxed),
            false => self.avail_flags.0.store(0, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        self.used_idx.0.load(Ordering::Relaxed) != n
    }

    fn disable(&self) {
        match self.event_idx {
            true => self.used_event.0.store(0x8000, Ordering::Relaxed),
            false => self.avail_flags.0.store(1, Ordering::Relaxed),
        }
    }
}

struct Packed {
    ring: Vec<crate::packed::Slot>,
    driver: crate::packed::Events,
    device: crate::packed::Events,
    event_idx: bool,
}

fn events() -> crate::packed::Events {
    crate::packed::Events {
        off_wrap: cell!(AtomicU16),
        flags: cell!(AtomicU16),
    }
}

/// Position and wrap counter of the `n`th buffer.
fn place(n: u16) -> (usize, bool) {
    (usize::from(n % SIZE), n / SIZE % 2 == 0)
}

fn off_wrap(n: u16) -> u16 {
    let (at, wrap) = place(n);
    at as u16 | u16::from(wrap) << 15
}

impl Driver for Packed {
    type Ring = crate::packed::Ring;

    fn new(event_idx: bool) -> (Arc<Self>, Self::Ring) {
        let slot = |_| crate::packed::Slot {
            addr: cell!(AtomicU64),
            len: cell!(AtomicU32),
            id: cell!(AtomicU16),
            flags: cell!(AtomicU16),
        };
        let this = Arc::new(Self {
            ring: (0..SIZE).map(slot).collect(),
            driver: events(),
            device: events(),
            event_idx,
        });
        let parts = crate::packed::Parts {
            ring: this.ring.as_ptr(),
            driver: &raw const this.driver,
            device: &raw const this.device,
        };
        let limits = Limits { indirect: 4 };
        let ring = crate::packed::Ring::with_parts(parts, &setup(true, event_idx), limits);
        (this, ring.unwrap())
    }

    fn offer(&self, n: u16, offset: u64) -> bool {
        let (at, wrap) = place(n);
        let slot = &self.ring[at];
        slot.addr.0.store(AT + offset, Ordering::Relaxed);
        slot.len.0.store(16, Ordering::Relaxed);
        slot.id.0.store(n, Ordering::Relaxed);
        // §2.8.21.1.1: a barrier before the flags.
        let bits = if wrap { 1 << 7 } else { 1 << 15 };
        slot.flags.0.store(2 | bits, Ordering::Release);
        fence(Ordering::SeqCst);
        match self.device.flags.0.load(Ordering::Acquire) {
            0 => true,
            1 => false,
            _ => self.device.off_wrap.0.load(Ordering::Relaxed) == off_wrap(n),
        }
    }

    fn used(&self, n: u16) -> Option<u32> {
        let (at, wrap) = place(n);
        let bits = if wrap { 1 << 7 | 1 << 15 } else { 0 };
        if self.ring[at].flags.0.load(Ordering::Acquire) & (1 << 7 | 1 << 15) != bits {
            return None;
        }
        assert_eq!(self.ring[at].id.0.load(Ordering::Relaxed), n);
        Some(self.ring[at].len.0.load(Ordering::Relaxed))
    }

    fn enable(&self, n: u16) -> bool {
        if self.event_idx {
            self.driver.off_wrap.0.store(off_wrap(n), Ordering::Relaxed);
            self.driver.flags.0.store(2, Ordering::Release);
        } else {
            self.driver.flags.0.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        let (at, wrap) = place(n);
        let bits = if wrap { 1 << 7 | 1 << 15 } else { 0 };
        self.ring[at].flags.0.load(Ordering::Relaxed) & (1 << 7 | 1 << 15) == bits
    }

    fn disable(&self) {
        self.driver.flags.0.store(1, Ordering::Relaxed);
    }
}

/// Descriptors go one way and data and used entries the other, twice through the same places.
fn publication<D: Driver>() {
    LazyLock::force(&MEMORY);
    loom::model(|| {
        let (driver, mut ring) = D::new(false);
        // What the buffers hold: loom reports accesses that nothing orders.
        let data = Arc::new(UnsafeCell::new(0u16));
        let theirs = data.clone();
        let device = thread::spawn(move || {
            for n in 0..2u16 {
                let chain = take_waiting(&mut ring, 16 * u64::from(n));
                // SAFETY: what this test is about; loom checks it.
                theirs.with_mut(|data| unsafe {
                    assert_eq!(*data, n, "stale data");
                    *data = 10 + n;
                });
                ring.complete(&chain, 10 + u32::from(n));
                ring.publish();
            }
        });
        for n in 0..2u16 {
            // SAFETY: as above.
            data.with_mut(|data| unsafe { *data = n });
            driver.offer(n, 16 * u64::from(n));
            let len = loop {
                match driver.used(n) {
                    Some(len) => break len,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(len, 10 + u32::from(n), "a stale used entry");
            // SAFETY: as above.
            let got = data.with(|data| unsafe { *data });
            assert_eq!(got, 10 + n, "stale data");
        }
        device.join().expect("no panic");
    });
}

/// Two buffers in one batch: whoever sees the first sees both.
fn batch<D: Driver>() {
    LazyLock::force(&MEMORY);
    loom::model(|| {
        let (driver, mut ring) = D::new(false);
        driver.offer(0, 0);
        driver.offer(1, 16);
        let device = thread::spawn(move || {
            let first = take_waiting(&mut ring, 0);
            let second = take_waiting(&mut ring, 16);
            ring.complete(&first, 10);
            ring.complete(&second, 11);
            ring.publish();
        });
        while driver.used(0).is_none() {
            thread::yield_now();
        }
        let used = (driver.used(0), driver.used(1));
        assert_eq!(used, (Some(10), Some(11)), "a stale used entry");
        device.join().expect("no panic");
    });
}

/// The driver publishes while the device goes to sleep: it is woken, or it has seen the buffer.
fn no_lost_kick<D: Driver>(event_idx: bool) {
    LazyLock::force(&MEMORY);
    loom::model(move || {
        let (driver, mut ring) = D::new(event_idx);
        // One round before, so that old values are there to be read.
        driver.offer(0, 0);
        let chain = take(&mut ring, 0).expect("offered");
        ring.complete(&chain, 1);
        ring.publish();
        ring.disable_notifications();
        let device = thread::spawn(move || ring.enable_notifications());
        let kick = driver.offer(1, 16);
        let seen = device.join().expect("no panic");
        assert!(kick || seen, "the device sleeps and nobody wakes it");
    });
}

/// The device publishes while the driver goes to sleep.
fn no_lost_interrupt<D: Driver>(event_idx: bool) {
    LazyLock::force(&MEMORY);
    loom::model(move || {
        let (driver, mut ring) = D::new(event_idx);
        driver.disable();
        // The first notification is never suppressed.
        driver.offer(0, 0);
        let chain = take(&mut ring, 0).expect("offered");
        ring.complete(&chain, 1);
        ring.publish();
        driver.offer(1, 16);
        let device = thread::spawn(move || {
            let chain = take(&mut ring, 16).expect("offered");
            ring.complete(&chain, 1);
            ring.publish()
        });
        let seen = driver.enable(1);
        let interrupt = device.join().expect("no panic");
        assert!(interrupt || seen, "the driver sleeps and nobody wakes it");
    });
}

macro_rules! explore {
    ($kind:ident, $driver:ident) => {
        mod $kind {
            use super::*;

            #[test]
            fn publishes() {
                publication::<$driver>();
            }

            #[test]
            fn publishes_a_batch_at_once() {
                batch::<$driver>();
            }

            #[test]
            fn loses_no_kick() {
                no_lost_kick::<$driver>(false);
                no_lost_kick::<$driver>(true);
            }

            #[test]
            fn loses_no_interrupt() {
                no_lost_interrupt::<$driver>(false);
                no_lost_interrupt::<$driver>(true);
            }

            #[test]
            #[should_panic]
            fn a_missing_release_is_found() {
                seed(Bug::Release);
                publication::<$driver>();
            }

            #[test]
            #[should_panic]
            fn a_missing_acquire_is_found() {
                seed(Bug::Acquire);
                publication::<$driver>();
            }

            #[test]
            #[should_panic(expected = "the device sleeps")]
            fn a_missing_fence_before_sleep_is_found() {
                seed(Bug::Fence);
                no_lost_kick::<$driver>(false);
            }

            #[test]
            #[should_panic(expected = "the device sleeps")]
            fn a_missing_fence_before_sleep_is_found_with_event_idx() {
                seed(Bug::Fence);
                no_lost_kick::<$driver>(true);
            }

            #[test]
            #[should_panic(expected = "the driver sleeps")]
            fn a_missing_fence_after_use_is_found() {
                seed(Bug::Fence);
                no_lost_interrupt::<$driver>(false);
            }

            #[test]
            #[should_panic(expected = "the driver sleeps")]
            fn a_missing_fence_after_use_is_found_with_event_idx() {
                seed(Bug::Fence);
                no_lost_interrupt::<$driver>(true);
            }
        }
    };
}

explore!(split, Split);
explore!(packed, Packed);
