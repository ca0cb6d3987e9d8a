//! Opening a device.
//!
//! Unsafe, because its settings are ioctls on structures of the kernel's.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::header::{HEADER, HEADER_TUNNEL};
use super::{Carries, TapOptions};
use crate::{NetError, Offloads};

/// Segmentation behind a tunnel's headers, and with an outer checksum (`linux/if_tun.h`): since Linux 6.17.
const TUNNEL_GSO: libc::c_uint = 0x80;
const TUNNEL_GSO_CSUM: libc::c_uint = 0x100;

const NO_SETTING: &str = "cannot set up a tap device, which needs CAP_NET_ADMIN";

/// One queue of a device.
pub(super) struct Queue {
    pub(super) file: File,
    /// Bytes before each frame.
    pub(super) header: usize,
}

/// What came of it.
pub(super) struct Opened {
    pub(super) name: String,
    pub(super) queues: Vec<Queue>,
    pub(super) completes: Offloads,
}

fn system(what: &'static str) -> impl Fn(io::Error) -> NetError {
    move |source| NetError::System { what, source }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes are a request without anything.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() || name.contains(['\0', '/']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0);
    bytes.map(|c| char::from(*c as u8)).collect()
}

/// Attaches a queue; gives the device's name.
fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<String> {
    let mut request = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a request of our own, which the kernel reads and fills.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(name_of(&request))
}

fn open_file() -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

/// Sets the length of the header; `TUNSETVNETHDRSZ` comes before `TUNSETOFFLOAD`, which asks for it.
fn set_header(file: &File, len: usize) -> io::Result<()> {
    let len = len as libc::c_int;
    // SAFETY: a number, which the kernel reads.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
    let little: libc::c_int = 1;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETLE, &raw const little) })
}

/// Says what frames that are read may leave undone.
fn set_offload(file: &File, offload: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offload),
        )
    })
}

/// What the kernel knows. It takes on frames that are written what it knows to leave on those that are read.
fn offloads(file: &File, carries: Carries) -> io::Result<(usize, Offloads)> {
    let plain = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
    match carries {
        Carries::Frames => {
            set_header(file, HEADER)?;
            if set_offload(file, plain | uso).is_ok() {
                return Ok((HEADER, Offloads::all()));
            }
            set_offload(file, plain)?;
            Ok((HEADER, tcp))
        }
        Carries::Tunnels => {
            // Both kinds of USO are needed for a probe only: with them a datagram that stands for several could be the outer one.
            set_header(file, HEADER_TUNNEL)?;
            let tunnel = TUNNEL_GSO | TUNNEL_GSO_CSUM;
            if set_offload(file, plain | uso | tunnel).is_ok() {
                set_offload(file, plain | tunnel)?;
                return Ok((HEADER_TUNNEL, Offloads::all()));
            }
            set_header(file, HEADER)?;
            // The kernel would take one that is to be cut for one that is in no tunnel.
            set_offload(file, libc::TUN_F_CSUM)?;
            Ok((HEADER, Offloads::CSUM))
        }
    }
}

pub(super) fn open(options: &TapOptions) -> Result<Opened, NetError> {
    let count = options.reactors.len();
    let refused = |error: io::Error| {
        let what = match error.raw_os_error() {
            Some(libc::EPERM) => "cannot make a tap device, which needs CAP_NET_ADMIN",
            Some(libc::EBUSY) => "cannot use the tap device: somebody else does",
            Some(libc::EINVAL) => {
                "cannot use the device of that name: it is no tap device, or one without vnet headers"
            }
            _ => "cannot make a tap device",
        };
        NetError::System {
            what,
            source: error,
        }
    };
    let no_tun = system("cannot open /dev/net/tun");
    let first = open_file().map_err(&no_tun)?;
    let several = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let (name, flags) = match attach(&first, &options.name, several) {
        // One that is there keeps the kind of queues that it was made with.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            let flags = several ^ libc::IFF_MULTI_QUEUE;
            (attach(&first, &options.name, flags), flags)
        }
        attached => (attached, several),
    };
    let name = name.map_err(refused)?;
    let mut files = vec![first];
    while flags != 0 && files.len() < count {
        let file = open_file().map_err(&no_tun)?;
        attach(&file, &name, flags).map_err(refused)?;
        files.push(file);
    }
    let mut completes = Offloads::all();
    let mut queues = Vec::new();
    for file in files {
        let found = offloads(&file, options.carries);
        let (header, of_file) = found.map_err(system("cannot set the offloads of a tap device"))?;
        completes &= of_file;
        queues.push(Queue { file, header });
    }
    set_up(&name).map_err(system(NO_SETTING))?;
    Ok(Opened {
        name,
        queues,
        completes,
    })
}

/// Asks the kernel for settings of a network device.
struct Settings(OwnedFd);

impl Settings {
    fn new() -> io::Result<Self> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::socket(libc::AF_INET, kind, 0) };
        check(fd)?;
        // SAFETY: it is ours.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn call(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: a request of our own.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what, request) })
    }
}

/// As [`Tap::raise_mtu`](super::Tap::raise_mtu).
pub(super) fn raise_mtu(name: &str, mtu: u16) -> Result<u16, NetError> {
    let raise = || {
        let settings = Settings::new()?;
        let mut asked = request(name)?;
        settings.call(libc::SIOCGIFMTU, &mut asked)?;
        // SAFETY: the kernel has written it.
        let now = unsafe { asked.ifr_ifru.ifru_mtu };
        if now >= libc::c_int::from(mtu) {
            return Ok(u16::try_from(now).unwrap_or(u16::MAX));
        }
        asked.ifr_ifru.ifru_mtu = mtu.into();
        settings.call(libc::SIOCSIFMTU, &mut asked)?;
        Ok(mtu)
    };
    raise().map_err(system(NO_SETTING))
}

/// Sets a device up.
fn set_up(name: &str) -> io::Result<()> {
    let settings = Settings::new()?;
    let mut asked = request(name)?;
    settings.call(libc::SIOCGIFFLAGS, &mut asked)?;
    // SAFETY: the kernel has written it.
    unsafe {
        asked.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
    }
    settings.call(libc::SIOCSIFFLAGS, &mut asked)
}
