//! PCIe functions that another process serves.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A vfio-user function. Its server listens on a socket before QEMU starts or the device is added: QEMU connects once, and does not again.
///
/// The guest's memory must be shared, as that of every [`Builder`](crate::guest::Builder) is.
#[derive(Clone, Debug)]
pub struct VfioUserPci {
    id: String,
    socket: PathBuf,
    properties: Vec<(String, Value)>,
}

impl VfioUserPci {
    /// A function with this id and QEMU's own defaults.
    pub fn new(id: &str, socket: &Path) -> Self {
        Self {
            id: id.into(),
            socket: socket.into(),
            properties: Vec::new(),
        }
    }

    /// The PCI bus, e.g. `hotplug0`.
    pub fn bus(self, bus: &str) -> Self {
        self.property("bus", json!(bus))
    }

    /// Where it stands in the firmware's order of boot devices, the smallest first. 0 is taken where a kernel is booted directly.
    pub fn boot_index(self, index: u32) -> Self {
        self.property("bootindex", json!(index))
    }

    /// How long QEMU waits for a reply, in milliseconds (5000).
    pub fn message_timeout_ms(self, bound: u32) -> Self {
        self.property("x-msg-timeout", json!(bound))
    }

    /// Any other property of `vfio-user-pci`.
    pub fn property(mut self, name: &str, value: Value) -> Self {
        self.properties.push((name.into(), value));
        self
    }

    /// What the function is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `-device`. Only its JSON form takes a socket's address.
    pub(crate) fn arguments(&self) -> Vec<String> {
        vec!["-device".into(), Value::Object(self.device()).to_string()]
    }

    /// The arguments of QMP `device_add`.
    pub(crate) fn device(&self) -> Map<String, Value> {
        let mut device = Map::new();
        device.insert("driver".into(), json!("vfio-user-pci"));
        device.insert("id".into(), json!(self.id));
        device.insert(
            "socket".into(),
            json!({ "type": "unix", "path": self.socket }),
        );
        device.extend(self.properties.iter().cloned());
        device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_the_same_on_the_command_line_and_in_qmp() {
        let function = VfioUserPci::new("nvme0", Path::new("/run/a,b.sock"))
            .bus("hotplug0")
            .boot_index(0)
            .message_timeout_ms(9000);
        let arguments = function.arguments();
        let device: Value = serde_json::from_str(&arguments[1]).expect("JSON");
        assert_eq!(device, Value::Object(function.device()));
        assert_eq!(
            device,
            json!({
                "driver": "vfio-user-pci", "id": "nvme0", "socket": { "type": "unix", "path": "/run/a,b.sock" },
                "bus": "hotplug0", "bootindex": 0, "x-msg-timeout": 9000,
            })
        );
    }
}
