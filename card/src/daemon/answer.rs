//! Answers to the questions of the control socket.

use super::{Daemon, Pending, Phase};
use crate::control::server::ClientNumber;
use crate::control::{
    FunctionEntry, NamespaceEntry, NamespacesEntry, NetworkEntry, Request, Response, Status,
    VolumeEntry,
};
use crate::data_half::DataHalf;
use crate::message::ToData;
use crate::registry::{Function, FunctionState, VolumeState};
use crate::spec::{DeviceSpec, Id, NamespaceSpec, SubsystemUse};
use crate::stats::Statistics;

impl Daemon {
    /// Answers a question now, or when the data half has.
    pub(super) fn question(&mut self, client: ClientNumber, request: Request) {
        let answer = match request {
            Request::Status => Ok(Response::Status(self.status())),
            Request::ListFunctions => Ok(Response::Functions(self.functions())),
            Request::ShowFunction { id } => self.function(&id).map(Response::Function),
            Request::ListVolumes => Ok(Response::Volumes(self.volumes())),
            Request::ResizeVolume { id, size } => match self.registry.check_resize(&id, size) {
                Ok(()) => {
                    let number = self.send(
                        ToData::ResizeVolume {
                            volume: id.clone(),
                            size,
                        },
                        Vec::new(),
                    );
                    self.pending.insert(number, Pending::Resize(client, id));
                    return;
                }
                Err(error) => Err(error.to_string()),
            },
            Request::ListNamespaces { function } => {
                self.namespaces(&function).map(Response::Namespaces)
            }
            Request::AddNamespace {
                function,
                volume,
                nsid,
            } => match self.new_namespace(&function, &volume, nsid) {
                Ok(namespace) => {
                    let of = function.clone();
                    let message = ToData::AddNamespace {
                        function,
                        namespace,
                    };
                    return self.change_namespaces(client, of, message);
                }
                Err(error) => Err(format!("{error:#}")),
            },
            Request::RemoveNamespace { function, volume } => {
                match self.registry.check_removal(&function, &volume) {
                    Ok(namespace) => {
                        let (of, nsid) = (function.clone(), namespace.nsid);
                        let message = ToData::RemoveNamespace { function, nsid };
                        return self.change_namespaces(client, of, message);
                    }
                    Err(error) => Err(error.to_string()),
                }
            }
            Request::ListNetworks => Ok(Response::Networks(self.networks())),
            Request::ShowNetwork { id } => self
                .network(&id)
                .map(|network| Response::Network(Box::new(network))),
            Request::ListAddresses { network } => match self.network(&network) {
                Ok(_) => {
                    let number = self.send(ToData::ListAddresses { network }, Vec::new());
                    self.pending
                        .insert(number, Pending::Addresses(client, Vec::new()));
                    return;
                }
                Err(error) => Err(error),
            },
            Request::SetLink { function, up } => match self.registry.check_link(&function) {
                Ok(()) => {
                    let id = function.clone();
                    let number = self.send(ToData::SetLink { function, up }, Vec::new());
                    self.pending.insert(number, Pending::Link(client, id));
                    return;
                }
                Err(error) => Err(error.to_string()),
            },
            Request::Statistics { function } => {
                match function.as_ref().map(|id| self.function(id)).transpose() {
                    Ok(_) => {
                        let number = self.send(ToData::Statistics { function }, Vec::new());
                        self.pending
                            .insert(number, Pending::Statistics(client, Statistics::default()));
                        return;
                    }
                    Err(error) => Err(error),
                }
            }
        };
        self.server.answer(client, answer);
    }

    fn new_namespace(
        &mut self,
        function: &Id,
        volume: &Id,
        nsid: Option<u32>,
    ) -> anyhow::Result<NamespaceSpec> {
        let namespace = self.registry.check_namespace(function, volume, nsid)?;
        self.presentable_namespace(function, &namespace)
    }

    fn change_namespaces(&mut self, client: ClientNumber, function: Id, message: ToData) {
        let number = self.send(message, Vec::new());
        let pending = Pending::Namespaces(client, function);
        self.pending.insert(number, pending);
    }

