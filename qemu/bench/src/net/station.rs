//! One end of a measurement: a polling driver of a virtio-net function, whoever serves it.
//!
//! Frames lie in their buffers from the start; when one is sent, its first bytes are written anew, as a guest's stack
//! writes headers. Of each frame that is received one word is read, so that its line is fetched as a reader would.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_front_end::{FrontEnd, Options, ring_features};
use bluff_virtio_driver::{
    Buffer, Config, DriverQueue, Features, Fixed, Memory, Span, SplitDriver,
};
use bluff_virtio_net::spec::{Header, feature};

use super::frames::{HEAD, HEADER, Image};
use crate::load::Count;

/// Descriptors of a queue.
const SIZE: u16 = 512;
/// Bytes of a buffer that receives.
const ROOM: usize = 2048;
/// From one such buffer to the next. An odd number of cache lines, here and for what is sent: otherwise all headers would share a few sets of the caches.
const STRIDE: usize = ROOM + 64;
/// Bytes of one descriptor's buffer that sends: as much as a guest has in one piece.
const PIECE: usize = 4096;
/// The most frames that are looked at in a turn.
const BURST: usize = 64;
const BASE: u64 = 1 << 30;
const RX: u16 = 0;
const TX: u16 = 1;
/// When nothing comes any more.
const STUCK: Duration = Duration::from_secs(20);

/// What a station negotiates and how much it has under way.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of the longest frame that it sends.
    pub longest: usize,
    /// Frames that it sends at once, at most.
    pub depth: u16,
    /// Checksums and segmentation are left to the device.
    pub offloads: bool,
    /// It wants to be notified: it is not there to be measured.
    pub sleeps: bool,
}

impl Shape {
    /// For frames of up to so many bytes.
    pub fn plain(longest: usize) -> Self {
        Self {
            longest,
            depth: SIZE / 2,
            offloads: false,
            sleeps: false,
        }
    }
}

/// A front end with one pair of queues.
pub struct Station {
    front: FrontEnd,
    memory: Arc<Memory>,
    rx: SplitDriver,
    tx: SplitDriver,
    shape: Shape,
    receives: Receives,
    sends: Sends,
    /// Where a frame lies that is none of the measurement's.
    said: u64,
}

struct Receives {
    chains: Vec<Fixed>,
    room: Span,
    first: u64,
}

struct Sends {
    /// By length of the frame: chains of the same buffers would overlap, so there is one length at a time.
    chains: Vec<Fixed>,
    room: Span,
    first: u64,
    stride: usize,
    /// Chains that are not under way.
    free: Vec<u16>,
    images: Vec<Image>,
    next: usize,
    words: usize,
}

/// Frames of a kind, to be sent one after the other.
pub struct Flows {
    /// What they all have behind their begin.
    pub body: Vec<u8>,
    /// How each begins.
    pub images: Vec<Image>,
}

impl Flows {
    /// Of whole frames of one length.
    pub fn new(frames: &[(Header, Vec<u8>)]) -> Result<Self> {
        let (_, first) = frames.first().context("no frame")?;
        let images = frames
            .iter()
            .map(|(header, frame)| Image::new(*header, frame));
        Ok(Self {
            body: first.clone(),
            images: images.collect(),
        })
    }

    /// Of frames without offloads.
    pub fn plain(frames: Vec<Vec<u8>>) -> Result<Self> {
        let frames: Vec<_> = frames.into_iter().map(|f| (Header::default(), f)).collect();
        Self::new(&frames)
    }
}

