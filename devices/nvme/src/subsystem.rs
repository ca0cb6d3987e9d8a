//! A subsystem: namespaces, the controllers that they are attached to, and who is told when that changes.
//!
//! ```text
//!   card: add, remove, attach, detach, ANA      volumes: resized
//!                     |                              |
//!                     v                              v
//!                 Subsystem: one lock, changes are rare
//!                     |  SubsystemEvent, to each controller that it concerns
//!                     v
//!   Controller --> Admin: changed list, events     workers: a new Table
//! ```
//!
//! What a controller is told comes in the order that it happened. Listeners are called under the subsystem's lock, so they must only pass it on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use bluff_block::{Geometry, Subscription, Volume, VolumeEvent};

use crate::attached::{AnaState, Attached, Identity, Table};
use crate::namespace::Namespace;

mod format;
mod keep;
#[cfg(test)]
mod tests;

use crate::token::Token;
pub use format::Formatting;
pub use keep::{FormatKeeper, Kept, NamespaceFormat, NotKept, Transient};

/// Why something of a subsystem could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubsystemError {
    /// The NQN is no such thing.
    #[error("\"{0}\" is no NVMe qualified name")]
    Nqn(String),
    /// The NSID is not 1 to the largest one.
    #[error("namespace ID {0} is not from 1 to {1}")]
    Nsid(u32, u32),
    /// Another namespace has it.
    #[error("namespace ID {0} is taken")]
    Taken(u32),
    /// All are taken.
    #[error("no namespace ID is left")]
    Full,
    /// There is none.
    #[error("there is no namespace {0}")]
    NoNamespace(u32),
    /// There is none, or it has gone.
    #[error("there is no controller {0}")]
    NoController(u16),
    /// The subsystem is for one controller, and has it.
    #[error("the subsystem is not shared, and has its controller")]
    NotShared,
    /// No identifier is left.
    #[error("no controller ID is left")]
    Controllers,
    /// A namespace cannot have blocks of this size on this volume.
    #[error("blocks of {0} bytes cannot be had on a volume of {1}")]
    BlockSize(u32, u32),
    /// The ANA group is not 1 to the largest one.
    #[error("ANA group {0} is not from 1 to {ANA_GROUPS}")]
    Group(u32),
    /// It is being formatted.
    #[error("namespace {0} is being formatted")]
    Busy(u32),
}

/// ANA groups that there can be: 1 to this.
pub const ANA_GROUPS: u32 = 32;

/// What of a subsystem is fixed.
#[derive(Clone, Debug)]
pub struct SubsystemOptions {
    /// NVMe Qualified Name (Base 2.1 §4.7), 223 bytes at most.
    pub nqn: String,
    /// Several controllers may be in it: its namespaces can be shared, and ANA is reported.
    pub shared: bool,
    /// The largest valid NSID (NN), and so how many namespaces there can be. Firmware asks for each of them in turn.
    pub max_namespaces: u32,
    /// Who keeps what hosts format namespaces to. With none, namespaces have their volumes' blocks, and formats do no more than erase.
    pub keeper: Option<Arc<dyn FormatKeeper>>,
}

/// The block sizes that a namespace is offered with, as powers of two.
const SHIFTS: [u8; 2] = [9, 12];

impl SubsystemOptions {
    /// The formats that a volume can have, as log2 of the block's bytes, in the order of Identify's list: what its blocks divide.
    pub(crate) fn formats(&self, geometry: &Geometry) -> impl Iterator<Item = u8> {
        let (block, keeps) = (geometry.block_size, self.keeper.is_some());
        SHIFTS.into_iter().filter(move |shift| {
            let size = 1u32 << shift;
            size == block || keeps && block != 0 && size.is_multiple_of(block)
        })
    }

    /// For one controller, and up to 256 namespaces, whose formats last as long as the subsystem.
    pub fn new(nqn: impl Into<String>) -> Self {
        Self {
            nqn: nqn.into(),
            shared: false,
            max_namespaces: 256,
            keeper: Some(Arc::new(Transient)),
        }
    }
}

/// A namespace to be.
#[derive(Clone, Debug)]
pub struct NamespaceOptions {
    /// Its NSID; `None`: the lowest that is free.
    pub nsid: Option<u32>,
    /// Bytes of a logical block: 512 or 4096; `None`: the volume's.
    pub block_size: Option<u32>,
    /// Identifiers.
    pub identity: Identity,
    /// ANA group, 1 and more.
    pub group: u32,
    /// To which controllers it is attached; `None`: to all, also those that come later.
    pub attached: Option<BTreeSet<u16>>,
}

impl NamespaceOptions {
    /// Attached to all, in group 1, with the volume's blocks.
    pub fn new(identity: Identity) -> Self {
        Self {
            nsid: None,
            block_size: None,
            identity,
            group: 1,
            attached: None,
        }
    }
}