    /// The subsystem of a function, as it is now.
    pub(super) fn namespaces(&self, id: &Id) -> Result<NamespacesEntry, String> {
        let function = self.registry.function(id);
        let function = function.map_err(|error| error.to_string())?;
        let found = self.subsystem(id, &function.spec);
        let found =
            found.ok_or_else(|| format!("function {id} is of a kind without namespaces"))?;
        let entry = |namespace: NamespaceSpec| {
            let volume = self.registry.volumes().get(&namespace.volume);
            let info = volume.and_then(|volume| match volume.state {
                VolumeState::Open(info) => Some(info),
                _ => None,
            });
            NamespaceEntry {
                nsid: namespace.nsid,
                info,
                block_size: namespace.block_size.or(info.map(|info| info.block_size)),
                volume: namespace.volume,
            }
        };
        let same = |(_, other): &(&Id, &Function)| match (&other.spec.device, &function.spec.device)
        {
            (
                DeviceSpec::Nvme {
                    subsystem: SubsystemUse::Shared { subsystem: one },
                    ..
                },
                DeviceSpec::Nvme {
                    subsystem: SubsystemUse::Shared { subsystem: two },
                    ..
                },
            ) => one == two,
            _ => std::ptr::eq(*other, function),
        };
        let functions = self.registry.functions().iter().filter(same);
        Ok(NamespacesEntry {
            function: id.clone(),
            nqn: found.nqn.unwrap_or_default(),
            functions: functions.map(|(id, _)| id.clone()).collect(),
            namespaces: found.namespaces.into_iter().map(entry).collect(),
        })
    }

    /// Tells everyone who waits for the data half that it will not answer.
    pub(super) fn abandon_questions(&mut self) {
        for pending in std::mem::take(&mut self.pending).into_values() {
            self.server.answer(
                pending.client(),
                Err("the data half was lost; ask again".to_owned()),
            );
        }
    }

    fn status(&self) -> Status {
        let functions = self.registry.functions();
        let is_connected = |state: &FunctionState| matches!(state, FunctionState::Connected(_));
        let phase = match self.phase {
            Phase::Starting => "starting",
            Phase::Ready => "ready",
            Phase::Draining(_) => "draining",
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            data_pid: self.half.as_ref().and_then(DataHalf::pid),
            data: self.card.data,
            restarts: self.restarts,
            phase: phase.to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            reactors: self.reactors,
            volumes: self.registry.volumes().len(),
            networks: self.registry.networks().len(),
            functions: functions.len(),
            connected: functions
                .values()
                .filter(|function| is_connected(&function.state))
                .count(),
        }
    }

    fn functions(&self) -> Vec<FunctionEntry> {
        let functions = self.registry.functions().iter();
        functions
            .map(|(id, function)| FunctionEntry::new(&self.registry, id, function))
            .collect()
    }

    pub(super) fn function(&self, id: &Id) -> Result<FunctionEntry, String> {
        let function = self
            .registry
            .function(id)
            .map_err(|error| error.to_string())?;
        let namespaces = match &function.spec.device {
            DeviceSpec::Nvme { .. } => self.namespaces(id)?.namespaces,
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => {
                Vec::new()
            }
        };
        Ok(FunctionEntry {
            namespaces,
            ..FunctionEntry::new(&self.registry, id, function)
        })
    }

    fn networks(&self) -> Vec<NetworkEntry> {
        let networks = self.registry.networks().iter();
        networks
            .map(|(id, network)| NetworkEntry::new(&self.registry, id, network))
            .collect()
    }

    fn network(&self, id: &Id) -> Result<NetworkEntry, String> {
        let network = self.registry.network(id);
        let network = network.map_err(|error| error.to_string())?;
        Ok(NetworkEntry::new(&self.registry, id, network))
    }

    fn volumes(&self) -> Vec<VolumeEntry> {
        let volumes = self.registry.volumes().iter();
        volumes
            .map(|(id, volume)| VolumeEntry::new(&self.registry, id, volume))
            .collect()
    }
}