impl Station {
    /// Connects to the function on `socket`, and is ready to receive.
    pub fn connect(socket: &Path, shape: Shape) -> Result<Self> {
        let stride = (HEADER + shape.longest).next_multiple_of(128) + 64;
        let sends = stride as u64 * u64::from(shape.depth);
        let receives = (STRIDE * usize::from(SIZE)) as u64;
        let len = (sends + receives + (1 << 20)).next_multiple_of(2 << 20);
        let memory = Memory::flat(BASE, len)?;
        memory.populate();
        let features = Features {
            event_idx: shape.sleeps,
            indirect: true,
            in_order: false,
        };
        let mut device = feature::MRG_RXBUF;
        if shape.offloads {
            device |= feature::CSUM | feature::HOST_TSO4;
        }
        let options = Options {
            queues: 2,
            queue_size: SIZE,
            device_features: device,
            ..Options::new(ring_features(features, false))
        };
        let mut front = FrontEnd::connect(socket, &memory, options).context("the session")?;
        let missing = device & !front.features();
        ensure!(missing == 0, "features {missing:#x} are not offered");
        let config = Config::new(SIZE, features);
        let mut rx = SplitDriver::new(&memory, &config)?;
        let mut tx = SplitDriver::new(&memory, &config)?;
        let first = memory.alloc(receives, PIECE as u64)?;
        let mut chains = Vec::new();
        for i in 0..u64::from(SIZE) {
            let buffer = Buffer::writable(first + i * STRIDE as u64, ROOM as u32);
            chains.push(rx.fix(&[buffer], false, i)?);
        }
        let receives = Receives {
            chains,
            room: memory.span(first, receives)?,
            first,
        };
        let first = memory.alloc(sends, PIECE as u64)?;
        let said = memory.alloc(ROOM as u64, 64)?;
        let sends = Sends {
            chains: Vec::new(),
            room: memory.span(first, sends)?,
            first,
            stride,
            free: Vec::new(),
            images: Vec::new(),
            next: 0,
            words: 0,
        };
        for chain in &receives.chains {
            rx.resubmit(*chain)?;
        }
        if shape.sleeps {
            rx.enable_interrupts();
            tx.enable_interrupts();
        } else {
            // Who polls wants no notification, and the back end should not pay for any.
            rx.disable_interrupts();
            tx.disable_interrupts();
        }
        rx.publish();
        front.start(RX, &rx, 0).context("the receive queue")?;
        front.start(TX, &tx, 0).context("the transmit queue")?;
        let this = Self {
            front,
            memory,
            rx,
            tx,
            shape,
            receives,
            sends,
            said,
        };
        this.front.kick(RX);
        Ok(this)
    }

    /// These frames are sent from now on. Once for a station, as chains stay.
    pub fn set_flows(&mut self, flows: Flows) -> Result<()> {
        ensure!(self.sends.chains.is_empty(), "it has frames already");
        let len = HEADER + flows.body.len();
        ensure!(len <= self.sends.stride, "longer than its buffers");
        for i in 0..self.shape.depth {
            let at = self.sends.first + u64::from(i) * self.sends.stride as u64;
            self.memory.write(at + HEADER as u64, &flows.body)?;
            let piece = |from: usize| {
                let len = (len - from).min(PIECE);
                Buffer::readable(at + from as u64, len as u32)
            };
            let chain: Vec<_> = (0..len).step_by(PIECE).map(piece).collect();
            let fixed = self.tx.fix(&chain, chain.len() > 1, i.into())?;
            self.sends.chains.push(fixed);
            self.sends.free.push(i);
        }
        self.sends.words = len.min(HEAD).div_ceil(16);
        self.sends.images = flows.images;
        Ok(())
    }

    /// How many flows it sends.
    pub fn flows(&self) -> usize {
        self.sends.images.len()
    }

    /// Sends up to `most` frames, as far as there are buffers; gives how many.
    pub fn send(&mut self, most: usize) -> Result<usize> {
        let Self { tx, sends, .. } = self;
        while let Some(used) = tx.pop_used()? {
            sends.free.push(used.token as u16);
            if sends.free.len() >= BURST {
                break;
            }
        }
        let mut sent = 0;
        while sent < most
            && let Some(i) = sends.free.pop()
        {
            let at = usize::from(i) * sends.stride;
            let Image(words) = &sends.images[sends.next];
            for (k, pair) in words.chunks_exact(2).take(sends.words).enumerate() {
                sends.room.write_u64_pair(at + 16 * k, pair[0], pair[1]);
            }
            sends.next += 1;
            if sends.next == sends.images.len() {
                sends.next = 0;
            }
            tx.resubmit(sends.chains[usize::from(i)])?;
            sent += 1;
        }
        if sent > 0 && tx.publish() {
            self.front.kick(TX);
        }
        Ok(sent)
    }

