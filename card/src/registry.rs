//! The volumes, networks and functions of a card, live: what there is, in which state, and what has to happen next.
//!
//! ```text
//!   create, change, delete        reports of the data half
//!            |                             |
//!            v                             v
//!        [ registry: specifications and states ] ---> events, for whoever subscribed
//!            |
//!            v
//!     actions, for the data half
//! ```
//!
//! It does no I/O of its own: a daemon takes the [`Action`]s out, carries them to the data half, and hands the answers
//! back by [`Registry::report`]. The configuration file, the control socket and a later API are faces on this.

mod event;
mod namespaces;
mod networks;
mod state;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use event::Subscribers;
pub use event::{BACKLOG, Change, Event, Subject};
pub use networks::Network;
pub use state::{FunctionState, IllegalTransition, NetworkState, VolumeState};
use state::{FunctionStep, NetworkStep, VolumeStep};

use crate::kinds::{LayerKind, VolumeUri};
use crate::message::{FromData, Subject as Failing};
use crate::spec::{
    DeviceSpec, FunctionSpec, Id, SocketMode, SubsystemSpec, SubsystemUse, VolumeSpec,
    attach_mistake, serial_mistake,
};

/// Why something cannot be done.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The ID is taken.
    #[error("{0} exists already")]
    Exists(Id),
    /// There is no volume of this ID.
    #[error("there is no volume {0}")]
    NoVolume(Id),
    /// There is no function of this ID.
    #[error("there is no function {0}")]
    NoFunction(Id),
    /// There is no network of this ID.
    #[error("there is no network {0}")]
    NoNetwork(Id),
    /// There is no subsystem of this ID.
    #[error("there is no subsystem {0}")]
    NoSubsystem(Id),
    /// Something stands on the volume.
    #[error("volume {volume} is used by {user}")]
    InUse {
        /// The volume.
        volume: Id,
        /// The function or subsystem.
        user: Subject,
    },
    /// Another function has the socket.
    #[error("function {0} has the same socket")]
    SocketTaken(Id),
    /// The specification makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It is not in a state for that.
    #[error(transparent)]
    State(#[from] IllegalTransition),
}

/// What the data half has to be told. The specifications stand in the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open this volume.
    OpenVolume(Id),
    /// Close this volume.
    CloseVolume(Id),
    /// Open this network.
    OpenNetwork(Id),
    /// Close this network.
    CloseNetwork(Id),
    /// Attach this function.
    AttachFunction(Id),
    /// Detach this function.
    DetachFunction(Id),
}

/// A volume of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// What it is.
    pub spec: VolumeSpec,
    /// How it stands.
    pub state: VolumeState,
}

/// A function of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// What it is.
    pub spec: FunctionSpec,
    /// How it stands.
    pub state: FunctionState,
}

/// All volumes, networks and functions.
#[derive(Debug, Default)]
pub struct Registry {
    runtime_dir: PathBuf,
    volumes: BTreeMap<Id, Volume>,
    subsystems: BTreeMap<Id, SubsystemSpec>,
    networks: BTreeMap<Id, Network>,
    functions: BTreeMap<Id, Function>,
    actions: Vec<Action>,
    subscribers: Subscribers,
}

impl Registry {
    /// An empty card whose sockets stand in `runtime_dir`.
    pub fn new(runtime_dir: &Path) -> Self {
        Self {
            runtime_dir: runtime_dir.to_owned(),
            ..Self::default()
        }
    }

    /// All volumes, by ID.
    pub fn volumes(&self) -> &BTreeMap<Id, Volume> {
        &self.volumes
    }

    /// All functions, by ID.
    pub fn functions(&self) -> &BTreeMap<Id, Function> {
        &self.functions
    }

    /// The subsystems that functions may share, by ID.
    pub fn subsystems(&self) -> &BTreeMap<Id, SubsystemSpec> {
        &self.subsystems
    }

    /// All networks, by ID.
    pub fn networks(&self) -> &BTreeMap<Id, Network> {
        &self.networks
    }

    /// A volume.
    pub fn volume(&self, id: &Id) -> Result<&Volume, RegistryError> {
        self.volumes
            .get(id)
            .ok_or_else(|| RegistryError::NoVolume(id.clone()))
    }

