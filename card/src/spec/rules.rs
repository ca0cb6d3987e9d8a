//! What a specification may say. The registry refuses what breaks a rule, and the reader of the configuration file points at its line: both
//! in these words.

use std::net::IpAddr;

use bluff_packet::Mac;

use super::{
    Attach, DeviceSpec, FunctionKind, FunctionSpec, LIST_MAX, LimitSpec, MTU, NAMESPACES_MAX,
    NSID_MAX, NamespaceSpec, NetworkSpec, PAIRS_CONTROLLED_MAX, PAIRS_MAX, PortSpec, SERIAL_MAX,
    TunnelSpec, UplinkSpec, VNI_MAX, VTEPS_MAX,
};

/// The longest name of a subsystem, in bytes (NVMe Base 2.1 §4.7).
const NQN_MAX: usize = 223;

/// What is wrong with a name as the NQN of a subsystem (NVMe Base 2.1 §4.7), if anything is.
pub fn nqn_mistake(nqn: &str) -> Option<&'static str> {
    // nqn.YYYY-MM.reverse.domain:whatever
    let form = |rest: &str| {
        let (date, rest) = rest.split_at_checked(8)?;
        let bytes = date.as_bytes();
        let digits = [0, 1, 2, 3, 5, 6]
            .iter()
            .all(|i| bytes[*i].is_ascii_digit());
        let (domain, name) = rest.split_once(':')?;
        let fits = digits && bytes[4] == b'-' && bytes[7] == b'.';
        (fits && !domain.is_empty() && !name.is_empty()).then_some(())
    };
    match nqn.strip_prefix("nqn.").and_then(form) {
        _ if nqn.len() > NQN_MAX => Some("an NQN has at most 223 bytes"),
        None => Some("an NQN is nqn.YYYY-MM.reverse.domain:name, such as nqn.2026-11.example:s0"),
        Some(()) if nqn.chars().any(char::is_control) => Some("an NQN has no control characters"),
        Some(()) => None,
    }
}

/// What is wrong with text as the serial number of a controller (NVMe Base 2.1 §1.4.2: ASCII strings have 20h to 7Eh), if anything is.
pub fn serial_mistake(text: &str) -> Option<String> {
    let fits = (1..=SERIAL_MAX).contains(&text.len())
        && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    (!fits).then(|| format!("a serial number has 1 to {SERIAL_MAX} characters of ASCII"))
}

/// What is wrong with a way in which functions of a kind are to reach hosts, if anything is.
pub fn attach_mistake(kind: FunctionKind, attach: Attach) -> Option<String> {
    let right = kind.attach();
    (attach != right).then(|| format!("a function of kind {kind} attaches by {right}"))
}

/// What is wrong with so many namespaces in a subsystem, if anything is.
pub fn count_mistake(namespaces: usize) -> Option<String> {
    (namespaces > NAMESPACES_MAX)
        .then(|| format!("a subsystem has at most {NAMESPACES_MAX} namespaces"))
}

/// What is wrong with an address as a station's, if anything is.
pub fn mac_mistake(mac: Mac) -> Option<&'static str> {
    match mac {
        _ if mac.is_multicast() => Some("a group's address is no station's: its first byte is odd"),
        Mac::ZERO => Some("all zeroes are no station's address"),
        _ => None,
    }
}

/// What is wrong with a number as a VLAN's, if anything is (IEEE 802.1Q §9.6: 0 and 4095 are none).
pub fn vlan_mistake(vlan: u16) -> Option<&'static str> {
    (!(1..=4094).contains(&vlan)).then_some("a VLAN has a number from 1 to 4094")
}

/// What is wrong with an address as a VTEP's, if anything is.
fn vtep_mistake(vtep: IpAddr) -> Option<String> {
    let broadcast = matches!(vtep, IpAddr::V4(v4) if v4.is_broadcast());
    let bad = vtep.is_unspecified() || vtep.is_multicast() || broadcast;
    bad.then(|| format!("{vtep} is not the address of one machine"))
}

impl TunnelSpec {
    /// What is wrong with the address of another card, beside those before it.
    pub fn vtep_mistake(&self, vtep: IpAddr, before: &[IpAddr]) -> Option<String> {
        match vtep {
            _ if vtep == self.vtep => Some(format!("{vtep} is this card's own address")),
            _ if vtep.is_ipv4() != self.vtep.is_ipv4() => Some(format!(
                "{vtep} and {}, this card's address, are of different families",
                self.vtep
            )),
            _ if before.contains(&vtep) => Some(format!("{vtep} stands there twice")),
            _ => vtep_mistake(vtep),
        }
    }

    /// What is wrong with its own address, if anything is.
    pub fn local_mistake(&self) -> Option<String> {
        vtep_mistake(self.vtep)
    }

    /// What is wrong with its gateway, if anything is.
    pub fn gateway_mistake(&self) -> Option<String> {
        let gateway = self.gateway?;
        match gateway {
            _ if !self.has_wire() => {
                Some("the kernel knows the way; only with a wire of the card's own (`tap`, `port:FUNCTION`) there is a gateway".to_owned())
            }
            _ if gateway == self.vtep => Some(format!("{gateway} is this card's own address")),
            _ if gateway.is_ipv4() != self.vtep.is_ipv4() => Some(format!(
                "{gateway} and {}, this card's address, are of different families",
                self.vtep
            )),
            _ => vtep_mistake(gateway),
        }
    }

