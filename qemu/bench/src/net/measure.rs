//! One measurement of one switch.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bluff_virtio_net::spec::Header;

use super::frames::{self, NEIGHBOUR, STATIONS, Tunnel};
use super::ovs::CARD;
use super::process::Process;
use super::rows::{Path, Peer, Work};
use super::space::{Arrived, Wire};
use super::station::{Flows, Shape, Station, drive};
use super::switches::{CORE, Lab, PORTS, Place, Switch, TESTPMD};
use super::tap::Tap;
use super::testpmd;
use crate::backend::cpu_time;
use crate::load::{self, Count};
use crate::report::One;

/// What is done before the measurement begins.
const WARM: Duration = Duration::from_millis(50);
/// How long it may take until frames come through.
const OPEN: Duration = Duration::from_secs(60);

/// Measures `peer` at this work.
pub fn measure(lab: &Lab, peer: &Peer, work: &Work, span: Duration) -> Result<One> {
    let place = Place::new(lab, peer, work.path)?;
    if let (Peer::Kernel, Place::Wired(wire)) = (peer, &place) {
        return kernel(lab, wire, work, span);
    }
    let mut switch = Switch::start(lab, &place, peer, work)?;
    let measured = match work.path {
        Path::Switch => local(&mut switch, work, span),
        Path::Encapsulation(tunnel) => tunnelled(&mut switch, peer, work, span, tunnel, true),
        Path::Decapsulation(tunnel) => tunnelled(&mut switch, peer, work, span, tunnel, false),
        Path::Kernel(_) | Path::Segments(_) => {
            let Place::Wired(wire) = &place else {
                bail!("a wire is missing")
            };
            leaving(&mut switch, wire, work, span)
        }
        Path::Across => across(lab, &mut switch, work),
    };
    let measured = measured.with_context(|| switch.process().said())?;
    switch.process().end()?;
    Ok(measured)
}

/// So many frames a second that leave `from` arrive at `to`, with `arriving` bytes.
fn run(
    switch: &mut Switch<'_>,
    from: &mut Station,
    to: &mut Station,
    arriving: usize,
    span: Duration,
) -> Result<One> {
    // Where there are many flows, each is to be known.
    let warm = if from.flows() > 1 { 20 * WARM } else { WARM };
    drive(from, to, arriving, warm)?;
    let pid = switch.process().id();
    let before = cpu_time(pid)?;
    let count = drive(from, to, arriving, span)?;
    let spent = cpu_time(pid)? - before;
    Ok(One::new(count, Some(spent)))
}

/// Sends `there` from one and `back` from the other, and answers questions, until both have got what they should.
fn open(
    one: &mut Station,
    other: &mut Station,
    there: &[u8],
    back: &[u8],
    right: impl Fn(&[u8], &[u8]) -> (bool, bool),
) -> Result<()> {
    let start = Instant::now();
    let (mut there_came, mut back_came) = (false, false);
    let mut last = None;
    while !(there_came && back_came) {
        ensure!(
            start.elapsed() < OPEN,
            "frames do not come through (there: {there_came}, back: {back_came})"
        );
        if last.is_none_or(|last: Instant| last.elapsed() > Duration::from_millis(20)) {
            one.say(there)?;
            other.say(back)?;
            last = Some(Instant::now());
        }
        while let Some(frame) = other.take()? {
            if let Some(answer) = frames::arp_answer(&frame) {
                other.say(&answer)?;
            }
            there_came |= right(&frame, &[]).0;
        }
        while let Some(frame) = one.take()? {
            back_came |= right(&[], &frame).1;
        }
    }
    Ok(())
}

fn local(switch: &mut Switch<'_>, work: &Work, span: Duration) -> Result<One> {
    let shape = Shape::plain(work.len);
    let [mut a, mut b] = [
        Station::connect(&switch.socket(PORTS[0]), shape)?,
        Station::connect(&switch.socket(PORTS[1]), shape)?,
    ];
    let [here, there] = STATIONS;
    let frame = frames::datagram(here, there, work.len, 0)?;
    let back = frames::datagram(there, here, work.len, 0)?;
    open(&mut a, &mut b, &frame, &back, |f, g| {
        (f == frame, g == back)
    })?;
    a.set_flows(Flows::plain(vec![frame])?)?;
    run(switch, &mut a, &mut b, work.len, span)
}

