//! A host that gives admin commands as it likes, and an operator who changes namespaces meanwhile.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_block::null::Null;

use super::choices::Choices;
use crate::admin::{Admin, BadDoorbell, ErrorReport, Outcome, QueueCommand, Transfer};
use crate::health::Settings;
use crate::spec::registers::Cc;
use crate::spec::{Command, Status};
use crate::{
    AnaState, ControllerOptions, Counters, Formatting, Identity, Membership, NamespaceOptions,
    Subsystem, SubsystemEvent, SubsystemOptions,
};

const NSIDS: u32 = 6;
const QUEUES: u16 = 4;
/// Opcodes that there are, and some that there are not.
const OPCODES: [u32; 16] = [
    0x06, 0x02, 0x09, 0x0a, 0x01, 0x05, 0x00, 0x04, 0x08, 0x0c, 0x80, 0x7c, 0x01, 0x05, 0x06, 0x0d,
];

struct Run {
    admin: Admin,
    subsystem: Arc<Subsystem>,
    member: Membership,
    heard: Arc<Mutex<Vec<SubsystemEvent>>>,
    /// Event requests that the host has given.
    requests: Vec<u16>,
    /// Submission queues that are being deleted.
    deleting: Vec<u16>,
    aborts: usize,
    formatting: Option<Formatting>,
    now: Instant,
    reached: Reached,
}

/// How often each kind of outcome came.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    done: u32,
    failed: u32,
    held: u32,
    made: u32,
    formats: u32,
    events: u32,
}

impl Run {
    fn new(shared: bool) -> Self {
        let subsystem = Subsystem::new(SubsystemOptions {
            nqn: "nqn.2026-11.example:fuzz".into(),
            shared,
            max_namespaces: NSIDS,
            keeper: Some(Arc::new(crate::Transient)),
        })
        .expect("a name");
        let heard = Arc::<Mutex<Vec<_>>>::default();
        let listener = heard.clone();
        let member = subsystem
            .join(move |event| listener.lock().expect("no panic").push(event))
            .expect("the first");
        let options = ControllerOptions {
            queues: QUEUES,
            ..ControllerOptions::new("fuzz")
        };
        let now = Instant::now();
        let settings = Arc::new(Settings::new(options.vectors));
        let counters = Arc::new(Counters::new(now));
        let id = member.id();
        let mut run = Self {
            admin: Admin::new(
                Arc::new(options),
                subsystem.clone(),
                id,
                counters,
                settings,
                now,
            ),
            subsystem,
            member,
            heard,
            requests: Vec::new(),
            deleting: Vec::new(),
            aborts: 0,
            formatting: None,
            now,
            reached: Reached::default(),
        };
        run.change(&mut Choices(&[0]));
        run.hear();
        run.admin.reset(4096, now);
        run
    }

    fn hear(&mut self) {
        let heard = std::mem::take(&mut *self.heard.lock().expect("no panic"));
        for event in &heard {
            self.admin.handle_event(event);
        }
    }

    /// What an operator does.
    fn change(&mut self, c: &mut Choices<'_>) {
        let nsid = u32::from(c.u8()) % (NSIDS + 1);
        // What cannot be is refused, which is as good.
        let _ = match c.u8() % 5 {
            0 => {
                let options = NamespaceOptions {
                    nsid: (nsid != 0).then_some(nsid),
                    group: u32::from(c.u8() % 3) + 1,
                    ..NamespaceOptions::new(Identity::hashed("fuzz"))
                };
                let block = if c.u8().is_multiple_of(2) { 512 } else { 4096 };
                let volume = Arc::new(Null::new(block, 1 << 20));
                self.subsystem.add(volume, options).map(|_| ())
            }
            1 => self.subsystem.remove(nsid),
            2 => self
                .subsystem
                .attach(nsid, self.member.id(), c.u8().is_multiple_of(2)),
            3 => {
                let ana = [
                    AnaState::Optimized,
                    AnaState::Inaccessible,
                    AnaState::Change,
                ];
                let ana = ana[usize::from(c.u8() % 3)];
                self.subsystem.set_ana(u32::from(c.u8() % 4), None, ana)
            }
            _ => {
                let table = self.admin.table().clone();
                if let Ok(n) = table.get(nsid, NSIDS) {
                    let size = (u64::from(c.u8()) + 1) << 16;
                    n.namespace
                        .volume()
                        .resize(size)
                        .expect("a null volume can");
                }
                Ok(())
            }
        };
    }