/// What a controller has to know.
#[derive(Debug)]
pub enum SubsystemEvent {
    /// Its namespaces, for the admin side and for all workers. The first event of a controller.
    Table(Arc<Table>),
    /// A namespace was attached, detached, resized or formatted: the host is told (Namespace Attribute Changed). The table that says so came before.
    NamespaceChanged(u32),
    /// An ANA state has changed: the host is told.
    AnaChanged,
    /// A namespace is about to be formatted, and is blocked ([`Namespace::block`]). Whoever still has commands of it in flight keeps a clone of the token until they are over.
    Drain(u32, Token),
    /// The subsystem is reset (NSSR).
    Reset,
}

/// Who tells a controller. It must not block, and must not call the subsystem.
pub type Listener = dyn Fn(SubsystemEvent) + Send + Sync;

/// A subsystem.
pub struct Subsystem {
    options: SubsystemOptions,
    /// For what volumes call.
    this: Weak<Self>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    namespaces: BTreeMap<u32, Entry>,
    controllers: BTreeMap<u16, Arc<Listener>>,
    /// Where it is not [`AnaState::Optimized`]: by controller and group.
    ana: BTreeMap<(u16, u32), AnaState>,
    /// Change counts, by controller and group.
    ana_changes: BTreeMap<(u16, u32), u64>,
    /// The next CNTLID to try, so that one that has gone is not soon another.
    next: u16,
    generation: u64,
}

struct Entry {
    /// One for all controllers; another one after a format.
    namespace: Arc<Namespace>,
    identity: Identity,
    group: u32,
    attached: Option<BTreeSet<u16>>,
    generation: u64,
    _resize: Subscription,
}

impl Entry {
    fn is_attached(&self, controller: u16) -> bool {
        self.attached
            .as_ref()
            .is_none_or(|all| all.contains(&controller))
    }
}

/// CNTLIDs from here on are reserved (Base 2.1 §3.1.1).
const FIRST_RESERVED: u16 = 0xfff0;

impl Subsystem {
    /// Makes one without namespaces.
    ///
    /// # Errors
    /// [`SubsystemError::Nqn`], and [`SubsystemError::Nsid`] for a limit of none, or of more than 65536.
    pub fn new(options: SubsystemOptions) -> Result<Arc<Self>, SubsystemError> {
        let nqn = &options.nqn;
        if !nqn.starts_with("nqn.") || nqn.len() > 223 || nqn.contains('\0') {
            return Err(SubsystemError::Nqn(nqn.clone()));
        }
        if !(1..=1 << 16).contains(&options.max_namespaces) {
            return Err(SubsystemError::Nsid(options.max_namespaces, 1 << 16));
        }
        Ok(Arc::new_cyclic(|this| Self {
            options,
            this: this.clone(),
            state: Mutex::default(),
        }))
    }

    /// What of it is fixed.
    pub fn options(&self) -> &SubsystemOptions {
        &self.options
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("listeners do not panic")
    }

    /// Adds a namespace; says which NSID it has.
    ///
    /// # Errors
    /// Where the NSID, the block size or the group cannot be.
    pub fn add(
        &self,
        volume: Arc<dyn Volume>,
        options: NamespaceOptions,
    ) -> Result<u32, SubsystemError> {
        let limit = self.options.max_namespaces;
        let geometry = volume.geometry();
        let block = options.block_size.unwrap_or(geometry.block_size);
        let shift = self
            .options
            .formats(&geometry)
            .find(|shift| 1 << shift == block)
            .ok_or(SubsystemError::BlockSize(block, geometry.block_size))?;
        check_group(options.group)?;
        let state = &mut *self.lock();
        let nsid = match options.nsid {
            Some(nsid) if nsid == 0 || nsid > limit => {
                return Err(SubsystemError::Nsid(nsid, limit));
            }
            Some(nsid) => nsid,
            None => (1..=limit)
                .find(|nsid| !state.namespaces.contains_key(nsid))
                .ok_or(SubsystemError::Full)?,
        };
        if state.namespaces.contains_key(&nsid) {
            return Err(SubsystemError::Taken(nsid));
        }
        let this = self.this.clone();
        let resize = volume.events().subscribe(move |event| {
            if event == VolumeEvent::Resized
                && let Some(this) = this.upgrade()
            {
                this.resized(nsid);
            }
        });
        let entry = Entry {
            namespace: Namespace::new(nsid, volume, shift),
            identity: options.identity,
            group: options.group,
            attached: options.attached,
            generation: state.next_generation(),
            _resize: resize,
        };
        state.namespaces.insert(nsid, entry);
        self.tell_changed(state, nsid, None);
        Ok(nsid)
    }

