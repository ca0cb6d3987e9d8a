//! NVMe functions and their subsystems.

use toml::Spanned;
use toml::de::DeValue;

use super::read::Section;
use super::{Names, Reader};
use crate::spec::{
    DeviceSpec, NAMESPACES_MAX, NSID_MAX, NamespaceSpec, SubsystemSpec, SubsystemUse,
    count_mistake, nqn_mistake, serial_mistake,
};

impl Reader<'_> {
    /// `[subsystem.ID]`.
    pub(super) fn subsystem(
        &mut self,
        section: &mut Section<'_>,
        names: &mut Names,
    ) -> SubsystemSpec {
        let nqn = section.text("nqn", self.sink);
        let key = section.key("nqn");
        if let Some(nqn) = &nqn {
            if let Some(complaint) = nqn_mistake(nqn.get_ref()) {
                self.sink.add(nqn.span(), &key, complaint);
            } else if names.nqns.contains(nqn.get_ref()) {
                let complaint = "another subsystem has this name";
                self.sink.add(nqn.span(), &key, complaint);
            } else {
                names.nqns.push(nqn.get_ref().clone());
            }
        }
        SubsystemSpec {
            nqn: nqn.map(Spanned::into_inner),
            namespaces: self.namespaces(section, names),
        }
    }

    /// The keys of a function of kind `nvme`.
    pub(super) fn nvme(
        &mut self,
        section: &mut Section<'_>,
        names: &mut Names,
    ) -> Option<DeviceSpec> {
        let serial = section.text("serial", self.sink);
        if let Some(serial) = &serial
            && let Some(complaint) = serial_mistake(serial.get_ref())
        {
            self.sink
                .add(serial.span(), &section.key("serial"), complaint);
        }
        let shared = section.text("subsystem", self.sink);
        let own = section.has("namespaces");
        let namespaces = self.namespaces(section, names);
        let subsystem = match shared {
            Some(name) => {
                let key = section.key("subsystem");
                if own {
                    let complaint = "the namespaces of a subsystem stand in its own table";
                    self.sink
                        .add(name.span(), &section.key("namespaces"), complaint);
                }
                let subsystem = self.reference(&key, "subsystem", &name, &names.subsystems)?;
                SubsystemUse::Shared { subsystem }
            }
            None => SubsystemUse::Own(SubsystemSpec {
                nqn: None,
                namespaces,
            }),
        };
        Some(DeviceSpec::Nvme {
            subsystem,
            serial: serial.map(Spanned::into_inner),
        })
    }

    /// `namespaces = ["disk0", { volume = "disk1", nsid = 5 }]`: by their places, where they do not say.
    fn namespaces(&mut self, section: &mut Section<'_>, names: &mut Names) -> Vec<NamespaceSpec> {
        let key = section.key("namespaces");
        let items = section.array("namespaces", self.sink).unwrap_or_default();
        if let Some(complaint) = count_mistake(items.len()) {
            self.sink.add(items[NAMESPACES_MAX].span(), &key, complaint);
        }
        let mut found: Vec<NamespaceSpec> = Vec::new();
        for (place, item) in (1..).zip(items) {
            let Some(namespace) = self.namespace(&key, place, item, names) else {
                continue;
            };
            for complaint in namespace.mistakes(&found) {
                self.sink.add(item.span(), &key, complaint);
            }
            found.push(namespace);
        }
        found
    }

    fn namespace(
        &mut self,
        key: &str,
        place: u32,
        item: &Spanned<DeValue<'_>>,
        names: &mut Names,
    ) -> Option<NamespaceSpec> {
        if let Some(name) = item.get_ref().as_str() {
            let name = Spanned::new(item.span(), name.to_owned());
            let volume = self.volume_reference(key.to_owned(), &name, names)?;
            return Some(NamespaceSpec::new(volume, place));
        }
        let Some(table) = item.get_ref().as_table() else {
            let complaint =
                "a namespace is the ID of a volume, or { volume = \"disk0\", nsid = 5 }";
            self.sink.add(item.span(), key, complaint);
            return None;
        };
        let mut section = Section::new(key.to_owned(), item.span(), table);
        let nsid = section.integer("nsid", 1..=NSID_MAX, self.sink);
        let volume = section.required_text("volume", "the ID of a volume", self.sink);
        let volume = volume.and_then(|v| self.volume_reference(section.key("volume"), &v, names));
        section.finish(self.sink);
        Some(NamespaceSpec::new(volume?, nsid.unwrap_or(place)))
    }
}
