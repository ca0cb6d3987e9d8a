//! libblkio as the front end: a virtio-blk driver that no one here wrote, and the same I/O for every back end.
//!
//! ```text
//!   each queue:  write its area --> flush --> the next queue reads it --> discard, zeroes --> read
//! ```
//! All queues are at work at the same time, each in an area of its own, so that what is right does not
//! depend on an order.
//!
//! Unsafe, because libblkio takes and gives memory by address.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};

/// Bytes of a request.
const BLOCK: usize = 4096;
/// Requests that a queue has in flight; an area has as many blocks.
const DEPTH: usize = 32;
/// How long a queue may take for what it was given.
const LIMIT: Duration = Duration::from_secs(20);
/// Blocks of an area that are discarded or zeroed.
const DISCARDED: usize = 1;
const ZEROED: [(usize, ReqFlags); 2] = [(2, ReqFlags::empty()), (3, ReqFlags::NO_UNMAP)];

/// How many queues to ask for.
#[derive(Clone, Copy, Debug)]
pub struct Queues {
    /// Queues that wait for interrupts.
    pub waiting: u16,
    /// Queues that poll and want none.
    pub polling: u16,
}

/// What a block holds after a write: no two blocks or rounds are the same.
fn content(block: usize, round: usize) -> Vec<u8> {
    let word = |i: usize| (round << 48 | block << 16 | i) as u64;
    (1..=BLOCK / 8)
        .flat_map(|i| word(i).to_le_bytes())
        .collect()
}

/// Memory that is shared with the device.
#[derive(Clone, Copy)]
struct Memory(*mut u8);

impl Memory {
    /// Where a block of the disk has its data.
    fn at(self, block: usize) -> *mut u8 {
        self.0.wrapping_add(block * BLOCK)
    }

    fn put(self, block: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), BLOCK);
        // SAFETY: the region has room for all blocks, and nothing is in flight for this one.
        unsafe {
            self.at(block)
                .copy_from_nonoverlapping(bytes.as_ptr(), BLOCK);
        };
    }

    fn get(self, block: usize) -> Vec<u8> {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.at(block), BLOCK) }.to_vec()
    }
}

/// Hands to the device what a queue was given.
fn submit(queue: &mut Blkioq) {
    let n = queue
        .do_io(&mut [], 0, None, None)
        .expect("requests are taken");
    assert_eq!(n, 0);
}

/// Waits until so many requests are done, each without an error.
fn finish(queue: &mut Blkioq, count: usize) {
    let mut done: Vec<MaybeUninit<Completion>> =
        (0..count).map(|_| MaybeUninit::uninit()).collect();
    let mut limit = LIMIT;
    let n = queue.do_io(&mut done, count, Some(&mut limit), None);
    let n = n.unwrap_or_else(|e| panic!("{count} requests: {e}"));
    assert_eq!(n, count);
    for completion in &done[..n] {
        // SAFETY: do_io has filled that many.
        let completion = unsafe { completion.assume_init_ref() };
        assert_eq!(completion.ret, 0, "request {}", completion.user_data);
    }
}

/// Reads the area of each queue by the queue after it.
fn read_all(queues: &mut [&mut Blkioq], memory: Memory) {
    let count = queues.len();
    for (i, queue) in queues.iter_mut().enumerate() {
        let area = (i + 1) % count * DEPTH;
        for block in area..area + DEPTH {
            memory.put(block, &[0xa5; BLOCK]);
            let at = (block * BLOCK) as u64;
            queue.read(at, memory.at(block), BLOCK, block, ReqFlags::empty());
        }
        submit(queue);
    }
    for queue in queues {
        finish(queue, DEPTH);
    }
}

/// Writes, flushes, reads, discards and zeroes through every queue at once, `rounds` times, and checks what is
/// read. Gives what the beginning of the disk holds in the end, all of it flushed.
///
/// # Panics
/// Where the device is not as it should be, has another capacity (in bytes), or is too slow.
pub fn exercise(socket: &Path, capacity: u64, queues: Queues, rounds: usize) -> Vec<u8> {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("libblkio has the driver");
    let path = socket.to_str().expect("a path that is text");
    blkio
        .set_str("path", path)
        .expect("a property of the driver");
    blkio.connect().expect("the back end listens");
    assert_eq!(blkio.get_u64("capacity").expect("it says so"), capacity);
    for (name, count) in [
        ("num-queues", queues.waiting),
        ("num-poll-queues", queues.polling),
    ] {
        blkio
            .set_i32(name, count.into())
            .expect("a property of the driver");
    }
    let mut started = blkio.start().expect("queues start");
    let mut all: Vec<&mut Blkioq> = Vec::new();
    all.extend(started.queues.iter_mut());
    all.extend(started.poll_queues.iter_mut());
    let blocks = all.len() * DEPTH;
    assert!(capacity >= (blocks * BLOCK) as u64, "room for all areas");
    let region = blkio.alloc_mem_region(blocks * BLOCK).expect("memory");
    blkio.map_mem_region(&region).expect("memory is shared");
    let memory = Memory(region.addr as *mut u8);
    for round in 0..rounds {
        write_all(&mut all, memory, round);
        read_all(&mut all, memory);
        for block in 0..blocks {
            assert!(
                memory.get(block) == content(block, round),
                "block {block} of round {round}"
            );
        }
        clear_some(&mut all);
        read_all(&mut all, memory);
        for block in 0..blocks {
            let zeroed = ZEROED.iter().any(|(i, _)| *i == block % DEPTH);
            let expected = if zeroed {
                vec![0; BLOCK]
            } else {
                content(block, round)
            };
            // What was discarded may read as anything.
            let free = block % DEPTH == DISCARDED;
            assert!(
                free || memory.get(block) == expected,
                "block {block} of round {round}"
            );
        }
    }
    write_all(&mut all, memory, rounds);
    drop(started);
    blkio.unmap_mem_region(&region);
    (0..blocks)
        .flat_map(|block| content(block, rounds))
        .collect()
}

/// Every queue writes its area and flushes. The last block is written with FUA, which the driver
/// makes of a flush.
fn write_all(queues: &mut [&mut Blkioq], memory: Memory, round: usize) {
    for (i, queue) in queues.iter_mut().enumerate() {
        for block in i * DEPTH..(i + 1) * DEPTH {
            memory.put(block, &content(block, round));
            let last = block % DEPTH == DEPTH - 1;
            let flags = if last {
                ReqFlags::FUA
            } else {
                ReqFlags::empty()
            };
            let at = (block * BLOCK) as u64;
            queue.write(at, memory.at(block), BLOCK, block, flags);
        }
        submit(queue);
    }
    for queue in queues.iter_mut() {
        finish(queue, DEPTH);
        queue.flush(0, ReqFlags::empty());
        submit(queue);
    }
    for queue in queues {
        finish(queue, 1);
    }
}

fn clear_some(queues: &mut [&mut Blkioq]) {
    let len = BLOCK as u64;
    for (i, queue) in queues.iter_mut().enumerate() {
        let at = |block: usize| ((i * DEPTH + block) * BLOCK) as u64;
        queue.discard(at(DISCARDED), len, 0, ReqFlags::empty());
        for (block, flags) in ZEROED {
            queue.write_zeroes(at(block), len, block, flags);
        }
        submit(queue);
    }
    for queue in queues {
        finish(queue, 1 + ZEROED.len());
    }
}