    /// Removes a namespace. Workers keep the volume until they have the new table, and their commands are over.
    ///
    /// # Errors
    /// [`SubsystemError::NoNamespace`], [`SubsystemError::Busy`].
    pub fn remove(&self, nsid: u32) -> Result<(), SubsystemError> {
        let state = &mut *self.lock();
        let entry = state.idle(nsid)?;
        let attached = entry.attached.clone();
        let removed = state.namespaces.remove(&nsid).expect("just found");
        let concerned: Vec<_> = state
            .controllers
            .keys()
            .copied()
            .filter(|id| attached.as_ref().is_none_or(|all| all.contains(id)))
            .collect();
        for id in concerned {
            self.tell(state, id, nsid);
        }
        drop(removed);
        Ok(())
    }

    /// Attaches a namespace to a controller, or detaches it.
    ///
    /// # Errors
    /// [`SubsystemError::NoNamespace`], [`SubsystemError::NoController`], [`SubsystemError::Busy`].
    pub fn attach(&self, nsid: u32, controller: u16, attached: bool) -> Result<(), SubsystemError> {
        let state = &mut *self.lock();
        if !state.controllers.contains_key(&controller) {
            return Err(SubsystemError::NoController(controller));
        }
        let all: BTreeSet<u16> = state.controllers.keys().copied().collect();
        let entry = state.idle(nsid)?;
        if entry.is_attached(controller) == attached {
            return Ok(());
        }
        let set = entry.attached.get_or_insert(all);
        match attached {
            true => set.insert(controller),
            false => set.remove(&controller),
        };
        state.renew(nsid);
        self.tell(state, controller, nsid);
        Ok(())
    }

    /// Sets the ANA state of a group, for one controller or for all that there are.
    ///
    /// # Errors
    /// [`SubsystemError::Group`], [`SubsystemError::NoController`], and [`SubsystemError::NotShared`] where ANA is not reported.
    pub fn set_ana(
        &self,
        group: u32,
        controller: Option<u16>,
        ana: AnaState,
    ) -> Result<(), SubsystemError> {
        check_group(group)?;
        if !self.options.shared {
            return Err(SubsystemError::NotShared);
        }
        let state = &mut *self.lock();
        let concerned: Vec<u16> = match controller {
            Some(id) if !state.controllers.contains_key(&id) => {
                return Err(SubsystemError::NoController(id));
            }
            Some(id) => vec![id],
            None => state.controllers.keys().copied().collect(),
        };
        let nsids: Vec<u32> = state
            .namespaces
            .iter()
            .filter(|(_, e)| e.group == group)
            .map(|(n, _)| *n)
            .collect();
        nsids.iter().for_each(|nsid| state.renew(*nsid));
        for id in concerned {
            let before = match ana {
                AnaState::Optimized => state.ana.remove(&(id, group)),
                _ => state.ana.insert((id, group), ana),
            };
            if before.unwrap_or_default() == ana {
                continue;
            }
            *state.ana_changes.entry((id, group)).or_default() += 1;
            let listener = state.controllers[&id].clone();
            listener(SubsystemEvent::Table(self.table_for(state, id)));
            listener(SubsystemEvent::AnaChanged);
        }
        Ok(())
    }

    /// How often a group's state has changed, for a controller.
    pub(crate) fn ana_changes(&self, controller: u16, group: u32) -> u64 {
        let state = self.lock();
        state
            .ana_changes
            .get(&(controller, group))
            .copied()
            .unwrap_or(0)
    }

    /// Lets a controller in. It is in the subsystem until the handle is dropped, and hears of what concerns it; first, before this returns, its table.
    ///
    /// # Errors
    /// [`SubsystemError::NotShared`], [`SubsystemError::Controllers`].
    pub fn join(
        self: &Arc<Self>,
        listener: impl Fn(SubsystemEvent) + Send + Sync + 'static,
    ) -> Result<Membership, SubsystemError> {
        let state = &mut *self.lock();
        if !self.options.shared && !state.controllers.is_empty() {
            return Err(SubsystemError::NotShared);
        }
        let id = (0..FIRST_RESERVED)
            .map(|n| (u32::from(state.next) + u32::from(n)) % u32::from(FIRST_RESERVED))
            .map(|id| id as u16)
            .find(|id| !state.controllers.contains_key(id))
            .ok_or(SubsystemError::Controllers)?;
        state.next = id + 1;
        let listener: Arc<Listener> = Arc::new(listener);
        state.controllers.insert(id, listener.clone());
        listener(SubsystemEvent::Table(self.table_for(state, id)));
        Ok(Membership {
            subsystem: self.clone(),
            id,
        })
    }

    /// The controllers in it, by identifier.
    pub fn controllers(&self) -> Vec<u16> {
        self.lock().controllers.keys().copied().collect()
    }

