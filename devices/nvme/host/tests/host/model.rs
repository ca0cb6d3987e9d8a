//! A controller that does what the tests need: registers, queues, Identify and a few features, reads and writes of a disk in memory. It works
//! in the thread that rings a doorbell. What it does wrong is asked for by a [`Lie`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bluff_nvme_host::{Bar, BarError, HostMemory};
use bluff_vfio_client::Event;

use crate::pieces::{Pieces, pieces};

pub const BLOCK: u64 = 512;
pub const BLOCKS: u64 = 4096;
/// Entries of a queue at most.
pub const MAX_ENTRIES: u32 = 1024;

/// What is done wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The command identifier of a completion is changed by so much.
    Cid(u16),
    /// So is the submission queue.
    Sq(u16),
    /// So is the SQ head.
    Head(u16),
    /// It is completed twice.
    Twice,
    /// The data that is read is of another block.
    Misplaced,
    /// A write is acknowledged and not done: one above the blocks that the load often writes.
    Lost,
    /// The event is not signalled.
    NoEvent,
}

#[derive(Debug)]
struct Queue {
    at: u64,
    entries: u32,
    /// SQ: what was fetched. CQ: what the host has taken.
    head: u32,
    /// SQ: what the host has written. CQ: what was written.
    tail: u32,
    /// SQ: where completions go. CQ: the vector.
    other: u16,
    phase: bool,
    enabled: bool,
}

impl Queue {
    fn new(at: u64, entries: u32, other: u16, enabled: bool) -> Self {
        Self {
            at,
            entries,
            head: 0,
            tail: 0,
            other,
            phase: true,
            enabled,
        }
    }
}

#[derive(Default)]
pub struct State {
    registers: BTreeMap<u64, u64>,
    sqs: BTreeMap<u16, Queue>,
    cqs: BTreeMap<u16, Queue>,
    pub disk: Vec<u8>,
    pub shadow: Option<(u64, u64)>,
    /// By vector.
    pub events: Vec<Arc<Event>>,
    /// Asynchronous event requests.
    held: Vec<u16>,
    /// I/O commands are kept: queue and command.
    pub hold: bool,
    pub kept: Vec<(u16, [u32; 16])>,
    pub lie: Option<Lie>,
    /// Doorbells that were rung.
    pub rung: Vec<(u64, u32)>,
    pub features: BTreeMap<u32, u32>,
    /// What commands had as their opcodes.
    pub log: Vec<u8>,
}

#[derive(Clone)]
pub struct Model {
    pub memory: Arc<HostMemory>,
    pub state: Arc<Mutex<State>>,
}

const CAP: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 2 << 24 | 1 << 36 | 1 << 37;
const OK: u16 = 0;
const INVALID: u16 = 2;

