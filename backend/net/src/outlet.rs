//! Ways to receive queues, wherever they live.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use bluff_reactor::{Actor, Context, Handle, Poll, Turn, Waker};

use crate::bell::Bell;
use crate::mailbox::{self, Envelope};
use crate::{BATCH, Batch, Cause, Receivers};

/// A receive queue, as those see it who have frames for it.
pub trait Receive {
    /// Takes the frames of `batch` that `which` names by their places, in that order. It uses what the batch lends only during the call.
    /// What it has no room for it drops and counts. It must not send frames itself.
    fn receive(&mut self, batch: &Batch, which: &[u8]);
}

/// Leads to a receive queue, from any thread.
#[derive(Clone)]
pub struct Outlet {
    home: Arc<Home>,
    slot: u32,
    /// Numbers the receivers that the slot has had: what is for one that has gone reaches nobody.
    generation: u32,
}

impl PartialEq for Outlet {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        let same = (self.slot, self.generation) == (other.slot, other.generation);
        same && Arc::ptr_eq(&self.home, &other.home)
    }
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outlet({}.{})", self.slot, self.generation)
    }
}

/// A reactor that has receive queues.
struct Home {
    handle: Handle,
    courier: Waker,
    /// Rung by who puts something into a mailbox.
    bell: Bell,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    receiver: Option<Rc<RefCell<dyn Receive>>>,
}

/// What this thread knows of receivers.
#[derive(Default)]
struct Local {
    /// What this thread is for others, once it has receivers.
    home: Option<Arc<Home>>,
    slots: Vec<Slot>,
    /// Mailboxes of other reactors.
    ways: Vec<(Arc<Home>, mailbox::Sender)>,
    /// Mailboxes of this one.
    inboxes: Vec<mailbox::Receiver>,
}

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// A receive queue that can be reached. Dropped, on the thread that it lives on, it cannot any more.
#[must_use]
pub struct Registration {
    outlet: Outlet,
    /// Not to be sent to other threads.
    _here: std::marker::PhantomData<Rc<()>>,
}

impl Registration {
    /// Makes `receiver` known, on the reactor that it lives on.
    pub fn new(cx: &mut Context<'_>, receiver: Rc<RefCell<dyn Receive>>) -> Self {
        let home = LOCAL.with_borrow(|local| local.home.clone());
        let home = home.unwrap_or_else(|| courier(cx));
        LOCAL.with_borrow_mut(|local| {
            let found = local.slots.iter().position(|s| s.receiver.is_none());
            let slot = found.unwrap_or_else(|| {
                local.slots.push(Slot::default());
                local.slots.len() - 1
            });
            let place = &mut local.slots[slot];
            place.generation = place.generation.wrapping_add(1);
            place.receiver = Some(receiver);
            Self {
                outlet: Outlet {
                    home,
                    slot: slot as u32,
                    generation: place.generation,
                },
                _here: std::marker::PhantomData,
            }
        })
    }

    /// Leads to it.
    pub fn outlet(&self) -> &Outlet {
        &self.outlet
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // At the end of a thread there may be no table any more.
        let gone = LOCAL.try_with(|local| {
            let slot = self.outlet.slot as usize;
            local.borrow_mut().slots.get_mut(slot)?.receiver.take()
        });
        // Dropped here, where the table is not borrowed: it may hold anything.
        drop(gone);
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.outlet.fmt(f)
    }
}

impl Outlet {
    /// Hands over the frames of `batch` that `which` names. It is called on a reactor's thread, or on one that is to be joined: what it
    /// has of mailboxes lives as long as the thread.
    ///
    /// # Errors
    /// Why those were dropped that come after the given number of frames.
    #[inline]
    pub fn deliver(&self, batch: &Batch, which: &[u8]) -> Result<(), (usize, Cause)> {
        let here = LOCAL.with_borrow(|local| match &local.home {
            Some(home) if Arc::ptr_eq(home, &self.home) => Some(local.find(self)),
            _ => None,
        });
        match here {
            Some(Some(receiver)) => {
                receiver.borrow_mut().receive(batch, which);
                Ok(())
            }
            Some(None) => Err((0, Cause::LinkDown)),
            None => self.post(batch, which),
        }
    }

    /// Into the mailbox of its reactor.
    fn post(&self, batch: &Batch, which: &[u8]) -> Result<(), (usize, Cause)> {
        LOCAL.with_borrow_mut(|local| {
            let found = local
                .ways
                .iter()
                .position(|(h, _)| Arc::ptr_eq(h, &self.home));
            let at = found.unwrap_or_else(|| local.open(&self.home));
            let (home, sender) = &mut local.ways[at];
            if sender.is_closed() {
                local.ways.swap_remove(at);
                return Err((0, Cause::LinkDown));
            }
            let to = Envelope {
                slot: self.slot,
                generation: self.generation,
            };
            let mut share = sender.share(to);
            let result = which.iter().enumerate().try_for_each(|(done, i)| {
                match sender.put_shared(batch, usize::from(*i), to, &mut share) {
                    true => Ok(()),
                    false => Err((done, Cause::Congested)),
                }
            });
            home.ring();
            result
        })
    }
}

impl Local {
    #[inline]
    fn find(&self, outlet: &Outlet) -> Option<Rc<RefCell<dyn Receive>>> {
        let slot = self.slots.get(outlet.slot as usize)?;
        let is_it = slot.generation == outlet.generation;
        slot.receiver.as_ref().filter(|_| is_it).cloned()
    }