fn tunnelled(
    switch: &mut Switch<'_>,
    peer: &Peer,
    work: &Work,
    span: Duration,
    tunnel: Tunnel,
    out: bool,
) -> Result<One> {
    let outer = work.len + 50;
    let shape = Shape::plain(outer);
    let [mut tenant, mut uplink] = [
        Station::connect(&switch.socket(PORTS[0]), shape)?,
        Station::connect(&switch.socket(PORTS[2]), shape)?,
    ];
    let [here, _] = STATIONS;
    let sent = |i| frames::datagram(here, frames::remote(i), work.len, i);
    let received = |i| frames::datagram(frames::remote(i), here, work.len, i);
    let wrapped = |i| frames::wrapped(tunnel, CARD, &received(i)?, i);
    let (first, back, wrapped_back) = (sent(0)?, received(0)?, wrapped(0)?);
    open(&mut tenant, &mut uplink, &first, &wrapped_back, |f, g| {
        let inner = frames::unwrapped(tunnel, f);
        (inner.is_ok_and(|inner| inner == first), g == back)
    })?;
    let flows = 0..peer.flows();
    if out {
        if flows.len() > 1 {
            let all: Vec<_> = flows.clone().map(wrapped).collect::<Result<_>>()?;
            learn(&mut uplink, &mut tenant, &all, work.len)?;
        }
        let all = flows.map(sent).collect::<Result<_>>()?;
        tenant.set_flows(Flows::plain(all)?)?;
        run(switch, &mut tenant, &mut uplink, outer, span)
    } else {
        let all = flows.map(wrapped).collect::<Result<_>>()?;
        uplink.set_flows(Flows::plain(all)?)?;
        run(switch, &mut uplink, &mut tenant, work.len, span)
    }
}

/// One frame from each address behind the tunnel, so that all are known where frames go to them.
fn learn(uplink: &mut Station, tenant: &mut Station, all: &[Vec<u8>], len: usize) -> Result<()> {
    let (start, mut came) = (Instant::now(), 0);
    for frame in all {
        uplink.say(frame)?;
        came += tenant.receive(len)?;
    }
    // All but those for which a queue was short.
    while came < all.len() as u64 * 9 / 10 {
        came += tenant.receive(len)?;
        ensure!(
            start.elapsed() < OPEN,
            "of {} frames {came} came",
            all.len()
        );
    }
    Ok(())
}

/// What is in a tunnel and leaves by the kernel is counted at the other end of the wire.
fn leaving(switch: &mut Switch<'_>, wire: &Wire, work: &Work, span: Duration) -> Result<One> {
    let segments = matches!(work.path, Path::Segments(_));
    let shape = Shape {
        offloads: segments,
        // Of large frames fewer are enough, and more would not fit into the caches of anybody.
        depth: if segments { 32 } else { 256 },
        ..Shape::plain(work.len)
    };
    let mut tenant = Station::connect(&switch.socket(PORTS[0]), shape)?;
    let frame = frame(work)?;
    tenant.set_flows(Flows::new(&[frame])?)?;
    let start = Instant::now();
    while wire.arrived()?.packets == 0 {
        tenant.send(1)?;
        ensure!(start.elapsed() < OPEN, "nothing comes out of the card");
        std::thread::sleep(Duration::from_millis(20));
    }
    settle(&mut tenant)?;
    let each = each(wire, || {
        tenant.send(1)?;
        settle(&mut tenant)
    })?;
    pour(&mut tenant, WARM)?;
    let pid = switch.process().id();
    let (before, from, start) = (cpu_time(pid)?, wire.arrived()?, Instant::now());
    pour(&mut tenant, span)?;
    let (after, to, span) = (cpu_time(pid)?, wire.arrived()?, start.elapsed());
    let count = Count {
        requests: (payload(from, to) / each) as u64,
        span,
    };
    ensure!(count.requests > 0, "nothing comes out of the card any more");
    Ok(One::new(count, Some(after - before)))
}

/// The same by the kernel alone, on the core of the switches.
fn kernel(lab: &Lab, wire: &Wire, work: &Work, span: Duration) -> Result<One> {
    let (header, frame) = frame(work)?;
    let mut tap = Tap::new(&lab.tools, &wire.card, header, &frame)?;
    let start = Instant::now();
    while wire.arrived()?.packets == 0 {
        tap.write()?;
        ensure!(start.elapsed() < OPEN, "nothing comes out of the kernel");
        std::thread::sleep(Duration::from_millis(20));
    }
    let each = each(wire, || tap.write())?;
    let work = || {
        load::pin(CORE)?;
        tap.pour(WARM)?;
        let (before, from, start) = (own_time()?, wire.arrived()?, Instant::now());
        tap.pour(span)?;
        let (after, to, span) = (own_time()?, wire.arrived()?, start.elapsed());
        let count = Count {
            requests: (payload(from, to) / each) as u64,
            span,
        };
        anyhow::Ok(One::new(count, Some(after - before)))
    };
    std::thread::scope(|scope| scope.spawn(work).join().expect("it does not panic"))
}

