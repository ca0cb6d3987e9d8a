//! Asking a daemon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Outcome, Request, RequestLine, Response, ResponseLine, VERSION};
use crate::message::{CapturePlace, CaptureSpec};
use crate::runtime_dir::CONTROL_SOCKET;

/// How long an answer may take. A resize can wait for storage.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next: u64,
}

impl Client {
    /// Connects to the daemon that has this runtime directory.
    ///
    /// # Errors
    /// Where none runs there, or it may not be asked.
    pub fn connect(runtime_dir: &Path) -> Result<Self> {
        let path = runtime_dir.join(CONTROL_SOCKET);
        let stream = UnixStream::connect(&path)
            .with_context(|| format!("no bluffd answers at {}", path.display()))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("the control socket")?;
        stream
            .set_write_timeout(Some(PATIENCE))
            .context("the control socket")?;
        Ok(Self {
            stream: BufReader::new(stream),
            next: 1,
        })
    }

    /// Asks for what passes a place, which then comes out of the connection ([`Request::Capture`]).
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn capture(mut self, place: CapturePlace, spec: CaptureSpec) -> Result<UnixStream> {
        match self.ask(Request::Capture { place, spec })? {
            Response::Capturing(_) => {}
            other => bail!("bluffd answered another question: {other:?}"),
        }
        ensure!(self.stream.buffer().is_empty(), "bluffd said too much");
        let mut stream = self.stream.into_inner();
        stream
            .set_read_timeout(None)
            .context("the control socket")?;
        stream.write_all(b"\n").context("asking bluffd")?;
        Ok(stream)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What the daemon answered, or that it did not.
    pub fn ask(&mut self, request: Request) -> Result<Response> {
        let id = self.next;
        self.next += 1;
        let mut line = serde_json::to_vec(&RequestLine {
            version: VERSION,
            id,
            request,
        })?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .context("asking bluffd")?;
        let mut line = String::new();
        let length = self
            .stream
            .read_line(&mut line)
            .context("waiting for bluffd's answer")?;
        ensure!(length > 0, "bluffd closed the connection");
        let response: ResponseLine =
            serde_json::from_str(&line).context("bluffd's answer cannot be read")?;
        match response.outcome {
            Outcome::Error(error) => bail!(error),
            Outcome::Result(_) if response.id != id => bail!("bluffd answered another question"),
            Outcome::Result(result) => Ok(result),
        }
    }
}
