//! Frames that wait for their receiver.

use std::fmt;

use crate::mailbox::{self, Envelope};
use crate::{BATCH, Batch, Lent};

/// Bytes that may wait: a few frames of 64 KiB, or hundreds of ordinary ones.
const SIZE: usize = 256 << 10;

/// Frames, copied, in their order. It is bounded, and takes no memory before it is used.
#[derive(Default)]
pub struct Backlog(Option<Box<Kept>>);

struct Kept {
    sender: mailbox::Sender,
    receiver: mailbox::Receiver,
    batch: Batch,
    envelopes: [Envelope; BATCH],
}

impl fmt::Debug for Backlog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backlog(empty: {})", self.is_empty())
    }
}

impl Backlog {
    /// Nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|kept| kept.receiver.is_empty())
    }

    /// Copies frame `i` of `batch`; `false` where there is no room.
    pub fn push(&mut self, batch: &Batch, i: usize) -> bool {
        let kept = self.0.get_or_insert_with(|| {
            let (sender, receiver) = mailbox::channel(SIZE);
            Box::new(Kept {
                sender,
                receiver,
                batch: Batch::default(),
                envelopes: [Envelope::default(); BATCH],
            })
        });
        kept.sender.put(batch, i, Envelope::default())
    }

    /// Shows the frames to `take`, the first one first, until it does not take one.
    pub fn drain(&mut self, mut take: impl FnMut(Lent<'_>, usize) -> bool) {
        let Some(kept) = &mut self.0 else { return };
        loop {
            let (mut shown, mut taken) = (0, 0);
            let Kept {
                receiver,
                batch,
                envelopes,
                ..
            } = &mut **kept;
            receiver.take(batch, envelopes, |mut batch, all| {
                shown = all.len();
                while taken < shown && take(batch.again(), taken) {
                    taken += 1;
                }
                taken
            });
            if taken < shown || shown == 0 {
                return;
            }
        }
    }

    /// Forgets them; says how many there were.
    pub fn clear(&mut self) -> u64 {
        let mut count = 0;
        self.drain(|_, _| {
            count += 1;
            true
        });
        self.0 = None;
        count
    }
}