impl Model {
    pub fn new(memory: &Arc<HostMemory>) -> Self {
        let state = State {
            disk: vec![0; (BLOCK * BLOCKS) as usize],
            events: (0..4).map(|_| Arc::new(Event::new().unwrap())).collect(),
            ..State::default()
        };
        Self {
            memory: memory.clone(),
            state: Arc::new(Mutex::new(state)),
        }
    }

    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }

    fn words(&self, at: u64) -> [u32; 16] {
        let mut bytes = [0; 64];
        self.memory.memory().read(at, &mut bytes).unwrap();
        let word = |i: usize| u32::from_le_bytes(bytes[4 * i..][..4].try_into().unwrap());
        std::array::from_fn(word)
    }

    pub fn has_queue(&self, id: u16) -> bool {
        self.with(|s| s.sqs.contains_key(&id) || s.cqs.contains_key(&id))
    }

    /// Fetches and does all that there is.
    pub fn work(&self) {
        let mut state = self.state.lock().unwrap();
        let ids: Vec<u16> = state.sqs.keys().copied().collect();
        for id in ids {
            self.look_at_shadows(&mut state, id);
            // It may delete itself meanwhile.
            while let Some(sq) = state.sqs.get_mut(&id) {
                if sq.head == sq.tail {
                    break;
                }
                let words = self.words(sq.at + u64::from(sq.head) * 64);
                sq.head = (sq.head + 1) % sq.entries;
                state.log.push(words[0] as u8);
                if state.hold && id != 0 {
                    state.kept.push((id, words));
                } else {
                    self.execute(&mut state, id, words);
                }
            }
        }
    }

    /// Does what was kept, in the order of these indices.
    pub fn release(&self, order: &[usize]) {
        let mut state = self.state.lock().unwrap();
        let kept = std::mem::take(&mut state.kept);
        for i in order {
            self.execute(&mut state, kept[*i].0, kept[*i].1);
        }
    }

    fn look_at_shadows(&self, state: &mut State, id: u16) {
        let (Some((doorbells, events)), 1..) = (state.shadow, id) else {
            return;
        };
        let memory = self.memory.memory();
        let at = u64::from(id) * 8;
        let mut bytes = [0; 4];
        memory.read(doorbells + at, &mut bytes).unwrap();
        let Some(sq) = state.sqs.get_mut(&id) else {
            return;
        };
        sq.tail = u32::from_le_bytes(bytes);
        // To be rung when it goes on from here.
        memory.write(events + at, &bytes).unwrap();
        if let Some(cq) = state.cqs.get_mut(&id) {
            memory.read(doorbells + at + 4, &mut bytes).unwrap();
            cq.head = u32::from_le_bytes(bytes);
        }
    }

    fn execute(&self, state: &mut State, sq: u16, c: [u32; 16]) {
        let cid = (c[0] >> 16) as u16;
        let answer = if sq == 0 {
            self.admin(state, cid, &c)
        } else {
            self.io(state, &c)
        };
        if let Some((status, result)) = answer {
            self.complete(state, sq, cid, status, result);
        }
    }

    pub fn complete(&self, state: &mut State, sq: u16, cid: u16, status: u16, result: u32) {
        let from = &state.sqs[&sq];
        let (mut head, mut id, mut cid) = (from.head as u16, sq, cid);
        let lie = state.lie.take_if(|_| sq != 0);
        match lie {
            Some(Lie::Cid(by)) => cid = cid.wrapping_add(by),
            Some(Lie::Sq(by)) => id = id.wrapping_add(by),
            Some(Lie::Head(by)) => head = head.wrapping_add(by),
            // Seen to elsewhere.
            Some(Lie::Misplaced | Lie::Lost) => state.lie = lie,
            _ => {}
        }
        let times = if lie == Some(Lie::Twice) { 2 } else { 1 };
        let cq = state.cqs.get_mut(&from.other).unwrap();
        for _ in 0..times {
            let next = (cq.tail + 1) % cq.entries;
            assert_ne!(next, cq.head, "the host lets the CQ be filled");
            let last = u32::from(cid) | u32::from(cq.phase) << 16 | u32::from(status) << 17;
            let words = [result, 0, u32::from(head) | u32::from(id) << 16, last];
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let at = cq.at + u64::from(cq.tail) * 16;
            // The phase tag after the rest.
            self.memory.memory().write(at, &bytes[..12]).unwrap();
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            self.memory.memory().write(at + 12, &bytes[12..]).unwrap();
            cq.tail = next;
            cq.phase ^= next == 0;
        }
        if cq.enabled && lie != Some(Lie::NoEvent) {
            state.events[usize::from(cq.other)].signal();
        }
    }

    /// Completes an event request.
    pub fn event(&self, what: u32) {
        let mut state = self.state.lock().unwrap();
        let cid = state.held.remove(0);
        self.complete(&mut state, 0, cid, OK, what);
    }

    fn admin(&self, state: &mut State, cid: u16, c: &[u32; 16]) -> Option<(u16, u32)> {
        let (id, entries) = (c[10] as u16, (c[10] >> 16) + 1);
        let at = u64::from(c[6]) | u64::from(c[7]) << 32;
        let bad = |code: u16| Some((1 << 8 | code, 0));
        let wrong_size = !(2..=MAX_ENTRIES).contains(&entries);
        match c[0] as u8 {
            0x01 if state.sqs.contains_key(&id) => return bad(1),
            0x01 if !state.cqs.contains_key(&((c[11] >> 16) as u16)) => return bad(0),
            0x05 if state.cqs.contains_key(&id) => return bad(1),
            0x01 | 0x05 if wrong_size || c[11] & 1 == 0 => return bad(2),
            0x01 => {
                let queue = Queue::new(at, entries, (c[11] >> 16) as u16, true);
                state.sqs.insert(id, queue);
            }
            0x05 => {
                let queue = Queue::new(at, entries, (c[11] >> 16) as u16, c[11] & 2 != 0);
                state.cqs.insert(id, queue);
            }
            0x00 => return state.sqs.remove(&id).map_or(bad(1), |_| Some((OK, 0))),
            0x04 if state.sqs.values().any(|sq| sq.other == id) => return bad(0xc),
            0x04 => return state.cqs.remove(&id).map_or(bad(1), |_| Some((OK, 0))),
            0x06 => self.put(&pieces(&self.memory, c, 4096).unwrap(), &identify(c)),
            0x02 => {
                let len = ((c[10] >> 16) + 1 + ((c[11] & 0xffff) << 16)) * 4;
                let page: Vec<u8> = (0..len).map(|i| (i + c[12] + c[10]) as u8).collect();
                self.put(&pieces(&self.memory, c, u64::from(len)).unwrap(), &page);
            }
            0x08 => return Some((OK, 1)),
            0x09 if c[10] == 7 => return Some((OK, 3 | 1 << 16)),
            0x09 => drop(state.features.insert(c[10], c[11])),
            0x0a => return Some((OK, state.features.get(&c[10]).copied().unwrap_or(0))),
            0x0c => {
                state.held.push(cid);
                return None;
            }
            0x7c => state.shadow = Some((at, u64::from(c[8]) | u64::from(c[9]) << 32)),
            0x80 => state.disk.fill(0),
            _ => return Some((1, 0)),
        }
        Some((OK, 0))
    }

    fn io(&self, state: &mut State, c: &[u32; 16]) -> Option<(u16, u32)> {
        let slba = u64::from(c[10]) | u64::from(c[11]) << 32;
        let len = u64::from((c[12] & 0xffff) + 1) * BLOCK;
        let opcode = c[0] as u8;
        if opcode == 0 {
            return Some((OK, 0));
        }
        let mut at = (slba * BLOCK) as usize;
        if at + len as usize > state.disk.len() {
            return Some((0x80, 0));
        }
        if state.lie.take_if(|l| *l == Lie::Misplaced).is_some() {
            at = (at + 8 * BLOCK as usize) % state.disk.len();
        }
        let range = at..at + len as usize;
        if opcode == 8 {
            state.disk[range].fill(0);
            return Some((OK, 0));
        }
        let Some(pieces) = pieces(&self.memory, c, len) else {
            return Some((INVALID, 0));
        };
        match opcode {
            1 if slba >= 128 && state.lie.take_if(|l| *l == Lie::Lost).is_some() => {}
            1 => {
                let data = self.get(&pieces);
                state.disk[range].copy_from_slice(&data);
            }
            2 => self.put(&pieces, &state.disk[range]),
            5 if self.get(&pieces) != state.disk[range] => return Some((2 << 8 | 0x85, 0)),
            5 => {}
            _ => return Some((1, 0)),
        }
        Some((OK, 0))
    }

    fn get(&self, pieces: &Pieces) -> Vec<u8> {
        let mut data = Vec::new();
        for (at, len) in pieces {
            let begin = data.len();
            data.resize(begin + *len as usize, 0);
            self.memory.memory().read(*at, &mut data[begin..]).unwrap();
        }
        data
    }

    fn put(&self, pieces: &Pieces, mut data: &[u8]) {
        for (at, len) in pieces {
            let (now, rest) = data.split_at(*len as usize);
            self.memory.memory().write(*at, now).unwrap();
            data = rest;
        }
    }

    fn write(&self, offset: u64, value: u64) {
        if offset >= 0x1000 {
            return self.rung(offset, value as u32);
        }
        let mut state = self.state.lock().unwrap();
        if offset == 0x20 {
            assert_eq!(value, 0x4e56_4d65);
            state.registers.insert(0x14, 0);
            state.registers.insert(0x1c, 0x10);
            state.sqs.clear();
            state.cqs.clear();
            return;
        }
        let before = state.registers.insert(offset, value).unwrap_or(0);
        if offset != 0x14 {
            return;
        }
        let csts = match (before & 1, value & 1) {
            (0, 1) => {
                let register = |at| state.registers[&at];
                let (aqa, asq, acq) = (register(0x24), register(0x28), register(0x30));
                let entries = |bits: u64| (bits & 0xfff) as u32 + 1;
                let sq = Queue::new(asq, entries(aqa), 0, true);
                let cq = Queue::new(acq, entries(aqa >> 16), 0, true);
                (state.sqs, state.cqs) = ([(0, sq)].into(), [(0, cq)].into());
                1
            }
            (1, 0) => {
                state.sqs.clear();
                state.cqs.clear();
                state.held.clear();
                state.shadow = None;
                0
            }
            _ if value >> 14 & 3 != 0 => 1 | 2 << 2,
            (_, on) => on,
        };
        state.registers.insert(0x1c, csts);
    }

    fn rung(&self, offset: u64, value: u32) {
        self.with(|state| {
            state.rung.push((offset, value));
            let index = (offset - 0x1000) / 4;
            let id = (index / 2) as u16;
            if index.is_multiple_of(2) {
                state.sqs.get_mut(&id).expect("an SQ that is there").tail = value;
            } else {
                state.cqs.get_mut(&id).expect("a CQ that is there").head = value;
            }
        });
        self.work();
    }
}