    /// Takes what has come; gives how many frames of `len` bytes of IPv4 that was.
    pub fn receive(&mut self, len: usize) -> Result<u64> {
        let Self { rx, receives, .. } = self;
        let wanted = (HEADER + len) as u32;
        let (mut good, mut all) = (0, 0);
        while all < BURST
            && let Some(used) = rx.pop_used()?
        {
            let i = used.token as usize;
            // The ethertype, and version and length of the IP header.
            let word = receives.room.read_u32(i * STRIDE + HEADER + 12);
            good += u64::from(used.written == wanted && word & 0xff_ffff == 0x45_0008);
            rx.resubmit(receives.chains[i])?;
            all += 1;
        }
        if all > 0 && rx.publish() {
            self.front.kick(RX);
        }
        Ok(good)
    }

    /// The next frame that has come, as a whole.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(used) = self.rx.pop_used()? else {
            return Ok(None);
        };
        let i = used.token as usize;
        let mut bytes = vec![0; used.written as usize];
        // A frame of the measurement is never longer than a buffer.
        ensure!(
            bytes.len() >= HEADER && bytes.len() <= ROOM,
            "of {} bytes",
            bytes.len()
        );
        let at = self.receives.first + (i * STRIDE) as u64;
        self.memory.read(at, &mut bytes)?;
        self.rx.resubmit(self.receives.chains[i])?;
        if self.rx.publish() {
            self.front.kick(RX);
        }
        Ok(Some(bytes.split_off(HEADER)))
    }

    /// Sends a frame that is none of the measurement's, and waits until it is taken.
    pub fn say(&mut self, frame: &[u8]) -> Result<()> {
        ensure!(HEADER + frame.len() <= ROOM, "too long to be said");
        let at = self.said;
        self.memory.write(at, &[&[0; HEADER][..], frame].concat())?;
        let buffer = Buffer::readable(at, (HEADER + frame.len()) as u32);
        self.tx.add(&[buffer], false, u64::MAX)?;
        if self.tx.publish() {
            self.front.kick(TX);
        }
        let start = Instant::now();
        loop {
            match self.tx.pop_used()? {
                Some(used) if used.token == u64::MAX => return Ok(()),
                Some(used) => self.sends.free.push(used.token as u16),
                None => ensure!(start.elapsed() < STUCK, "what was sent is not taken"),
            }
        }
    }

    /// Whether nothing of what it sent is under way.
    pub fn settled(&mut self) -> Result<bool> {
        while let Some(used) = self.tx.pop_used()? {
            self.sends.free.push(used.token as u16);
        }
        Ok(self.tx.in_flight() == 0)
    }
}

/// Sends from one station as fast as it can and counts what the other gets of `len` bytes, until `span` is over.
pub fn drive(from: &mut Station, to: &mut Station, len: usize, span: Duration) -> Result<Count> {
    let start = Instant::now();
    let (mut frames, mut turns, mut last) = (0u64, 0u32, (0u64, start));
    loop {
        frames += to.receive(len)?;
        from.send(BURST)?;
        turns += 1;
        if turns.is_multiple_of(64) {
            let now = Instant::now();
            if now - start >= span {
                return Ok(Count {
                    requests: frames,
                    span: now - start,
                });
            }
            if frames != last.0 {
                last = (frames, now);
            }
            ensure!(now - last.1 < STUCK, "nothing came for {STUCK:?}");
        }
    }
}