    fn command(&mut self, c: &mut Choices<'_>) {
        let dword = |c: &mut Choices<'_>| c.of(&[0, 1, 2, 3, 0xffff, 0x0001_0001, 0x00ff_0002]);
        let opcode = c.of(&OPCODES) as u8;
        let mut cdw10 = dword(c);
        match opcode {
            0x06 => {
                cdw10 =
                    cdw10 & !0xff | c.of(&[0, 1, 2, 3, 5, 6, 7, 8, 0x10, 0x11, 0x12, 0x13, 0x1c]);
            }
            0x02 => cdw10 = cdw10 & !0xff | c.of(&[0, 1, 2, 3, 4, 5, 0x0c, 0x12, 0x13]),
            0x09 | 0x0a => {
                let fid = c.of(&[1, 2, 4, 5, 6, 7, 8, 9, 0x0a, 0x0b, 0x0e, 0x16, 0x19, 0x81]);
                cdw10 = c.of(&[0, 0, 0, 1, 2, 3]) << 8 & 0x700 | fid & 0xff;
            }
            0x01 | 0x05 => {
                cdw10 = c.of(&[1, 2, 1, 3, 4, 0, 5]) & 0xffff
                    | c.of(&[7, 63, 7, 1, 4095, 7, 0, 0xffff]) << 16;
            }
            0x00 | 0x04 => cdw10 = c.of(&[1, 2, 3, 4, 0, 5]),
            0x80 => cdw10 = c.of(&[0, 1, 1 << 9, 2 << 9]),
            _ => {}
        }
        let cdw11 = match opcode {
            0x01 | 0x05 => c.of(&[1, 3, 1, 1, 0]) & 0xffff | c.of(&[1, 2, 1, 3, 0, 4]) << 16,
            _ => dword(c),
        };
        let command = Command {
            opcode,
            flags: if c.u8() >= 0xf8 { c.u8() } else { 0 },
            cid: (c.of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) as u16).into(),
            nsid: c.of(&[0, 1, 2, 3, 6, 7, 0xffff_ffff, 0xffff_fffe]).into(),
            cdw10: cdw10.into(),
            cdw11: cdw11.into(),
            cdw12: c.of(&[0, 0, 4, 512, 4096, 0xffff_fffc]).into(),
            cdw13: c.of(&[0, 0, 0, 0, 1]).into(),
            dptr: [
                u64::from(c.of(&[0x1000, 0, 0x3000, 0x4000, 0x1008])).into(),
                0x2000.into(),
            ],
            ..Command::default()
        };
        let transfer = self.admin.transfer(&command);
        let data: Vec<u8> = match transfer {
            Ok(Transfer::FromHost(len)) => {
                assert!(len <= 1 << 20);
                let fill = c.u8();
                (0..len)
                    .map(|at| if at < 8 { c.u8() } else { fill & 1 })
                    .collect()
            }
            _ => Vec::new(),
        };
        let outcome = self.admin.execute(&command, &data, self.now);
        if let Err(status) = transfer {
            assert_eq!(
                outcome,
                Outcome::Failed(status),
                "refused once, refused twice"
            );
        }
        self.check(&command, transfer, outcome);
    }

    fn check(&mut self, command: &Command, transfer: Result<Transfer, Status>, outcome: Outcome) {
        let nsid = command.nsid.get();
        let there = self.admin.table().get(nsid, NSIDS).is_ok();
        match outcome {
            Outcome::Done { data, .. } => {
                self.reached.done += 1;
                let len = match transfer {
                    Ok(Transfer::ToHost(len)) => len,
                    _ => 0,
                };
                assert_eq!(data.len(), len);
                let cns = command.cdw10.get() as u8;
                if command.opcode == 0x06 && matches!(cns, 0x00 | 0x05 | 0x08 | 0x11 | 0x12) {
                    assert!((1..=NSIDS).contains(&nsid), "success for a wrong namespace");
                }
                if command.opcode == 0x06 && cns == 0x00 {
                    assert_eq!(
                        data.iter().any(|b| *b != 0),
                        there,
                        "an active one and no other"
                    );
                }
                if matches!(command.opcode, 0x02 | 0x09) && !matches!(nsid, 0 | 0xffff_ffff) {
                    assert!(command.opcode == 0x09 && cns == 5 && there);
                }
            }
            Outcome::Failed(status) => {
                self.reached.failed += 1;
                assert!(status.is_error());
                self.admin
                    .report_error(&ErrorReport::of(0, command, status));
            }
            Outcome::Held => {
                self.reached.held += 1;
                assert!(!self.requests.contains(&command.cid.get()) && self.requests.len() < 8);
                self.requests.push(command.cid.get());
            }
            Outcome::Queue(queue) => self.queue(queue),
            Outcome::Format(format) => {
                self.reached.formats += 1;
                for nsid in &format.nsids {
                    let namespace = self.admin.table().get(*nsid, NSIDS).expect("attached");
                    assert_eq!(namespace.check(), Ok(()));
                }
                let id = self.member.id();
                let begun = self
                    .subsystem
                    .begin_format(id, &format.nsids, format.format, || ());
                // One at a time, so that there is one to be ended.
                assert!(self.formatting.is_none() || begun.is_ok());
                if let Ok(begun) = begun {
                    self.formatting = Some(begun);
                }
            }
        }
    }

    fn queue(&mut self, queue: QueueCommand) {
        const CC: Cc = Cc(4 << 20 | 6 << 16 | 1);
        let queues = &mut self.admin.queues;
        match queue {
            QueueCommand::CreateCq(raw) => {
                if let Ok(made) = queues.create_cq(&raw, CC) {
                    assert!((1..=QUEUES).contains(&made.qid));
                    assert!((2..=4096).contains(&made.entries));
                }
            }
            QueueCommand::CreateSq(raw) => {
                if let Ok(made) = queues.create_sq(&raw, CC) {
                    self.reached.made += 1;
                    assert!((1..=QUEUES).contains(&made.qid) && (1..=QUEUES).contains(&made.cqid));
                    assert_eq!(queues.delete_cq(made.cqid), Err(Status::QUEUE_DELETION));
                }
            }
            QueueCommand::DeleteSq(qid) => {
                if queues.delete_sq(qid).is_ok() {
                    self.deleting.push(qid);
                }
            }
            QueueCommand::DeleteCq(qid) => {
                if queues.delete_cq(qid).is_ok() {
                    queues.deleted_cq(qid);
                }
            }
            QueueCommand::Abort(raw) => {
                self.aborts += 1;
                assert!(self.aborts <= 4);
                let _ = queues.abort(raw);
                if raw.sqid == 0 && self.admin.abort_event(raw.cid) {
                    self.requests.retain(|cid| *cid != raw.cid);
                }
            }
            QueueCommand::DoorbellBuffer { shadow, event } => {
                assert!((shadow | event).is_multiple_of(4096));
            }
        }
    }

    fn reset(&mut self) {
        self.hear();
        self.admin.reset(4096, self.now);
        self.requests.clear();
        self.deleting.clear();
        self.aborts = 0;
        assert!(self.admin.queues.is_empty());
    }
}

