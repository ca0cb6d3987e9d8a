//! What fuzzers and property tests share: bytes become a client's behaviour, played against a target that checks its
//! contract, beside a naive model of what has to come of it.

mod model;
mod strict;

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use crate::framing::{self, MAX_FILES};
use crate::spec::{self, HEADER_LEN, RawDmaAccess, RawDmaMap, RawDmaUnmap, RawHeader, RawIrqSet};
use crate::spec::{RawRegionAccess, RawWrite, command, flag, irq};
use crate::{Limits, Session};
use model::{Model, Outcome};
use strict::Strict;

const PAGE: u64 = 4096;
/// As QEMU's, and short.
const VERSION: &[u8] = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":5000,\"max_dma_maps\":8,\"write_multiple\":true}}\0";

/// Bytes as choices; zero for ever when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_ne_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Mostly one of the values that make sense.
    fn of(&mut self, sensible: &[u64]) -> u64 {
        match self.byte() {
            0xff => u64::from(self.word()) << 32 | u64::from(self.word()),
            0xfe => u64::from(self.word()),
            n => sensible[usize::from(n) % sensible.len()],
        }
    }

    fn small(&mut self, sensible: &[u64]) -> u32 {
        self.of(sensible) as u32
    }

    fn page(&mut self) -> u64 {
        let top = 0u64.wrapping_sub(PAGE);
        self.of(&[0, 1, 2, 3, 4, 6, 8, 12]
            .map(|n| n * PAGE)
            .map(|a| if a == 12 * PAGE { top } else { a }))
    }
}

/// What is to come of a command that was sent.
struct Sent {
    id: u16,
    command: u16,
    outcome: Outcome,
}

struct Run {
    session: Session<Strict>,
    model: Model,
    /// Commands that want a reply, in order.
    sent: VecDeque<Sent>,
    next_id: u16,
    /// Commands of the server: id, command, address, count.
    asked: Vec<(u16, u16, u64, u64)>,
    tags: u64,
    /// DMA operations that are not over.
    open_tags: Vec<u64>,
    /// The other ends of the descriptors that were sent.
    peers: Vec<UnixStream>,
    /// The client does not read.
    deaf: bool,
    now: Instant,
}

impl Run {
    fn new() -> Self {
        let limits = Limits {
            max_data_xfer_size: 4096,
            max_mapped: 1 << 30,
            ..Limits::default()
        };
        Self {
            session: Session::new(Strict::default(), limits),
            model: Model::default(),
            sent: VecDeque::new(),
            next_id: 0,
            asked: Vec::new(),
            tags: 0,
            open_tags: Vec::new(),
            peers: Vec::new(),
            deaf: false,
            now: Instant::now(),
        }
    }

    fn file(&mut self) -> Option<OwnedFd> {
        if self.peers.len() == 64 {
            self.peers.retain(|peer| !is_closed(peer));
        }
        if self.peers.len() == 64 {
            return None;
        }
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        self.peers.push(ours);
        Some(theirs.into())
    }

    /// Descriptors that somebody on the server's side has open.
    fn open_files(&self) -> usize {
        self.peers.iter().filter(|peer| !is_closed(peer)).count()
    }

    /// Takes what the server sends, and checks it.
    fn drain(&mut self) {
        while let Some(message) = self.session.poll_transmit() {
            assert!(message.files.len() <= MAX_FILES);
            let (raw, body) = RawHeader::read_from_prefix(&message.bytes).expect("a header");
            assert_eq!(raw.size.get() as usize, message.bytes.len());
            if raw.flags.get() & flag::TYPE == flag::COMMAND {
                self.asked_of_us(&raw, body);
                continue;
            }
            let sent = self.sent.pop_front().expect("a reply to nothing");
            assert_eq!(
                (raw.id.get(), raw.command.get()),
                (sent.id, sent.command),
                "out of order"
            );
            let failed = raw.flags.get() & flag::ERROR != 0;
            if failed {
                assert!(body.is_empty() && raw.error.get() != 0 && message.files.is_empty());
            }
            let errno = failed.then(|| raw.error.get() as i32);
            sent.outcome.check(sent.command, errno);
        }
        while self.session.poll_refused().is_some() {}
        while let Some(done) = self.session.poll_dma() {
            let at = self.open_tags.iter().position(|t| *t == done.tag);
            self.open_tags.swap_remove(at.expect("over twice"));
        }
    }

