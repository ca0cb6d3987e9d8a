//! Captures: each has a thread, which carries blocks from the reactors' buffer to whoever asked for it.
//!
//! The connection is the client's own, which control has answered and let go of: the client sends a byte when it has read the answer, and from then on it is sent a file of pcapng. It closes its
//! half when it has seen enough, and gets the end of the file. A client that reads slowly, or not at all, makes only its own thread wait.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_net::capture::pcapng::{self, LinkType};
use bluff_net::capture::{Attached, Capture, CaptureOptions, Way};
use bluff_overlay::Outer;
use rustix::event::{PollFd, PollFlags};

use super::{Data, Stands};
use crate::message::{CapturePlace, CaptureSpec, CaptureWay};

/// Bytes that wait for a reader, and again as many that are on their way to it.
const ROOM: usize = 4 << 20;
/// Captures at once: that bounds their memory.
const MOST: usize = 8;
/// How often the buffer is emptied while there is something in it.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a client may take for its first byte, and for the end of the file once nothing more comes.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of the data half waits for the end of a file.
const FAREWELL: Duration = Duration::from_millis(500);

/// Those that run.
#[derive(Default)]
pub(super) struct Captures(Vec<(Arc<Capture>, JoinHandle<()>)>);

impl Data {
    pub(super) fn capture(
        &mut self,
        place: &CapturePlace,
        spec: CaptureSpec,
        descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        let captures = &mut self.captures.0;
        captures.retain(|(_, thread)| !thread.is_finished());
        ensure!(captures.len() < MOST, "there are {MOST} captures already");
        let socket = descriptors.into_iter().next();
        let socket = UnixStream::from(socket.context("its connection was lost on the way")?);
        socket.set_nonblocking(true)?;
        let capture = Capture::new(CaptureOptions {
            snaplen: spec.snaplen,
            only: spec.only.map(|only| match only {
                CaptureWay::In => Way::In,
                CaptureWay::Out => Way::Out,
            }),
            count: spec.count.unwrap_or(u64::MAX),
            room: ROOM,
        });
        let (attached, link) = match place {
            CapturePlace::Function(id) => match self.functions.get(id) {
                Some(Stands::Net(net)) => (net.capture(capture.clone())?, LinkType::Ethernet),
                Some(Stands::Blk(_) | Stands::Nvme(_)) => {
                    anyhow::bail!("it is of a kind without frames")
                }
                None => anyhow::bail!("it is not attached"),
            },
            CapturePlace::Network(id) => {
                let (network, outer): (_, Outer) = self.networks.tunnel(id)?;
                (network.capture(outer, capture.clone()), LinkType::Ip)
            }
        };
        let begin = pcapng::begin(
            concat!("Diamond Bluff ", env!("CARGO_PKG_VERSION")),
            &place.to_string(),
            link,
            spec.snaplen,
        );
        let name = place.to_string();
        let thread = std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || {
                let mut stream = Stream {
                    socket,
                    attached,
                    is_closed: false,
                };
                // A client that is gone has what it wanted.
                if let Err(error) = stream.run(&begin) {
                    log::debug!("the capture of {name}: {error}");
                }
            })
            .context("the thread of a capture")?;
        self.captures.0.push((capture, thread));
        Ok(())
    }
}

impl Drop for Captures {
    fn drop(&mut self) {
        self.0.iter().for_each(|(capture, _)| capture.end());
        let end = Instant::now() + FAREWELL;
        for (_, thread) in self.0.drain(..) {
            while !thread.is_finished() && Instant::now() < end {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// A capture on its way to a client.
struct Stream {
    socket: UnixStream,
    attached: Attached,
    /// The client has closed its half.
    is_closed: bool,
}

impl Stream {
    fn run(&mut self, begin: &[u8]) -> std::io::Result<()> {
        self.wait(PollFlags::IN, PATIENCE)?;
        if self.socket.read(&mut [0])? == 0 {
            return Ok(());
        }
        self.write(begin)?;
        let mut blocks = Vec::with_capacity(ROOM);
        loop {
            // Asked first: what came before the end is in the buffer.
            let is_over = self.is_closed || self.attached.is_over();
            if is_over {
                self.attached.capture().end();
            }
            self.attached.capture().take(&mut blocks);
            self.write(&blocks)?;
            match (is_over, blocks.is_empty()) {
                (true, true) => break,
                (false, true) => self.look(PAUSE)?,
                (_, false) => self.look(Duration::ZERO)?,
            }
        }
        let capture = self.attached.capture().clone();
        self.write(&pcapng::end(capture.span(), capture.captured()))
    }

    /// Waits until the socket is as wanted, or for so long.
    fn wait(&self, what: PollFlags, span: Duration) -> std::io::Result<bool> {
        let span = span.try_into().expect("some seconds");
        match rustix::event::poll(&mut [PollFd::new(&self.socket, what)], Some(&span)) {
            Ok(n) => Ok(n > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks whether the client has closed its half, for so long.
    fn look(&mut self, span: Duration) -> std::io::Result<()> {
        if self.is_closed {
            return Ok(());
        }
        if self.wait(PollFlags::IN, span)? {
            match self.socket.read(&mut [0; 64]) {
                Ok(0) => self.is_closed = true,
                Ok(_) => {}
                Err(error) if is_nothing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        let mut last = Instant::now();
        while !bytes.is_empty() {
            match self.socket.write(bytes) {
                Ok(n) => (bytes, last) = (&bytes[n..], Instant::now()),
                Err(error) if is_nothing(&error) => {
                    // While frames come it may take its time: then they are missed. Once none come it would be waited for in vain.
                    let is_over = self.is_closed || self.attached.is_over();
                    if is_over && last.elapsed() > PATIENCE {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    self.wait(PollFlags::OUT, 10 * PAUSE)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_nothing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
