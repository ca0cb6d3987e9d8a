//! The program itself: its socket, its signals, its descriptors, what it says of itself.

mod ring;
mod vm;

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bluff_reference::spec::request_type;
use bluff_reference::{Capabilities, Description};
use vm::{LONG, Vm};

const PROGRAM: &str = env!("CARGO_BIN_EXE_bluff-reference");

struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the number of a child that was not waited for.
        #[allow(unsafe_code)]
        let rc = unsafe { libc::kill(self.0.id() as i32, signal) };
        assert_eq!(rc, 0);
    }

    fn wait(&mut self) -> i32 {
        let end = Instant::now() + LONG;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().expect("it ends by itself");
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::yield_now();
        }
    }

    fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.0.id());
        std::fs::read_dir(folder).unwrap().count()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ram(path: &Path) -> Program {
    let mut command = Command::new(PROGRAM);
    command.args(["--volume", "ram:?size=8MiB", "--num-queues", "2"]);
    Program::start(command.arg("--socket-path").arg(path))
}

fn read_a_block(vm: &mut Vm) {
    let at = 0x40_0000;
    let ring = &mut vm.lanes[0].ring;
    ring.header(at, request_type::IN, 0);
    ring.fill(at + 16, 1, 0xee);
    ring.fill(at + 0x1000, 4096, 0xee);
    ring.add(&[
        (at, 16, false),
        (at + 0x1000, 4096, true),
        (at + 16, 1, true),
    ]);
    vm.publish(0);
    assert_eq!(vm.wait(0).1, 4097);
    assert_eq!(vm.lanes[0].ring.byte(at + 16), 0);
    assert_eq!(vm.lanes[0].ring.bytes(at + 0x1000, 4096), [0; 4096]);
}

#[test]
fn signals_end_it_and_it_removes_its_socket() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // Alone, then with a front end.
        let mut program = ram(&path);
        program.signal(signal);
        assert_eq!(program.wait(), 0);
        assert!(!path.exists());
        let mut program = ram(&path);
        let mut vm = Vm::new(UnixStream::connect(&path).unwrap(), 2, 128, 0);
        read_a_block(&mut vm);
        program.signal(signal);
        assert_eq!(program.wait(), 0);
        assert!(!path.exists());
    }
}

#[test]
fn a_killed_one_leaves_a_socket_that_the_next_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    drop(ram(&path));
    assert!(path.exists());
    let _program = ram(&path);
    read_a_block(&mut Vm::new(UnixStream::connect(&path).unwrap(), 2, 128, 0));
}

#[test]
fn sessions_leave_no_descriptors_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let program = ram(&path);
    let before = program.descriptors();
    for _ in 0..10 {
        let mut vm = Vm::new(UnixStream::connect(&path).unwrap(), 2, 128, 0);
        read_a_block(&mut vm);
        assert!(program.descriptors() > before);
    }
    let end = Instant::now() + LONG;
    while program.descriptors() != before {
        assert!(Instant::now() < end, "{} now", program.descriptors());
        std::thread::yield_now();
    }
}

#[test]
fn a_file_outlives_it() {
    let folder = tempfile::tempdir().unwrap();
    let (path, disk) = (folder.path().join("socket"), folder.path().join("a?b%.raw"));
    std::fs::write(&disk, vec![0; 8 << 20]).unwrap();
    let start = || {
        let mut command = Command::new(PROGRAM);
        command
            .arg("--blk-file")
            .arg(&disk)
            .args(["--num-queues", "2"]);
        Program::start(command.arg("--socket-path").arg(&path))
    };
    let mut program = start();
    let mut vm = Vm::new(UnixStream::connect(&path).unwrap(), 2, 128, 0);
    read_a_block(&mut vm);
    let at = 0x41_0000;
    for (n, kind) in [request_type::OUT, request_type::FLUSH]
        .into_iter()
        .enumerate()
    {
        let at = at + 0x1_0000 * n as u64;
        let ring = &mut vm.lanes[1].ring;
        ring.header(at, kind, 8);
        ring.fill(at + 16, 1, 0xee);
        ring.fill(at + 0x1000, 4096, 0x42);
        let data = (at + 0x1000, 4096, false);
        let status = (at + 16, 1, true);
        match kind {
            request_type::OUT => ring.add(&[(at, 16, false), data, status]),
            _ => ring.add(&[(at, 16, false), status]),
        };
        vm.publish(1);
        assert_eq!(vm.wait(1).1, 1);
        assert_eq!(vm.lanes[1].ring.byte(at + 16), 0);
    }
    // Another one does not get the file meanwhile.
    let other = Command::new(PROGRAM)
        .arg("--blk-file")
        .arg(&disk)
        .arg("--socket-path")
        .arg(folder.path().join("other"))
        .output()
        .unwrap();
    assert!(!other.status.success());
    let said = String::from_utf8(other.stderr).unwrap();
    assert!(said.contains("locked"), "{said}");
    program.signal(libc::SIGTERM);
    assert_eq!(program.wait(), 0);
    let bytes = std::fs::read(&disk).unwrap();
    assert!(bytes[..4096].iter().all(|&b| b == 0));
    assert!(bytes[4096..8192].iter().all(|&b| b == 0x42));
    assert!(bytes[8192..].iter().all(|&b| b == 0));
    start();
}

