//! What can be wrong with bytes that came, with a packet to be built, and with answering a packet.

/// What is wrong with bytes that came. Small and `Copy`, so that it can stand in a [`Frame`](crate::Frame) as a verdict and
/// be counted by cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Malformed {
    /// A header lies in the frame, as far as its lengths tell, but not in the part of the frame that is at hand. Nothing is wrong with the frame.
    #[error("a header lies past the part of the frame at hand")]
    Truncated,
    /// The frame is shorter than an Ethernet header.
    #[error("the frame is shorter than 14 bytes")]
    Ethernet,
    /// The frame ends in a VLAN tag.
    #[error("the frame ends in a VLAN tag")]
    VlanTag,
    /// The frame ends in the IP header.
    #[error("the frame ends in the IP header")]
    IpHeader,
    /// The IP header's version is not what the ethertype says.
    #[error("the IP version is not that of the ethertype")]
    IpVersion,
    /// The IPv4 header length is below 20, or past the end of the frame (RFC 791 §3.1).
    #[error("bad IPv4 header length")]
    IpHeaderLength,
    /// The IPv4 total length is less than the header's: what follows would have a negative length.
    #[error("the IPv4 total length is below the header's length")]
    IpLengthBelowHeader,
    /// The packet's length goes past the end of the frame.
    #[error("the IP length goes past the end of the frame")]
    IpLengthPastEnd,
    /// The fragment would end past the largest packet there is: 65,535 bytes.
    #[error("the fragment ends past the largest packet")]
    FragmentPastEnd,
    /// An extension header goes past the end of the packet.
    #[error("an extension header goes past the end of the packet")]
    ExtensionPastEnd,
    /// An authentication header whose length is below its fixed part (RFC 4302 §2.2).
    #[error("bad length of an authentication header")]
    ExtensionLength,
    /// More extension headers than are followed.
    #[error("too many extension headers")]
    ExtensionChain,
    /// Hop-by-hop options that do not come first (RFC 8200 §4.1).
    #[error("hop-by-hop options are not the first header")]
    HopByHopNotFirst,
    /// A second fragment header (RFC 8200 §4.1 has one at most).
    #[error("two fragment headers")]
    SecondFragmentHeader,
    /// ARP for something else than IPv4 on Ethernet.
    #[error("ARP that is not for IPv4 on Ethernet")]
    ArpKind,
    /// The frame ends in the ARP packet.
    #[error("the frame ends in the ARP packet")]
    ArpPacket,
    /// The packet ends in the TCP, UDP or ICMP header.
    #[error("the packet ends in its transport header")]
    TransportHeader,
    /// The TCP header's length is below 20 or past the end of the packet.
    #[error("bad TCP header length")]
    TcpHeaderLength,
    /// The UDP length is below 8, or past the end of a packet that is whole.
    #[error("bad UDP length")]
    UdpLength,
    /// Neighbour discovery with another hop limit than 255, with a code, or in fragments (RFC 4861 §7.1, RFC 6980 §5).
    #[error("neighbour discovery that cannot come from this link")]
    NdpOrigin,
    /// A neighbour message that ends early, or whose option has a bad length (RFC 4861 §7.1).
    #[error("bad length in neighbour discovery")]
    NdpLength,
    /// Two link-layer addresses that differ.
    #[error("two link-layer addresses in neighbour discovery")]
    NdpTwoAddresses,
    /// The datagram is shorter than the tunnel's header.
    #[error("the datagram ends in the tunnel's header")]
    TunnelHeader,
    /// VXLAN without the I flag (RFC 7348 §5).
    #[error("no VNI in the VXLAN header")]
    VxlanFlags,
    /// Another version of Geneve than 0 (RFC 8926 §3.4).
    #[error("unknown version of Geneve")]
    GeneveVersion,
    /// Geneve options that go past the end of the datagram, or whose lengths are not the header's (RFC 8926 §3.5).
    #[error("bad length of Geneve options")]
    GeneveOptions,
    /// Something else than an Ethernet frame inside of Geneve.
    #[error("no Ethernet frame inside of Geneve")]
    GeneveProtocol,
    /// A critical Geneve option that we do not know: the packet must be dropped (RFC 8926 §3.5).
    #[error("an unknown critical Geneve option")]
    GeneveCritical,
    /// The inner frame is shorter than an Ethernet header.
    #[error("the inner frame is shorter than 14 bytes")]
    InnerFrame,
    /// A VNI of more than 24 bits.
    #[error("a VNI has 24 bits")]
    Vni,
}

/// Why a packet cannot be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The room ends before the header does.
    #[error("no room for the packet")]
    NoRoom,
    /// The payload is longer than the header's length field can tell.
    #[error("the payload is too long for its header")]
    TooLong,
    /// Geneve options whose lengths do not add up, or of more than 252 bytes.
    #[error("bad Geneve options")]
    Options,
}

/// Why a packet is not answered with an ICMP error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// It is not a packet of that IP version, or is malformed where the decision needs it.
    #[error("not an IP packet that can be answered")]
    NotIp,
    /// To or from a group of stations, on the link or in IP (RFC 1122 §3.2.2, RFC 4443 §2.4 e.3, e.4).
    #[error("sent to or from a group of stations")]
    Multicast,
    /// Its source is not the address of one station (RFC 1122 §3.2.2, RFC 4443 §2.4 e.6).
    #[error("its source address is not one station's")]
    Source,
    /// A fragment, and not the first (RFC 1122 §3.2.2).
    #[error("a fragment that is not the first")]
    Fragment,
    /// An ICMP error, redirect, or a message that may be one (RFC 1122 §3.2.2, RFC 4443 §2.4 e.1, e.2).
    #[error("an ICMP error itself")]
    IcmpError,
    /// The answer does not fit.
    #[error(transparent)]
    Build(#[from] BuildError),
}
