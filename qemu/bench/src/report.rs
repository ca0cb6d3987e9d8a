//! What was measured, as a table.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::Count;
use crate::rows::Row;

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct One {
    /// Requests a second.
    rate: f64,
    /// Microseconds of the back end's CPU for a request, where it is a process.
    cpu: Option<f64>,
}

impl One {
    /// From what was counted, and the CPU time that the back end took meanwhile.
    pub fn new(count: Count, cpu: Option<Duration>) -> Self {
        let requests = count.requests as f64;
        Self {
            rate: requests / count.span.as_secs_f64(),
            cpu: cpu.map(|t| t.as_secs_f64() * 1e6 / requests.max(1.0)),
        }
    }
}

/// The measurements of one back end in one row.
#[derive(Clone, Debug, Default)]
pub struct Measured(Vec<One>);

impl Measured {
    /// Adds one.
    pub fn add(&mut self, one: One) {
        self.0.push(one);
    }

    fn median(&self, of: impl Fn(&One) -> Option<f64>) -> Option<f64> {
        median(self.0.iter().filter_map(of))
    }

    /// How much faster than `other`: the median of the rounds' ratios, as a round is short and the machine's
    /// speed can change from one to the next.
    fn ratio(&self, other: &Self) -> f64 {
        median(self.0.iter().zip(&other.0).map(|(a, b)| a.rate / b.rate)).unwrap_or(0.0)
    }

    fn rate(&self) -> f64 {
        self.median(|one| Some(one.rate)).unwrap_or(0.0)
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The table: a line for each back end of each row.
#[derive(Debug, Default)]
pub struct Table {
    lines: Vec<[String; 6]>,
    missed: Vec<String>,
}

const TITLES: [&str; 6] = [
    "work",
    "back end",
    "kIOPS",
    "µs CPU/IO",
    "ours / it",
    "to reach",
];

impl Table {
    /// Adds a row.
    pub fn add(&mut self, row: &Row, measured: &[Measured]) {
        for (i, (peer, m)) in row.peers.iter().zip(measured).enumerate() {
            let ratio = measured[0].ratio(m);
            let target = row.target.filter(|_| i == 1);
            if let Some(target) = target
                && ratio < target
            {
                self.missed
                    .push(format!("{}: {ratio:.2} of {target}", row.name));
            }
            self.lines.push([
                if i == 0 {
                    row.name.clone()
                } else {
                    String::new()
                },
                peer.name().into(),
                format!("{:.1}", m.rate() / 1e3),
                m.median(|one| one.cpu)
                    .map_or(String::new(), |c| format!("{c:.3}")),
                if i == 0 {
                    String::new()
                } else {
                    format!("{ratio:.2}")
                },
                match (target, row.limit.filter(|_| i == 0)) {
                    (Some(t), _) => format!("{t:.2}"),
                    (None, Some(limit)) => format!("{limit:.3} µs"),
                    (None, None) => String::new(),
                },
            ]);
        }
        let cpu = measured[0].median(|one| one.cpu);
        if let Some((limit, cpu)) = row.limit.zip(cpu)
            && cpu > limit
        {
            self.missed
                .push(format!("{}: {cpu:.3} µs of {limit:.3}", row.name));
        }
    }

    /// Adds what functions cost that have nothing to do: a share of a core, and the most that it may be.
    pub fn add_idle(&mut self, name: &str, share: f64, most: f64) {
        if share >= most {
            self.missed
                .push(format!("{name}: {:.2} % of a core", 100.0 * share));
        }
        self.lines.push([
            name.into(),
            format!("bluffd, adaptive: {:.2} % of a core", 100.0 * share),
            String::new(),
            String::new(),
            String::new(),
            format!("{:.0} %", 100.0 * most),
        ]);
    }

    /// Whether every figure was reached.
    pub fn reached(&self) -> bool {
        self.missed.is_empty()
    }

    /// As Markdown, which is as good to read on a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut widths = TITLES.map(|t| t.chars().count());
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut put = |cells: [&str; 6]| {
            for (width, cell) in widths.iter().zip(cells) {
                let _ = write!(out, "| {cell}{} ", " ".repeat(width - cell.chars().count()));
            }
            out.push_str("|\n");
        };
        put(TITLES);
        put(["---"; 6]);
        for line in &self.lines {
            put(line.each_ref().map(String::as_str));
        }
        if self.missed.is_empty() {
            out.push_str("\nEvery figure that was to be reached is reached.\n");
        } else {
            let _ = writeln!(out, "\nMissed:\n- {}", self.missed.join("\n- "));
        }
        out
    }

    /// Puts the table between the markers of a document.
    pub fn write(&self, path: &Path, rounds: usize, millis: u64) -> Result<()> {
        const FROM: &str = "<!-- bench -->\n";
        const TO: &str = "<!-- /bench -->";
        let text = std::fs::read_to_string(path)?;
        let (head, rest) = text.split_once(FROM).context("no marker to begin at")?;
        let (_, tail) = rest.split_once(TO).context("no marker to end at")?;
        let table = self.text();
        let new = format!(
            "{head}{FROM}\nMedians of {rounds} interleaved runs of {millis} ms.\n\n{table}\n{TO}{tail}"
        );
        Ok(std::fs::write(path, new)?)
    }
}
