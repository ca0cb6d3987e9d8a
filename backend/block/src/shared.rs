//! One channel for all queues of a reactor that use the same volume.
//!
//! A channel may be a connection, so a thousand queues share one. Each queue has a [`ChannelHandle`]:
//! it submits straight into the channel and polls it itself, so that a single queue pays nothing for
//! the sharing. What it finds for others it puts into their inboxes. While everybody sleeps an actor
//! of its own, the hub, is what the channel wakes; it polls, and wakes those concerned.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use bluff_reactor::{Actor, ActorId, Context, Poll, Turn, Waker};

use crate::{BlockError, Cancel, Channel, Completion, Op, OpenContext, Tag, Volume};

/// Where the handle's number stands in a tag; below it is the user's part.
const SHIFT: u32 = 48;

struct User {
    waker: Option<Waker>,
    inbox: Vec<Completion>,
    in_flight: usize,
    /// It waits because the channel was busy, perhaps with the operations of others.
    starved: bool,
}

struct Inner {
    // Declared before `_volume`: a channel is dropped before what it is a channel of.
    channel: Box<dyn Channel>,
    _volume: Arc<dyn Volume>,
    users: Vec<User>,
    scratch: Vec<Completion>,
    hub: Waker,
    /// When the hub's timer will go off.
    timer: Option<Instant>,
}

thread_local! {
    /// The channels of this thread's reactor, by the address of their volume.
    static OPEN: RefCell<Vec<(usize, Weak<RefCell<Inner>>)>> = const { RefCell::new(Vec::new()) };
}

/// A queue's share of a channel.
pub struct ChannelHandle {
    inner: Rc<RefCell<Inner>>,
    index: u16,
}

impl std::fmt::Debug for ChannelHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChannelHandle({})", self.index)
    }
}

impl ChannelHandle {
    /// Opens a channel of `volume` on this reactor, or shares the one that is open, for the actor
    /// that is being called or built.
    ///
    /// # Errors
    /// Where the channel cannot be opened, or has 65,536 users already.
    pub fn open(cx: &mut Context<'_>, volume: &Arc<dyn Volume>) -> Result<Self, BlockError> {
        let key = Arc::as_ptr(volume).cast::<()>() as usize;
        let found = OPEN.with_borrow_mut(|open| {
            open.retain(|(_, weak)| weak.strong_count() > 0);
            open.iter()
                .find(|(k, _)| *k == key)
                .and_then(|(_, weak)| weak.upgrade())
        });
        let inner = match found {
            Some(inner) => inner,
            None => open_channel(cx, volume, key)?,
        };
        let waker = cx.waker(cx.id());
        let user = User {
            waker: Some(waker),
            inbox: Vec::new(),
            in_flight: 0,
            starved: false,
        };
        let index = {
            let users = &mut inner.borrow_mut().users;
            // A number is used again when nothing can arrive for the one who had it.
            match users
                .iter()
                .position(|u| u.waker.is_none() && u.in_flight == 0)
            {
                Some(i) => {
                    users[i] = user;
                    i
                }
                None => {
                    users.push(user);
                    users.len() - 1
                }
            }
        };
        let index = u16::try_from(index).map_err(|_| BlockError::Unavailable)?;
        Ok(Self { inner, index })
    }

    /// The tag for this user's `slot`, and for one of the operations that it consists of.
    #[inline]
    pub fn tag(&self, slot: u32, part: u16) -> Tag {
        Tag(u64::from(self.index) << SHIFT | u64::from(part) << 32 | u64::from(slot))
    }

    /// The slot of a tag.
    #[inline]
    pub fn slot(tag: Tag) -> u32 {
        tag.0 as u32
    }

    /// As [`Channel::submit`], with tags from [`ChannelHandle::tag`].
    pub fn submit(&mut self, ops: &[Op]) -> usize {
        let inner = &mut *self.inner.borrow_mut();
        let n = inner.channel.submit(ops);
        inner.users[usize::from(self.index)].in_flight += n;
        n
    }

    /// As [`Channel::kick`].
    pub fn kick(&mut self) {
        self.inner.borrow_mut().channel.kick();
    }

