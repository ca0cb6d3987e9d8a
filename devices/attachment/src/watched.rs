//! What an epoll knows of a loop's sessions.

use std::collections::HashMap;
use std::hash::Hash;
use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

/// The descriptors that are waited for: whose each is, what it is to him (its role), and what is waited for.
///
/// Before a descriptor is closed it has to be forgotten: an open file that others hold too would stay in the epoll, and be reported for ever.
/// So the owner of sessions, after each thing that he did to one, calls [`Watched::forget`] with what that wants now, closes
/// what is over, and calls [`Watched::watch`].
#[derive(Debug)]
pub struct Watched<I, R> {
    all: HashMap<RawFd, (I, R, EventSet)>,
    /// Which are whose.
    by_owner: HashMap<I, Vec<RawFd>>,
}

impl<I, R> Default for Watched<I, R> {
    fn default() -> Self {
        Self {
            all: HashMap::new(),
            by_owner: HashMap::new(),
        }
    }
}

impl<I: Copy + Eq + Hash, R: Copy + PartialEq> Watched<I, R> {
    /// Whose a descriptor is, and in what role.
    pub fn whose(&self, fd: RawFd) -> Option<(I, R)> {
        self.all.get(&fd).map(|(id, role, _)| (*id, *role))
    }

    /// Stops waiting for what `id` does not want any more.
    pub fn forget(&mut self, id: I, wants: &[(R, RawFd, EventSet)], ops: &mut EventOps) {
        let Some(mine) = self.by_owner.get_mut(&id) else {
            return;
        };
        let all = &mut self.all;
        mine.retain(|fd| {
            let role = all.get(fd).map(|watched| watched.1);
            let wanted = wants.iter().any(|w| w.1 == *fd && Some(w.0) == role);
            if !wanted {
                all.remove(fd);
                let _ = ops.remove(Events::empty_raw(*fd));
            }
            wanted
        });
        if mine.is_empty() {
            self.by_owner.remove(&id);
        }
    }

    /// Waits for what `id` wants.
    pub fn watch(&mut self, id: I, wants: &[(R, RawFd, EventSet)], ops: &mut EventOps) {
        for (role, fd, set) in wants {
            let events = Events::new_raw(*fd, *set);
            let result = match self.all.get(fd) {
                Some((_, _, now)) if now == set => continue,
                Some(_) => ops.modify(events),
                None => ops.add(events),
            };
            if let Err(e) = result {
                // A host may send anything: what cannot be waited for is not.
                log::debug!("descriptor {fd} cannot be waited for: {e:?}");
                continue;
            }
            if self.all.insert(*fd, (id, *role, *set)).is_none() {
                self.by_owner.entry(id).or_default().push(*fd);
            }
        }
    }
}
