//! A tap whose frames go to the kernel's own VXLAN device: what a tunnel of large frames is compared with.

#![allow(unsafe_code)] // Three ioctls that no crate of the workspace has.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bluff_qemu::hostdir::HostDir;
use bluff_virtio_net::spec::Header;
use rustix::ioctl::{Opcode, Setter, ioctl};
use zerocopy::IntoBytes;

use super::frames::{HEADER, Tunnel, VNI, VTEPS};
use super::space::{CARD_END, Space};
use crate::load::Count;

// `linux/if_tun.h`.
const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETVNETHDRSZ: Opcode = 0x4004_54d8;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const NAME: &str = "tap0";

/// `struct ifreq` with flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A tap, in a bridge with the kernel's VXLAN device.
pub struct Tap {
    file: File,
    frame: Vec<u8>,
}

impl Tap {
    /// One in `space`, whose frames leave for the neighbour. `frame` is what is written, behind its header.
    pub fn new(tools: &HostDir, space: &Space, header: Header, frame: &[u8]) -> Result<Self> {
        let file = {
            let _in = space.enter()?;
            let file = File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .context("/dev/net/tun")?;
            let mut request = Request {
                name: [0; 16],
                flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
                rest: [0; 22],
            };
            request.name[..NAME.len()].copy_from_slice(NAME.as_bytes());
            // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which is as long as the request.
            unsafe { ioctl(file.as_fd(), Setter::<TUNSETIFF, Request>::new(request)) }
                .context("a tap")?;
            // SAFETY: it reads one int.
            unsafe {
                ioctl(
                    file.as_fd(),
                    Setter::<TUNSETVNETHDRSZ, i32>::new(HEADER as i32),
                )
            }?;
            file
        };
        let [own, other] = VTEPS;
        let port = Tunnel::Vxlan.port();
        for words in [
            "link add br0 type bridge",
            &format!(
                "link add vxlan0 mtu 1500 type vxlan id {VNI} local {own} remote {other} dstport {port} dev {CARD_END} nolearning"
            ),
            "link set vxlan0 master br0",
            &format!("link set {NAME} mtu 1500 master br0"),
            "link set vxlan0 up",
            &format!("link set {NAME} up"),
            "link set br0 up",
        ] {
            space.ip(tools, words)?;
        }
        Ok(Self {
            file,
            frame: [header.as_bytes(), frame].concat(),
        })
    }

    /// Writes the frame once.
    pub fn write(&mut self) -> Result<()> {
        let len = self.file.write(&self.frame).context("the tap")?;
        anyhow::ensure!(len == self.frame.len(), "a frame was cut");
        Ok(())
    }

    /// Writes it again and again until `span` is over.
    pub fn pour(&mut self, span: Duration) -> Result<Count> {
        let start = Instant::now();
        let mut frames = 0u64;
        loop {
            self.write()?;
            frames += 1;
            if frames.is_multiple_of(16) && start.elapsed() >= span {
                return Ok(Count {
                    requests: frames,
                    span: start.elapsed(),
                });
            }
        }
    }
}

const _: () = assert!(size_of::<Request>() == 40);