    /// A function.
    pub fn function(&self, id: &Id) -> Result<&Function, RegistryError> {
        self.functions
            .get(id)
            .ok_or_else(|| RegistryError::NoFunction(id.clone()))
    }

    /// The functions that stand on a volume.
    pub fn users<'a>(&'a self, volume: &'a Id) -> impl Iterator<Item = &'a Id> {
        let stands = |(_, function): &(&Id, &Function)| {
            function.specs().any(|spec| self.stands_on(spec, volume))
        };
        self.functions.iter().filter(stands).map(|(id, _)| id)
    }

    /// The volumes that a function stands on.
    pub fn volumes_of<'a>(&'a self, spec: &'a FunctionSpec) -> Vec<&'a Id> {
        match &spec.device {
            DeviceSpec::VirtioBlk { volume, .. } => vec![volume],
            DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => Vec::new(),
            DeviceSpec::Nvme { subsystem, .. } => {
                let namespaces = self.subsystem_of(subsystem).map(|s| &s.namespaces);
                let namespaces = namespaces.into_iter().flatten();
                namespaces.map(|namespace| &namespace.volume).collect()
            }
        }
    }

    fn stands_on(&self, spec: &FunctionSpec, volume: &Id) -> bool {
        self.volumes_of(spec).contains(&volume)
    }

    /// Who has a volume: functions and subsystems, each once.
    fn holders<'a>(&'a self, volume: &'a Id) -> impl Iterator<Item = Subject> + 'a {
        let holds = |spec: &SubsystemSpec| spec.namespaces.iter().any(|n| n.volume == *volume);
        let subsystems = self.subsystems.iter().filter(move |(_, spec)| holds(spec));
        let functions = self.functions.iter().filter(move |(_, function)| {
            let own = |spec: &&FunctionSpec| match &spec.device {
                DeviceSpec::Nvme { subsystem, .. } => matches!(subsystem, SubsystemUse::Own(_)),
                DeviceSpec::VirtioBlk { .. }
                | DeviceSpec::VirtioNet { .. }
                | DeviceSpec::Uplink(_) => true,
            };
            let mut specs = function.specs().filter(own);
            specs.any(|spec| self.stands_on(spec, volume))
        });
        let subsystems = subsystems.map(|(id, _)| Subject::Subsystem(id.clone()));
        subsystems.chain(functions.map(|(id, _)| Subject::Function(id.clone())))
    }

    /// Where a function's socket stands.
    pub fn socket_path(&self, id: &Id, spec: &FunctionSpec) -> PathBuf {
        spec.socket_path(id, &self.runtime_dir)
    }

    /// What happens from now on. A subscriber that falls behind by [`BACKLOG`] events loses its place: its receiver
    /// ends, and it has to look at everything again.
    pub fn subscribe(&mut self) -> std::sync::mpsc::Receiver<Event> {
        self.subscribers.add()
    }

    /// What has to be done, in this order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Adds a volume, which is then opened.
    ///
    /// # Errors
    /// Where the ID is taken or the specification makes no sense.
    pub fn create_volume(&mut self, id: Id, spec: VolumeSpec) -> Result<(), RegistryError> {
        if self.volumes.contains_key(&id) {
            return Err(RegistryError::Exists(id));
        }
        check_volume(&spec)?;
        self.actions.push(Action::OpenVolume(id.clone()));
        self.subscribers
            .tell(Subject::Volume(id.clone()), Change::Created);
        self.volumes.insert(
            id,
            Volume {
                spec,
                state: VolumeState::Opening,
            },
        );
        Ok(())
    }

    /// Takes a volume away, once it is closed.
    ///
    /// # Errors
    /// Where a function stands on it, or it is being opened or closed.
    pub fn delete_volume(&mut self, id: &Id) -> Result<(), RegistryError> {
        let volume = self.volume(id)?;
        if let Some(user) = self.holders(id).next() {
            return Err(RegistryError::InUse {
                volume: id.clone(),
                user,
            });
        }
        if matches!(volume.state, VolumeState::Failed { .. }) {
            self.remove_volume(id);
            return Ok(());
        }
        self.step_volume(id, VolumeStep::Close)?;
        self.actions.push(Action::CloseVolume(id.clone()));
        Ok(())
    }

