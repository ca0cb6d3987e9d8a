//! User-Mode Linux, which has no QEMU between itself and the card: configuration and control queue are the card's.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::image::Image;
use bluff_qemu::uml::Uml;

use super::traffic;
use crate::card::{BluffdNet, MTU, Station};
use crate::cases::MIB;
use crate::runner::Context;

const ONE: Station = Station {
    number: 1,
    pairs: 1,
};
const TWO: Station = Station {
    number: 2,
    pairs: 1,
};

/// Two of them on one card. What the card says about MTU, address and link reaches them.
pub(super) fn all(context: &Context<'_, BluffdNet>) -> Result<()> {
    let mut card = context.card("card", None, None, &[ONE, TWO])?;
    let image = Image::user_mode_linux()?.for_networks().load("ipv6");
    let mut kernels = Vec::new();
    for station in [ONE, TWO] {
        let kernel = Uml::builder(&image)
            .memory_mib(128)
            .vhost_user_net(&card.socket(station))
            .start()?;
        kernel.sh(&traffic::settle(station))?;
        kernels.push(kernel);
    }
    let kernel = &kernels[0];
    kernel.sh(&traffic::found(TWO))?;
    let found = kernel.sh("cd /sys/class/net/eth0 && cat address mtu carrier")?;
    let wanted = format!("{}\n{MTU}\n1", ONE.mac());
    ensure!(found == wanted, "address, MTU and link are {found}");
    kernel.sh(&traffic::all(TWO, MIB))?;
    kernels[1].sh(&traffic::all(ONE, MIB))?;
    card.set_link(ONE, false)?;
    kernel.sh(
        "timeout 60 sh -c 'until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.05; done'",
    )?;
    kernel.sh(&traffic::lost(TWO))?;
    card.set_link(ONE, true)?;
    kernel.sh(
        "timeout 60 sh -c 'until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done'",
    )?;
    kernel.sh(&traffic::found(TWO))?;
    kernel.sh(&traffic::all(TWO, MIB))?;
    for kernel in kernels {
        kernel.power_off(Duration::from_secs(20))?;
    }
    card.check()
}