/// Something for each CNS: where it is asked for and for whom.
fn identify(c: &[u32; 16]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    match c[10] as u8 {
        0 => {
            page[..8].copy_from_slice(&BLOCKS.to_le_bytes());
            page[26] = 0x21;
            page[128 + 4 * 17 + 2] = 9;
        }
        1 => {
            page[4..24].copy_from_slice(b"SERIAL              ");
            page[77] = 5;
            page[257] = 1;
            page[536] = 1;
        }
        2 => {
            for (i, nsid) in [1u32, 5].into_iter().filter(|n| *n > c[1]).enumerate() {
                page[4 * i..][..4].copy_from_slice(&nsid.to_le_bytes());
            }
        }
        _ => {}
    }
    page
}

impl Bar for Model {
    fn read32(&self, offset: u64) -> Result<u32, BarError> {
        Ok(self.read64(offset)? as u32)
    }

    fn read64(&self, offset: u64) -> Result<u64, BarError> {
        let state = self.state.lock().unwrap();
        Ok(match offset {
            0 => CAP,
            8 => 0x0002_0100,
            other => state.registers.get(&other).copied().unwrap_or(0),
        })
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError> {
        self.write(offset, u64::from(value));
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError> {
        self.write(offset, value);
        Ok(())
    }

    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError> {
        self.write(offset, u64::from(value));
        Ok(())
    }
}
