//! Between the registry and the data half: actions become messages, reports become states.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bluff_attachment::keeper::Bounds;

use super::fronts::{HandOver, Happening};
use super::{Daemon, Pending, Phase};
use crate::control::{Response, VolumeEntry};
use crate::descriptors;
use crate::message::{AddressEntry, DESCRIPTORS_MAX, FromData, Numbered, Subject, ToData};
use crate::registry::{Action, FunctionState};
use crate::runtime_dir::{self, BoundSocket};
use crate::spec::{Attach, Id, SocketMode};
use crate::stats::Statistics;

/// The mode of functions' sockets, less the umask: this user, and its group where the umask is 007. Who may connect has
/// the disk.
const FUNCTION_MODE: u32 = 0o660;
/// Most addresses that a data half may say that a network has: more than it learns.
const ADDRESSES_MAX: usize = 1 << 17;
/// How long to wait before connecting again.
const RECONNECT: Duration = Duration::from_millis(250);
/// What may be recorded of a session over such an attachment, where its front end's share of descriptors is this.
fn bounds(attach: Attach, share: u32) -> Bounds {
    match attach {
        // Its session refuses what is over the share.
        Attach::VhostUser => bluff_vhost_user::keeper::BOUNDS,
        Attach::VfioUser => {
            let bounds = bluff_vfio_user::keeper::BOUNDS;
            let share = usize::try_from(share).unwrap_or(usize::MAX);
            Bounds {
                kept: bounds.kept.min(share),
                ..bounds
            }
        }
    }
}

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
            Action::OpenNetwork(network) => {
                let Ok(found) = self.registry.network(&network) else {
                    return;
                };
                let spec = found.spec.clone();
                self.send(ToData::OpenNetwork { network, spec }, Vec::new());
            }
            Action::CloseNetwork(network) => {
                self.send(ToData::CloseNetwork { network }, Vec::new());
            }
            Action::AttachFunction(function) => {
                if let Err(error) = self.attach(&function) {
                    let error = format!("{error:#}");
                    log::error!("function {function}: {error}");
                    self.release(&function);
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
        let functions = self.registry.functions().len();
        let share = descriptors::share(descriptors::limit(), functions, spec.rings());
        let subsystem = self.presentable(id, &spec)?;
        if !self.fronts.has_door(id) {
            let path = self.registry.socket_path(id, &spec);
            let listener = match spec.mode {
                SocketMode::Client => None,
                SocketMode::Server => Some(BoundSocket::bind(&path, FUNCTION_MODE)?),
            };
            let bounds = bounds(spec.attach, share);
            self.fronts.open(id.clone(), listener, bounds)?;
        }
        let files = self.fronts.files(id)?;
        let message = ToData::AttachFunction {
            function: id.clone(),
            descriptors: share,
            subsystem,
            spec,
            files: files.len(),
        };
        self.send(message, files);
        Ok(())
    }

    /// Gives a front end to the data half, with what is recorded of its session, as soon as the function is attached.
    fn hand_over(&mut self, id: &Id) {
        let function = self.registry.function(id);
        if !function.is_ok_and(|function| function.state == FunctionState::Idle) {
            return;
        }
        match self.fronts.hand_over(id) {
            Ok(Some(front)) => self.send_front(id, front),
            Ok(None) if self.fronts.is_taken(id) => {}
            Ok(None) => self.reconnect(id),
            Err(error) => {
                self.warn(id, format_args!("its front end cannot be served: {error}"));
                self.fronts.let_go(id);
                self.reconnect(id);
            }
        }
    }

    /// In client mode. Not at once: a front end that closes every connection would keep us busy.
    fn reconnect(&mut self, id: &Id) {
        self.connect_at
            .insert(id.clone(), Instant::now() + RECONNECT);
    }

    fn send_front(&mut self, id: &Id, front: HandOver) {
        let mut descriptors = vec![front.connection];
        let recorded = front.recorded.is_some();
        if let Some((record, kept)) = front.recorded {
            descriptors.push(record);
            let mut kept = kept.into_iter().peekable();
            while kept.peek().is_some() {
                let (keys, files) = kept.by_ref().take(DESCRIPTORS_MAX).unzip();
                let function = id.clone();
                self.send(ToData::Restore { function, keys }, files);
            }
        }
        let function = id.clone();
        self.send(ToData::Connection { function, recorded }, descriptors);
    }

    /// Looks after the functions' sockets.
    pub(super) fn fronts_turn(&mut self, now: Instant) {
        for happening in self.fronts.turn(now) {
            match happening {
                Happening::Came(id) => self.hand_over(&id),
                Happening::Done(function, seq) => {
                    self.send(ToData::Committed { function, seq }, Vec::new());
                }
            }
        }
    }

    fn commit(&mut self, function: Id, descriptors: Vec<OwnedFd>) {
        match self.fronts.commit(&function, descriptors) {
            Ok(Some(seq)) => {
                self.send(ToData::Committed { function, seq }, Vec::new());
            }
            Ok(None) => {}
            Err(error) => self.warn(&function, format_args!("its front end is let go: {error}")),
        }
    }

    /// Takes in one message of the data half.
    pub(super) fn report(&mut self, number: u64, report: FromData, descriptors: Vec<OwnedFd>) {
        let pending = self.pending.remove(&number);
        match (pending, report) {
            (Some(pending), FromData::Failed { error, .. }) => {
                self.server.answer(pending.client(), Err(error));
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
            (
                Some(Pending::Namespaces(client, function)),
                report @ (FromData::NamespaceAdded { .. } | FromData::NamespaceRemoved { .. }),
            ) => {
                self.tell_registry(&report);
                let entry = self.namespaces(&function);
                self.server.answer(client, entry.map(Response::Namespaces));
            }
            (
                Some(Pending::Addresses(client, sum)),
                FromData::Addresses {
                    addresses, more, ..
                },
            ) => self.add_addresses(number, client, sum, addresses, more),
            (Some(Pending::Link(client, id)), report @ FromData::LinkSet { .. }) => {
                self.tell_registry(&report);
                let entry = self.function(&id);
                self.server.answer(client, entry.map(Response::Function));
            }
            (Some(Pending::Statistics(client, sum)), FromData::Statistics { statistics, more }) => {
                self.add_statistics(number, client, sum, statistics, more);
            }
            (Some(pending), report) => {
                log::warn!("the data half answered a question with {report:?}");
                self.server.answer(
                    pending.client(),
                    Err("the data half answered another question".to_owned()),
                );
            }
            (None, report) => self.unasked(report, descriptors),
        }
    }

    fn add_addresses(
        &mut self,
        number: u64,
        client: u64,
        mut sum: Vec<AddressEntry>,
        part: Vec<AddressEntry>,
        more: bool,
    ) {
        sum.extend(part);
        if sum.len() > ADDRESSES_MAX {
            log::warn!("the data half knows more addresses than there can be");
            let error = "the data half knows more addresses than there can be";
            self.server.answer(client, Err(error.to_owned()));
        } else if more {
            self.pending.insert(number, Pending::Addresses(client, sum));
        } else {
            self.server.answer(client, Ok(Response::Addresses(sum)));
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
            FromData::Commit { function, .. } => {
                return self.commit(function.clone(), descriptors);
            }
            FromData::KeepFormats {
                subsystem,
                seq,
                formats,
            } => return self.keep_formats(subsystem, *seq, formats),
            // It could not even start: nothing will be served by this one.
            FromData::Failed {
                about: Subject::Card,
                error,
            } if self.reactors_unknown() => {
                self.useless = Some(anyhow!("it cannot start: {error}"));
            }
            FromData::Failed {
                about: Subject::Card,
                error,
            } => log::error!("the data half: {error}"),
            FromData::Failed {
                about: Subject::Volume(id),
                error,
            } => {
                log::error!("volume {id}: {error}");
                // Whose disk cannot be opened any more is told by the end of its connection. One that is accepted and never
                // answered would wait for ever.
                self.bar_users(id, true);
                self.reopen.failed(id, Instant::now());
            }
            FromData::VolumeOpened { volume, .. } => {
                self.reopen.opened(volume);
                self.bar_users(volume, false);
            }
            FromData::Failed {
                about: Subject::Network(id),
                error,
            } => {
                log::error!("network {id}: {error}");
                self.bar_members(id, true);
                self.reopen_networks.failed(id, Instant::now());
            }
            FromData::NetworkOpened { network, info } => {
                if let Some(underlay) = &info.underlay {
                    log::info!("network {network}: its underlay is {underlay}");
                }
                self.reopen_networks.opened(network);
                self.bar_members(network, false);
            }
            FromData::Failed {
                about: Subject::Function(id),
                error,
            } => {
                log::error!("function {id}: {error}");
                self.release(id);
            }
            FromData::FrontEndGone { function, reason } => {
                if let Some(reason) = reason {
                    self.warn(function, format_args!("its front end is gone: {reason}"));
                }
                self.fronts.gone(function);
                self.reconnect(function);
            }
            FromData::FunctionAttached { function, files } => {
                let kept = match descriptors.len() == *files {
                    true => self.fronts.keep(function, descriptors),
                    // This process has too many open to take them.
                    false => Err(io::Error::other("they were lost")),
                };
                if let Err(error) = kept {
                    log::error!(
                        "function {function}: its session would not outlive a data half: the function's files: {error}"
                    );
                }
                self.connect_at.insert(function.clone(), Instant::now());
            }
            FromData::FunctionDetached { function } => self.release(function),
            _ => {}
        }
        self.tell_registry(&report);
        if let FromData::FrontEndGone { function, .. }
        | FromData::FunctionAttached { function, .. } = &report
        {
            self.hand_over(function);
        }
    }

    /// Logs what a front end can cause, which may be often.
    fn warn(&mut self, function: &Id, line: fmt::Arguments<'_>) {
        let limit = self.limits.entry(function.clone()).or_default();
        limit.warn(Instant::now(), format_args!("function {function}"), line);
    }

    fn bar_users(&mut self, volume: &Id, barred: bool) {
        let users: Vec<Id> = self.registry.users(volume).cloned().collect();
        for user in users {
            self.fronts.bar(&user, barred);
        }
    }

    fn bar_members(&mut self, network: &Id, barred: bool) {
        let members: Vec<Id> = self.registry.members(network).cloned().collect();
        for member in members {
            self.fronts.bar(&member, barred);
        }
    }

    /// Tries volumes and networks again that could not be opened by a data half after the first.
    pub(super) fn reopen(&mut self, now: Instant) {
        if self.phase != Phase::Ready {
            return;
        }
        for id in self.reopen.due(now) {
            self.registry.reopen_volume(&id);
        }
        for id in self.reopen_networks.due(now) {
            self.registry.reopen_network(&id);
        }
        self.carry_out();
    }

    fn tell_registry(&mut self, report: &FromData) {
        if let Err(error) = self.registry.report(report) {
            log::warn!("the data half reported {report:?}: {error}");
        }
    }

    /// Lets go of all that stands for a function.
    pub(super) fn release(&mut self, id: &Id) {
        self.fronts.close(id);
        self.connect_at.remove(id);
        self.limits.remove(id);
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
            let is_idle = function.state == FunctionState::Idle && !self.fronts.is_taken(&id);
            if function.spec.mode != SocketMode::Client || !is_idle {
                continue;
            }
            match runtime_dir::connect(&self.registry.socket_path(&id, &function.spec)) {
                Ok(connection) => {
                    self.fronts.connected(&id, connection);
                    self.hand_over(&id);
                }
                // Nobody listens yet, or too many wait: that is what waiting is for.
                Err(_) => drop(self.connect_at.insert(id, now + RECONNECT)),
            }
        }
    }
}
