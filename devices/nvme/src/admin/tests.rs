//! Admin commands: what is refused, what is accepted, and what comes of it. Layouts are checked by the specification's offsets, not by our structures.

mod features;
mod format;
mod identify;
mod logs;
mod requests;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_block::null::Null;
use bluff_block::{BlockError, Channel, Geometry, OpenContext, Volume, VolumeEvent};

use super::*;
use crate::attached::Identity;
use crate::subsystem::{Membership, NamespaceOptions, SubsystemOptions};

/// A volume of any shape; nobody opens it.
#[derive(Debug)]
pub(crate) struct Shape {
    geometry: Mutex<Geometry>,
    events: bluff_block::Events,
}

impl Shape {
    pub fn new(geometry: Geometry) -> Arc<Self> {
        Arc::new(Self {
            geometry: Mutex::new(geometry),
            events: bluff_block::Events::default(),
        })
    }
}

impl Volume for Shape {
    fn geometry(&self) -> Geometry {
        *self.geometry.lock().unwrap()
    }

    fn open(&self, _: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        Err(BlockError::Unavailable)
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.geometry.lock().unwrap().size = size;
        self.events.emit(VolumeEvent::Resized);
        Ok(())
    }

    fn events(&self) -> &bluff_block::Events {
        &self.events
    }
}

/// A controller with its subsystem, and a clock that the test moves.
pub(crate) struct Rig {
    pub admin: Admin,
    pub subsystem: Arc<Subsystem>,
    pub member: Membership,
    pub heard: Arc<Mutex<Vec<SubsystemEvent>>>,
    pub now: Instant,
}

pub(crate) fn subsystem(shared: bool) -> Arc<Subsystem> {
    Subsystem::new(SubsystemOptions {
        nqn: "nqn.2026-11.example:s0".into(),
        shared,
        max_namespaces: 32,
        keeper: Some(Arc::new(crate::Transient)),
    })
    .unwrap()
}

/// One of 512-byte blocks and a volatile cache, one of 4096-byte blocks without, NSID 1 and 3.
pub(crate) fn with_two_namespaces(shared: bool) -> Arc<Subsystem> {
    let s = subsystem(shared);
    let mut cached = Geometry::new(512, 64 << 20);
    cached.physical_block_size = 4096;
    let one = s.add(
        Shape::new(cached),
        NamespaceOptions::new(Identity::hashed("one")),
    );
    let three = NamespaceOptions {
        nsid: Some(3),
        ..NamespaceOptions::new(Identity::hashed("three"))
    };
    let three = s.add(Arc::new(Null::new(4096, 1 << 30)), three);
    assert_eq!((one, three), (Ok(1), Ok(3)));
    s
}

impl Rig {
    pub fn on(subsystem: Arc<Subsystem>, options: ControllerOptions) -> Self {
        let heard = Arc::<Mutex<Vec<_>>>::default();
        let listener = heard.clone();
        let member = subsystem
            .join(move |event| listener.lock().unwrap().push(event))
            .unwrap();
        let now = Instant::now();
        let admin = Admin::new(
            Arc::new(options.clone()),
            subsystem.clone(),
            member.id(),
            Arc::new(Counters::new(now)),
            Arc::new(Settings::new(options.vectors)),
            now,
        );
        let mut rig = Self {
            admin,
            subsystem,
            member,
            heard,
            now,
        };
        rig.hear();
        rig.admin.reset(4096, now);
        rig
    }

    pub fn new() -> Self {
        Self::on(with_two_namespaces(false), ControllerOptions::new("DB0001"))
    }

    pub fn shared() -> Self {
        Self::on(with_two_namespaces(true), ControllerOptions::new("DB0001"))
    }

    /// Passes on what the subsystem has told.
    pub fn hear(&mut self) {
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        for event in &heard {
            self.admin.handle_event(event);
        }
    }

    pub fn execute(&mut self, command: &Command, data: &[u8]) -> Outcome {
        self.hear();
        self.admin.execute(command, data, self.now)
    }

    /// Dword 0 and data of a command that must succeed.
    #[track_caller]
    pub fn done(&mut self, command: &Command, data: &[u8]) -> (u32, Vec<u8>) {
        match self.execute(command, data) {
            Outcome::Done { dw0, data } => (dw0, data),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub fn failed(&mut self, command: &Command, data: &[u8]) -> Status {
        match self.execute(command, data) {
            Outcome::Failed(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Sets a feature without data.
    pub fn set(&mut self, fid: u8, value: u32) -> Result<u32, Status> {
        match self.execute(&set_feature(fid, value), &[]) {
            Outcome::Done { dw0, .. } => Ok(dw0),
            Outcome::Failed(status) => Err(status),
            other => panic!("{other:?}"),
        }
    }

    pub fn get(&mut self, fid: u8, cdw11: u32) -> Result<(u32, Vec<u8>), Status> {
        let command = dwords(0x0a, 0, [fid.into(), cdw11]);
        match self.execute(&command, &[]) {
            Outcome::Done { dw0, data } => Ok((dw0, data)),
            Outcome::Failed(status) => Err(status),
            other => panic!("{other:?}"),
        }
    }

    /// An event request.
    pub fn request(&mut self, cid: u16) -> Outcome {
        let mut command = dwords(0x0c, 0, [0; 2]);
        command.cid = cid.into();
        self.execute(&command, &[])
    }

    pub fn wait(&mut self, time: Duration) {
        self.now += time;
    }
}

/// A command with dwords 10 and 11.
pub(crate) fn dwords(opcode: u8, nsid: u32, [cdw10, cdw11]: [u32; 2]) -> Command {
    Command {
        opcode,
        nsid: nsid.into(),
        cdw10: cdw10.into(),
        cdw11: cdw11.into(),
        ..Command::default()
    }
}

pub(crate) fn identify(cns: u8, nsid: u32) -> Command {
    dwords(0x06, nsid, [cns.into(), 0])
}

pub(crate) fn set_feature(fid: u8, value: u32) -> Command {
    dwords(0x09, 0, [fid.into(), value])
}

/// Get Log Page of `len` bytes.
pub(crate) fn log(lid: u8, len: u32, offset: u64, retain: bool) -> Command {
    let numd = len / 4 - 1;
    let mut c = dwords(0x02, 0xffff_ffff, [0, numd >> 16]);
    c.cdw10 = (u32::from(lid) | u32::from(retain) << 15 | (numd & 0xffff) << 16).into();
    c.cdw12 = (offset as u32).into();
    c.cdw13 = ((offset >> 32) as u32).into();
    c
}

pub(crate) fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(data[at..at + 2].try_into().unwrap())
}

pub(crate) fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}
