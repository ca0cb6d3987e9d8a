//! Networks, and who is in them.

use super::{Action, Change, Registry, RegistryError, Subject, check};
use crate::message::NetworkInfo;
use crate::registry::state::NetworkStep;
use crate::registry::{FunctionState, NetworkState};
use crate::spec::{DeviceSpec, FunctionSpec, Id, NetworkSpec, PortSpec};

/// A network of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// What it is.
    pub spec: NetworkSpec,
    /// How it stands.
    pub state: NetworkState,
}

impl Registry {
    /// A network.
    pub fn network(&self, id: &Id) -> Result<&Network, RegistryError> {
        self.networks
            .get(id)
            .ok_or_else(|| RegistryError::NoNetwork(id.clone()))
    }

    /// The functions that are in a network.
    pub fn members<'a>(&'a self, network: &'a Id) -> impl Iterator<Item = &'a Id> {
        let all = self.functions.iter();
        let its = all.filter(move |(_, function)| {
            let mut ports = function.specs().filter_map(FunctionSpec::port);
            ports.any(|(id, _)| id == network)
        });
        its.map(|(id, _)| id)
    }

    /// Adds a network, which is then opened.
    ///
    /// # Errors
    /// Where the ID is taken, the specification makes no sense, or another network has the same place among other cards.
    pub fn create_network(&mut self, id: Id, spec: NetworkSpec) -> Result<(), RegistryError> {
        if self.networks.contains_key(&id) {
            return Err(RegistryError::Exists(id));
        }
        check(spec.mistakes())?;
        let others = self.networks.iter();
        let mut mistakes = others.filter_map(|(id, n)| spec.mistake_beside(id, &n.spec));
        if let Some(complaint) = mistakes.next() {
            return Err(RegistryError::Invalid(complaint));
        }
        self.actions.push(Action::OpenNetwork(id.clone()));
        let subject = Subject::Network(id.clone());
        self.subscribers.tell(subject, Change::Created);
        let state = NetworkState::Opening;
        self.networks.insert(id, Network { spec, state });
        Ok(())
    }

    /// Takes a network away, once it is closed.
    ///
    /// # Errors
    /// Where a function is in it, or it is being opened or closed.
    pub fn delete_network(&mut self, id: &Id) -> Result<(), RegistryError> {
        let state = &self.network(id)?.state;
        let is_failed = matches!(state, NetworkState::Failed { .. });
        if let Some(user) = self.members(id).next() {
            let complaint = format!("function {user} is in network {id}");
            return Err(RegistryError::Invalid(complaint));
        }
        if is_failed {
            self.remove_network(id);
            return Ok(());
        }
        self.step_network(id, NetworkStep::Close)?;
        self.actions.push(Action::CloseNetwork(id.clone()));
        Ok(())
    }

    /// Tries a network again that could not be opened. Of no effect on others.
    pub fn reopen_network(&mut self, id: &Id) {
        if self.step_network(id, NetworkStep::Reopen).is_ok() {
            self.actions.push(Action::OpenNetwork(id.clone()));
        }
    }

    pub(super) fn network_opened(
        &mut self,
        id: &Id,
        info: &NetworkInfo,
    ) -> Result<(), RegistryError> {
        self.step_network(id, NetworkStep::Opened(info.clone()))?;
        let members: Vec<Id> = self.members(id).cloned().collect();
        members
            .iter()
            .for_each(|function| self.attach_if_ready(function));
        Ok(())
    }

    pub(super) fn network_closed(&mut self, id: &Id) -> Result<(), RegistryError> {
        self.network(id)?.state.next(NetworkStep::Closed)?;
        self.remove_network(id);
        Ok(())
    }

    pub(super) fn step_network(&mut self, id: &Id, step: NetworkStep) -> Result<(), RegistryError> {
        let state = self.network(id)?.state.next(step)?;
        self.set_network(id, state);
        Ok(())
    }

    fn set_network(&mut self, id: &Id, state: NetworkState) {
        let found = self.networks.get_mut(id);
        if let Some(network) = found.filter(|network| network.state != state) {
            network.state = state;
            let subject = Subject::Network(id.clone());
            self.subscribers.tell(subject, Change::Changed);
        }
    }

    fn remove_network(&mut self, id: &Id) {
        self.networks.remove(id);
        let subject = Subject::Network(id.clone());
        self.subscribers.tell(subject, Change::Deleted);
    }

    /// The data half is gone: networks are opened again.
    pub(super) fn reopen_networks(&mut self) {
        let networks: Vec<Id> = self.networks.keys().cloned().collect();
        for id in networks {
            match self.networks[&id].state {
                NetworkState::Closing => self.remove_network(&id),
                NetworkState::Failed { .. } => {}
                NetworkState::Opening | NetworkState::Open(_) => {
                    self.set_network(&id, NetworkState::Opening);
                    self.actions.push(Action::OpenNetwork(id));
                }
            }
        }
    }

    /// Whether a function may have such a port.
    pub(super) fn check_port(
        &self,
        function: &Id,
        network: &Id,
        port: &PortSpec,
    ) -> Result<(), RegistryError> {
        self.network(network)?;
        check(port.mistakes())?;
        let same = |(id, other): &(&Id, &super::Function)| {
            let mut ports = other.specs().filter_map(FunctionSpec::port);
            *id != function && ports.any(|(n, p)| n == network && p.is_same_station(port))
        };
        match self.functions.iter().find(same) {
            Some((other, _)) => Err(RegistryError::Invalid(format!(
                "function {other} has the same address in network {network}"
            ))),
            None => Ok(()),
        }
    }

    /// Whether the cable of a function can be pulled out, or plugged in, now.
    ///
    /// # Errors
    /// Where it is no network function, or not attached.
    pub fn check_link(&self, id: &Id) -> Result<(), RegistryError> {
        let function = self.function(id)?;
        let Some(_) = function.spec.port() else {
            let complaint = format!("function {id} is of a kind without a link");
            return Err(RegistryError::Invalid(complaint));
        };
        match function.state {
            FunctionState::Idle | FunctionState::Connected(_) => Ok(()),
            ref state => {
                let complaint = format!("function {id} is {}", state.word());
                Err(RegistryError::Invalid(complaint))
            }
        }
    }

    /// What it stands on stays as it is over data halves.
    pub(super) fn link_set(&mut self, id: &Id, up: bool) -> Result<(), RegistryError> {
        self.function(id)?;
        let found = self.functions.get_mut(id).map(|f| &mut f.spec.device);
        if let Some(DeviceSpec::VirtioNet { port, .. }) = found
            && port.unplugged == up
        {
            port.unplugged = !up;
            let subject = Subject::Function(id.clone());
            self.subscribers.tell(subject, Change::Changed);
        }
        Ok(())
    }
}