    /// Makes a mailbox between this thread and a reactor.
    #[cold]
    fn open(&mut self, home: &Arc<Home>) -> usize {
        self.ways.retain(|(_, sender)| !sender.is_closed());
        let (sender, receiver) = mailbox::channel(mailbox::SIZE);
        let courier = home.courier.clone();
        home.handle.send(move |cx| {
            LOCAL.with_borrow_mut(|local| local.inboxes.push(receiver));
            cx.wake(courier.actor());
        });
        self.ways.push((home.clone(), sender));
        self.ways.len() - 1
    }
}

impl Home {
    /// Something is in a mailbox.
    #[inline]
    fn ring(&self) {
        if self.bell.ring() {
            self.courier.wake();
        }
    }
}

/// Takes frames out of this reactor's mailboxes.
struct Courier {
    home: Arc<Home>,
    batch: Batch,
    envelopes: [Envelope; BATCH],
}

/// Makes this thread a home.
#[cold]
fn courier(cx: &mut Context<'_>) -> Arc<Home> {
    let handle = cx.handle();
    let mut home = None;
    cx.insert(Poll::default(), |cx, id| {
        let made = Arc::new(Home {
            handle,
            courier: cx.waker(id),
            bell: Bell::default(),
        });
        home = Some(made.clone());
        Box::new(Courier {
            home: made,
            batch: Batch::default(),
            envelopes: [Envelope::default(); BATCH],
        })
    });
    let home = home.expect("built at once");
    LOCAL.with_borrow_mut(|local| local.home = Some(home.clone()));
    home
}

impl Drop for Courier {
    /// The reactor has ended: this thread is no home any more, and who writes to its mailboxes is told.
    fn drop(&mut self) {
        // At the end of a thread there may be no table any more.
        let gone = LOCAL.try_with(|local| {
            let local = &mut *local.borrow_mut();
            local.home.take_if(|home| Arc::ptr_eq(home, &self.home))?;
            Some(std::mem::take(&mut local.inboxes))
        });
        drop(gone);
    }
}

impl Courier {
    /// Delivers a batch out of mailbox `i`; says whether there was anything, and `None` where there is no such mailbox.
    fn deliver(&mut self, i: usize) -> Option<bool> {
        // Taken out meanwhile, as receivers are looked up while it is used.
        let mut inbox = LOCAL.with_borrow_mut(|local| {
            (i < local.inboxes.len()).then(|| local.inboxes.swap_remove(i))
        })?;
        let (batch, envelopes) = (&mut self.batch, &mut self.envelopes);
        let n = inbox.take(batch, envelopes, |batch, envelopes| {
            let mut which = [0; BATCH];
            let mut at = 0;
            for run in envelopes.chunk_by(PartialEq::eq) {
                for (place, i) in which.iter_mut().zip(at..at + run.len()) {
                    *place = i as u8;
                }
                at += run.len();
                let outlet = Outlet {
                    home: self.home.clone(),
                    slot: run[0].slot,
                    generation: run[0].generation,
                };
                // One that has gone meanwhile: so have its counters.
                let _ = outlet.deliver(&batch, &which[..run.len()]);
            }
            envelopes.len()
        });
        let open = n > 0 || !inbox.is_over();
        if open {
            LOCAL.with_borrow_mut(|local| {
                local.inboxes.push(inbox);
                // Back to its place.
                let last = local.inboxes.len() - 1;
                local.inboxes.swap(i, last);
            });
        }
        Some(n > 0 || !open)
    }
}

impl Actor for Courier {
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        let (mut worked, mut i) = (false, 0);
        while let Some(some) = self.deliver(i) {
            worked |= some;
            i += 1;
        }
        if worked { Turn::Worked } else { Turn::Idle }
    }

    fn arm(&mut self, _: &mut Context<'_>) -> bool {
        let is_empty = || LOCAL.with_borrow(|local| local.inboxes.iter().all(|i| i.is_empty()));
        self.home.bell.arm(is_empty)
    }
}

impl Receivers {
    /// Hands over the frames whose bits are set in `which`, those of one queue together. `done` hears for each group what became of it.
    #[inline]
    pub fn deliver(
        &self,
        batch: &Batch,
        which: u32,
        mut done: impl FnMut(&[u8], Result<(), Cause>),
    ) {
        let mut queues = [0; BATCH];
        if self.steering.looks() {
            for i in places(which) {
                queues[i] = self.steering.queue(&batch.frames()[i]);
            }
        }
        let mut pending = which;
        while pending != 0 {
            let queue = queues[pending.trailing_zeros() as usize];
            let (mut which, mut n) = ([0; BATCH], 0);
            for i in places(pending) {
                if queues[i] == queue {
                    (which[n], n) = (i as u8, n + 1);
                    pending &= !(1 << i);
                }
            }
            let which = &which[..n];
            let outlet = self.queues.get(usize::from(queue)).and_then(Option::as_ref);
            match outlet.map(|outlet| outlet.deliver(batch, which)) {
                Some(Ok(())) => done(which, Ok(())),
                Some(Err((taken, cause))) => {
                    done(&which[..taken], Ok(()));
                    done(&which[taken..], Err(cause));
                }
                None => done(which, Err(Cause::LinkDown)),
            }
        }
    }
}

/// The places whose bits are set.
#[inline]
pub fn places(mut set: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let i = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(i)
    })
}

/// All frames of a batch, as a set of their places.
#[inline]
pub fn all_of(batch: &Batch) -> u32 {
    ((1u64 << batch.frames().len()) - 1) as u32
}
