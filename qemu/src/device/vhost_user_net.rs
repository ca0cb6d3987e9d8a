//! Network functions behind vhost-user.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{comma, reconnection};

/// A virtio-net function whose back end listens on a socket.
#[derive(Clone, Debug)]
pub struct VhostUserNet {
    id: String,
    socket: PathBuf,
    pairs: u16,
    reconnect_ms: Option<u32>,
    properties: Vec<(String, Value)>,
}

impl VhostUserNet {
    /// A function with this id and address, one pair of queues, and QEMU's own defaults. QEMU's address is what the guest sees; the back
    /// end must know the same. `disable-legacy` is on, as for [`super::VhostUserBlk`]; no firmware boots from it.
    pub fn new(id: &str, socket: &Path, mac: &str) -> Self {
        Self {
            id: id.into(),
            socket: socket.into(),
            pairs: 1,
            reconnect_ms: None,
            properties: vec![
                ("mac".into(), json!(mac)),
                ("disable-legacy".into(), json!("on")),
                ("romfile".into(), json!("")),
            ],
        }
    }

    /// Pairs of queues.
    pub fn pairs(mut self, count: u16) -> Self {
        self.pairs = count;
        self.property("mq", json!(count > 1))
    }

    /// Connect again, after this many milliseconds, to a back end that went; see [`super::VhostUserBlk::reconnect_ms`].
    pub fn reconnect_ms(mut self, period: u32) -> Self {
        self.reconnect_ms = Some(period);
        self
    }

    /// Any other property of `virtio-net-pci`.
    pub fn property(mut self, name: &str, value: Value) -> Self {
        self.properties.push((name.into(), value));
        self
    }

    /// What the function is called, also by `set_link`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `-chardev`, `-netdev` and `-device`.
    pub(crate) fn arguments(&self, version: (u32, u32, u32)) -> Vec<String> {
        let (id, pairs) = (&self.id, self.pairs);
        let reconnect = reconnection(self.reconnect_ms, version);
        vec![
            "-chardev".into(),
            format!(
                "socket,id={id}-socket,path={}{reconnect}",
                comma(&self.socket)
            ),
            "-netdev".into(),
            format!("vhost-user,id={id}-netdev,chardev={id}-socket,queues={pairs}"),
            "-device".into(),
            Value::Object(self.device()).to_string(),
        ]
    }

    fn device(&self) -> Map<String, Value> {
        let mut device = Map::new();
        device.insert("driver".into(), json!("virtio-net-pci"));
        device.insert("id".into(), json!(self.id));
        device.insert("netdev".into(), json!(format!("{}-netdev", self.id)));
        device.extend(self.properties.iter().cloned());
        device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_and_address_stand_where_qemu_looks_for_them() {
        let function = VhostUserNet::new("net0", Path::new("/run/a.sock"), "02:00:00:00:00:01")
            .pairs(2)
            .reconnect_ms(100);
        let arguments = function.arguments((11, 1, 3));
        assert_eq!(
            arguments[1],
            "socket,id=net0-socket,path=/run/a.sock,reconnect-ms=100"
        );
        assert_eq!(
            arguments[3],
            "vhost-user,id=net0-netdev,chardev=net0-socket,queues=2"
        );
        let device: Value = serde_json::from_str(&arguments[5]).expect("JSON");
        assert_eq!(device["mq"], json!(true));
        assert_eq!(device["mac"], json!("02:00:00:00:00:01"));
    }
}
