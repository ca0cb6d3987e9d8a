//! The NVMe controller that QEMU itself has, over raw files.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A namespace of an [`Nvme`] controller: a raw file.
#[derive(Clone, Debug)]
pub struct Namespace {
    path: PathBuf,
    nsid: u32,
    throttle: Option<String>,
    properties: Vec<(String, Value)>,
}

impl Namespace {
    /// The whole file, under this id (1 and up). Without [`Namespace::block_size`] blocks have 512 bytes.
    pub fn raw(path: &Path, nsid: u32) -> Self {
        Self {
            path: path.into(),
            nsid,
            throttle: None,
            properties: Vec::new(),
        }
    }

    /// Bytes of a block.
    pub fn block_size(self, bytes: u32) -> Self {
        self.property("logical_block_size", json!(bytes))
            .property("physical_block_size", json!(bytes))
    }

    /// It is there, but the controller has to attach it first.
    pub fn detached(self) -> Self {
        self.property("detached", json!(true))
    }

    /// With a throttle group of this name, without limits at first: [`Guest::throttle`](crate::guest::Guest::throttle) sets them.
    pub fn throttle(mut self, group: &str) -> Self {
        self.throttle = Some(group.into());
        self
    }

    /// Any other property of `nvme-ns`.
    pub fn property(mut self, name: &str, value: Value) -> Self {
        self.properties.push((name.into(), value));
        self
    }
}

/// A controller alone in its subsystem.
///
/// On the command line it has any namespaces. QEMU cannot add a namespace to a controller that runs, and so one that is hot-added has only
/// the first, as its own drive: with id 1.
#[derive(Clone, Debug)]
pub struct Nvme {
    id: String,
    namespaces: Vec<Namespace>,
    properties: Vec<(String, Value)>,
}

impl Nvme {
    /// A controller with this id, serial number and number of I/O queue pairs, and no namespace yet.
    pub fn new(id: &str, serial: &str, queues: u16) -> Self {
        Self {
            id: id.into(),
            namespaces: Vec::new(),
            properties: Vec::new(),
        }
        .property("serial", json!(serial))
        .property("max_ioqpairs", json!(queues))
        // The admin queue has a vector as well.
        .property("msix_qsize", json!(u32::from(queues) + 1))
    }

    /// With this namespace.
    pub fn namespace(mut self, namespace: Namespace) -> Self {
        self.namespaces.push(namespace);
        self
    }

    /// The PCI bus, e.g. `hotplug0`.
    pub fn bus(self, bus: &str) -> Self {
        self.property("bus", json!(bus))
    }

    /// Where its first namespace stands in the firmware's order of boot devices, the smallest first. 0 is taken where a kernel is booted directly.
    pub fn boot_index(mut self, index: u32) -> Self {
        if let Some(first) = self.namespaces.first_mut() {
            first.properties.push(("bootindex".into(), json!(index)));
        }
        self
    }

    /// Any other property of `nvme`.
    pub fn property(mut self, name: &str, value: Value) -> Self {
        self.properties.push((name.into(), value));
        self
    }

