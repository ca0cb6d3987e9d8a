//! `bluffctl capture`: what functions send and receive, and what tunnels carry, as others read it.

use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use bluff_card::control::client::Client;
use bluff_card::control::{Request, Response};
use bluff_card::ctl::capture::copy;
use bluff_card::message::CaptureSpec;
use bluff_testing::loopback;
use rustix::process::{Pid, Signal};

use crate::net::{Station, cross, frame, local, mac, tunnelled};
use crate::support::daemon::{Daemon, Place};

/// A `bluffctl capture` that runs.
struct Capture {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Capture {
    /// One that has begun.
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bluffctl"));
        command.arg("--runtime-dir").arg(place.path("run"));
        command.arg("capture").args(arguments);
        command.arg("-w").arg(place.path("file.pcapng"));
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut this = Self {
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
        };
        let mut line = String::new();
        this.stderr.read_line(&mut line).unwrap();
        assert_eq!(line, format!("capturing {}\n", arguments[0]));
        this
    }

    /// As Ctrl-C does.
    fn interrupt(&self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    /// Waits for its end; what it said, and whether it was content.
    fn end(mut self) -> (String, bool) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        (said, self.child.wait().unwrap().success())
    }
}

/// The packets of a file: their flags and bytes.
fn packets(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let file = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let (mut at, mut packets) = (0, Vec::new());
    while at < file.len() {
        let len = word(at + 4) as usize;
        if word(at) == 6 {
            let captured = word(at + 20) as usize;
            let options = at + 28 + captured.next_multiple_of(4);
            assert_eq!(word(options), 4 << 16 | 2, "flags come first");
            packets.push((word(options + 4), file[at + 28..at + 28 + captured].into()));
        }
        at += len;
    }
    assert_eq!(at, file.len());
    packets
}

/// What tcpdump says of a file, one line for each packet; `None` where there is no tcpdump.
fn tcpdump(path: &Path, arguments: &[&str]) -> Option<Vec<String>> {
    let Ok(output) = Command::new("tcpdump")
        .args(["-n", "-e", "-r"])
        .arg(path)
        .args(arguments)
        .output()
    else {
        eprintln!("not compared: there is no tcpdump");
        return None;
    };
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let lines = String::from_utf8(output.stdout).unwrap();
    // Without the bytes of what it does not know.
    let lines = lines.lines().filter(|line| !line.starts_with('\t'));
    Some(lines.map(str::to_owned).collect())
}

const OUT: u32 = 2;
const IN: u32 = 1;

#[test]
fn what_a_function_sends_and_receives_is_captured() {
    for card in ["", "data = \"process\""] {
        let place = local(card);
        let daemon = place.start();
        let mut one = Station::start(&place.socket("net1"), 1);
        let mut two = Station::start(&place.socket("net2"), 2);
        cross(&mut one, &mut two, "nobody looks");
        let capture = Capture::start(&place, &["net1"]);
        cross(&mut one, &mut two, "sent");
        cross(&mut two, &mut one, "received");
        // What is dropped for its source was sent all the same.
        let spoofed = frame(9, mac(2), "spoofed");
        one.send_frame(&spoofed);
        one.settle();
        capture.interrupt();
        let (said, good) = capture.end();
        assert!(good, "{said}");
        assert!(
            said.starts_with("3 frames captured\n0 frames dropped"),
            "{said}"
        );
        let file = place.path("file.pcapng");
        let wanted = [
            (OUT, frame(1, mac(2), "sent")),
            (IN, frame(2, mac(1), "received")),
            (OUT, spoofed),
        ];
        assert_eq!(packets(&file), wanted);
        if let Some(lines) = tcpdump(&file, &[]) {
            let macs = [
                "02:00:00:00:00:01 > 02:00:00:00:00:02",
                "02:00:00:00:00:02 > 02:00:00:00:00:01",
                "02:00:00:00:00:09 > 02:00:00:00:00:02",
            ];
            assert_eq!(lines.len(), 3, "{lines:?}");
            for (line, macs) in lines.iter().zip(macs) {
                assert!(line.contains(macs), "{line}");
            }
        }
        // Nobody looks any more, and traffic goes on.
        cross(&mut one, &mut two, "after it");
        drop((one, two));
        daemon.terminate();
    }
}

#[test]
fn a_capture_ends_by_count_and_takes_what_is_asked_for() {
    let place = local("");
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    let mut two = Station::start(&place.socket("net2"), 2);
    let options = [
        "net2",
        "--direction",
        "in",
        "--snaplen",
        "20",
        "--count",
        "2",
    ];
    let capture = Capture::start(&place, &options);
    for i in 0..4 {
        cross(&mut one, &mut two, &format!("there {i}"));
        cross(&mut two, &mut one, "back");
    }
    let (said, good) = capture.end();
    assert!(good && said.starts_with("2 frames captured"), "{said}");
    let wanted = |i: u8| {
        let whole = frame(1, mac(2), &format!("there {i}"));
        (IN, whole[..20].to_vec())
    };
    assert_eq!(packets(&place.path("file.pcapng")), [wanted(0), wanted(1)]);
    drop((one, two));
    daemon.terminate();
}

const SPEC: CaptureSpec = CaptureSpec {
    snaplen: 262_144,
    only: None,
    count: None,
};