    fn asked_of_us(&mut self, raw: &RawHeader, body: &[u8]) {
        let (access, data) = RawDmaAccess::read_from_prefix(body).expect("address and count");
        let (id, command, count) = (raw.id.get(), raw.command.get(), access.count.get());
        assert!((1..=4096).contains(&count), "more than was agreed on");
        assert!(self.asked.iter().all(|a| a.0 != id), "an ID that is taken");
        match command {
            command::DMA_READ => assert!(data.is_empty()),
            command::DMA_WRITE => assert_eq!(data.len() as u64, count),
            other => panic!("command {other} from the server"),
        }
        self.asked.push((id, command, access.address.get(), count));
    }

    /// Gives bytes to the session, in pieces.
    fn give(&mut self, c: &mut Choices<'_>, bytes: &[u8], mut files: Vec<OwnedFd>) {
        let step = match c.byte() {
            n @ 0xf0.. => usize::from(n - 0xef),
            _ => bytes.len(),
        };
        for part in bytes.chunks(step) {
            let files = std::mem::take(&mut files);
            if self.session.receive(part, files, false).is_err() {
                self.drain();
                return self.end();
            }
        }
    }

    fn command(&mut self, c: &mut Choices<'_>, command: u16) {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let mut payload = payload(c, command);
        let kind = c.byte();
        match kind {
            0xff => payload.truncate(usize::from(c.byte())),
            0xfe => payload.resize(c.word() as usize % 5000, 0x41),
            _ => {}
        }
        let count = match (c.byte(), command) {
            (0xff, _) => usize::from(c.byte() % 20),
            (0xc0.., command::DMA_MAP) => 0,
            (_, command::DMA_MAP) => 1,
            (n, command::DEVICE_SET_IRQS)
                if payload.len() >= 20 && payload[4] & 4 != 0 && n < 0xc0 =>
            {
                usize::from(payload[16]).min(17)
            }
            _ => 0,
        };
        let files: Vec<_> = (0..count).map_while(|_| self.file()).collect();
        let no_reply = c.byte() == 0xff;
        let outcome = self.model.command(command, &payload, files.len());
        if !no_reply {
            self.sent.push_back(Sent {
                id,
                command,
                outcome,
            });
        }
        let flags = if no_reply { flag::NO_REPLY } else { 0 };
        let bytes = framing::message(id, command, flags, 0, &[&payload]);
        // In the version a reply is not optional; without it the client is turned away.
        self.give(c, &bytes, files);
    }

    fn dma(&mut self, c: &mut Choices<'_>) {
        self.tags += 1;
        let (address, len) = (c.page(), c.of(&[1, 4096, 5000, 8192, 20000]) as usize);
        let write = c.byte() & 1 == 1;
        let result = match write {
            true => self
                .session
                .dma_write(self.tags, address, vec![1; len.min(1 << 20)], self.now),
            false => self.session.dma_read(self.tags, address, len, self.now),
        };
        if result.is_ok() {
            self.open_tags.push(self.tags);
        }
    }

    fn answer(&mut self, c: &mut Choices<'_>) {
        if self.asked.is_empty() {
            return;
        }
        let at = usize::from(c.byte()) % self.asked.len();
        let (id, command, address, count) = self.asked.swap_remove(at);
        let raw = RawDmaAccess {
            address: address.into(),
            count: count.into(),
        };
        let mut payload = raw.as_bytes().to_vec();
        if command == command::DMA_READ {
            payload.resize(16 + count as usize, 7);
        }
        let mut flags = flag::REPLY;
        match c.byte() {
            0xff => payload.truncate(usize::from(c.byte())),
            0xfe => flags |= flag::ERROR,
            0xfd => payload[0] ^= 1,
            _ => {}
        }
        let errno = u32::from(c.byte());
        let bytes = framing::message(id, command, flags, errno, &[&payload]);
        self.give(c, &bytes, Vec::new());
    }