    /// What is wrong with the static address at a place of its list.
    pub fn fdb_mistakes(&self, at: usize) -> impl Iterator<Item = String> {
        let entry = &self.fdb[at];
        let same = |e: &&super::FdbSpec| (e.mac, e.vlan) == (entry.mac, entry.vlan);
        let twice = self.fdb[..at].iter().find(same);
        let known = self.vteps.contains(&entry.vtep);
        let mistakes = [
            mac_mistake(entry.mac.0).map(str::to_owned),
            entry.vlan.and_then(vlan_mistake).map(str::to_owned),
            (!known).then(|| format!("{} is none of the network's `vteps`", entry.vtep)),
            twice.map(|_| format!("{} stands there twice", entry.mac)),
        ];
        mistakes.into_iter().flatten()
    }

    fn mistakes(&self) -> impl Iterator<Item = String> {
        let port = (self.port == Some(0)).then(|| "0 is no port".to_owned());
        let many = (self.vteps.len() > VTEPS_MAX || self.fdb.len() > LIST_MAX)
            .then(|| format!("a network has at most {VTEPS_MAX} VTEPs, and {LIST_MAX} addresses"));
        let first = [port, many, self.local_mistake(), self.gateway_mistake()];
        let vteps = self.vteps.iter().enumerate();
        let vteps = vteps.filter_map(|(i, v)| self.vtep_mistake(*v, &self.vteps[..i]));
        let fdb = (0..self.fdb.len()).flat_map(|i| self.fdb_mistakes(i));
        first.into_iter().flatten().chain(vteps).chain(fdb)
    }
}

impl NetworkSpec {
    /// What is wrong with it.
    pub fn mistakes(&self) -> impl Iterator<Item = String> {
        let (least, most) = (MTU.start(), MTU.end());
        let mtu = (!MTU.contains(&self.mtu))
            .then(|| format!("a network's MTU is a number from {least} to {most}"));
        let vni = match self.vni {
            None if self.tunnel.is_some() => Some("a network with a tunnel has a VNI".to_owned()),
            Some(vni) if vni > VNI_MAX => Some(format!("a VNI is at most {VNI_MAX}")),
            _ => None,
        };
        mtu.into_iter()
            .chain(vni)
            .chain(self.tunnel.iter().flat_map(TunnelSpec::mistakes))
    }
}

impl UplinkSpec {
    /// What is wrong with it.
    pub fn mistakes(&self) -> impl Iterator<Item = String> {
        let (least, most) = (MTU.start(), MTU.end());
        let mtu = (!MTU.contains(&self.mtu))
            .then(|| format!("an uplink's MTU is a number from {least} to {most}"));
        let mac = self.mac.and_then(|m| mac_mistake(m.0)).map(str::to_owned);
        mtu.into_iter().chain(mac)
    }
}

impl PortSpec {
    /// What is wrong with it.
    pub fn mistakes(&self) -> impl Iterator<Item = String> {
        let LimitSpec {
            tx,
            rx,
            tx_pps,
            rx_pps,
        } = self.limit;
        let zero = [tx, rx, tx_pps, rx_pps].contains(&Some(0));
        let many = self.allowed.as_ref().is_some_and(|a| a.len() > LIST_MAX);
        let mistakes = [
            self.mac.and_then(|m| mac_mistake(m.0)).map(str::to_owned),
            self.vlan.and_then(vlan_mistake).map(str::to_owned),
            zero.then(|| "a limit of 0 lets nothing pass".to_owned()),
            many.then(|| format!("a port has at most {LIST_MAX} prefixes")),
        ];
        mistakes.into_iter().flatten()
    }
}

impl FunctionSpec {
    /// The most queues, or pairs of queues, of such a function.
    pub fn queues_max(kind: FunctionKind) -> u16 {
        match kind {
            FunctionKind::VirtioNet | FunctionKind::Uplink => PAIRS_MAX,
            FunctionKind::VirtioBlk | FunctionKind::Nvme => crate::config::QUEUES_MAX,
        }
    }

    /// What is wrong with how many queues it has, if anything is.
    pub fn queues_mistake(&self) -> Option<String> {
        let most = Self::queues_max(self.device.kind());
        let most = match &self.device {
            DeviceSpec::VirtioNet { port, .. } if port.control_queue => PAIRS_CONTROLLED_MAX,
            _ => most,
        };
        let what = match self.device {
            DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => "pairs of queues",
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::Nvme { .. } => "queues",
        };
        let fits = (1..=most).contains(&self.queues);
        (!fits).then(|| format!("a function has 1 to {most} {what}"))
    }
}

impl NamespaceSpec {
    /// What is wrong with it beside others of its subsystem.
    pub fn mistakes(&self, others: &[Self]) -> impl Iterator<Item = String> {
        let Self { volume, nsid, .. } = self;
        let numbered = (1..=NSID_MAX).contains(nsid);
        let same_number = others.iter().any(|other| other.nsid == *nsid);
        let same_volume = others.iter().find(|other| other.volume == *volume);
        let mistakes = [
            (!numbered).then(|| format!("a namespace has a number from 1 to {NSID_MAX}")),
            same_number.then(|| format!("there is a namespace {nsid} already")),
            same_volume.map(|other| format!("volume {volume} is namespace {} already", other.nsid)),
        ];
        mistakes.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_subsystems_have_a_date_and_a_domain() {
        for good in [
            "nqn.2026-11.example:s0",
            "nqn.2014-08.org.nvmexpress:uuid:x",
        ] {
            assert_eq!(nqn_mistake(good), None, "{good}");
        }
        let long = format!("nqn.2026-11.example:{}", "a".repeat(NQN_MAX));
        for bad in [
            "",
            "s0",
            "nqn.2026-11.example",
            "nqn.2026-11.:s0",
            "nqn.26-11.example:s0",
            "nqn.2026-11.é\u{7}:s",
            "nqn.20é6-11.example:s0",
            &long,
        ] {
            assert!(nqn_mistake(bad).is_some(), "{bad}");
        }
    }
}
