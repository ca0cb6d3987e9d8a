//! Memory of our own: for what is read to be compared, or to be written elsewhere, and zeroes.

use bluff_memory::IoVec;

/// Bytes of a bounce buffer.
pub(super) const BOUNCE: usize = 128 << 10;
/// Bounce buffers of a worker. Commands that find none wait for one.
const MOST: usize = 4;
/// Bytes of zeroes that there are.
const ZEROED: usize = 64 << 10;

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; 4096]);

#[repr(align(4096))]
struct Zeroes(#[allow(dead_code, reason = "read through a pointer")] [u8; ZEROED]);

static ZEROES: Zeroes = Zeroes([0; ZEROED]);

/// A bounce buffer: it does not move.
pub(super) struct Bounce(Vec<Page>);

impl Bounce {
    fn new() -> Self {
        Self(vec![Page([0; 4096]); BOUNCE / 4096])
    }

    /// Its first `len` bytes, for an operation. Until that is completed [`Bounce::bytes`] is not called.
    pub(super) fn buffer(&mut self, len: u64) -> IoVec {
        assert!(len <= BOUNCE as u64);
        IoVec::new(self.0.as_mut_ptr().cast(), len as usize)
    }

    /// Its first `len` bytes.
    pub(super) fn bytes(&self, len: u64) -> impl Iterator<Item = &[u8]> {
        let len = len as usize;
        self.0
            .iter()
            .take(len.div_ceil(4096))
            .enumerate()
            .map(move |(i, page)| &page.0[..(len - i * 4096).min(4096)])
    }
}

/// The bounce buffers of a worker.
#[derive(Default)]
pub(super) struct Bounces {
    free: Vec<Bounce>,
    made: usize,
}

impl Bounces {
    /// One, where not all are taken.
    pub(super) fn take(&mut self) -> Option<Bounce> {
        self.free.pop().or_else(|| {
            let one = (self.made < MOST).then(Bounce::new);
            self.made += usize::from(one.is_some());
            one
        })
    }

    pub(super) fn give(&mut self, bounce: Bounce) {
        self.free.push(bounce);
    }
}

/// Buffers of `len` zeroes, for a write.
pub(crate) fn zeroes(mut len: u64, out: &mut Vec<IoVec>) {
    while len > 0 {
        let here = len.min(ZEROED as u64);
        // Only read: a write takes from its buffers.
        let ptr = (&raw const ZEROES).cast::<u8>().cast_mut();
        out.push(IoVec::new(ptr, here as usize));
        len -= here;
    }
}
