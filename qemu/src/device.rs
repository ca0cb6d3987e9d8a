//! Devices on QEMU's command line and through QMP.

mod nvme;
mod vfio_user;
mod vhost_user_net;

pub use nvme::{Namespace, Nvme};
pub use vfio_user::VfioUserPci;
pub use vhost_user_net::VhostUserNet;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A vhost-user-blk function. Its back end listens on a socket, unless [`VhostUserBlk::listens`].
#[derive(Clone, Debug)]
pub struct VhostUserBlk {
    id: String,
    socket: PathBuf,
    bus: Option<String>,
    reconnect_ms: Option<u32>,
    listens: bool,
    properties: Vec<(String, Value)>,
}

impl VhostUserBlk {
    /// A function with this id and QEMU's own defaults. `disable-legacy` is on: on a conventional slot QEMU would offer virtio 0.9 as well.
    pub fn new(id: &str, socket: &Path) -> Self {
        Self {
            id: id.into(),
            socket: socket.into(),
            bus: None,
            reconnect_ms: None,
            listens: false,
            properties: vec![("disable-legacy".into(), json!("on"))],
        }
    }

    /// `num-queues`.
    pub fn queues(self, count: u16) -> Self {
        self.property("num-queues", json!(count))
    }

    /// `queue-size`: entries a queue.
    pub fn queue_size(self, entries: u16) -> Self {
        self.property("queue-size", json!(entries))
    }

    /// Packed or split rings.
    pub fn packed(self, packed: bool) -> Self {
        self.property("packed", json!(packed))
    }

    /// Connect again, after this many milliseconds, to a back end that went. QEMU before 9.2 counts seconds; it is rounded up there.
    pub fn reconnect_ms(mut self, period: u32) -> Self {
        self.reconnect_ms = Some(period);
        self
    }

    /// QEMU listens on the socket and waits for the back end to connect, now and whenever the connection ends.
    pub fn listens(mut self) -> Self {
        self.listens = true;
        self
    }

    /// The PCI bus, e.g. `hotplug0`.
    pub fn bus(mut self, bus: &str) -> Self {
        self.bus = Some(bus.into());
        self
    }

    /// Any other property of `vhost-user-blk-pci`.
    pub fn property(mut self, name: &str, value: Value) -> Self {
        self.properties.push((name.into(), value));
        self
    }

    /// What the function is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn chardev_id(&self) -> String {
        format!("{}-socket", self.id)
    }

    /// `-chardev` and `-device`.
    pub(crate) fn arguments(&self, version: (u32, u32, u32)) -> Vec<String> {
        let reconnect = reconnection(self.reconnect_ms, version);
        let listens = if self.listens {
            ",server=on,wait=off"
        } else {
            ""
        };
        let chardev = format!(
            "socket,id={},path={}{reconnect}{listens}",
            self.chardev_id(),
            comma(&self.socket)
        );
        // The JSON form takes the same types as `device_add`.
        vec![
            "-chardev".into(),
            chardev,
            "-device".into(),
            Value::Object(self.device()).to_string(),
        ]
    }

    /// The arguments of QMP `chardev-add`.
    pub(crate) fn chardev(&self, version: (u32, u32, u32)) -> Value {
        let address = json!({ "type": "unix", "data": { "path": self.socket } });
        let mut data = json!({ "addr": address, "server": self.listens });
        if self.listens {
            data["wait"] = json!(false);
        }
        match self.reconnect_ms {
            None => {}
            Some(period) if version >= (9, 2, 0) => data["reconnect-ms"] = json!(period),
            Some(period) => data["reconnect"] = json!(period.div_ceil(1000)),
        }
        json!({ "id": self.chardev_id(), "backend": { "type": "socket", "data": data } })
    }

    /// The arguments of QMP `device_add`.
    pub(crate) fn device(&self) -> Map<String, Value> {
        let mut device = Map::new();
        device.insert("driver".into(), json!("vhost-user-blk-pci"));
        device.insert("id".into(), json!(self.id));
        device.insert("chardev".into(), json!(self.chardev_id()));
        device.extend(self.bus.iter().map(|bus| ("bus".to_string(), json!(bus))));
        device.extend(self.properties.iter().cloned());
        device
    }
}

/// A disk that QEMU itself serves from a file, found in the guest by its serial number.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
    serial: String,
    snapshot: bool,
}

impl Disk {
    /// A raw image.
    pub fn raw(path: &Path, serial: &str) -> Self {
        Self {
            path: path.into(),
            serial: serial.into(),
            snapshot: false,
        }
    }

    /// What the guest writes is thrown away at the end.
    pub fn snapshot(mut self) -> Self {
        self.snapshot = true;
        self
    }

    pub(crate) fn arguments(&self) -> Vec<String> {
        let (path, serial) = (comma(&self.path), &self.serial);
        let snapshot = if self.snapshot { "on" } else { "off" };
        vec![
            "-drive".into(),
            format!("if=none,id=drive-{serial},format=raw,file={path},snapshot={snapshot}"),
            "-device".into(),
            format!("virtio-blk-pci,disable-legacy=on,drive=drive-{serial},serial={serial}"),
        ]
    }
}

/// What a character device has where it connects again.
fn reconnection(period_ms: Option<u32>, version: (u32, u32, u32)) -> String {
    match period_ms {
        None => String::new(),
        Some(period) if version >= (9, 2, 0) => format!(",reconnect-ms={period}"),
        Some(period) => format!(",reconnect={}", period.div_ceil(1000)),
    }
}

/// QEMU's options end at a comma, and a doubled one is a comma.
fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_the_same_on_the_command_line_and_in_qmp() {
        let function = VhostUserBlk::new("blk0", Path::new("/run/a,b.sock"))
            .queues(2)
            .packed(true)
            .reconnect_ms(1500)
            .bus("hotplug0");
        let new = function.arguments((11, 1, 3));
        assert_eq!(
            new[1],
            "socket,id=blk0-socket,path=/run/a,,b.sock,reconnect-ms=1500"
        );
        assert_eq!(
            function.arguments((7, 2, 22))[1],
            "socket,id=blk0-socket,path=/run/a,,b.sock,reconnect=2"
        );
        let device: Value = serde_json::from_str(&new[3]).expect("JSON");
        assert_eq!(device, Value::Object(function.device()));
        assert_eq!(device["num-queues"], json!(2));
        assert_eq!(device["packed"], json!(true));
        assert_eq!(
            function.chardev((7, 2, 22))["backend"]["data"]["reconnect"],
            json!(2)
        );
    }
}
