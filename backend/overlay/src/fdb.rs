//! The forwarding database: where an address was last seen (IEEE 802.1Q-2022 §8.8).
//!
//! Every reactor reads it for each frame, and none may wait; it is written when an address is new, has moved or is forgotten, under
//! a lock. It is a table of slots with open addressing. **A slot's key is set once** and never changes while the table is in use; its value
//! comes and goes. So a reader that has found its key cannot be given what belongs to another address, whatever the writers do at that
//! time. Slots of forgotten addresses are left behind in the table, and a new one takes its place when there are too many.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::{ArcSwap, Guard};

/// An address in a VLAN.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    /// Of a MAC address and a VLAN (0: frames without a tag).
    #[inline]
    pub fn new(mac: [u8; 6], vlan: u16) -> Self {
        let [a, b, c, d, e, f] = mac;
        let mac = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        Self(SET | u64::from(vlan & 0xfff) << 48 | mac)
    }

    /// The MAC address.
    pub fn mac(self) -> [u8; 6] {
        let [_, _, mac @ ..] = self.0.to_be_bytes();
        mac
    }

    /// The VLAN.
    pub fn vlan(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    /// Where the search for it begins.
    #[inline]
    fn hash(self, seed: u64) -> u64 {
        // Two rounds of multiplication and fold: whoever does not know the seed cannot aim at one place.
        let fold = |x: u64, by: u64| {
            let wide = u128::from(x) * u128::from(by);
            (wide as u64) ^ (wide >> 64) as u64
        };
        fold(
            fold(self.0 ^ seed, 0x9e37_79b9_7f4a_7c15) ^ seed.rotate_left(32),
            0xd6e8_feb8_6659_fd93,
        )
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.mac();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        match self.vlan() {
            0 => Ok(()),
            vlan => write!(f, ".{vlan}"),
        }
    }
}

/// A key that is set, so that none is 0.
const SET: u64 = 1 << 63;

/// Where frames for an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// To a port of this card, by its number in the network.
    Port(u16),
    /// To another card, by its number among the network's VTEPs.
    Vtep(u16),
}

/// What is known of an address. In a slot: bits 0 to 15 the number, 16 whether it is a VTEP, 17 static, 18 set; from 32 on the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub place: Place,
    /// It was configured: it is not forgotten, and does not move.
    pub fixed: bool,
    /// When it was last seen, in the ticks of [`Fdb::see`].
    pub seen: u32,
}

const VTEP: u64 = 1 << 16;
const FIXED: u64 = 1 << 17;
const THERE: u64 = 1 << 18;

impl Entry {
    #[inline]
    fn pack(self) -> u64 {
        let place = match self.place {
            Place::Port(n) => u64::from(n),
            Place::Vtep(n) => u64::from(n) | VTEP,
        };
        let fixed = if self.fixed { FIXED } else { 0 };
        u64::from(self.seen) << 32 | THERE | fixed | place
    }

    #[inline]
    fn unpack(value: u64) -> Option<Self> {
        if value & THERE == 0 {
            return None;
        }
        let place = match value & VTEP {
            0 => Place::Port(value as u16),
            _ => Place::Vtep(value as u16),
        };
        Some(Self {
            place,
            fixed: value & FIXED != 0,
            seen: (value >> 32) as u32,
        })
    }
}

#[derive(Debug, Default)]
struct Slot {
    key: AtomicU64,
    value: AtomicU64,
}

#[derive(Debug)]
struct Table {
    slots: Box<[Slot]>,
    seed: u64,
}

impl Table {
    fn new(slots: usize, seed: u64) -> Self {
        Self {
            slots: (0..slots).map(|_| Slot::default()).collect(),
            seed,
        }
    }

    /// The slot of `key`, or the free one where it would be. There always is a free one.
    #[inline]
    fn slot(&self, key: Key) -> (&Slot, bool) {
        let mask = self.slots.len() - 1;
        let mut at = key.hash(self.seed) as usize & mask;
        loop {
            let slot = &self.slots[at];
            // Acquire: the value that was stored before the key is seen.
            let found = slot.key.load(Ordering::Acquire);
            if found == key.0 || found == 0 {
                return (slot, found != 0);
            }
            at = (at + 1) & mask;
        }
    }

    /// Puts an entry in, under the writers' lock; says whether it took a free slot.
    fn put(&self, key: Key, value: u64) -> bool {
        let (slot, there) = self.slot(key);
        slot.value.store(value, Ordering::Relaxed);
        if !there {
            // Release: who finds the key finds the value.
            slot.key.store(key.0, Ordering::Release);
        }
        !there
    }

    /// Notes that an address was seen at `tick`, if it is there and known to be at `place`. Times do not go back.
    fn see(&self, key: Key, place: Place, tick: u32) {
        let (slot, there) = self.slot(key);
        if !there {
            return;
        }
        let order = Ordering::Relaxed;
        // Not where it was forgotten, or has moved: then the next frame has it learnt.
        let _ = slot.value.fetch_update(order, order, |value| {
            let entry = Entry::unpack(value)?;
            let again = entry.place == place && !entry.fixed && is_later(tick, entry.seen);
            again.then(|| {
                Entry {
                    seen: tick,
                    ..entry
                }
                .pack()
            })
        });
    }

