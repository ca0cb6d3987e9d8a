//! PID 1 of a test guest: mounts what every script expects, loads the modules that the image lists, then serves scripts.
//!
//! Two processes: PID 1 does nothing but reap (and powers off when the agent dies), its child is the agent. So the agent can wait for
//! its own jobs, and what daemons leave behind is still reaped. Linked statically, as nothing else is in the first archive.
//! Under the name `traffic` it is a program of its own ([`traffic`]).

mod job;
mod sys;
mod traffic;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guest_agent::{Decoder, Frame, Kind, PORT_NAME};

fn main() {
    if std::process::id() == 1 {
        init();
        return;
    }
    let arguments: Vec<String> = std::env::args().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    let (name, done) = match name.is_some_and(|name| name == traffic::NAME) {
        true => (traffic::NAME, traffic::run(&arguments[1..])),
        false => ("agent", agent()),
    };
    if let Err(error) = done {
        eprintln!("{name}: {error}");
        std::process::exit(1);
    }
}

/// PID 1. Never returns: a kernel whose init ends panics.
fn init() {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("tmpfs", "/dev/shm", "tmpfs"),
        ("tmpfs", "/tmp", "tmpfs"),
        ("tmpfs", "/run", "tmpfs"),
    ] {
        let done = fs::create_dir_all(target).and_then(|()| sys::mount(source, target, kind));
        complain(&format!("mount {target}"), done);
    }
    // Shells with process substitution, and fio, open these.
    for (name, to) in [
        ("fd", ""),
        ("stdin", "/0"),
        ("stdout", "/1"),
        ("stderr", "/2"),
    ] {
        let link = std::os::unix::fs::symlink(format!("/proc/self/fd{to}"), format!("/dev/{name}"));
        complain(name, link);
    }
    complain("modules", load_modules());
    match Command::new("/proc/self/exe").arg("agent").spawn() {
        Ok(child) => {
            while sys::wait_any().is_some_and(|pid| pid != child.id()) {}
            eprintln!("init: the agent is gone");
        }
        Err(error) => eprintln!("init: {error}"),
    }
    sys::power_off();
}

fn complain(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("init: {what}: {error}");
    }
}

/// Loads what `/etc/modules` lists: paths of unpacked modules, one a line, in an order that satisfies their dependencies.
fn load_modules() -> io::Result<()> {
    for path in fs::read_to_string("/etc/modules")?.lines() {
        complain(
            path,
            File::open(path).and_then(|file| sys::load_module(&file)),
        );
    }
    Ok(())
}

/// Opens the channel to the host: the line that the kernel's command line names, or else the virtio-serial port.
fn open_port() -> io::Result<File> {
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    let line = fs::read_to_string("/proc/cmdline")?;
    if let Some(path) = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("bluff.port="))
    {
        let port = open(path)?;
        sys::make_raw(&port)?;
        return Ok(port);
    }
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return open(&format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        // The port appears when the host has named it; nothing announces that to a process without a netlink socket.
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(io::Error::other("no port to the host"))
}

fn agent() -> io::Result<()> {
    let mut input = open_port()?;
    let output: job::Port = Arc::new(Mutex::new(input.try_clone()?));
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let mut jobs = job::Jobs::new(output.clone())?;
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match input.read(&mut buffer) {
            // No host is connected: the port reads as empty at once, and stays so until one is there.
            Ok(0) => {
                decoder = Decoder::default();
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        decoder.push(&buffer[..length]);
        while let Some(frame) = decoder.next_frame() {
            match frame.kind {
                Kind::Hello => {
                    let mut payload = frame.payload;
                    payload.extend_from_slice(boot_id.trim().as_bytes());
                    job::send(&output, &Frame::new(Kind::Hello, 0, payload))?;
                }
                _ => jobs.handle(frame)?,
            }
        }
    }
}

/// Writes all of a frame; a port without a host blocks until one comes.
pub(crate) fn write_frame(port: &mut File, frame: &Frame) -> io::Result<()> {
    port.write_all(&frame.encode())
}