    fn release(&mut self) {
        for ticket in self.session.target_mut().take_held() {
            self.session.finished(ticket);
        }
    }

    /// Everything that was sent has its answer; then the model is right.
    fn settle(&mut self) {
        self.session.target_mut().hold = false;
        loop {
            self.drain();
            if !self.session.is_busy() {
                break;
            }
            self.release();
        }
        if self.session.agreed().is_some() {
            let mapped: Vec<_> = self.session.mappings().copied().collect();
            assert_eq!(mapped, self.model.mappings(), "what is mapped");
            assert_eq!(
                mapped,
                self.session.target().mappings(),
                "what the target knows"
            );
            assert!(self.sent.is_empty(), "a command without a reply");
            let partial = usize::from(self.session.is_within_message()) * MAX_FILES;
            let held = self.session.target().files();
            assert!(
                (held..=held + partial).contains(&self.open_files()),
                "descriptors"
            );
        }
    }

    /// The client goes, and nothing is left of it.
    fn end(&mut self) {
        let _ = self.session.end();
        self.release();
        self.drain();
        assert!(self.session.is_idle(), "a session that does not end");
        assert!(self.session.target().is_clean());
        assert_eq!(
            self.open_files(),
            0,
            "descriptors of a client that has gone"
        );
        assert!(self.open_tags.is_empty(), "operations that are never over");
        self.model = Model::default();
        self.sent.clear();
        self.asked.clear();
    }
}

fn is_closed(mut peer: &UnixStream) -> bool {
    matches!(peer.read(&mut [0]), Ok(0))
}

fn payload(c: &mut Choices<'_>, command: u16) -> Vec<u8> {
    let info = |c: &mut Choices<'_>, len: u64| {
        let fields = [c.small(&[len, len, 256]), 0, c.small(&[0, 2, 7, 3]), 0];
        fields.as_bytes().to_vec()
    };
    match command {
        command::VERSION => VERSION.to_vec(),
        command::DMA_MAP => RawDmaMap {
            argsz: c.small(&[32]).into(),
            flags: c.small(&[3, 3, 1, 2, 0]).into(),
            offset: c.page().into(),
            address: c.page().into(),
            size: c.of(&[1, 1, 2, 3, 8].map(|n| n * PAGE)).into(),
        }
        .as_bytes()
        .to_vec(),
        command::DMA_UNMAP => {
            let all = c.byte() >= 0xf0;
            let (address, size) = match all {
                true => (0, 0),
                false => (c.page(), c.of(&[1, 1, 2, 3, 16].map(|n| n * PAGE))),
            };
            RawDmaUnmap {
                argsz: c.small(&[24]).into(),
                flags: (if all {
                    spec::dma_unmap::ALL
                } else {
                    c.small(&[0, 0, 0, 1])
                })
                .into(),
                address: address.into(),
                size: size.into(),
            }
            .as_bytes()
            .to_vec()
        }
        command::DEVICE_GET_REGION_INFO => [info(c, 32), vec![0; 16]].concat(),
        command::DEVICE_GET_INFO
        | command::DEVICE_GET_REGION_IO_FDS
        | command::DEVICE_GET_IRQ_INFO => info(c, 16),
        command::DEVICE_SET_IRQS => {
            let data = c.small(&[irq::DATA_EVENTFD, irq::DATA_NONE, irq::DATA_BOOL].map(u64::from));
            let action = c
                .small(&[irq::ACTION_TRIGGER, irq::ACTION_MASK, irq::ACTION_UNMASK].map(u64::from));
            let count = c.small(&[1, 0, 2, 8, 16]);
            let raw = RawIrqSet {
                argsz: c.small(&[20]).into(),
                flags: (data | action).into(),
                index: c.small(&[2, 0, 3]).into(),
                start: c.small(&[0, 0, 1, 60]).into(),
                count: count.into(),
            };
            let mut bytes = raw.as_bytes().to_vec();
            if data == irq::DATA_BOOL {
                bytes.resize(20 + count.min(100) as usize, c.byte() & 1);
            }
            bytes
        }
        command::REGION_READ | command::REGION_WRITE => {
            let count = c.small(&[4, 1, 8, 4096, 0]);
            let raw = RawRegionAccess {
                offset: c.of(&[0, 4, 0xfff, 0x3ffc]).into(),
                region: c.small(&[0, 7, 2, 8]).into(),
                count: count.into(),
            };
            let mut bytes = raw.as_bytes().to_vec();
            if command == command::REGION_WRITE {
                bytes.resize(16 + count.min(5000) as usize, 0x42);
            }
            bytes
        }
        command::REGION_WRITE_MULTI => {
            let count = c.of(&[1, 2, 0, 100]);
            let mut bytes = count.as_bytes().to_vec();
            for _ in 0..count.min(101) {
                let write = RawWrite {
                    access: RawRegionAccess {
                        offset: c.of(&[0, 0x1000]).into(),
                        region: c.small(&[0, 7]).into(),
                        count: c.small(&[4, 8, 1]).into(),
                    },
                    data: [3; 8],
                };
                bytes.extend_from_slice(write.as_bytes());
            }
            bytes
        }
        _ => Vec::new(),
    }
}