/// The CPU time of this thread.
fn own_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let first = text.split_whitespace().next().context("its first field")?;
    Ok(Duration::from_nanos(first.parse()?))
}

/// What is sent to the station behind the tunnel, and left for the device to do.
fn frame(work: &Work) -> Result<(Header, Vec<u8>)> {
    let (here, there) = (STATIONS[0], frames::remote(0));
    match work.path {
        Path::Segments(_) => frames::segment(here, there, work.len),
        _ => Ok((
            Header::default(),
            frames::datagram(here, there, work.len, 0)?,
        )),
    }
}

/// Bytes in UDP datagrams that came between the two: the headers outside of that are there once for each packet, in however many datagrams it was cut.
fn payload(from: Arrived, to: Arrived) -> f64 {
    const OUTSIDE: u64 = 14 + 20 + 8;
    let packets = to.packets - from.packets;
    (to.bytes - from.bytes).saturating_sub(packets * OUTSIDE) as f64
}

/// What a frame comes to, in such bytes: a switch segments it, or leaves it whole.
fn each(wire: &Wire, mut send: impl FnMut() -> Result<()>) -> Result<f64> {
    const TIMES: u32 = 64;
    let from = wire.arrived()?;
    for _ in 0..TIMES {
        send()?;
    }
    let start = Instant::now();
    let mut last = wire.arrived()?;
    // What was taken may still be under way.
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let now = wire.arrived()?;
        if now == last && now != from {
            return Ok(payload(from, now) / f64::from(TIMES));
        }
        last = now;
        ensure!(start.elapsed() < OPEN, "what comes out does not end");
    }
}

fn settle(station: &mut Station) -> Result<()> {
    let start = Instant::now();
    while !station.settled()? {
        ensure!(start.elapsed() < OPEN, "what was sent is not taken");
    }
    Ok(())
}

fn pour(from: &mut Station, span: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < span {
        for _ in 0..64 {
            from.send(64)?;
        }
    }
    Ok(())
}

/// testpmd in our place: what it says that both its ports have received in its third second.
fn across(lab: &Lab, switch: &mut Switch<'_>, work: &Work) -> Result<One> {
    let sockets = [PORTS[0], PORTS[1]].map(|port| switch.socket(port));
    let command = testpmd::driver(&lab.tools, &sockets, work.len, TESTPMD)?;
    let mut driver = Process::start(&command, "0", &lab.folder.join("driver.log"))?;
    let pid = switch.process().id();
    let (start, mut marks) = (Instant::now(), Vec::new());
    while marks.len() < 3 {
        std::thread::sleep(Duration::from_millis(1));
        let seen = testpmd::rates(&driver.said()).len() / 2;
        if seen > marks.len() {
            marks.push((Instant::now(), cpu_time(pid)?));
        }
        ensure!(
            start.elapsed() < OPEN,
            "testpmd says nothing: {}",
            driver.said()
        );
    }
    let rates = testpmd::rates(&driver.said());
    driver.end()?;
    let [.., (from, before), (to, after)] = marks[..] else {
        bail!("three seconds")
    };
    let rate: f64 = rates[4..6].iter().sum();
    let span = to - from;
    let count = Count {
        requests: (rate * span.as_secs_f64()) as u64,
        span,
    };
    Ok(One::new(count, Some(after - before)))
}

/// Attaches a station to each socket, has each send one frame to nobody, and calls `measure` while all of them have nothing to do.
pub fn idle(
    sockets: impl Iterator<Item = PathBuf>,
    measure: impl FnOnce() -> Result<f64>,
) -> Result<f64> {
    let shape = Shape {
        depth: 1,
        sleeps: true,
        ..Shape::plain(64)
    };
    let mut attached = Vec::new();
    for socket in sockets {
        let mut station = Station::connect(&socket, shape)?;
        let [_, nobody] = STATIONS;
        station.say(&frames::datagram(NEIGHBOUR, nobody, 64, 0)?)?;
        attached.push(station);
    }
    measure()
}
