//! Between the registry and the data half: actions become messages, reports become states.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Daemon, Pending, Phase};
use crate::control::{Response, VolumeEntry};
use crate::message::{DESCRIPTORS_MAX, Endpoint, FromData, Numbered, Role, Subject, ToData};
use crate::registry::{Action, FunctionState};
use crate::runtime_dir::{self, BoundSocket};
use crate::spec::{FunctionSpec, Id, SocketMode};
use crate::stats::Statistics;

/// The mode of functions' sockets, less the umask: this user, and its group where the umask is 007. Who may connect has
/// the disk.
const FUNCTION_MODE: u32 = 0o660;
/// How long to wait before connecting again.
const RECONNECT: Duration = Duration::from_millis(250);
/// Most descriptors that are kept for one function: guest memory of 509 regions, three for each of 256 queues, and some.
const KEPT_MAX: usize = 509 + 3 * 256 + 8;

impl Daemon {
    /// Sends a message and returns its number.
    pub(super) fn send(&mut self, message: ToData, descriptors: Vec<OwnedFd>) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        if let Err(error) = self.link.send(&Numbered { number, message }, descriptors) {
            // That the other half is gone is also told by the socket itself, where all of it is handled.
            log::warn!("to the data half: {error}");
        }
        number
    }

    /// Does what the registry wants done.
    pub(super) fn carry_out(&mut self) {
        loop {
            let actions = self.registry.take_actions();
            if actions.is_empty() {
                return;
            }
            for action in actions {
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::OpenVolume(volume) => {
                let Ok(found) = self.registry.volume(&volume) else {
                    return;
                };
                let spec = found.spec.clone();
                self.send(ToData::OpenVolume { volume, spec }, Vec::new());
            }
            Action::CloseVolume(volume) => {
                self.send(ToData::CloseVolume { volume }, Vec::new());
            }
            Action::AttachFunction(function) => {
                if let Err(error) = self.attach(&function) {
                    let error = format!("{error:#}");
                    log::error!("function {function}: {error}");
                    self.tell_registry(&FromData::Failed {
                        about: Subject::Function(function),
                        error,
                    });
                }
            }
            Action::DetachFunction(function) => {
                self.connect_at.remove(&function);
                self.send(ToData::DetachFunction { function }, Vec::new());
            }
        }
    }

    fn attach(&mut self, id: &Id) -> Result<()> {
        let spec = self.registry.function(id)?.spec.clone();
        let path = self.registry.socket_path(id, &spec);
        let (endpoint, descriptors) = match spec.mode {
            SocketMode::Client => (Endpoint::Client, Vec::new()),
            SocketMode::Server => {
                if !self.sockets.contains_key(id) {
                    self.sockets
                        .insert(id.clone(), BoundSocket::bind(&path, FUNCTION_MODE)?);
                }
                let listener = self.sockets[id].listener.as_fd().try_clone_to_owned();
                (
                    Endpoint::Listener,
                    vec![listener.context("a duplicate of the socket")?],
                )
            }
        };
        self.restore(id)?;
        // The data half gets the whole path, also where the configuration leaves it out.
        let spec = FunctionSpec {
            socket: Some(path),
            ..spec
        };
        self.send(
            ToData::AttachFunction {
                function: id.clone(),
                spec,
                endpoint,
            },
            descriptors,
        );
        Ok(())
    }

    /// Hands the descriptors of a session that another data half had begun to this one.
    fn restore(&mut self, id: &Id) -> Result<()> {
        let mut parts: Vec<(Vec<Role>, Vec<OwnedFd>)> = Vec::new();
        for (role, descriptor) in self.kept.get(id).into_iter().flatten() {
            if parts
                .last()
                .is_none_or(|(roles, _)| roles.len() == DESCRIPTORS_MAX)
            {
                parts.push(Default::default());
            }
            let descriptor = descriptor
                .try_clone()
                .context("a duplicate of a session's descriptor")?;
            let (roles, descriptors) = parts.last_mut().expect("one was pushed");
            roles.push(*role);
            descriptors.push(descriptor);
        }
        for (roles, descriptors) in parts {
            self.send(
                ToData::Restore {
                    function: id.clone(),
                    roles,
                },
                descriptors,
            );
        }
        Ok(())
    }

    /// Takes in one message of the data half.
    pub(super) fn report(&mut self, number: u64, report: FromData, descriptors: Vec<OwnedFd>) {
        let pending = self.pending.remove(&number);
        match (pending, report) {
            (Some(Pending::Resize(client, _)), FromData::Failed { error, .. }) => {
                self.server.answer(client, Err(error));
            }
            (Some(Pending::Resize(client, id)), report @ FromData::VolumeResized { .. }) => {
                self.tell_registry(&report);
                let entry = self
                    .registry
                    .volume(&id)
                    .map(|volume| VolumeEntry::new(&self.registry, &id, volume));
                self.server.answer(
                    client,
                    entry
                        .map(Response::Volume)
                        .map_err(|error| error.to_string()),
                );
            }
            (Some(Pending::Statistics(client, sum)), FromData::Statistics { statistics, more }) => {
                self.add_statistics(number, client, sum, statistics, more);
            }
            (Some(Pending::Statistics(client, _)), FromData::Failed { error, .. }) => {
                self.server.answer(client, Err(error));
            }
            (Some(Pending::Resize(client, _) | Pending::Statistics(client, _)), report) => {
                log::warn!("the data half answered a question with {report:?}");
                self.server.answer(
                    client,
                    Err("the data half answered another question".to_owned()),
                );
            }
            (None, report) => self.unasked(report, descriptors),
        }
    }

    fn add_statistics(
        &mut self,
        number: u64,
        client: u64,
        mut sum: Statistics,
        part: Statistics,
        more: bool,
    ) {
        sum.at_ns = part.at_ns;
        sum.functions.extend(part.functions);
        sum.reactors.extend(part.reactors);
        if sum.functions.len() > self.registry.functions().len()
            || sum.reactors.len() > usize::from(self.reactors)
        {
            log::warn!("the data half counts more than there is");
            self.server.answer(
                client,
                Err("the data half counts more than there is".to_owned()),
            );
        } else if more {
            self.pending
                .insert(number, Pending::Statistics(client, sum));
        } else {
            self.server.answer(client, Ok(Response::Statistics(sum)));
        }
    }

    fn unasked(&mut self, report: FromData, descriptors: Vec<OwnedFd>) {
        match &report {
            FromData::Started { reactors } => self.reactors = (*reactors).max(1),
            FromData::Drained if matches!(self.phase, Phase::Draining(_)) => self.finish(Ok(())),
            FromData::Drained => log::warn!("the data half drained without having been told to"),
            FromData::Keep { function, roles } => self.keep(function, roles, descriptors),
            FromData::Forget { function, roles } => {
                if let Some(kept) = self.kept.get_mut(function) {
                    kept.retain(|role, _| !roles.contains(role));
                }
            }
            FromData::Failed {
                about: Subject::Card,
                error,
            } => log::error!("the data half: {error}"),
            FromData::Failed {
                about: Subject::Volume(id),
                error,
            } => log::error!("volume {id}: {error}"),
            FromData::Failed {
                about: Subject::Function(id),
                error,
            } => {
                log::error!("function {id}: {error}");
                self.release(id);
            }
            FromData::FrontEndGone { function, reason } => {
                if let Some(reason) = reason {
                    log::warn!("function {function}: its front end is gone: {reason}");
                }
                self.kept.remove(function);
                self.connect_at.insert(function.clone(), Instant::now());
            }
            FromData::FunctionAttached { function } => {
                // One that goes on with an old session has its connection.
                let kept = self.kept.get(function);
                if !kept.is_some_and(|kept| kept.contains_key(&Role::Connection)) {
                    self.connect_at.insert(function.clone(), Instant::now());
                }
            }
            FromData::FunctionDetached { function } => self.release(function),
            _ => {}
        }
        self.tell_registry(&report);
    }

    fn tell_registry(&mut self, report: &FromData) {
        if let Err(error) = self.registry.report(report) {
            log::warn!("the data half reported {report:?}: {error}");
        }
    }

    fn keep(&mut self, id: &Id, roles: &[Role], descriptors: Vec<OwnedFd>) {
        if self.registry.function(id).is_err() {
            log::warn!("the data half wants descriptors kept for {id}, which is not there");
            return;
        }
        let kept = self.kept.entry(id.clone()).or_default();
        for (role, descriptor) in roles.iter().zip(descriptors) {
            if kept.len() >= KEPT_MAX && !kept.contains_key(role) {
                log::warn!("function {id}: more than {KEPT_MAX} descriptors to keep");
                return;
            }
            kept.insert(*role, descriptor);
        }
    }

    /// Lets go of all that stands for a function.
    pub(super) fn release(&mut self, id: &Id) {
        self.sockets.remove(id);
        self.kept.remove(id);
        self.connect_at.remove(id);
    }

    /// Connects functions in client mode to front ends that listen.
    pub(super) fn connect_clients(&mut self, now: Instant) {
        let due: Vec<Id> = self
            .connect_at
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.connect_at.remove(&id);
            let Ok(function) = self.registry.function(&id) else {
                continue;
            };
            if function.spec.mode != SocketMode::Client || function.state != FunctionState::Idle {
                continue;
            }
            match runtime_dir::connect(&self.registry.socket_path(&id, &function.spec)) {
                Ok(connection) => {
                    self.send(ToData::Connection { function: id }, vec![connection]);
                }
                // Nobody listens yet, or too many wait: that is what waiting is for.
                Err(_) => drop(self.connect_at.insert(id, now + RECONNECT)),
            }
        }
    }
}