    /// Those that a namespace is attached to; `None`: there is no such namespace.
    pub fn attached_controllers(&self, nsid: u32) -> Option<Vec<u16>> {
        let state = self.lock();
        let entry = state.namespaces.get(&nsid)?;
        let all = state.controllers.keys().copied();
        Some(all.filter(|id| entry.is_attached(*id)).collect())
    }

    /// All namespaces, attached or not, as `controller` sees them or would.
    pub fn allocated(&self, controller: u16) -> Table {
        let state = self.lock();
        Table::new(
            state
                .namespaces
                .keys()
                .map(|nsid| self.snapshot(&state, *nsid, controller)),
        )
    }

    /// All controllers are reset (NSSR, Base 2.1 §3.7.1).
    pub fn reset(&self) {
        let state = self.lock();
        state
            .controllers
            .values()
            .for_each(|listener| listener(SubsystemEvent::Reset));
    }

    fn resized(&self, nsid: u32) {
        let state = &mut *self.lock();
        if let Some(entry) = state.namespaces.get(&nsid) {
            entry.namespace.resized();
            state.renew(nsid);
            self.tell_changed(state, nsid, None);
        }
    }

    /// Tells all controllers that it is attached to, but for `except`.
    fn tell_changed(&self, state: &State, nsid: u32, except: Option<u16>) {
        let entry = &state.namespaces[&nsid];
        for id in state.controllers.keys().copied() {
            if entry.is_attached(id) {
                match except == Some(id) {
                    true => {
                        state.controllers[&id](SubsystemEvent::Table(self.table_for(state, id)));
                    }
                    false => self.tell(state, id, nsid),
                }
            }
        }
    }

    fn tell(&self, state: &State, controller: u16, nsid: u32) {
        let listener = &state.controllers[&controller];
        listener(SubsystemEvent::Table(self.table_for(state, controller)));
        listener(SubsystemEvent::NamespaceChanged(nsid));
    }

    fn table_for(&self, state: &State, controller: u16) -> Arc<Table> {
        let attached = state.namespaces.iter();
        let attached = attached.filter(|(_, entry)| entry.is_attached(controller));
        Arc::new(Table::new(
            attached.map(|(nsid, _)| self.snapshot(state, *nsid, controller)),
        ))
    }

    fn snapshot(&self, state: &State, nsid: u32, controller: u16) -> Attached {
        let entry = &state.namespaces[&nsid];
        let geometry = entry.namespace.volume().geometry();
        let mut formats = self.options.formats(&geometry);
        let format = formats.position(|shift| shift == entry.namespace.lba_shift());
        Attached {
            namespace: entry.namespace.clone(),
            geometry,
            // A volume's block size does not change.
            format: format.unwrap_or(0) as u8,
            generation: entry.generation,
            identity: entry.identity,
            group: entry.group,
            ana: *state
                .ana
                .get(&(controller, entry.group))
                .unwrap_or(&AnaState::Optimized),
            shared: self.options.shared,
        }
    }
}

impl State {
    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    fn renew(&mut self, nsid: u32) {
        let generation = self.next_generation();
        if let Some(entry) = self.namespaces.get_mut(&nsid) {
            entry.generation = generation;
        }
    }

    /// A namespace that is not being formatted.
    fn idle(&mut self, nsid: u32) -> Result<&mut Entry, SubsystemError> {
        let entry = self.namespaces.get_mut(&nsid);
        let entry = entry.ok_or(SubsystemError::NoNamespace(nsid))?;
        match entry.namespace.is_blocked() {
            true => Err(SubsystemError::Busy(nsid)),
            false => Ok(entry),
        }
    }
}

fn check_group(group: u32) -> Result<(), SubsystemError> {
    match (1..=ANA_GROUPS).contains(&group) {
        true => Ok(()),
        false => Err(SubsystemError::Group(group)),
    }
}

impl fmt::Debug for Subsystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subsystem")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A controller's place in its subsystem; it leaves when this is dropped.
#[derive(Debug)]
pub struct Membership {
    subsystem: Arc<Subsystem>,
    id: u16,
}

impl Membership {
    /// Its CNTLID.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The subsystem.
    pub fn subsystem(&self) -> &Arc<Subsystem> {
        &self.subsystem
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.subsystem.lock();
        let listener = state.controllers.remove(&self.id);
        state.ana.retain(|(id, _), _| *id != self.id);
        state.ana_changes.retain(|(id, _), _| *id != self.id);
        for entry in state.namespaces.values_mut() {
            if let Some(all) = &mut entry.attached {
                all.remove(&self.id);
            }
        }
        // Not under the lock: nobody knows what it holds.
        drop(state);
        drop(listener);
    }
}