    /// The same without forgotten ones and with room, and how many slots are taken.
    fn renewed(&self) -> (Self, usize) {
        let all: Vec<_> = self.entries().collect();
        let slots = (4 * (all.len() + 1)).next_power_of_two().max(SLOTS);
        let table = Self::new(slots, self.seed);
        for (key, entry) in &all {
            table.put(*key, entry.pack());
        }
        (table, all.len())
    }

    fn entries(&self) -> impl Iterator<Item = (Key, Entry)> {
        self.slots.iter().filter_map(|slot| {
            let key = Key(slot.key.load(Ordering::Acquire));
            let entry = Entry::unpack(slot.value.load(Ordering::Relaxed))?;
            Some((key, entry))
        })
    }
}

/// Whether a tick comes after another one. They wrap, and reactors' clocks differ by little.
#[inline]
fn is_later(tick: u32, than: u32) -> bool {
    tick.wrapping_sub(than) as i32 > 0
}

/// How many addresses are learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbLimits {
    /// In all.
    pub total: usize,
    /// At each port, and behind each VTEP.
    pub each: usize,
}

/// Why an address was not learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It was configured to be elsewhere.
    Fixed,
    /// There are too many.
    Full,
    /// Somebody else is writing: the next frame will do.
    Busy,
}

/// What became of an address that was seen.
pub type Learnt = Result<(), Refused>;

/// What writers know.
#[derive(Debug, Default)]
struct Books {
    /// Slots that were taken in this table, those of forgotten addresses too.
    taken: usize,
    /// Addresses that were learnt.
    learnt: usize,
    each: HashMap<Place, usize>,
}

impl Books {
    fn leaves(&mut self, place: Place) {
        self.learnt -= 1;
        if let Some(n) = self.each.get_mut(&place) {
            *n -= 1;
            if *n == 0 {
                self.each.remove(&place);
            }
        }
    }
}

/// A network's forwarding database.
#[derive(Debug)]
pub struct Fdb {
    table: ArcSwap<Table>,
    books: Mutex<Books>,
    limits: FdbLimits,
}

/// The slots of a table that is new.
const SLOTS: usize = 256;

impl Fdb {
    /// An empty one. The seed is the card's secret: who knows it can choose addresses that are slow to find.
    pub fn new(seed: u64, limits: FdbLimits) -> Self {
        Self {
            table: ArcSwap::from_pointee(Table::new(SLOTS, seed)),
            books: Mutex::default(),
            limits,
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics with it")
    }

    /// For a batch of frames.
    #[inline]
    pub(crate) fn view(&self) -> View<'_> {
        View {
            fdb: self,
            table: self.table.load(),
            seen: None,
        }
    }

    /// Where an address is.
    pub fn find(&self, key: Key) -> Option<Entry> {
        self.view().find(key)
    }

    /// An address was seen at `place`, at time `tick`. It must be the address of one station. It does not wait.
    ///
    /// # Errors
    /// Why it was not learnt.
    pub fn see(&self, key: Key, place: Place, tick: u32) -> Learnt {
        self.view().see(key, place, tick)
    }

    /// Notes that an address was seen again, where `table` has it: once in a tick for each.
    ///
    /// The table may be renewed meanwhile. Then either this sees the new one after it has written, and writes there too; or
    /// [`Fdb::publish`] finds what was written, and takes it over. Both write first, and look after a fence that is in one order with the other's.
    #[cold]
    fn refresh(&self, mut table: Arc<Table>, key: Key, place: Place, tick: u32) {
        table.see(key, place, tick);
        loop {
            fence(Ordering::SeqCst);
            let newest = self.table.load_full();
            if Arc::ptr_eq(&table, &newest) {
                return;
            }
            newest.see(key, place, tick);
            table = newest;
        }
    }

    #[cold]
    fn learn(&self, key: Key, place: Place, seen: u32) -> Learnt {
        let Ok(mut books) = self.books.try_lock() else {
            return Err(Refused::Busy);
        };
        let before = self.find(key);
        match before {
            Some(entry) if entry.fixed && entry.place != place => return Err(Refused::Fixed),
            Some(entry) if entry.place == place => {
                // Another reactor was here first. Nobody renews the table now.
                self.table.load().see(key, place, seen);
                return Ok(());
            }
            _ => {}
        }
        let others = books.learnt - usize::from(before.is_some());
        let at_place = books.each.get(&place).copied().unwrap_or(0);
        if others >= self.limits.total || at_place >= self.limits.each {
            return Err(Refused::Full);
        }
        if let Some(entry) = before {
            books.leaves(entry.place);
        }
        books.learnt += 1;
        *books.each.entry(place).or_default() += 1;
        let entry = Entry {
            place,
            fixed: false,
            seen,
        };
        self.put(&mut books, key, entry.pack());
        Ok(())
    }

