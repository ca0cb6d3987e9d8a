//! What guests send to each other, as scripts for their shells: `traffic` is the agent's.

use std::str::FromStr;

use anyhow::{Context as _, Result};

use crate::card::Station;

/// Where `traffic` answers.
const PORT: u16 = 7000;
/// Longer than a packet may be: the kernel makes fragments of it.
const FRAGMENTED: u32 = 8000;

/// Gives a guest its addresses, and has it answer others. Nobody else can have its addresses, so it does not ask.
pub(super) fn settle(station: Station) -> String {
    let (ipv4, ipv6) = (station.ipv4(), station.ipv6());
    format!(
        "set -e; ip link set lo up; echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; \
         ip addr add {ipv4}/24 dev eth0; ip link set eth0 up; ip addr add {ipv6}/64 dev eth0; \
         traffic serve {PORT} </dev/null >/dev/null 2>/run/traffic.log &"
    )
}

/// Waits until the other answers.
pub(super) fn found(to: Station) -> String {
    let to = to.ipv4();
    format!("timeout 60 sh -c 'until ping -q -c 1 -W 1 {to} >/dev/null; do sleep 0.02; done'")
}

/// One echo of so many bytes.
pub(super) fn echo(to: Station, bytes: u32) -> String {
    format!("ping -c 1 -W 5 -s {bytes} {}", to.ipv4())
}

/// That nothing comes back.
pub(super) fn lost(to: Station) -> String {
    let to = to.ipv4();
    format!("if ping -q -c 2 -W 1 {to}; then echo it answers; exit 1; fi")
}

/// Everything once, there and back, each byte checked: echoes, TCP with as many bytes, datagrams; over both families, also in fragments.
pub(super) fn all(to: Station, bytes: u64) -> String {
    let (ipv4, ipv6) = (to.ipv4(), to.ipv6());
    let pings = format!(
        "ping -q -A -c 5 -w 20 {ipv4} && ping -q -A -c 3 -w 20 -s {FRAGMENTED} {ipv4} && ping6 -q -A -c 5 -w 20 {ipv6}"
    );
    let datagrams = |to| format!("traffic udp {to} {PORT} count=200 bytes={FRAGMENTED}");
    [
        pings,
        tcp(&ipv4, bytes, ""),
        tcp(&ipv6, bytes, ""),
        datagrams(&ipv4),
        datagrams(&ipv6),
    ]
    .join(" && ")
}

/// TCP alone, with more of `traffic`'s keys.
pub(super) fn tcp(to: &str, bytes: u64, more: &str) -> String {
    format!("traffic tcp {to} {PORT} bytes={bytes} {more}")
}

/// Asks every few milliseconds, until this file is there.
pub(super) fn beat(to: Station, enough: &str) -> String {
    format!("traffic beat {} {PORT} {enough}", to.ipv4())
}

/// What `traffic` says about something.
pub(super) fn said<T: FromStr>(text: &str, name: &str) -> Result<T> {
    let found = text.split_whitespace().find_map(|word| {
        let (key, value) = word.split_once('=')?;
        (key == name).then(|| value.parse().ok())?
    });
    found.with_context(|| format!("no {name} in {text}"))
}
