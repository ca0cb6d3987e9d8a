//! What networks count at their tunnels, and how it is shown.

use std::net::UdpSocket;
use std::process::Command;

use bluff_card::control::{Request, Response};
use bluff_card::stats::NetworkStatistics;
use bluff_testing::loopback;

use crate::net::tunnelled;
use crate::support::daemon::{Daemon, Place};
use crate::support::until;

fn counted(daemon: &Daemon) -> NetworkStatistics {
    match daemon.ask(Request::Statistics { function: None }).unwrap() {
        Response::Statistics(mut all) => all.networks.pop().expect("a network with a tunnel"),
        other => panic!("{other:?}"),
    }
}

fn bluffctl(place: &Place, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bluffctl"));
    command.arg("--runtime-dir").arg(place.path("run"));
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_is_dropped_at_a_tunnel_is_shown_by_cause() {
    for card in ["", "data = \"process\""] {
        let here = loopback();
        let place = tunnelled(2, [here, loopback()], "vxlan", card);
        let daemon = place.start();
        let before = bluffctl(&place, &["network", "show", "blue"]);
        assert!(!before.contains("DROPPED"), "{before}");
        // Somebody who is no VTEP: what is no tunnel, and frames of the network.
        let stranger = UdpSocket::bind((loopback(), 0)).unwrap();
        let frame = [&[8, 0, 0, 0, 0, 0x13, 0x89, 0][..], &[2; 60]].concat();
        for datagram in [
            &b"\0nonsense, and long enough for a frame"[..],
            &frame,
            &frame,
        ] {
            stranger.send_to(datagram, (here, 4789)).unwrap();
        }
        let drops = until("all of them", || {
            let counted = counted(&daemon);
            (counted.arrived_drops.get("stranger") == Some(&2)).then_some(counted)
        });
        assert_eq!(drops.underlay_received_drops.get("bad-tunnel"), Some(&1));
        let shown = bluffctl(&place, &["network", "show", "blue"]);
        let lines: Vec<_> = shown.lines().rev().take(3).collect();
        assert_eq!(lines[2], "DROPPED     SENT  RECEIVED  OUT OF THE TUNNEL");
        assert_eq!(lines[1], "bad-tunnel  0     1         0");
        assert_eq!(lines[0], "stranger    0     0         2");
        let top = bluffctl(&place, &["top", "--once"]);
        assert!(
            top.contains("network:blue   stranger    0       0           2"),
            "{top}"
        );
        assert!(
            top.contains("underlay:blue  bad-tunnel  0       0           1"),
            "{top}"
        );
        daemon.terminate();
    }
}
