//! The `blkio` crate as the front end: a virtio-blk driver that no one here wrote.

use std::mem::MaybeUninit;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use bluff_reference::{DeviceOptions, Endpoint, Server, open_volume};

const BLOCK: usize = 4096;
const DEPTH: usize = 32;

fn finish(queue: &mut Blkioq, count: usize) {
    let mut done: Vec<MaybeUninit<Completion>> =
        (0..count).map(|_| MaybeUninit::uninit()).collect();
    let n = queue.do_io(&mut done, count, None, None).unwrap();
    assert_eq!(n, count);
    for completion in &done[..n] {
        // SAFETY: do_io has filled that many.
        #[allow(unsafe_code)]
        let completion = unsafe { completion.assume_init_ref() };
        assert_eq!(completion.ret, 0, "request {}", completion.user_data);
    }
}

fn drive(poll: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let volume = open_volume("ram:?size=64MiB").unwrap();
    let options = DeviceOptions {
        num_queues: 2,
        poll,
        ..DeviceOptions::default()
    };
    let mut server = Server::new(volume, options, Endpoint::Path(path.clone())).unwrap();
    let stop = server.stop();
    let thread = std::thread::spawn(move || server.run());

    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", path.to_str().unwrap()).unwrap();
    blkio.connect().unwrap();
    assert_eq!(blkio.get_u64("capacity").unwrap(), 64 << 20);
    blkio.set_i32("num-queues", 2).unwrap();
    let mut started = blkio.start().unwrap();
    let len = BLOCK * DEPTH;
    let region = blkio.alloc_mem_region(len).unwrap();
    blkio.map_mem_region(&region).unwrap();
    let memory = region.addr as *mut u8;
    let fill = |byte: u8| {
        // SAFETY: the region is ours, and nothing is in flight.
        #[allow(unsafe_code)]
        unsafe {
            memory.write_bytes(byte, len);
        }
    };
    let holds = |n: usize, byte: u8| {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        let block = unsafe { std::slice::from_raw_parts(memory.add(n * BLOCK), BLOCK) };
        block.iter().all(|&b| b == byte)
    };
    let none = ReqFlags::empty();
    for (i, queue) in started.queues.iter_mut().enumerate() {
        for round in 0..20u8 {
            let byte = 1 + round + 100 * i as u8;
            fill(byte);
            for n in 0..DEPTH {
                let at = (n * BLOCK) as u64;
                queue.write(at, memory.wrapping_add(n * BLOCK), BLOCK, n, none);
            }
            finish(queue, DEPTH);
            queue.flush(0, none);
            finish(queue, 1);
            fill(0);
            for n in 0..DEPTH {
                let at = (n * BLOCK) as u64;
                queue.read(at, memory.wrapping_add(n * BLOCK), BLOCK, n, none);
            }
            finish(queue, DEPTH);
            assert!((0..DEPTH).all(|n| holds(n, byte)));
        }
        fill(0xff);
        queue.discard(BLOCK as u64, BLOCK as u64, 0, none);
        queue.write_zeroes(2 * BLOCK as u64, BLOCK as u64, 1, none);
        queue.write_zeroes(3 * BLOCK as u64, BLOCK as u64, 2, ReqFlags::NO_UNMAP);
        finish(queue, 3);
        for n in 0..DEPTH {
            let at = (n * BLOCK) as u64;
            queue.read(at, memory.wrapping_add(n * BLOCK), BLOCK, n, none);
        }
        finish(queue, DEPTH);
        assert!(holds(2, 0) && holds(3, 0) && holds(4, 20 + 100 * i as u8));
    }
    drop(started);
    blkio.unmap_mem_region(&region);
    drop(blkio);
    stop.stop();
    thread.join().unwrap().unwrap();
    assert!(!path.exists());
}

#[test]
fn write_read_flush_discard() {
    drive(false);
}

#[test]
fn the_same_polled() {
    drive(true);
}
