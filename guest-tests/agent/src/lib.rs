//! The wire protocol between a test on the host and the agent inside its guest.
//!
//! ```text
//!   test ── Unix socket ── virtio-serial port (or a UML serial line) ── agent ── /bin/sh
//!        Hello, Run, Stdin, Kill  -->              <--  Hello, Stdout, Stderr, Exit
//! ```
//!
//! Both sides speak [`Frame`]s. A guest can be reset, and a test can reconnect, in the middle of a frame, so each frame opens with
//! a magic number and the [`Decoder`] skips to the next one when it finds anything else. A `Hello` with a nonce, echoed by the agent,
//! tells the host that what follows belongs to this connection.
//!
//! What it does not do: it does not protect itself against the other side; both are ours.

/// What a frame opens with.
pub const MAGIC: [u8; 4] = *b"BLF1";
/// Bytes before the payload: magic, kind, three zeroes, id, length; integers are little-endian.
pub const HEADER: usize = 16;
/// The longest payload that is accepted, in bytes. A longer one is taken for noise.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// The name of the virtio-serial port that the agent answers on.
pub const PORT_NAME: &str = "bluff.agent";

/// What a frame means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Host: an 8-byte nonce. Agent: the nonce, then the kernel's boot id as text.
    Hello = 1,
    /// Host: one byte (1: standard input follows, 0: it is empty), then a shell script. The id names the job.
    Run = 2,
    /// Host: bytes for the job's standard input; an empty payload closes it.
    Stdin = 3,
    /// Host: a signal number (4 bytes) for the job's process group.
    Kill = 4,
    /// Agent: what the job wrote to standard output.
    Stdout = 5,
    /// Agent: what the job wrote to standard error.
    Stderr = 6,
    /// Agent: the job ended: its exit status (4 bytes), or 128 plus the signal. Nothing follows for this job.
    Exit = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Hello, Run, Stdin, Kill, Stdout, Stderr, Exit]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it means.
    pub kind: Kind,
    /// The job that it belongs to, chosen by the host.
    pub id: u32,
    /// See [`Kind`].
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame of this kind for this job.
    pub fn new(kind: Kind, id: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            id,
            payload: payload.into(),
        }
    }

    /// The bytes to send. A payload above [`MAX_PAYLOAD`] is a bug of the caller.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.payload.len() <= MAX_PAYLOAD, "frame too long");
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The payload's first four bytes as a number (`Kill`, `Exit`).
    pub fn number(&self) -> Option<i32> {
        Some(i32::from_le_bytes(self.payload.get(..4)?.try_into().ok()?))
    }
}

/// Finds frames in a stream of bytes, and skips what is none.
#[derive(Default, Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or nothing until more is pushed.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let start = self
                .buffer
                .windows(MAGIC.len())
                .position(|window| window == MAGIC)
                // The last bytes can be the beginning of a magic number.
                .unwrap_or(self.buffer.len().saturating_sub(MAGIC.len() - 1));
            self.buffer.drain(..start);
            let header: &[u8; HEADER] = self.buffer.first_chunk()?;
            let word = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let (kind, id, length) = (Kind::from_byte(header[4]), word(8), word(12) as usize);
            let Some(kind) = kind.filter(|_| length <= MAX_PAYLOAD && header[5..8] == [0; 3])
            else {
                self.buffer.drain(..1);
                continue;
            };
            if self.buffer.len() < HEADER + length {
                return None;
            }
            let payload = self.buffer[HEADER..HEADER + length].to_vec();
            self.buffer.drain(..HEADER + length);
            return Some(Frame { kind, id, payload });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_split() {
        let frames = [
            Frame::new(Kind::Run, 7, b"\x00echo hello".to_vec()),
            Frame::new(Kind::Stdout, 7, vec![0xff; 5000]),
            Frame::new(Kind::Exit, 7, 3i32.to_le_bytes()),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        for step in [1, 3, 16, 17, 4096] {
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.push(piece);
                found.extend(std::iter::from_fn(|| decoder.next_frame()));
            }
            assert_eq!(found, frames, "in pieces of {step}");
        }
    }

    #[test]
    fn a_stream_cut_in_mid_frame_is_found_again() {
        let whole = Frame::new(Kind::Hello, 0, b"12345678".to_vec());
        let mut noise = Frame::new(Kind::Stdout, 1, vec![b'x'; 100]).encode();
        noise.drain(..40);
        noise.extend_from_slice(b"BLF1\xee\0\0\0garbage!BLF");
        let mut decoder = Decoder::default();
        decoder.push(&noise);
        assert_eq!(decoder.next_frame(), None);
        decoder.push(&whole.encode());
        assert_eq!(decoder.next_frame(), Some(whole));
    }

    #[test]
    fn numbers_are_read_only_where_there_is_one() {
        assert_eq!(
            Frame::new(Kind::Exit, 1, (-1i32).to_le_bytes()).number(),
            Some(-1)
        );
        assert_eq!(Frame::new(Kind::Exit, 1, vec![1, 2]).number(), None);
    }
}
