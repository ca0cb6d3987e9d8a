//! A namespace on this reactor: its channel, and the operations that wait for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_block::{BlockError, ChannelHandle, Completion, InUse, Op, lock_pause};
use bluff_reactor::Context;

use crate::namespace::Namespace;
use crate::spec::Status;

/// When to say that a volume is held by somebody else.
const TELL: Duration = Duration::from_secs(2);

/// A namespace on this reactor.
pub(super) struct Space {
    pub(super) namespace: Arc<Namespace>,
    pub(super) channel: ChannelHandle,
    /// Operations that the channel has not taken yet.
    pub(super) ops: Vec<Op>,
    /// It is not in the table any more, and ends with what is in flight, also where its namespace is attached again meanwhile.
    pub(super) ends: bool,
    /// What its commands are refused with: the controller is no way to it now.
    pub(super) refusal: Option<Status>,
    /// How many it has taken and not completed.
    out: usize,
    lock: Lock,
}

enum Lock {
    Held(#[allow(dead_code, reason = "held until it is dropped")] InUse),
    Waits {
        since: Instant,
        next: Instant,
        told: bool,
    },
}

impl Space {
    /// Opens a channel. The volume's lock is taken before the first operation.
    pub(super) fn open(
        cx: &mut Context<'_>,
        namespace: &Arc<Namespace>,
    ) -> Result<Self, BlockError> {
        let now = cx.now();
        Ok(Self {
            channel: ChannelHandle::open(cx, namespace.volume())?,
            namespace: namespace.clone(),
            ops: Vec::with_capacity(32),
            ends: false,
            refusal: None,
            out: 0,
            lock: Lock::Waits {
                since: now,
                next: now,
                told: false,
            },
        })
    }

    /// Offers operations to the channel; says whether it took any.
    #[inline(always)]
    pub(super) fn submit(&mut self, cx: &mut Context<'_>) -> bool {
        if self.ops.is_empty() || !(matches!(self.lock, Lock::Held(_)) || self.try_lock(cx)) {
            return false;
        }
        let n = self.channel.submit(&self.ops);
        if n == self.ops.len() {
            self.ops.clear();
        } else {
            self.ops.drain(..n);
        }
        if n > 0 {
            self.channel.kick();
        }
        self.out += n;
        n > 0
    }

    /// Takes completions.
    #[inline(always)]
    pub(super) fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        if self.out > 0 {
            let before = done.len();
            self.channel.poll(now, done);
            self.out -= done.len() - before;
        }
    }

    /// Takes the volume's lock, or tries again later; operations wait.
    #[cold]
    fn try_lock(&mut self, cx: &mut Context<'_>) -> bool {
        let Lock::Waits { since, next, told } = &mut self.lock else {
            return true;
        };
        let now = cx.now();
        if now < *next {
            return false;
        }
        match InUse::new(self.namespace.volume().clone()) {
            Ok(lock) => {
                self.lock = Lock::Held(lock);
                true
            }
            Err(e) => {
                if !*told && now - *since >= TELL {
                    *told = true;
                    log::error!(
                        "namespace {}: {e}: {:?}; it is served when that changes",
                        self.namespace.nsid(),
                        self.namespace.volume()
                    );
                }
                *next = now + lock_pause();
                cx.timer(cx.id(), *next, 0);
                false
            }
        }
    }
}