/// The descriptor keeps its number: any other could be one that this process has for something else.
fn with_fd(fd: i32) -> Program {
    let mut command = Command::new(PROGRAM);
    command.args(["--volume", "ram:?size=8MiB", "--num-queues", "2"]);
    command.arg("--fd").arg(fd.to_string());
    // SAFETY: fcntl may be called between fork and exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(fd, libc::F_SETFD, 0) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    Program::start(&mut command)
}

#[test]
fn a_socket_that_listens_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = with_fd(listener.as_raw_fd());
    for _ in 0..2 {
        read_a_block(&mut Vm::new(UnixStream::connect(&path).unwrap(), 2, 128, 0));
    }
    program.signal(libc::SIGTERM);
    assert_eq!(program.wait(), 0);
    assert!(path.exists(), "it is not its own to remove");
}

#[test]
fn a_socket_that_is_connected_has_one_session() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut program = with_fd(theirs.as_raw_fd());
    drop(theirs);
    let mut vm = Vm::new(ours, 2, 128, 0);
    read_a_block(&mut vm);
    drop(vm);
    assert_eq!(program.wait(), 0);
}

#[test]
fn what_it_says_of_itself() {
    let out = Command::new(PROGRAM)
        .arg("--print-capabilities")
        .output()
        .unwrap();
    assert!(out.status.success());
    let printed: Capabilities = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(printed, Capabilities::ours());
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/50-bluff-reference.json");
    let text = std::fs::read_to_string(file).unwrap();
    let description: Description = serde_json::from_str(&text).unwrap();
    assert_eq!(description.kind, printed.kind);
    let binary = Path::new(&description.binary);
    assert!(binary.is_absolute());
    assert_eq!(binary.file_name(), Path::new(PROGRAM).file_name());
    // Each feature names an option that is there (vhost-user.rst, "Backend program conventions").
    let help = Command::new(PROGRAM).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for option in ["socket-path", "fd", "print-capabilities"] {
        assert!(help.contains(&format!("--{option}")), "{option}");
    }
    for option in &printed.features {
        assert!(help.contains(&format!("--{option}")), "{option}");
    }
}

#[test]
fn mistakes_on_the_command_line() {
    let wrong: [&[&str]; 10] = [
        &["--volume", "ram:?size=1MiB", "--fd", "1"],
        &["--volume", "ram:?size=1MiB", "--fd", "99"],
        &[],
        &["--socket-path", "/nowhere/s"],
        &["--volume", "ram:?size=1MiB"],
        &[
            "--volume",
            "ram:?size=1MiB",
            "--socket-path",
            "/nowhere/s",
            "--fd",
            "3",
        ],
        &["--volume", "ram:?size=1MiB", "--socket-path", "/nowhere/s"],
        &["--volume", "nonsense:", "--socket-path", "/tmp/never-made"],
        &[
            "--volume",
            "ram:?size=1MiB",
            "--socket-path",
            "/s",
            "--queue-size",
            "100",
        ],
        &[
            "--volume",
            "ram:?size=1MiB",
            "--socket-path",
            "/s",
            "--num-queues",
            "65",
        ],
    ];
    for arguments in wrong {
        let out = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert!(out.status.code().is_some_and(|c| c != 0), "{arguments:?}");
        assert!(!out.stderr.is_empty(), "{arguments:?}");
    }
}