/// Plays bytes as a client: messages that make sense and messages that do not, answers that come late, clients that do not read,
/// clients that go and come.
///
/// # Panics
/// Where the session breaks the target's contract, answers a command not just once or out of order, keeps a descriptor of a refused
/// one, or has other mappings than the model.
pub fn fuzz_messages(data: &[u8]) {
    let c = &mut Choices(data);
    let mut run = Run::new();
    // Far more than a fuzzer finds interesting, so that a long input ends.
    for _ in 0..400 {
        if c.0.is_empty() {
            break;
        }
        if run.session.is_idle() {
            run.session.connect();
            if c.byte() < 0xf8 {
                run.command(&mut Choices(&[]), command::VERSION);
            }
        }
        match c.byte() {
            0..=199 => {
                let which = u16::from(c.byte()) % 20;
                run.command(c, which);
            }
            200..=201 => {
                let bytes: [u8; HEADER_LEN] = std::array::from_fn(|_| c.byte());
                // Nobody knows what is still answered, so that is its last word.
                if run
                    .session
                    .receive(&bytes, Vec::new(), c.byte() == 0xff)
                    .is_ok()
                {
                    run.settle_blindly();
                }
                run.end();
            }
            202..=211 => run.session.target_mut().hold ^= true,
            212..=223 => run.release(),
            224..=233 => run.dma(c),
            234..=243 => run.answer(c),
            244..=246 => {
                run.now += Duration::from_secs(u64::from(c.byte() % 8));
                run.session.handle_timeout(run.now);
            }
            247..=249 => run.deaf ^= true,
            250..=252 => run.settle(),
            _ => run.end(),
        }
        if !run.deaf {
            run.drain();
        }
    }
    run.settle();
    run.end();
}

impl Run {
    /// As [`Run::settle`], without a look at the answers.
    fn settle_blindly(&mut self) {
        self.session.target_mut().hold = false;
        while self.session.is_busy() {
            self.release();
        }
        while self.session.poll_transmit().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cases() -> u32 {
        if std::env::var_os("BLUFF_TEST_LONG").is_some() {
            50_000
        } else {
            1_000
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

        #[test]
        fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            fuzz_messages(&data);
        }

        /// Small choices: messages that make sense, so that much is mapped.
        #[test]
        fn sensible_messages_are_survived(
            data in prop::collection::vec(prop_oneof![12 => 0..40u8, 1 => 200..=255u8], 0..2000)
        ) {
            fuzz_messages(&data);
        }
    }

    /// The generator reaches what it is for.
    #[test]
    fn the_sensible_choices_map_and_unmap() {
        let mut run = Run::new();
        run.session.connect();
        for command in [command::VERSION, command::DMA_MAP, command::DEVICE_SET_IRQS] {
            run.command(&mut Choices(&[]), command);
        }
        run.settle();
        assert_eq!((run.session.mappings().count(), run.open_files()), (1, 2));
        run.command(&mut Choices(&[]), command::DMA_UNMAP);
        run.settle();
        assert_eq!((run.session.mappings().count(), run.open_files()), (0, 1));
        run.end();
    }
}