    /// As [`Channel::poll`], for this user's completions; the others' go into their inboxes.
    pub fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let inner = &mut *self.inner.borrow_mut();
        let me = usize::from(self.index);
        let before = done.len();
        if let [user] = &mut inner.users[..] {
            // Alone: nothing to sort.
            inner.channel.poll(now, done);
            done.append(&mut user.inbox);
            user.in_flight -= done.len() - before;
            return;
        }
        inner.sort(now, Some(me));
        let user = &mut inner.users[me];
        done.append(&mut user.inbox);
        user.in_flight -= done.len() - before;
    }

    /// As [`Channel::cancel`].
    pub fn cancel(&mut self, tag: Tag) -> Cancel {
        let inner = &mut *self.inner.borrow_mut();
        // Finished already, and only not yet taken out of the inbox.
        if inner.users[usize::from(self.index)]
            .inbox
            .iter()
            .any(|c| c.tag == tag)
        {
            return Cancel::Soon;
        }
        inner.channel.cancel(tag)
    }

    /// Called before its actor goes to sleep: a completion will wake it, and with `busy` also one of
    /// somebody else, as that may have made room. `false`: there is something for it already.
    pub fn park(&mut self, cx: &mut Context<'_>, busy: bool) -> bool {
        let inner = &mut *self.inner.borrow_mut();
        let user = &mut inner.users[usize::from(self.index)];
        user.starved = busy;
        if !user.inbox.is_empty() {
            return false;
        }
        inner.set_timer(cx);
        true
    }
}

impl Drop for ChannelHandle {
    fn drop(&mut self) {
        let inner = &mut *self.inner.borrow_mut();
        let user = &mut inner.users[usize::from(self.index)];
        user.waker = None;
        user.in_flight -= user.inbox.len();
        user.inbox.clear();
        // The hub ends itself when it is the last.
        inner.hub.wake();
    }
}

impl Inner {
    /// Polls the channel and puts what it finds into the inboxes, waking their users but for `me`.
    fn sort(&mut self, now: Instant, me: Option<usize>) {
        self.channel.poll(now, &mut self.scratch);
        if self.scratch.is_empty() {
            return;
        }
        for completion in self.scratch.drain(..) {
            let index = (completion.tag.0 >> SHIFT) as usize;
            let user = &mut self.users[index];
            match &user.waker {
                Some(waker) => {
                    if user.inbox.is_empty() && Some(index) != me {
                        waker.wake();
                    }
                    user.inbox.push(completion);
                }
                None => user.in_flight -= 1,
            }
        }
        for user in &mut self.users {
            if std::mem::take(&mut user.starved)
                && let Some(waker) = &user.waker
            {
                waker.wake();
            }
        }
    }

    /// Has the hub woken when the channel wants to be polled.
    fn set_timer(&mut self, cx: &mut Context<'_>) {
        if let Some(at) = self.channel.deadline()
            && self.timer.is_none_or(|t| at < t || t <= cx.now())
        {
            self.timer = Some(at);
            cx.timer(self.hub.actor(), at, 0);
        }
    }
}

fn open_channel(
    cx: &mut Context<'_>,
    volume: &Arc<dyn Volume>,
    key: usize,
) -> Result<Rc<RefCell<Inner>>, BlockError> {
    let mut result = Err(BlockError::Unavailable);
    let uring = cx.uring();
    cx.insert(Poll::Never, |cx, id: ActorId| {
        let context = OpenContext {
            waker: cx.waker(id),
            uring,
        };
        result = volume.open(&context).map(|channel| {
            Rc::new(RefCell::new(Inner {
                channel,
                _volume: volume.clone(),
                users: Vec::new(),
                scratch: Vec::new(),
                hub: context.waker,
                timer: None,
            }))
        });
        Box::new(Hub {
            inner: result.as_ref().map_or_else(|_| Weak::new(), Rc::downgrade),
        })
    });
    let inner = result?;
    OPEN.with_borrow_mut(|open| open.push((key, Rc::downgrade(&inner))));
    Ok(inner)
}

/// What the channel wakes. It lives as long as the channel has users.
struct Hub {
    inner: Weak<RefCell<Inner>>,
}

impl Actor for Hub {
    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        let Some(inner) = self.inner.upgrade() else {
            return Turn::Done;
        };
        let inner = &mut *inner.borrow_mut();
        inner.sort(cx.now(), None);
        inner.set_timer(cx);
        Turn::Idle
    }
}