/// It misses frames, they are counted, and nobody else notices.
#[test]
fn a_reader_that_does_not_read_slows_nobody() {
    for card in ["", "data = \"process\""] {
        let place = local(card);
        let daemon = place.start();
        let mut one = Station::start(&place.socket("net1"), 1);
        let mut two = Station::start(&place.socket("net2"), 2);
        let client = Client::connect(&place.path("run")).unwrap();
        let stream = client.capture("net1".parse().unwrap(), SPEC).unwrap();
        // Twice the room for what waits, what the socket holds, and some more.
        let text = "x".repeat(1400);
        let sent = 8000;
        for _ in 0..sent {
            cross(&mut one, &mut two, &text);
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let copied = copy(stream, std::io::sink()).unwrap();
        let missed = copied.missed.expect("the end of the file");
        assert!(missed > 0 && copied.frames > 2000, "{copied:?}");
        assert_eq!(copied.frames + missed, sent);
        drop((one, two));
        daemon.terminate();
    }
}

/// What is inside of the tunnel, and what it is in.
#[test]
fn a_tunnel_is_captured_with_its_outer_headers() {
    for (kind, port) in [("vxlan", 4789u16), ("geneve", 6081)] {
        let (a, b) = (loopback(), loopback());
        let places = [
            tunnelled(2, [a, b], kind, ""),
            tunnelled(3, [b, a], kind, ""),
        ];
        let daemons = [places[0].start(), places[1].start()];
        let mut two = Station::start(&places[0].socket("net2"), 2);
        let mut three = Station::start(&places[1].socket("net3"), 3);
        let capture = Capture::start(&places[0], &["network:blue"]);
        cross(&mut two, &mut three, "through the tunnel");
        cross(&mut three, &mut two, "and back");
        capture.interrupt();
        let (said, good) = capture.end();
        assert!(good && said.starts_with("2 frames captured"), "{said}");
        let file = places[0].path("file.pcapng");
        let packets = packets(&file);
        for ((flags, bytes), (way, from, to, inner)) in packets.iter().zip([
            (OUT, a, b, frame(2, mac(3), "through the tunnel")),
            (IN, b, a, frame(3, mac(2), "and back")),
        ]) {
            assert_eq!(*flags & 3, way);
            assert_eq!(bytes[36..], inner);
            assert_eq!(
                (&bytes[12..16], &bytes[16..20]),
                (&from.octets()[..], &to.octets()[..])
            );
            assert_eq!(bytes[22..24], port.to_be_bytes());
            assert_eq!(bytes[32..35], [0, 0x13, 0x89], "VNI 5001");
        }
        assert_eq!(packets.len(), 2);
        // It has to be told that this is a port of VXLAN, and cannot be told of Geneve.
        if kind == "vxlan"
            && let Some(lines) = tcpdump(&file, &["-T", kind])
        {
            let all = lines.join("\n");
            assert!(all.contains("VXLAN") && all.contains("vni 5001"), "{all}");
        }
        drop((two, three));
        daemons.into_iter().for_each(Daemon::terminate);
    }
}

#[test]
fn what_cannot_be_captured_is_told() {
    let place = local("");
    let daemon = place.start();
    let fails = |what: &str| {
        let client = Client::connect(&place.path("run")).unwrap();
        let error = client.capture(what.parse().unwrap(), SPEC).unwrap_err();
        error.to_string()
    };
    assert_eq!(fails("net9"), "there is no function net9");
    assert_eq!(fails("network:red"), "there is no network red");
    assert_eq!(fails("network:blue"), "network blue has no tunnel");
    // As many as there may be, and one more.
    let begin = || {
        let client = Client::connect(&place.path("run")).unwrap();
        client.capture("net1".parse().unwrap(), SPEC)
    };
    let some: Vec<_> = (0..8).map(|_| begin().unwrap()).collect();
    assert!(begin().unwrap_err().to_string().contains("8 captures"));
    drop(some);
    daemon.terminate();
}

/// The file is good up to where it ends, whoever ends first.
#[test]
fn captures_end_with_the_data_half_and_with_the_daemon() {
    let place = local("data = \"process\"");
    let daemon = place.start();
    let mut one = Station::start(&place.socket("net1"), 1);
    let mut two = Station::start(&place.socket("net2"), 2);
    let capture = Capture::start(&place, &["net1"]);
    cross(&mut one, &mut two, "before");
    // So that it has been written.
    let written = || packets(&place.path("file.pcapng")).len() == 1;
    crate::support::until("the frame in the file", || written().then_some(()));
    daemon.kill_data_half();
    let (said, good) = capture.end();
    assert!(!good && said.contains("the capture broke off"), "{said}");
    let file = packets(&place.path("file.pcapng"));
    assert_eq!(file, [(OUT, frame(1, mac(2), "before"))]);
    drop((one, two));
    // An orderly end is the end of the file too. The daemon answers until then.
    crate::support::until("another data half", || {
        let id = "net1".parse().unwrap();
        match daemon.ask(Request::ShowFunction { id }) {
            Ok(Response::Function(entry)) => (entry.state == "idle").then_some(()),
            other => panic!("{other:?}"),
        }
    });
    let capture = Capture::start(&place, &["net1"]);
    daemon.terminate();
    let (said, good) = capture.end();
    assert!(good, "{said}");
}
