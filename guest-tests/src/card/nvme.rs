//! NVMe functions of `bluffd`, over vfio-user.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bluff_qemu::device::VfioUserPci;
use bluff_qemu::guest::{Builder, Guest};

use super::{Bluffd, Daemon};
use crate::controller::{Ability, Controller, Function, Manner, Namespace, SILENT, Served};
use crate::runner::Peer;
use serde_json::Value;

/// `bluffd` with one NVMe function.
#[derive(Clone, Copy, Debug)]
pub struct BluffdNvme(pub Bluffd);

impl Peer for BluffdNvme {
    type Ability = Ability;

    fn name(&self) -> &'static str {
        self.0.name
    }

    fn has(&self, ability: Ability) -> bool {
        match ability {
            // QEMU aborts when a vfio-user function with MSI-X is removed; see docs/vfio-user.md.
            Ability::Unplug => false,
            Ability::DataHalf => self.0.data == "process",
            _ => true,
        }
    }
}

impl Controller for BluffdNvme {
    fn model(&self) -> &'static str {
        "Diamond Bluff NVMe Controller"
    }

    fn start(&self, folder: &Path, function: &Function) -> Result<Box<dyn Served>> {
        Ok(Box::new(ServedByCard {
            daemon: Daemon::start(folder, &config(self.0.data, function))?,
            function: function.clone(),
        }))
    }
}

/// The layers that make a volume answer so.
fn layers(manner: Manner) -> String {
    match manner {
        Manner::Prompt => String::new(),
        Manner::Slow => {
            r#"{ kind = "delay", read = "5ms", write = "5ms", jitter = "10ms" }"#.into()
        }
        // After the volume has done it: the latest that it can touch the host's memory.
        Manner::Late => {
            r#"{ kind = "delay", read = "5s", write = "5s", rate = "0.001", when = "after" }"#
                .into()
        }
        Manner::Silent => format!(
            r#"{{ kind = "fault", action = "stall", kinds = "read,write", range = "{}MiB-{}MiB" }}"#,
            SILENT.start >> 20,
            SILENT.end >> 20
        ),
    }
}

fn config(data: &str, function: &Function) -> String {
    let mut text = format!("[card]\ndata = \"{data}\"\npoll_us = 1000\n");
    for (i, namespace) in function.namespaces.iter().enumerate() {
        text += &format!(
            "\n[volume.disk{i}]\nuri = \"file:{}?block_size={}\"\nlayers = [{}]\n",
            namespace.path.display(),
            namespace.block_size,
            layers(namespace.manner),
        );
    }
    let attached = function.namespaces.iter().enumerate();
    let attached: Vec<_> = attached
        .filter(|(_, namespace)| !namespace.spare)
        .map(|(i, Namespace { nsid, .. })| format!("{{ volume = \"disk{i}\", nsid = {nsid} }}"))
        .collect();
    text += &format!(
        "\n[subsystem.s0]\nnamespaces = [{}]\n\n[function.nvme0]\nkind = \"nvme\"\nattach = \"vfio-user\"\n\
         subsystem = \"s0\"\nserial = \"{}\"\nqueues = {}\npoll = \"{}\"\n",
        attached.join(", "),
        function.serial,
        function.queues,
        function.poll,
    );
    text
}

struct ServedByCard {
    daemon: Daemon,
    function: Function,
}

impl ServedByCard {
    fn device(&self) -> VfioUserPci {
        VfioUserPci::new("nvme0", &self.daemon.folder.join("run/nvme0.sock"))
    }
}

impl Served for ServedByCard {
    fn attach(&self, guest: Builder) -> Builder {
        guest.vfio_user(&self.device().boot_index(1))
    }

    fn plug(&mut self, guest: &Guest, bus: &str) -> Result<()> {
        guest.add_vfio_user(&self.device().bus(bus))
    }

    fn unplug(&mut self, _: &Guest) -> Result<()> {
        bail!("QEMU aborts when a vfio-user function with MSI-X is removed")
    }

    fn add(&mut self, _: &Guest, namespace: usize) -> Result<()> {
        let nsid = self.function.namespaces[namespace].nsid.to_string();
        let volume = format!("disk{namespace}");
        self.daemon
            .ctl(&["namespace", "add", "nvme0", &volume, "--nsid", &nsid])
    }

    fn remove(&mut self, _: &Guest, namespace: usize) -> Result<()> {
        let volume = format!("disk{namespace}");
        self.daemon.ctl(&["namespace", "remove", "nvme0", &volume])
    }

    fn resize(&mut self, namespace: usize, bytes: u64) -> Result<()> {
        self.daemon.resize(namespace, bytes)
    }

    fn delay(&mut self, _: &Guest) -> Result<()> {
        // The layer does it by chance.
        Ok(())
    }

    fn kill_data_half(&mut self) -> Result<()> {
        let count = self.daemon.process()?.kill_children()?;
        ensure!(count == 1, "bluffd has {count} children, not its data half");
        Ok(())
    }

    fn messages(&mut self) -> Result<(u64, u64)> {
        let shown = self.daemon.ask(&["--json", "function", "show", "nvme0"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        let statistics = &shown["statistics"];
        let queues = statistics["queues"].as_array().into_iter().flatten();
        let kinds = ["reads", "writes", "flushes", "discards"];
        let of = |queue: &Value| -> u64 { kinds.iter().filter_map(|k| queue[k].as_u64()).sum() };
        let messages = statistics["messages"].as_u64();
        Ok((
            messages.context("no messages are counted")?,
            queues.map(of).sum(),
        ))
    }

    fn check(&mut self) -> Result<()> {
        self.daemon.process()?.check_alive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_namespace_is_a_volume_that_the_function_does_not_have() {
        let namespace = |nsid, spare| Namespace {
            path: format!("/tmp/{nsid}").into(),
            nsid,
            size: 0,
            block_size: 4096,
            manner: Manner::Silent,
            spare,
        };
        let function = Function {
            serial: "DB0001".into(),
            queues: 2,
            poll: "adaptive",
            namespaces: vec![namespace(1, false), namespace(5, false), namespace(7, true)],
        };
        let text = config("threads", &function);
        let lines = [
            r#"namespaces = [{ volume = "disk0", nsid = 1 }, { volume = "disk1", nsid = 5 }]"#,
            "[volume.disk2]",
            r#"uri = "file:/tmp/7?block_size=4096""#,
            r#"layers = [{ kind = "fault", action = "stall", kinds = "read,write", range = "32MiB-48MiB" }]"#,
            "queues = 2",
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }
}
