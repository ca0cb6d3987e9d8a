//! Rings, and the doorbells that tell of them (Base 2.1 §3.3, §B.5; PCIe Transport 1.1 §3.1.2).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use bluff_vfio_client::Event;
use bluff_virtio_driver::Span;

use crate::{Bar, Command, Completion, Error, Pages, Violation};

/// Bytes of an SQ entry.
const SQE: usize = 64;
/// Bytes of a CQ entry.
const CQE: usize = 16;
/// In the last word of a CQ entry: the phase tag.
const PHASE: u32 = 1 << 16;

/// Shadow doorbells and event indices of one controller.
#[derive(Clone, Debug)]
pub(crate) struct Shadow {
    pub doorbells: Span,
    pub events: Span,
}

/// A doorbell, and its shadow where there is one.
#[derive(Clone, Debug)]
pub(crate) struct Bell {
    /// Offset in the BAR.
    pub register: u64,
    /// Offset in both shadow buffers.
    pub offset: usize,
    pub shadow: Option<Shadow>,
}

impl Bell {
    /// Tells of `new`, after `old`. Whether the doorbell itself was rung.
    #[inline(always)]
    fn ring(&self, bar: &impl Bar, old: u32, new: u32) -> Result<bool, Error> {
        if let Some(shadow) = &self.shadow {
            // Releases what the new value tells of.
            shadow
                .doorbells
                .store_u32(self.offset, new, Ordering::Release);
            // The store must be visible before the event index is loaded: the controller stores that and then looks at the doorbell,
            // so one of the two sides sees the other.
            fence(Ordering::SeqCst);
            let event = shadow.events.load_u32(self.offset, Ordering::Relaxed);
            if !passes(event as u16, old as u16, new as u16) {
                return Ok(false);
            }
        }
        bar.doorbell(self.register, new)?;
        Ok(true)
    }
}

/// Whether going from `old` to `new` passes the event index. Indices go around at the size of the queue and not at 2^16; then
/// this may say yes too often, and Linux has it so.
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A submission queue.
#[derive(Debug)]
pub struct Sq {
    id: u16,
    cq: u16,
    entries: u32,
    ring: Span,
    /// None for memory that is somebody else's.
    _pages: Pages,
    tail: u32,
    /// As far as it is known to be fetched.
    head: u32,
    rung: u32,
    bell: Bell,
    /// By command identifier: the opcode in flight.
    in_flight: Box<[Option<u8>]>,
    free: Vec<u16>,
    rings: u64,
}

impl Sq {
    pub(crate) fn new(id: u16, cq: u16, entries: u32, pages: Pages, bell: Bell) -> Self {
        // One identifier for each entry, of which one is never used; 0xffff is reserved (§4.1.1).
        let cids = entries.min(0xffff);
        Self {
            id,
            cq,
            entries,
            ring: pages.span(),
            _pages: pages,
            tail: 0,
            head: 0,
            rung: 0,
            bell,
            in_flight: vec![None; cids as usize].into(),
            free: (0..cids as u16).rev().collect(),
            rings: 0,
        }
    }

    /// Its identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The identifier of the CQ that it posts to.
    pub fn cq(&self) -> u16 {
        self.cq
    }

    /// How many entries it has.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Offset of its doorbell in the BAR.
    pub fn doorbell(&self) -> u64 {
        self.bell.register
    }