    /// Tries a volume again that could not be opened. Of no effect on others.
    pub fn reopen_volume(&mut self, id: &Id) {
        if self.step_volume(id, VolumeStep::Reopen).is_ok() {
            self.actions.push(Action::OpenVolume(id.clone()));
        }
    }

    /// Whether a volume could be given this size. What it is given is told by [`FromData::VolumeResized`].
    ///
    /// # Errors
    /// Where it is not open, read-only, or the size is no multiple of its block.
    pub fn check_resize(&self, id: &Id, size: u64) -> Result<(), RegistryError> {
        match self.volume(id)?.state {
            VolumeState::Open(info) if info.read_only => {
                Err(RegistryError::Invalid(format!("volume {id} is read-only")))
            }
            VolumeState::Open(info)
                if size == 0 || !size.is_multiple_of(u64::from(info.block_size)) =>
            {
                let block = info.block_size;
                Err(RegistryError::Invalid(format!(
                    "the size must be a multiple of {block} bytes, and not 0"
                )))
            }
            VolumeState::Open(_) => Ok(()),
            ref state => Err(RegistryError::Invalid(format!(
                "volume {id} is {}",
                state.word()
            ))),
        }
    }

    /// Adds a function, which is attached as soon as what it stands on is open.
    ///
    /// # Errors
    /// Where the ID or its socket is taken, or what it stands on is not there or not free.
    pub fn create_function(&mut self, id: Id, spec: FunctionSpec) -> Result<(), RegistryError> {
        if self.functions.contains_key(&id) {
            return Err(RegistryError::Exists(id));
        }
        self.check_function(&id, &spec)?;
        self.subscribers
            .tell(Subject::Function(id.clone()), Change::Created);
        self.functions.insert(
            id.clone(),
            Function {
                spec,
                state: FunctionState::Waiting,
            },
        );
        self.attach_if_ready(&id);
        Ok(())
    }

    /// Gives a function another specification: it is detached and attached anew, which its host sees as a device that was
    /// taken out and put in again.
    ///
    /// # Errors
    /// As [`Registry::create_function`]; also where it is being attached or detached.
    pub fn change_function(&mut self, id: &Id, spec: FunctionSpec) -> Result<(), RegistryError> {
        let function = self.function(id)?;
        if function.spec == spec {
            return Ok(());
        }
        let is_attached = function.state.is_attached();
        self.check_function(id, &spec)?;
        if is_attached {
            self.step_function(
                id,
                FunctionStep::Detach {
                    next: Some(Box::new(spec)),
                },
            )?;
            self.actions.push(Action::DetachFunction(id.clone()));
        } else {
            self.step_function(id, FunctionStep::Wait)?;
            self.replace(id, spec);
        }
        Ok(())
    }

    /// Takes a function away, once it is detached.
    ///
    /// # Errors
    /// Where it is being attached or detached.
    pub fn delete_function(&mut self, id: &Id) -> Result<(), RegistryError> {
        match self.function(id)?.state {
            FunctionState::Waiting | FunctionState::Failed { .. } => self.remove_function(id),
            _ => {
                self.step_function(id, FunctionStep::Detach { next: None })?;
                self.actions.push(Action::DetachFunction(id.clone()));
            }
        }
        Ok(())
    }