/// Plays bytes as admin commands and changes of the subsystem.
///
/// # Panics
/// Where a command is answered with other bytes than were promised, or with success for a namespace that is not there; where an event request is answered
/// that was not given; where limits do not hold.
pub fn fuzz_admin(data: &[u8]) {
    play(data);
}

fn play(data: &[u8]) -> Reached {
    let c = &mut Choices(data);
    let mut run = Run::new(c.u8() % 2 == 0);
    for _ in 0..400 {
        if c.is_empty() {
            break;
        }
        match c.u8() {
            0..=2 => run.change(c),
            3 => run
                .admin
                .report_doorbell(BadDoorbell::Value, Some(u16::from(c.u8()))),
            4 => {
                if let Some(qid) = run.deleting.pop() {
                    run.admin.queues.deleted_sq(qid);
                }
            }
            5..=6 => {
                if run.aborts > 0 {
                    run.aborts -= 1;
                    run.admin.abort_done();
                }
            }
            7 => match (run.formatting.take(), c.u8() % 2) {
                (Some(formatting), 0) => formatting.finish(|kept| assert!(kept.is_ok())),
                (formatting, _) => drop(formatting),
            },
            8 => run.now += Duration::from_millis(u64::from(c.u32())),
            9 if c.u8() % 8 == 0 => run.reset(),
            _ => run.command(c),
        }
        run.hear();
        while let Some((cid, dw0)) = run.admin.poll_event() {
            let at = run.requests.iter().position(|r| *r == cid);
            run.requests
                .swap_remove(at.expect("a request that was given"));
            assert!(matches!(dw0 & 0xff, 0..=2));
            run.reached.events += 1;
        }
    }
    run.reached
}

#[cfg(test)]
mod tests {
    use bluff_testing::Chance;

    use super::*;

    /// The generator reaches what it is for.
    #[test]
    fn every_kind_of_outcome_comes() {
        let mut sum = Reached::default();
        for seed in 0..200 {
            let bytes: Vec<u8> = Chance::new(seed).bytes(1500);
            let bytes: Vec<u8> = bytes.iter().map(|b| b % 40).collect();
            let one = play(&bytes);
            sum.done += one.done;
            sum.failed += one.failed;
            sum.held += one.held;
            sum.made += one.made;
            sum.formats += one.formats;
            sum.events += one.events;
        }
        let Reached {
            done,
            failed,
            held,
            made,
            formats,
            events,
        } = sum;
        let all = [done, failed, held, made, formats, events];
        assert!(all.iter().all(|n| *n > 20), "{sum:?}");
    }
}
