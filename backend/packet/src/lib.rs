//! Wire formats of the network path: frames are parsed from the bytes at hand and built into room that is given.
//!
//! ```text
//!   head: &[u8], len --> parse_l2 --> L2: addresses, tags, ethertype         a switch
//!                            |
//!                          parse ----> Frame: L3, L4 ----+--> ndp            anti-spoofing
//!                                        |               +--> flow           entropy of a tunnel's source port
//!                                        |               +--> toeplitz       RSS and hash report
//!                                        |               `--> icmp           "too big", to its sender
//!   UDP payload --> tunnel: VNI, where the inner frame begins
//!   checksum: sums over pieces, updates, pseudo headers           build: headers into room, ARP
//! ```
//!
//! Everything from outside is read from a copy of the frame's first bytes, `head`; `len` is how long the whole frame is. The
//! crate tells what is wrong with the *frame* ([`Malformed`]) from what cannot be told from the bytes at hand
//! ([`Malformed::Truncated`]). Bytes after the IP packet are padding, and legal; no length is taken from the frame's where IP has one.
//!
//! Nothing allocates: the crate has no `std`. Time is bounded by the head: at most [`ipv6::MAX_EXTENSIONS`] extension headers, 63 Geneve options,
//! and what a checksum is asked to cover.
//!
//! # Editions
//! Ethernet: IEEE 802.3-2022, tags: IEEE 802.1Q-2022; IPv4: RFC 791, IPv6: RFC 8200, TCP: RFC 9293, UDP: RFC 768; VXLAN: RFC 7348, Geneve:
//! RFC 8926; hashes: virtio 1.3 §5.1.6.4.3; checksums: RFC 1071, RFC 1624. Other rules stand where they are kept.
//!
//! # Not implemented
//! * Frames of 802.3 with LLC, MPLS, MACsec, 0x9100 tags: [`L3::Other`]. A third tag is not looked at.
//! * Options of IPv4, TCP and Geneve are not interpreted, and those of IPv6 only as far as hashes need it.
//! * AH inside of IPv4, ESP, IP in IP, SCTP, IGMP: [`L4::Other`]. Jumbograms (RFC 2675): their length 0 is taken for 0.
//! * Reassembly. Header checksums are not verified by parsing: a switch does not route, and a NIC's offloads leave them to be filled in later.
//! * The inner header hash of virtio (`VIRTIO_NET_F_HASH_TUNNEL`).

#![cfg_attr(not(any(test, feature = "fuzzing")), no_std)]

pub mod build;
pub mod checksum;
mod error;
pub mod flow;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod icmp;
pub mod ipv6;
mod l2;
mod names;
pub mod ndp;
pub mod spec;
#[cfg(test)]
mod tests;
pub mod toeplitz;
pub mod tunnel;
mod window;

pub use error::{BuildError, Malformed, NoAnswer};
pub use frame::{Arp, Fragment, Frame, Icmp, Ipv4, L3, L4, Tcp, Udp, parse, parse_into};
pub use ipv6::Ipv6;
pub use l2::{L2, Macs, Tag, Tags, parse_l2};
pub use names::{BadMac, EtherType, IpProto, Mac, Vni};