    /// Takes in what the data half says. What is not about states is none of the registry's business.
    ///
    /// # Errors
    /// Where the report does not fit the state, or nothing of that ID is there: the data half is then not what it should
    /// be. Nothing has changed.
    pub fn report(&mut self, report: &FromData) -> Result<(), RegistryError> {
        match report {
            FromData::VolumeOpened { volume, info } => {
                self.step_volume(volume, VolumeStep::Opened(*info))?;
                let users: Vec<Id> = self.users(volume).cloned().collect();
                users
                    .iter()
                    .for_each(|function| self.attach_if_ready(function));
            }
            FromData::VolumeClosed { volume } => {
                self.volume(volume)?.state.next(VolumeStep::Closed)?;
                self.remove_volume(volume);
            }
            FromData::VolumeResized { volume, size } => {
                self.step_volume(volume, VolumeStep::Resized(*size))?;
            }
            FromData::NetworkOpened { network, info } => self.network_opened(network, info)?,
            FromData::NetworkClosed { network } => self.network_closed(network)?,
            FromData::LinkSet { function, up } => self.link_set(function, *up)?,
            FromData::FunctionAttached { function, .. } => {
                self.step_function(function, FunctionStep::Attached)?;
            }
            FromData::FrontEnd { function, session } => {
                self.step_function(function, FunctionStep::FrontEnd(*session))?;
            }
            FromData::FrontEndGone { function, .. } => {
                self.step_function(function, FunctionStep::FrontEndGone)?;
            }
            FromData::FunctionDetached { function } => self.detached(function)?,
            FromData::NamespaceAdded {
                function,
                namespace,
            } => self.namespace_added(function, namespace.clone())?,
            FromData::NamespaceRemoved { function, nsid } => {
                self.namespace_removed(function, *nsid)?;
            }
            FromData::Failed {
                about: Failing::Volume(volume),
                error,
            } => {
                self.step_volume(volume, VolumeStep::Failed(error.clone()))?;
            }
            FromData::Failed {
                about: Failing::Function(function),
                error,
            } => {
                self.step_function(function, FunctionStep::Failed(error.clone()))?;
            }
            FromData::Failed {
                about: Failing::Network(network),
                error,
            } => self.step_network(network, NetworkStep::Failed(error.clone()))?,
            FromData::Failed {
                about: Failing::Card,
                ..
            }
            | FromData::Addresses { .. }
            | FromData::Started { .. }
            | FromData::Commit { .. }
            | FromData::KeepFormats { .. }
            | FromData::Statistics { .. }
            | FromData::Capturing { .. }
            | FromData::Drained => {}
        }
        Ok(())
    }

    /// The data half is gone, with all that it had open: everything is opened and attached again, in another.
    pub fn start_over(&mut self) {
        self.actions.clear();
        let functions: Vec<Id> = self.functions.keys().cloned().collect();
        for id in functions {
            let function = &self.functions[&id];
            match function.state.clone() {
                FunctionState::Detaching { next: None } => self.remove_function(&id),
                FunctionState::Detaching { next: Some(spec) } => {
                    self.set_function(&id, FunctionState::Waiting);
                    self.replace_spec(&id, *spec);
                }
                FunctionState::Waiting | FunctionState::Failed { .. } => {}
                FunctionState::Attaching | FunctionState::Idle | FunctionState::Connected(_) => {
                    self.set_function(&id, FunctionState::Waiting);
                }
            }
        }
        self.reopen_networks();
        let volumes: Vec<Id> = self.volumes.keys().cloned().collect();
        for id in volumes {
            match self.volumes[&id].state {
                VolumeState::Closing => self.remove_volume(&id),
                VolumeState::Failed { .. } => {}
                VolumeState::Opening | VolumeState::Open(_) => {
                    self.set_volume(&id, VolumeState::Opening);
                    self.actions.push(Action::OpenVolume(id));
                }
            }
        }
        // Those that stand on nothing have nothing to wait for.
        let functions: Vec<Id> = self.functions.keys().cloned().collect();
        functions.iter().for_each(|id| self.attach_if_ready(id));
    }

    fn check_function(&self, id: &Id, spec: &FunctionSpec) -> Result<(), RegistryError> {
        let me = Subject::Function(id.clone());
        match &spec.device {
            DeviceSpec::VirtioBlk { volume, .. } => self.check_use(volume, &me)?,
            DeviceSpec::VirtioNet { network, port } => self.check_port(id, network, port)?,
            DeviceSpec::Uplink(uplink) => check(uplink.mistakes())?,
            DeviceSpec::Nvme { subsystem, serial } => {
                check(serial.as_deref().and_then(serial_mistake))?;
                match subsystem {
                    SubsystemUse::Shared { subsystem } => {
                        let found = self.subsystems.get(subsystem);
                        found.ok_or_else(|| RegistryError::NoSubsystem(subsystem.clone()))?;
                    }
                    SubsystemUse::Own(own) => self.check_subsystem(own, &me)?,
                }
            }
        }
        check(attach_mistake(spec.device.kind(), spec.attach))?;
        check(spec.queues_mistake())?;
        if spec.mode == SocketMode::Client && spec.socket.is_none() {
            return Err(RegistryError::Invalid(
                "a client needs the path of a socket".to_owned(),
            ));
        }
        let path = spec.socket_path(id, &self.runtime_dir);
        let mut rest = self.functions.iter().filter(|(other, _)| *other != id);
        match rest
            .find(|(other, function)| function.spec.socket_path(other, &self.runtime_dir) == path)
        {
            Some((other, _)) => Err(RegistryError::SocketTaken(other.clone())),
            None => Ok(()),
        }
    }

