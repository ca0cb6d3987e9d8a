//! Two cards, a VM on each, and one Ethernet segment for both VMs.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use bluff_qemu::device::VhostUserNet;
use bluff_qemu::emulator::Qemu;
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;
use bluff_qemu::namespace::Cable;

use super::{Card, PATIENCE, indent};
use crate::run;

/// What is shown of the cable: all but what the VMs' IPv6 says there by itself (the type of a frame behind 8 bytes of VXLAN).
const FILTER: &str = "ip and udp[28:2] != 0x86dd";

/// What is between the cards.
enum Underlay {
    /// Each is in a network namespace.
    Cable(Box<Cable>),
    /// The loopback, on a machine that gives us no namespaces.
    Loopback,
}

impl Underlay {
    /// A card's address, and the other's.
    fn vteps(&self, card: usize) -> [&'static str; 2] {
        let [one, two] = match self {
            Self::Cable(_) => ["10.0.0.1", "10.0.0.2"],
            Self::Loopback => ["127.0.0.2", "127.0.0.3"],
        };
        if card == 0 { [one, two] } else { [two, one] }
    }
}

/// A VM on its card.
struct Place {
    number: usize,
    card: Card,
    guest: Guest,
}

impl Place {
    fn address(&self) -> String {
        address(self.number)
    }

    fn sh(&self, script: &str) -> Result<String> {
        println!("    guest{}# {script}", self.number);
        let said = self.guest.sh(script)?;
        if !said.is_empty() {
            print!("{}", indent(&said));
        }
        Ok(said)
    }
}

fn address(number: usize) -> String {
    format!("192.168.7.{number}")
}

fn mac(number: usize) -> String {
    format!("02:00:00:00:00:{number:02}")
}

fn config(number: usize, [vtep, other]: [&str; 2]) -> String {
    format!(
        "[network.blue]\nvni = 5001\ntunnel = \"vxlan\"\nvtep = \"{vtep}\"\nvteps = [\"{other}\"]\n\n\
         [function.net0]\nkind = \"virtio-net\"\nattach = \"vhost-user\"\nnetwork = \"blue\"\nmac = \"{}\"\nqueues = 2\n\
         allowed = [\"{}/32\"]\n",
        mac(number),
        address(number)
    )
}

/// Starts both cards and their VMs, shows the network, and ends them; gives the facts for the summary.
pub fn run(programs: &Path, folder: &Path, qemu: &Qemu, image: &Image) -> Result<Vec<String>> {
    run::say("a network: two more cards, which reach each other by IP alone");
    let underlay = match Cable::new([&["10.0.0.1/24"], &["10.0.0.2/24"]]) {
        Ok(cable) => {
            println!("    each bluffd is in a network namespace of its own; a cable joins them");
            Underlay::Cable(Box::new(cable))
        }
        Err(error) => {
            println!(
                "    on this machine's loopback, as it gives us no network namespaces: {error:#}"
            );
            Underlay::Loopback
        }
    };
    let mut cards = Vec::new();
    for number in [1, 2] {
        let config = config(number, underlay.vteps(number - 1));
        if number == 1 {
            print!("{}", indent(&config));
            println!("    (and the same for card 2, the other way round)");
        }
        let place = match &underlay {
            Underlay::Cable(cable) => Some(cable.ends[number - 1].entrance()),
            Underlay::Loopback => None,
        };
        let folder = folder.join(format!("card{number}"));
        cards.push((number, Card::start(programs, &folder, &config, place)?));
    }
    let start = Instant::now();
    let places = boot(cards, qemu, image)?;
    println!(
        "    both VMs are up after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    let facts = show(&places, &underlay, folder).map_err(|error| {
        let with = |error, place: &Place| place.card.explain(error);
        places.iter().fold(error, with)
    })?;
    for place in places {
        place.guest.quit(PATIENCE)?;
        place.card.end()?;
    }
    Ok(facts)
}

fn boot(cards: Vec<(usize, Card)>, qemu: &Qemu, image: &Image) -> Result<Vec<Place>> {
    let image = image.clone().for_networks();
    let mut booting = Vec::new();
    for (number, card) in cards {
        let socket = card.folder.join("run/net0.sock");
        let function = VhostUserNet::new("net0", &socket, &mac(number)).pairs(2);
        let function = function.property("host_mtu", 1450.into());
        let guest = Guest::builder(qemu, &image).memory_mib(256);
        let guest = guest.vhost_user_net(function);
        booting.push((number, card, std::thread::spawn(move || guest.start())));
    }
    let place = |(number, card, guest): (_, Card, std::thread::JoinHandle<Result<Guest>>)| {
        let guest = guest.join().expect("a boot does not panic");
        let guest = guest.map_err(|error| card.explain(error))?;
        Ok(Place {
            number,
            card,
            guest,
        })
    };
    booting.into_iter().map(place).collect()
}

fn show(places: &[Place], underlay: &Underlay, folder: &Path) -> Result<Vec<String>> {
    let mut facts = Vec::new();
    let [one, two] = places else {
        anyhow::bail!("there are two");
    };
    for place in places {
        place.sh(&format!(
            "ip address add {}/24 dev eth0 && ip link set eth0 up",
            place.address()
        ))?;
    }
    one.sh("ethtool -i eth0 | grep driver && ethtool -l eth0 | tail -n 1")?;

    run::say("one VM asks for the other, and this is what passes between the cards");
    let capture = match underlay {
        // A question for the neighbour's address and its answer, then the echo and its answer.
        Underlay::Cable(cable) => {
            println!("    card1# tcpdump -i eth0 -n -e -t '{FILTER}' &");
            Some(cable.ends[0].capture(FILTER, 4, &folder.join("tcpdump.log"))?)
        }
        Underlay::Loopback => None,
    };
    one.sh(&format!("ping -c 1 {}", two.address()))?;
    facts.push(
        "two VMs on two cards share an Ethernet segment: they find and answer each other".into(),
    );
    if let Some(capture) = capture {
        let seen = capture.wait(PATIENCE)?;
        print!("{}", indent(&seen));
        ensure!(
            seen.contains("VXLAN") && seen.contains("vni 5001"),
            "that is no VXLAN"
        );
        facts.push("on the cable tcpdump, which is not ours, reads VXLAN of network 5001 between the cards' addresses, and the VMs' frames within".into());
    }

    run::say("16 MiB from one VM to the other by TCP");
    let sum = one.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null; sha256sum </tmp/data; httpd -h /tmp")?;
    let received = two.sh(&format!(
        "wget -q -O - http://{}/data | sha256sum",
        one.address()
    ))?;
    ensure!(received == sum, "it is not what was sent");
    facts.push("16 MiB of TCP came through the tunnel with the same SHA-256".into());

    run::say("seen from the first card");
    for arguments in [
        ["network", "show", "blue"],
        ["network", "fdb", "blue"],
        ["function", "show", "net0"],
    ] {
        print!("{}", indent(&one.card.ctl(&arguments)?));
    }
    Ok(facts)
}