    /// What the controller is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn node(&self, namespace: &Namespace) -> String {
        format!("{}-ns{}", self.id, namespace.nsid)
    }

    /// The block device behind a namespace: the arguments of QMP `blockdev-add`.
    fn block(&self, namespace: &Namespace) -> Value {
        let node = self.node(namespace);
        let file = json!({ "driver": "file", "filename": namespace.path, "discard": "unmap" });
        let raw = json!({ "driver": "raw", "node-name": node, "discard": "unmap", "file": file });
        match &namespace.throttle {
            None => raw,
            Some(group) => {
                let mut file = raw;
                file["node-name"] = json!(format!("{node}-file"));
                json!({ "driver": "throttle", "node-name": node, "throttle-group": group, "discard": "unmap", "file": file })
            }
        }
    }

    fn controller(&self) -> Map<String, Value> {
        let mut device = Map::new();
        device.insert("driver".into(), json!("nvme"));
        device.insert("id".into(), json!(self.id));
        device.extend(self.properties.iter().cloned());
        device
    }

    /// `-object`, `-blockdev`, `-device`.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut add =
            |option: &str, value: Value| arguments.extend([option.to_string(), value.to_string()]);
        let mut groups: Vec<_> = self
            .namespaces
            .iter()
            .filter_map(|namespace| namespace.throttle.as_ref())
            .collect();
        groups.sort();
        groups.dedup();
        for group in groups {
            add(
                "-object",
                json!({ "qom-type": "throttle-group", "id": group }),
            );
        }
        // Only a subsystem can have namespaces that are detached.
        let subsystem = format!("{}-subsystem", self.id);
        add(
            "-device",
            json!({ "driver": "nvme-subsys", "id": subsystem, "nqn": subsystem }),
        );
        let mut controller = self.controller();
        controller.insert("subsys".into(), json!(subsystem));
        add("-device", Value::Object(controller));
        for namespace in &self.namespaces {
            add("-blockdev", self.block(namespace));
            let mut device = Map::new();
            device.insert("driver".into(), json!("nvme-ns"));
            device.insert("bus".into(), json!(self.id));
            device.insert("drive".into(), json!(self.node(namespace)));
            device.insert("nsid".into(), json!(namespace.nsid));
            device.extend(namespace.properties.iter().cloned());
            add("-device", Value::Object(device));
        }
        arguments
    }

    /// QMP commands that add it, with their arguments.
    pub(crate) fn plug(&self) -> Vec<(&'static str, Value)> {
        let mut device = self.controller();
        let mut commands = Vec::new();
        if let Some(namespace) = self.namespaces.first() {
            commands.push(("blockdev-add", self.block(namespace)));
            device.insert("drive".into(), json!(self.node(namespace)));
            device.extend(namespace.properties.iter().cloned());
        }
        commands.push(("device_add", Value::Object(device)));
        commands
    }

    /// QMP commands after `device_del`, with their arguments.
    pub(crate) fn unplug(&self) -> Vec<(&'static str, Value)> {
        self.namespaces
            .iter()
            .take(1)
            .map(|namespace| ("blockdev-del", json!({ "node-name": self.node(namespace) })))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> Nvme {
        Nvme::new("nvme0", "DB0001", 2)
            .namespace(
                Namespace::raw(Path::new("/tmp/a"), 1)
                    .block_size(4096)
                    .throttle("slow"),
            )
            .namespace(Namespace::raw(Path::new("/tmp/b"), 5).detached())
            .boot_index(0)
    }

    #[test]
    fn each_namespace_has_its_block_device_before_it() {
        let arguments = controller().arguments();
        let pairs: Vec<(&str, Value)> = arguments
            .chunks(2)
            .map(|pair| {
                let value = serde_json::from_str(&pair[1]).expect("JSON");
                (pair[0].as_str(), value)
            })
            .collect();
        let options: Vec<_> = pairs.iter().map(|(option, _)| *option).collect();
        let expected = [
            "-object",
            "-device",
            "-device",
            "-blockdev",
            "-device",
            "-blockdev",
            "-device",
        ];
        assert_eq!(options, expected);
        assert_eq!(pairs[2].1["subsys"], pairs[1].1["id"]);
        assert_eq!(pairs[2].1["msix_qsize"], json!(3));
        assert_eq!(pairs[3].1["node-name"], pairs[4].1["drive"]);
        assert_eq!(pairs[3].1["throttle-group"], pairs[0].1["id"]);
        assert_eq!(pairs[4].1["bootindex"], json!(0));
        assert_eq!(pairs[6].1["nsid"], json!(5));
        assert_eq!(pairs[6].1["detached"], json!(true));
        assert_eq!(pairs[6].1.get("bootindex"), None);
    }

    #[test]
    fn hot_added_it_has_its_first_namespace_as_drive() {
        let commands = controller().bus("hotplug0").plug();
        assert_eq!(
            (commands[0].0, commands[1].0),
            ("blockdev-add", "device_add")
        );
        assert_eq!(commands[0].1["node-name"], commands[1].1["drive"]);
        assert_eq!(commands[1].1["logical_block_size"], json!(4096));
        assert_eq!(commands[1].1["bus"], json!("hotplug0"));
        assert_eq!(commands.len(), 2);
    }
}
