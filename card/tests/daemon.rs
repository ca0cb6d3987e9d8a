//! The real `bluffd` and `bluffctl`, from outside.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bluff_vhost_user::{framing, unix};

const LIMIT: Duration = Duration::from_secs(30);

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("card.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bluffd(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bluffd"));
        command.arg("--config").arg(self.path("card.toml"));
        command
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .arg("--state-dir")
            .arg(self.path("state"));
        command
    }

    fn start(&self) -> Daemon {
        Daemon::start(&mut self.bluffd())
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bluffctl"));
        command
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .args(arguments)
            .output()
            .unwrap()
    }
}

/// A daemon that said "ready".
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            sender.send(line)
        });
        let mut daemon = Self(child);
        match receiver.recv_timeout(LIMIT) {
            Ok(line) if line == "ready\n" => daemon,
            other => panic!("{other:?} instead of ready; it says {}", daemon.kill()),
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal).unwrap();
    }

    fn wait(mut self) -> ExitStatus {
        // The daemon bounds its own end; a hang is a failure of the test run.
        self.0.wait().unwrap()
    }

    fn terminate(self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.wait()
    }

    fn kill(&mut self) -> String {
        let _ = self.0.kill();
        let mut text = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            stderr.read_to_string(&mut text).unwrap();
        }
        self.0.wait().unwrap();
        text
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

const EMPTY: &str = "[card]\npoll = \"never\"\n";

#[test]
fn check_accepts_a_sound_file_and_starts_nothing() {
    let place = Place::new(
        "[volume.d]\nuri = \"null:?size=1TiB\"\n[function.f]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"d\"\n",
    );
    let output = place.bluffd().arg("--check").output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), String::new())
    );
    assert!(!place.path("run").exists());
}

#[test]
fn check_names_every_mistake_by_its_line() {
    let place = Place::new("[card]\npol = 1\n[volume.d]\nuri = \"nfs:/x\"\n");
    let output = place.bluffd().arg("--check").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (file, said) = (
        place.path("card.toml").display().to_string(),
        text(&output.stderr),
    );
    assert!(
        said.contains(&format!("{file}:2:1: card.pol: unknown key; allowed:")),
        "{said}"
    );
    assert!(
        said.contains(&format!("{file}:4:7: volume.d.uri: unknown scheme `nfs`")),
        "{said}"
    );
}