    /// How often its doorbell was rung.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// How many commands are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len() - self.free.len()
    }

    /// How many more entries fit, as far as is known (§3.3.1: one stays empty).
    #[inline(always)]
    pub fn room(&self) -> u32 {
        let used = if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.tail + self.entries - self.head
        };
        self.entries - 1 - used
    }

    /// Writes an entry as it is, whether there is room or not, and tracks nothing.
    #[inline(always)]
    pub fn push(&mut self, command: &Command) {
        let at = self.tail as usize * SQE;
        let word = |i: usize| u64::from(command.0[i]) | u64::from(command.0[i + 1]) << 32;
        for i in 0..4 {
            self.ring
                .write_u64_pair(at + 16 * i, word(4 * i), word(4 * i + 2));
        }
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
        }
    }

    /// Adds a command with an identifier of its own, which is given back; [`Sq::ring`] makes it visible.
    ///
    /// # Errors
    /// [`Error::Full`].
    #[inline]
    pub fn submit(&mut self, command: &Command) -> Result<u16, Error> {
        if self.room() == 0 {
            return Err(Error::Full);
        }
        let cid = self.free.pop().ok_or(Error::Full)?;
        self.in_flight[usize::from(cid)] = Some(command.opcode());
        self.push(&command.cid(cid));
        Ok(cid)
    }

    /// Rings the doorbell, if something was added since it was rung.
    ///
    /// # Errors
    /// What the transport says.
    #[inline(always)]
    pub fn ring(&mut self, bar: &impl Bar) -> Result<(), Error> {
        if self.tail != self.rung {
            let old = std::mem::replace(&mut self.rung, self.tail);
            self.rings += u64::from(self.bell.ring(bar, old, self.tail)?);
        }
        Ok(())
    }

    /// Takes note of a completion; the opcode of its command.
    #[inline(always)]
    pub(crate) fn completed(&mut self, c: &Completion) -> Result<u8, Violation> {
        let head = u32::from(c.sq_head);
        // No remainder: a division would cost more than all the rest.
        let ahead = |at: u32| match at.checked_sub(self.head) {
            Some(n) => n,
            None => at + self.entries - self.head,
        };
        if head >= self.entries || ahead(head) > ahead(self.tail) {
            return Err(Violation::Head {
                sq: self.id,
                head: c.sq_head,
                known: self.head as u16,
                tail: self.tail as u16,
            });
        }
        let slot = self.in_flight.get_mut(usize::from(c.cid));
        let Some(opcode) = slot.and_then(Option::take) else {
            return Err(Violation::Stray {
                sq: self.id,
                cid: c.cid,
            });
        };
        self.head = head;
        self.free.push(c.cid);
        Ok(opcode)
    }

    pub(crate) fn bell_mut(&mut self) -> &mut Bell {
        &mut self.bell
    }

    /// Puts what was rung last where the controller will look for it from now on.
    pub(crate) fn fill_shadow(&self, shadow: &Shadow) {
        let at = self.bell.offset;
        shadow.doorbells.store_u32(at, self.rung, Ordering::Release);
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    id: u16,
    entries: u32,
    ring: Span,
    _pages: Pages,
    head: u32,
    /// What the next new entry has as its phase tag.
    phase: u32,
    rung: u32,
    bell: Bell,
    event: Option<Arc<Event>>,
    rings: u64,
}

impl Cq {
    pub(crate) fn new(
        id: u16,
        entries: u32,
        pages: Pages,
        bell: Bell,
        event: Option<Arc<Event>>,
    ) -> Self {
        Self {
            id,
            entries,
            ring: pages.span(),
            _pages: pages,
            head: 0,
            // Memory is zeroed, and the first round has ones (§4.2.4).
            phase: PHASE,
            rung: 0,
            bell,
            event,
            rings: 0,
        }
    }

    /// Its identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// How many entries it has.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Offset of its doorbell in the BAR.
    pub fn doorbell(&self) -> u64 {
        self.bell.register
    }

    /// How often its doorbell was rung.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// The entry that is read next.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// What is signalled for it; none where it is polled.
    pub fn event(&self) -> Option<&Arc<Event>> {
        self.event.as_ref()
    }

    /// Whether there is a new entry.
    #[inline(always)]
    pub fn is_ready(&self) -> bool {
        self.last_word() & PHASE == self.phase
    }

    #[inline(always)]
    fn last_word(&self) -> u32 {
        // Acquires what the controller wrote before it.
        let at = self.head as usize * CQE + 12;
        self.ring.load_u32(at, Ordering::Acquire)
    }

    /// Takes the next entry, whatever it says; [`Cq::ring`] gives its place back.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Completion> {
        let last = self.last_word();
        if last & PHASE != self.phase {
            return None;
        }
        let at = self.head as usize * CQE;
        let result = self.ring.read_u64(at);
        let completion = Completion::new(result, self.ring.read_u32(at + 8), last);
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase ^= PHASE;
        }
        Some(completion)
    }

    /// Rings the doorbell, if something was taken since it was rung.
    ///
    /// # Errors
    /// What the transport says.
    #[inline(always)]
    pub fn ring(&mut self, bar: &impl Bar) -> Result<(), Error> {
        if self.head != self.rung {
            let old = std::mem::replace(&mut self.rung, self.head);
            self.rings += u64::from(self.bell.ring(bar, old, self.head)?);
        }
        Ok(())
    }

    pub(crate) fn bell_mut(&mut self) -> &mut Bell {
        &mut self.bell
    }

    /// Puts what was rung last where the controller will look for it from now on.
    pub(crate) fn fill_shadow(&self, shadow: &Shadow) {
        let at = self.bell.offset;
        shadow.doorbells.store_u32(at, self.rung, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::passes;

    #[test]
    fn an_event_index_is_passed_when_it_lies_from_old_to_below_new() {
        for (old, new) in [(0u16, 1u16), (5, 9), (65530, 3), (7, 7)] {
            for event in 0..=u16::MAX {
                let steps = event.wrapping_sub(old);
                let want = steps < new.wrapping_sub(old);
                assert_eq!(passes(event, old, new), want, "{event} {old} {new}");
            }
        }
    }
}