    fn attach_if_ready(&mut self, id: &Id) {
        let Some(function) = self.functions.get(id) else {
            return;
        };
        if self.is_ready(&function.spec) && function.state == FunctionState::Waiting {
            self.set_function(id, FunctionState::Attaching);
            self.actions.push(Action::AttachFunction(id.clone()));
        }
    }

    fn detached(&mut self, id: &Id) -> Result<(), RegistryError> {
        match &self.function(id)?.state {
            FunctionState::Detaching { next: None } => self.remove_function(id),
            FunctionState::Detaching { next: Some(spec) } => {
                let spec = (**spec).clone();
                self.step_function(id, FunctionStep::Wait)?;
                self.replace(id, spec);
            }
            state => return Err(state.illegal(&FunctionStep::Wait).into()),
        }
        Ok(())
    }

    fn replace(&mut self, id: &Id, spec: FunctionSpec) {
        self.replace_spec(id, spec);
        self.attach_if_ready(id);
    }

    fn replace_spec(&mut self, id: &Id, spec: FunctionSpec) {
        if let Some(function) = self.functions.get_mut(id) {
            function.spec = spec;
            self.subscribers
                .tell(Subject::Function(id.clone()), Change::Changed);
        }
    }

    fn step_volume(&mut self, id: &Id, step: VolumeStep) -> Result<(), RegistryError> {
        let state = self.volume(id)?.state.next(step)?;
        self.set_volume(id, state);
        Ok(())
    }

    fn set_volume(&mut self, id: &Id, state: VolumeState) {
        if let Some(volume) = self
            .volumes
            .get_mut(id)
            .filter(|volume| volume.state != state)
        {
            volume.state = state;
            self.subscribers
                .tell(Subject::Volume(id.clone()), Change::Changed);
        }
    }

    fn remove_volume(&mut self, id: &Id) {
        self.volumes.remove(id);
        self.subscribers
            .tell(Subject::Volume(id.clone()), Change::Deleted);
    }

    fn step_function(&mut self, id: &Id, step: FunctionStep) -> Result<(), RegistryError> {
        let state = self.function(id)?.state.next(step)?;
        self.set_function(id, state);
        Ok(())
    }

    fn set_function(&mut self, id: &Id, state: FunctionState) {
        if let Some(function) = self
            .functions
            .get_mut(id)
            .filter(|function| function.state != state)
        {
            function.state = state;
            self.subscribers
                .tell(Subject::Function(id.clone()), Change::Changed);
        }
    }

    fn remove_function(&mut self, id: &Id) {
        self.functions.remove(id);
        self.subscribers
            .tell(Subject::Function(id.clone()), Change::Deleted);
    }
}

impl Function {
    /// What it is, and what it will be when it has been changed.
    fn specs(&self) -> impl Iterator<Item = &FunctionSpec> {
        let next = match &self.state {
            FunctionState::Detaching { next } => next.as_deref(),
            _ => None,
        };
        std::iter::once(&self.spec).chain(next)
    }
}

/// Refuses what has mistakes, for the first of them.
fn check(mistakes: impl IntoIterator<Item = impl Into<String>>) -> Result<(), RegistryError> {
    match mistakes.into_iter().next() {
        Some(mistake) => Err(RegistryError::Invalid(mistake.into())),
        None => Ok(()),
    }
}

fn check_volume(spec: &VolumeSpec) -> Result<(), RegistryError> {
    VolumeUri::parse(&spec.uri).map_err(RegistryError::Invalid)?;
    for layer in &spec.layers {
        let kind = LayerKind::find(&layer.kind).map_err(RegistryError::Invalid)?;
        if let Some(mistake) = kind.mistakes(&layer.parameters).into_iter().next() {
            let text = format!("{}: {}", mistake.name, mistake.message);
            return Err(RegistryError::Invalid(text));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
