//! What was measured, as a table.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::Count;
use crate::{net, rows};

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

/// A table: a line for each back end of each row.
#[derive(Debug)]
pub struct Table {
    /// What stands around it in a document.
    marker: &'static str,
    titles: &'static [&'static str],
    lines: Vec<Vec<String>>,
    missed: Vec<String>,
}

impl Table {
    /// For volumes.
    pub fn blocks() -> Self {
        const TITLES: &[&str] = &[
            "work",
            "back end",
            "kIOPS",
            "µs CPU/IO",
            "ours / it",
            "to reach",
        ];
        Self::new("bench", TITLES)
    }

    /// For networks.
    pub fn networks() -> Self {
        const TITLES: &[&str] = &[
            "work",
            "switch",
            "kframes/s",
            "Gbit/s",
            "ns CPU/frame",
            "cycles/frame",
            "ours / it",
            "to reach",
        ];
        Self::new("bench net", TITLES)
    }

    fn new(marker: &'static str, titles: &'static [&'static str]) -> Self {
        Self {
            marker,
            titles,
            lines: Vec::new(),
            missed: Vec::new(),
        }
    }

    /// Whether nothing was measured for it.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds a row of volumes.
    pub fn add(&mut self, row: &rows::Row, measured: &[Measured]) {
        for (i, (peer, m)) in row.peers.iter().zip(measured).enumerate() {
            let ratio = measured[0].ratio(m);
            let target = row.target.filter(|_| i == 1);
            self.compare(&row.name, ratio, target);
            self.lines.push(vec![
                first(i, &row.name),
                peer.name().into(),
                format!("{:.1}", m.rate() / 1e3),
                m.median(|one| one.cpu)
                    .map_or(String::new(), |c| format!("{c:.3}")),
                other(i, ratio),
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

    /// Adds a row of networks, on a machine whose clock makes so many cycles in a microsecond. The best of ours stands first.
    pub fn add_net(&mut self, row: &net::rows::Row, measured: &[Measured], clock: f64) {
        let mut order: Vec<usize> = (0..row.peers.len()).collect();
        order[..row.ours].sort_by(|a, b| measured[*b].rate().total_cmp(&measured[*a].rate()));
        let best = &measured[order[0]];
        for (i, &peer) in order.iter().enumerate() {
            let m = &measured[peer];
            let ratio = best.ratio(m);
            let target = row.target.filter(|_| i == row.ours);
            self.compare(&row.name, ratio, target);
            let cpu = m.median(|one| one.cpu);
            let cell = |per_frame: fn(f64, f64) -> f64| {
                cpu.map_or(String::new(), |cpu| format!("{:.0}", per_frame(cpu, clock)))
            };
            self.lines.push(vec![
                first(i, &row.name),
                row.peers[peer].name(row.work.path),
                format!("{:.1}", m.rate() / 1e3),
                format!("{:.1}", m.rate() * row.work.len as f64 * 8.0 / 1e9),
                cell(|cpu, _| cpu * 1e3),
                cell(|cpu, clock| cpu * clock),
                other(i, ratio),
                target.map_or(String::new(), |t| format!("{t:.2}")),
            ]);
        }
    }

    fn compare(&mut self, name: &str, ratio: f64, target: Option<f64>) {
        if let Some(target) = target
            && ratio < target
        {
            self.missed.push(format!("{name}: {ratio:.2} of {target}"));
        }
    }

    /// Adds what functions cost that have nothing to do: a share of a core, and the most that it may be.
    pub fn add_idle(&mut self, name: &str, share: f64, most: f64) {
        if share >= most {
            self.missed
                .push(format!("{name}: {:.2} % of a core", 100.0 * share));
        }
        let mut line = vec![String::new(); self.titles.len()];
        line[0] = name.into();
        line[1] = format!("bluffd, adaptive: {:.2} % of a core", 100.0 * share);
        line[self.titles.len() - 1] = format!("{:.0} %", 100.0 * most);
        self.lines.push(line);
    }

    /// Whether every figure was reached.
    pub fn reached(&self) -> bool {
        self.missed.is_empty()
    }

    /// As Markdown, which is as good to read on a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut widths: Vec<_> = self.titles.iter().map(|t| t.chars().count()).collect();
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut put = |cells: &[&str]| {
            for (width, cell) in widths.iter().zip(cells) {
                let _ = write!(out, "| {cell}{} ", " ".repeat(width - cell.chars().count()));
            }
            out.push_str("|\n");
        };
        put(self.titles);
        put(&vec!["---"; self.titles.len()]);
        for line in &self.lines {
            put(&line.iter().map(String::as_str).collect::<Vec<_>>());
        }
        if self.missed.is_empty() {
            out.push_str("\nEvery figure that was to be reached is reached.\n");
        } else {
            let _ = writeln!(out, "\nMissed:\n- {}", self.missed.join("\n- "));
        }
        out
    }

    /// Puts the table between its markers in a document.
    pub fn write(&self, path: &Path, rounds: usize, millis: u64) -> Result<()> {
        let from = format!("<!-- {} -->\n", self.marker);
        let to = format!("<!-- /{} -->", self.marker);
        let text = std::fs::read_to_string(path)?;
        let (head, rest) = text.split_once(&from).context("no marker to begin at")?;
        let (_, tail) = rest.split_once(&to).context("no marker to end at")?;
        let table = self.text();
        let new = format!(
            "{head}{from}\nMedians of {rounds} interleaved runs of {millis} ms.\n\n{table}\n{to}{tail}"
        );
        Ok(std::fs::write(path, new)?)
    }
}

/// The name of a row, in its first line.
fn first(line: usize, name: &str) -> String {
    if line == 0 {
        name.into()
    } else {
        String::new()
    }
}

/// A ratio, in the lines after the first.
fn other(line: usize, ratio: f64) -> String {
    if line == 0 {
        String::new()
    } else {
        format!("{ratio:.2}")
    }
}
