//! Subsystems of NVMe functions, and the namespaces in them.

use super::{Change, Registry, RegistryError, Subject, check};
use crate::kinds::VolumeUri;
use crate::registry::{NetworkState, VolumeState};
use crate::spec::{
    DeviceSpec, FunctionSpec, Id, NamespaceSpec, SubsystemSpec, SubsystemUse, count_mistake,
    nqn_mistake,
};

impl Registry {
    /// Adds a subsystem that functions may share.
    ///
    /// # Errors
    /// Where the ID is taken, or it makes no sense, or a volume of its namespaces is not there or not free.
    pub fn create_subsystem(&mut self, id: Id, spec: SubsystemSpec) -> Result<(), RegistryError> {
        if self.subsystems.contains_key(&id) {
            return Err(RegistryError::Exists(id));
        }
        self.check_subsystem(&spec, &Subject::Subsystem(id.clone()))?;
        let subject = Subject::Subsystem(id.clone());
        self.subscribers.tell(subject, Change::Created);
        self.subsystems.insert(id, spec);
        Ok(())
    }

    /// What a function uses: `None` where it is one to be shared that is not there.
    pub fn subsystem_of<'a>(&'a self, used: &'a SubsystemUse) -> Option<&'a SubsystemSpec> {
        match used {
            SubsystemUse::Shared { subsystem } => self.subsystems.get(subsystem),
            SubsystemUse::Own(own) => Some(own),
        }
    }

    /// A namespace that could be added to the subsystem of a function: with the NSID that it gets, where none is wanted.
    ///
    /// # Errors
    /// Where the function is none that has namespaces, or the volume or the NSID is not free, or the volume is not open.
    pub fn check_namespace(
        &self,
        function: &Id,
        volume: &Id,
        nsid: Option<u32>,
    ) -> Result<NamespaceSpec, RegistryError> {
        let (user, subsystem) = self.namespaces_of(function)?;
        let nsid = nsid.unwrap_or_else(|| subsystem.free_nsid());
        check(count_mistake(subsystem.namespaces.len() + 1))?;
        let namespace = NamespaceSpec::new(volume.clone(), nsid);
        check(namespace.mistakes(&subsystem.namespaces))?;
        self.check_use(volume, &user)?;
        match &self.volume(volume)?.state {
            VolumeState::Open(_) => Ok(namespace),
            state => Err(RegistryError::Invalid(format!(
                "volume {volume} is {}",
                state.word()
            ))),
        }
    }

    /// The namespace of a function on this volume, which could be removed.
    ///
    /// # Errors
    /// Where the function is none that has namespaces, or none of them stands on the volume.
    pub fn check_removal(
        &self,
        function: &Id,
        volume: &Id,
    ) -> Result<NamespaceSpec, RegistryError> {
        let (_, subsystem) = self.namespaces_of(function)?;
        let found = subsystem.namespaces.iter().find(|n| n.volume == *volume);
        found.cloned().ok_or_else(|| {
            RegistryError::Invalid(format!(
                "function {function} has no namespace on volume {volume}"
            ))
        })
    }

    pub(super) fn namespace_added(
        &mut self,
        function: &Id,
        namespace: NamespaceSpec,
    ) -> Result<(), RegistryError> {
        self.volume(&namespace.volume)?;
        let (_, subsystem) = self.namespaces_of(function)?;
        check(namespace.mistakes(&subsystem.namespaces))?;
        let NamespaceSpec { volume, nsid, .. } = namespace;
        self.change_namespaces(function, |all| {
            all.push(NamespaceSpec::new(volume, nsid));
            all.sort_by_key(|n| n.nsid);
        });
        Ok(())
    }

    pub(super) fn namespace_removed(
        &mut self,
        function: &Id,
        nsid: u32,
    ) -> Result<(), RegistryError> {
        self.namespaces_of(function)?;
        self.change_namespaces(function, |all| all.retain(|n| n.nsid != nsid));
        Ok(())
    }

    fn change_namespaces(&mut self, function: &Id, change: impl FnOnce(&mut Vec<NamespaceSpec>)) {
        let Some(found) = self.functions.get_mut(function) else {
            return;
        };
        let DeviceSpec::Nvme { subsystem, .. } = &mut found.spec.device else {
            return;
        };
        let subject = match subsystem {
            SubsystemUse::Own(own) => {
                change(&mut own.namespaces);
                Subject::Function(function.clone())
            }
            SubsystemUse::Shared { subsystem } => {
                let subsystem = subsystem.clone();
                if let Some(shared) = self.subsystems.get_mut(&subsystem) {
                    change(&mut shared.namespaces);
                }
                Subject::Subsystem(subsystem)
            }
        };
        self.subscribers.tell(subject, Change::Changed);
    }

    /// The subsystem of a function, and who that is as a user of volumes.
    fn namespaces_of(&self, function: &Id) -> Result<(Subject, &SubsystemSpec), RegistryError> {
        match &self.function(function)?.spec.device {
            DeviceSpec::Nvme { subsystem, .. } => {
                let user = match subsystem {
                    SubsystemUse::Shared { subsystem } => Subject::Subsystem(subsystem.clone()),
                    SubsystemUse::Own(_) => Subject::Function(function.clone()),
                };
                let found = self.subsystem_of(subsystem);
                Ok((user, found.expect("checked when the function was created")))
            }
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => {
                Err(RegistryError::Invalid(format!(
                    "function {function} is of a kind without namespaces"
                )))
            }
        }
    }

    pub(super) fn check_subsystem(
        &self,
        spec: &SubsystemSpec,
        me: &Subject,
    ) -> Result<(), RegistryError> {
        check(spec.nqn.as_deref().and_then(nqn_mistake))?;
        check(count_mistake(spec.namespaces.len()))?;
        let same = |other: &SubsystemSpec| spec.nqn.is_some() && other.nqn == spec.nqn;
        let mut others = self.subsystems.iter();
        if let Some((id, _)) =
            others.find(|(id, other)| *me != Subject::Subsystem((*id).clone()) && same(other))
        {
            let complaint = format!("subsystem {id} has the same NQN");
            return Err(RegistryError::Invalid(complaint));
        }
        for (index, namespace) in spec.namespaces.iter().enumerate() {
            check(namespace.mistakes(&spec.namespaces[..index]))?;
            self.check_use(&namespace.volume, me)?;
        }
        Ok(())
    }

    /// Whether a volume is there, and free for this user.
    pub(super) fn check_use(&self, volume: &Id, me: &Subject) -> Result<(), RegistryError> {
        let uri = &self.volume(volume)?.spec.uri;
        let uri = VolumeUri::parse(uri).map_err(RegistryError::Invalid)?;
        let mut others = self.holders(volume).filter(|user| user != me);
        match others.next() {
            Some(user) if uri.is_exclusive() => Err(RegistryError::InUse {
                volume: volume.clone(),
                user,
            }),
            _ => Ok(()),
        }
    }

    /// Whether all that a function stands on is open.
    pub fn is_ready(&self, spec: &FunctionSpec) -> bool {
        let is_open = |id: &Id| {
            let volume = self.volumes.get(id);
            volume.is_some_and(|v| matches!(v.state, VolumeState::Open(_)))
        };
        let network = spec.port().map(|(network, _)| self.networks.get(network));
        let is_there = network.is_none_or(|network| {
            network.is_some_and(|n| matches!(n.state, NetworkState::Open(_)))
        });
        is_there && self.volumes_of(spec).into_iter().all(is_open)
    }
}
