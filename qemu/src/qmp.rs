//! A client of QMP, QEMU's control protocol (QEMU 11.1, `docs/interop/qmp-spec.rst`): negotiation, commands, events, time-outs.
//!
//! Replies and events share one stream of lines. Events that come while a reply is awaited are kept until somebody asks for them.
//! It does not do out-of-band execution.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

/// Something that happened in QEMU.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// Its name, e.g. `RESET`.
    pub event: String,
    /// What belongs to it; null where nothing does.
    #[serde(default)]
    pub data: Value,
}

/// A command that QEMU refused.
#[derive(Clone, Debug, Deserialize)]
pub struct Refusal {
    /// The kind of error, nearly always `GenericError`.
    pub class: String,
    /// For people.
    pub desc: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} ({})", self.desc, self.class)
    }
}

impl std::error::Error for Refusal {}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        _qmp: Value,
    },
    Event(Event),
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<u64>,
    },
    Error {
        error: Refusal,
        id: Option<u64>,
    },
}

/// One connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(path: &Path, bound: Duration) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        Self::over(stream, bound)
    }

    /// Negotiates over a connection that stands.
    pub fn over(stream: UnixStream, bound: Duration) -> Result<Self> {
        let mut qmp = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            next_id: 0,
        };
        match qmp.read(Instant::now() + bound)? {
            Some(Message::Greeting { .. }) => {}
            Some(_) => bail!("QMP does not begin with a greeting"),
            None => bail!("no QMP greeting within {bound:?}"),
        }
        qmp.execute("qmp_capabilities", json!({}), bound)?;
        Ok(qmp)
    }

    /// Sends a command and waits for its reply. A refusal is an error that holds a [`Refusal`].
    pub fn execute(&mut self, command: &str, arguments: Value, bound: Duration) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.stream
            .set_write_timeout(Some(bound.max(Duration::from_millis(1))))?;
        self.stream
            .write_all(line.as_bytes())
            .with_context(|| format!("send QMP {command}"))?;
        let end = Instant::now() + bound;
        loop {
            match self.read(end).with_context(|| format!("QMP {command}"))? {
                None => bail!("QMP {command}: no reply within {bound:?}"),
                Some(Message::Return {
                    value,
                    id: Some(found),
                }) if found == id => return Ok(value),
                Some(Message::Error { error, id: found })
                    if found.is_none_or(|found| found == id) =>
                {
                    return Err(error).with_context(|| format!("QMP {command}"));
                }
                Some(Message::Event(event)) => self.events.push_back(event),
                // The reply to a command whose time ran out.
                Some(Message::Return { .. } | Message::Error { .. } | Message::Greeting { .. }) => {
                }
            }
        }
    }

    /// The first event of this name that fits, whether it came already or comes in time; it is taken out, others stay.
    pub fn wait_event(
        &mut self,
        name: &str,
        fits: impl Fn(&Value) -> bool,
        bound: Duration,
    ) -> Result<Event> {
        let wanted = |event: &Event| event.event == name && fits(&event.data);
        if let Some(event) = self
            .events
            .iter()
            .position(wanted)
            .and_then(|index| self.events.remove(index))
        {
            return Ok(event);
        }
        let end = Instant::now() + bound;
        loop {
            match self
                .read(end)
                .with_context(|| format!("wait for QMP event {name}"))?
            {
                None => bail!("no QMP event {name} within {bound:?}"),
                Some(Message::Event(event)) if wanted(&event) => return Ok(event),
                Some(Message::Event(event)) => self.events.push_back(event),
                Some(_) => {}
            }
        }
    }

    /// Forgets events that came before now, so that a wait cannot be answered by an old one.
    pub fn forget_events(&mut self) -> Result<()> {
        while self.read(Instant::now())?.is_some() {}
        self.events.clear();
        Ok(())
    }

    /// The next message, or nothing when the time is over.
    fn read(&mut self, end: Instant) -> Result<Option<Message>> {
        loop {
            if let Some(length) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=length).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let text = String::from_utf8_lossy(&line);
                log::trace!("qmp: {}", text.trim());
                return Ok(Some(
                    serde_json::from_str(&text).with_context(|| format!("QMP message {text}"))?,
                ));
            }
            // No time-out at all is what zero would mean.
            let left = end
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => bail!("QEMU closed the connection"),
                Ok(length) => self.buffer.extend_from_slice(&piece[..length]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    /// A peer that says one thing per line that it gets, after a greeting.
    fn peer(replies: &'static [&'static str]) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        std::thread::spawn(move || {
            let mut out = theirs.try_clone().expect("a socket");
            writeln!(out, r#"{{"QMP": {{"version": {{}}, "capabilities": []}}}}"#).expect("a peer");
            let mut lines = BufReader::new(theirs).lines();
            for reply in replies {
                lines.next();
                writeln!(out, "{reply}").expect("a peer");
            }
            // Stays open until the client goes.
            lines.next();
        });
        ours
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn replies_and_events_are_told_apart() {
        let stream = peer(&[
            r#"{"return": {}, "id": 1}"#,
            "{\"event\": \"STOP\", \"timestamp\": {}}\r\n{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n{\"return\": 5, \"id\": 2}",
            r#"{"error": {"class": "GenericError", "desc": "no such device"}, "id": 3}"#,
        ]);
        let mut qmp = Qmp::over(stream, SECOND).expect("negotiated");
        assert_eq!(
            qmp.execute("query", json!({}), SECOND).expect("a reply"),
            json!(5)
        );
        let reset = qmp
            .wait_event("RESET", |data| data["guest"] == true, SECOND)
            .expect("kept");
        assert_eq!(reset.data["guest"], json!(true));
        assert!(
            qmp.wait_event("RESET", |_| true, Duration::from_millis(10))
                .is_err()
        );
        let error = qmp
            .execute("device_del", json!({"id": "x"}), SECOND)
            .expect_err("refused");
        assert_eq!(
            error.downcast_ref::<Refusal>().expect("a refusal").desc,
            "no such device"
        );
    }

    #[test]
    fn a_silent_peer_and_a_closed_one_are_errors() {
        let mut qmp = Qmp::over(peer(&[r#"{"return": {}, "id": 1}"#]), SECOND).expect("negotiated");
        let error = qmp
            .execute("query", json!({}), Duration::from_millis(20))
            .expect_err("closed or silent");
        assert!(error.to_string().contains("QMP query"), "{error:#}");
        let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
        assert!(Qmp::over(ours, Duration::from_millis(20)).is_err());
    }
}