    /// Sets where an address is for good.
    pub fn fix(&self, key: Key, place: Place) {
        let mut books = self.books();
        if let Some(entry) = self.find(key)
            && !entry.fixed
        {
            books.leaves(entry.place);
        }
        let entry = Entry {
            place,
            fixed: true,
            seen: 0,
        };
        self.put(&mut books, key, entry.pack());
    }

    fn put(&self, books: &mut Books, key: Key, value: u64) {
        let table = self.table.load_full();
        if table.slot(key).1 {
            table.put(key, value);
            return;
        }
        // At most half of the slots are taken, so that a search is short, and ends.
        if 2 * (books.taken + 1) > table.slots.len() {
            self.renew(books, &table);
        }
        books.taken += usize::from(self.table.load().put(key, value));
    }

    /// Another table, without the forgotten ones, and with room.
    fn renew(&self, books: &mut Books, old: &Table) {
        let (table, taken) = old.renewed();
        books.taken = taken;
        self.publish(old, table);
    }

    /// Puts a new table in the place of the old one, with the times that readers write into the old one meanwhile.
    fn publish(&self, old: &Table, new: Table) {
        let new = Arc::new(new);
        self.table.store(new.clone());
        fence(Ordering::SeqCst);
        for (key, entry) in old.entries().filter(|(_, entry)| !entry.fixed) {
            new.see(key, entry.place, entry.seen);
        }
    }

    /// Forgets those that `which` names, fixed ones too; says how many there were.
    pub fn forget(&self, which: impl Fn(Key, Entry) -> bool) -> usize {
        let mut books = self.books();
        let table = self.table.load_full();
        let mut forgotten = 0;
        for slot in &table.slots {
            let key = Key(slot.key.load(Ordering::Acquire));
            // Again where a reader has just seen the address: what counts is what is there at the end.
            let mut value = slot.value.load(Ordering::Relaxed);
            while let Some(entry) = Entry::unpack(value)
                && which(key, entry)
            {
                let order = Ordering::Relaxed;
                match slot.value.compare_exchange(value, 0, order, order) {
                    Ok(_) => {
                        forgotten += 1;
                        if !entry.fixed {
                            books.leaves(entry.place);
                        }
                        break;
                    }
                    Err(now) => value = now,
                }
            }
        }
        forgotten
    }

    /// Forgets learnt ones that were last seen more than `age` ticks before `tick`.
    pub fn age(&self, tick: u32, age: u32) -> usize {
        // A reactor's clock may be ahead of ours: then the difference is below 0.
        let since = |entry: Entry| tick.wrapping_sub(entry.seen) as i32;
        let age = i32::try_from(age).unwrap_or(i32::MAX);
        self.forget(|_, entry| !entry.fixed && since(entry) > age)
    }

    /// All that is known, in no order.
    pub fn entries(&self) -> Vec<(Key, Entry)> {
        self.table.load().entries().collect()
    }

    /// How many addresses were learnt.
    pub fn learnt(&self) -> usize {
        self.books().learnt
    }
}

/// The database as a batch of frames sees it: the table is looked up once.
pub(crate) struct View<'a> {
    fdb: &'a Fdb,
    table: Guard<Arc<Table>>,
    /// What was seen last: nearly always all frames of a batch have one source.
    seen: Option<(Key, Place)>,
}

impl View<'_> {
    /// Where an address is.
    #[inline]
    pub fn find(&self, key: Key) -> Option<Entry> {
        let (slot, there) = self.table.slot(key);
        if !there {
            return None;
        }
        // Relaxed: the key's acquire came after the first value, and any later one is as good.
        Entry::unpack(slot.value.load(Ordering::Relaxed))
    }

    /// [`Fdb::see`].
    ///
    /// # Errors
    /// Why it was not learnt.
    #[inline]
    pub fn see(&mut self, key: Key, place: Place, tick: u32) -> Learnt {
        if self.seen == Some((key, place)) {
            return Ok(());
        }
        self.see_another(key, place, tick)
    }

    fn see_another(&mut self, key: Key, place: Place, tick: u32) -> Learnt {
        let (slot, there) = self.table.slot(key);
        let value = slot.value.load(Ordering::Relaxed);
        if there && let Some(entry) = Entry::unpack(value) {
            if entry.place == place {
                if is_later(tick, entry.seen) && !entry.fixed {
                    self.fdb.refresh(Arc::clone(&self.table), key, place, tick);
                }
                self.seen = Some((key, place));
                return Ok(());
            }
            if entry.fixed {
                return Err(Refused::Fixed);
            }
        }
        self.learn(key, place, tick)
    }

    #[cold]
    fn learn(&mut self, key: Key, place: Place, tick: u32) -> Learnt {
        let learnt = self.fdb.learn(key, place, tick);
        // It may be another table now.
        self.table = self.fdb.table.load();
        learnt
    }
}

#[cfg(test)]
mod tests;