#[test]
fn a_missing_file_is_named() {
    let place = Place::new("");
    std::fs::remove_file(place.path("card.toml")).unwrap();
    let output = place.bluffd().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("card.toml: No such file"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn it_is_asked_over_a_socket_of_its_owner_and_ends_cleanly() {
    for data in ["threads", "process"] {
        let place = Place::new(&format!("{EMPTY}data = \"{data}\"\n"));
        let daemon = place.start();
        let socket = place.path("run/control.sock").metadata().unwrap();
        assert!(socket.file_type().is_socket());
        assert_eq!(socket.mode() & 0o777, 0o600);

        let output = place.ctl(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&status["phase"], &status["data"]),
            (&"ready".into(), &data.into())
        );
        assert_eq!(status["pid"], daemon.0.id());
        assert_eq!(status["data_pid"].is_u64(), data == "process");
        assert!(text(&place.ctl(&["status"]).stdout).contains("phase      ready"));
        assert!(text(&place.ctl(&["function", "list"]).stdout).starts_with("FUNCTION"));
        assert_eq!(
            text(&place.ctl(&["volume", "list", "--json"]).stdout),
            "[]\n"
        );
        assert!(text(&place.ctl(&["top", "--once"]).stdout).contains("IOPS"));
        let output = place.ctl(&["function", "show", "blk9"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("there is no function blk9"));
        let output = place.ctl(&["volume", "resize", "disk9", "1GiB"]);
        assert!(text(&output.stderr).contains("there is no volume disk9"));

        assert_eq!(daemon.terminate().code(), Some(0));
        assert!(!place.path("run/control.sock").exists());
        assert!(text(&place.ctl(&["status"]).stderr).contains("no bluffd answers"));
    }
}

#[test]
fn a_second_daemon_is_refused_and_the_first_is_not_disturbed() {
    let place = Place::new(EMPTY);
    let daemon = place.start();
    let output = place.bluffd().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = format!("another bluffd (process {}) runs in", daemon.0.id());
    assert!(
        text(&output.stderr).contains(&expected),
        "{}",
        text(&output.stderr)
    );
    assert!(place.ctl(&["status"]).status.success());
    assert_eq!(daemon.terminate().code(), Some(0));
}

#[test]
fn a_killed_daemon_leaves_nothing_that_keeps_the_next_from_starting() {
    let place = Place::new(EMPTY);
    let mut daemon = place.start();
    daemon.kill();
    assert!(place.path("run/control.sock").exists());
    let daemon = place.start();
    assert!(place.ctl(&["status"]).status.success());
    assert_eq!(daemon.terminate().code(), Some(0));
}

#[test]
fn a_socket_that_another_serves_is_left_alone() {
    let place = Place::new(EMPTY);
    std::fs::create_dir(place.path("run")).unwrap();
    let other = UnixListener::bind(place.path("run/control.sock")).unwrap();
    let output = place.bluffd().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("in use by another process"),
        "{}",
        text(&output.stderr)
    );
    assert!(other.accept().is_ok(), "it was asked, and still stands");
}

#[test]
fn a_volume_that_cannot_be_opened_ends_it_with_its_name() {
    let file = "/does/not/exist/at-all";
    let place = Place::new(&format!("[volume.disk0]\nuri = \"file:{file}\"\n"));
    let output = place.bluffd().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("bluffd: volume disk0: "),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(text(&output.stdout), "");
}

#[test]
fn a_data_half_that_dies_is_started_again() {
    let place = Place::new("[card]\ndata = \"process\"\n");
    let daemon = place.start();
    let status = || -> serde_json::Value {
        let output = place.ctl(&["status", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let first = i32::try_from(status()["data_pid"].as_i64().unwrap()).unwrap();
    let first = rustix::process::Pid::from_raw(first).unwrap();
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    let start = Instant::now();
    while status()["restarts"] != 1 {
        assert!(start.elapsed() < LIMIT, "no other was started");
    }
    assert_ne!(status()["data_pid"], first.as_raw_nonzero().get());
    assert_eq!(daemon.terminate().code(), Some(0));
}

#[test]
fn systemd_is_told() {
    let place = Place::new(EMPTY);
    let notify = UnixDatagram::bind(place.path("notify")).unwrap();
    notify.set_read_timeout(Some(LIMIT)).unwrap();
    let daemon = Daemon::start(place.bluffd().env("NOTIFY_SOCKET", place.path("notify")));
    let mut buffer = [0; 256];
    let length = notify.recv(&mut buffer).unwrap();
    assert_eq!(text(&buffer[..length]).trim(), "READY=1");
    assert_eq!(daemon.terminate().code(), Some(0));
    let length = notify.recv(&mut buffer).unwrap();
    assert_eq!(text(&buffer[..length]).trim(), "STOPPING=1");
}

#[test]
fn a_hostile_client_keeps_nobody_waiting() {
    let place = Place::new(EMPTY);
    let daemon = place.start();
    let mut hostile: Vec<UnixStream> = Vec::new();
    for line in [
        "",
        "{",
        "\n\n\n",
        "{\"version\":1,\"id\":1,\"request\":\"list_volumes\"}\n",
    ] {
        let mut client = UnixStream::connect(place.path("run/control.sock")).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        hostile.push(client);
    }
    assert!(place.ctl(&["status"]).status.success());
    assert_eq!(daemon.terminate().code(), Some(0));
}

/// A front end that sends plain messages.
struct Front(UnixStream);

impl Front {
    fn connect(place: &Place, function: &str) -> Self {
        let socket =
            UnixStream::connect(place.path("run").join(format!("{function}.sock"))).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(socket)
    }

    /// The answer; `None` where the connection has ended.
    fn ask(&mut self, code: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> Option<u64> {
        let message = framing::request(code, true, payload);
        unix::send(self.0.as_fd(), &message, files).ok()?;
        let mut reply = [0; framing::HEADER_LEN + 8];
        self.0.read_exact(&mut reply).ok()?;
        Some(u64::from_ne_bytes(*reply.last_chunk().unwrap()))
    }

    /// SET_PROTOCOL_FEATURES: acknowledgements and memory by slots.
    fn negotiate(&mut self) -> Option<u64> {
        let wanted = 1u64 << 3 | 1 << 15;
        self.ask(16, &wanted.to_ne_bytes(), &[])
    }

    /// ADD_MEM_REG of the region of this number.
    fn add_region(&mut self, number: u64, file: BorrowedFd<'_>) -> Option<u64> {
        let at = number << 12;
        let region = [0, at, 4096, 1 << 40 | at, 0];
        let payload: Vec<u8> = region.iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
        self.ask(37, &payload, &[file])
    }
}

fn many_functions(data: &str, count: usize) -> String {
    let mut text = format!("[card]\ndata = \"{data}\"\npoll = \"never\"\n");
    for i in 0..count {
        text += &format!(
            "[volume.disk{i}]\nuri = \"null:?size=1GiB\"\n[function.blk{i}]\nkind = \"virtio-blk\"\n\
             attach = \"vhost-user\"\nvolume = \"disk{i}\"\n"
        );
    }
    text
}

/// Started with so few descriptors.
fn with_descriptors(place: &Place, soft: u32, hard: u32) -> Daemon {
    let bluffd = place.bluffd();
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(format!(
            "ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\""
        ))
        .arg(bluffd.get_program())
        .args(bluffd.get_args());
    Daemon::start(&mut shell)
}

#[test]
fn front_ends_that_take_all_descriptors_end_neither_half() {
    for data in ["threads", "process"] {
        let place = Place::new(&many_functions(data, 12));
        let daemon = with_descriptors(&place, 64, 300);
        let status = || -> serde_json::Value {
            let output = place.ctl(&["status", "--json"]);
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let before = status();
        let halves = [before["pid"].as_u64(), before["data_pid"].as_u64()];
        for pid in halves.into_iter().flatten() {
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let files = limits.lines().find(|l| l.contains("open files")).unwrap();
            let numbers: Vec<_> = files.split_whitespace().skip(3).take(2).collect();
            assert_eq!(numbers, ["300", "300"], "the soft limit is raised");
        }
        let memory = unix::sealed_memory(c"guest", 4096).unwrap();
        let mut fronts = Vec::new();
        let mut taken = 0;
        for function in 0..12 {
            let mut front = Front::connect(&place, &format!("blk{function}"));
            // Later ones are turned away.
            if front.negotiate() == Some(0) {
                let added =
                    (0..600).take_while(|&n| front.add_region(n, memory.as_fd()) == Some(0));
                let added = added.count();
                assert!(added <= 32 + 4, "{added} of its share");
                taken += added;
            }
            fronts.push(front);
        }
        assert!(taken > 100, "{taken} regions");
        drop(fronts);
        // What they held is free again.
        until("a front end that is served", || {
            let mut front = Front::connect(&place, "blk11");
            (front.negotiate() == Some(0)).then_some(())
        });
        let after = status();
        for same in ["pid", "data_pid", "restarts", "phase"] {
            assert_eq!(after[same], before[same], "{data}: {same}");
        }
        assert!(daemon.terminate().success());
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_daemon_that_goes_is_an_error_of_the_client() {
    let place = Place::new(EMPTY);
    std::fs::create_dir(place.path("run")).unwrap();
    let listener = UnixListener::bind(place.path("run").join("control.sock")).unwrap();
    let daemon = std::thread::spawn(move || {
        let mut client = BufReader::new(listener.accept().unwrap().0);
        let mut question = String::new();
        client.read_line(&mut question).unwrap();
        let question: serde_json::Value = serde_json::from_str(&question).unwrap();
        // The second question finds nobody who reads it: as a broken pipe.
        client.get_ref().shutdown(Shutdown::Read).unwrap();
        let answer = serde_json::json!({
            "version": question["version"],
            "id": question["id"],
            "result": { "statistics": { "at_ns": 0, "functions": [], "reactors": [] } },
        });
        writeln!(client.get_mut(), "{answer}").unwrap();
        client
    });
    let output = place.ctl(&["top", "--once"]);
    drop(daemon.join().unwrap());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("asking bluffd"));
}

#[test]
fn clients_for_whom_there_is_no_descriptor_keep_nothing_busy() {
    let place = Place::new(EMPTY);
    let mut daemon = with_descriptors(&place, 40, 40);
    let socket = place.path("run").join("control.sock");
    let connect = |_| UnixStream::connect(&socket).unwrap();
    let clients: Vec<_> = (0..60).map(connect).collect();
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.0.id())).unwrap();
        let rest = stat.rsplit(')').next().unwrap();
        let numbers = rest.split_whitespace().skip(11).take(2);
        numbers.map(|n| n.parse::<u64>().unwrap()).sum()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    // Of about 100 in a second.
    assert!(ticks() - before < 30, "{} ticks", ticks() - before);
    drop(clients);
    let output = place.ctl(&["status"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let said = daemon.kill();
    let lines = said.lines().filter(|l| l.contains("the control socket"));
    assert!((1..10).contains(&lines.count()), "{said}");
}
