//! The configuration file: TOML, read with the place of every key, so that each mistake is answered with its line.
//!
//! ```toml
//! [card]
//! reactors = [1]
//! [volume.disk0]
//! uri = "file:/srv/disk0.raw"
//! [function.blk0]
//! kind = "virtio-blk"
//! attach = "vhost-user"
//! volume = "disk0"
//! ```
//!
//! All mistakes are told at once. Nothing is opened to find them: what is checked is the file, and the CPUs of the machine.

mod mistake;
mod net;
mod nvme;
mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

pub use mistake::{Mistake, Mistakes};
use read::{Section, Sink};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::kinds::{LayerKind, VolumeUri, list};
use crate::spec::{
    Attach, CardSpec, DataMode, DeviceSpec, FunctionKind, FunctionSpec, Id, LayerSpec, NetworkSpec,
    Parameter, Poll, PortSpec, STOP_TIMEOUT_MS_DEFAULT, SocketMode, SubsystemSpec, VolumeSpec,
    attach_mistake,
};

/// Most queues of one function: what one reactor may have to visit for one host.
pub const QUEUES_MAX: u16 = 256;
/// How long a function may let its front end wait for a stop, in milliseconds. QEMU waits in its main loop, with all of the VM.
pub const STOP_TIMEOUT_MS: RangeInclusive<u32> = 10..=60_000;
/// The same, at most, for vfio-user: QEMU gives a reply 5 s, and cancelling takes its time.
pub const STOP_TIMEOUT_MS_VFIO_MAX: u32 = 3_000;
/// The longest time that adaptive polling may go on after the last work: a second, in microseconds.
pub const POLL_US_MAX: u32 = 1_000_000;
/// The longest path of a Unix socket, in bytes, without the closing zero (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// A configuration without mistakes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The card as a whole.
    pub card: CardSpec,
    /// Its volumes.
    pub volumes: BTreeMap<Id, VolumeSpec>,
    /// The subsystems that NVMe functions may share.
    pub subsystems: BTreeMap<Id, SubsystemSpec>,
    /// The networks that network functions are in.
    pub networks: BTreeMap<Id, NetworkSpec>,
    /// Its functions.
    pub functions: BTreeMap<Id, FunctionSpec>,
}

/// What a configuration is checked against.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The CPUs that reactors may be pinned to.
    pub cpus: BTreeSet<u32>,
    /// Where sockets stand that have no path of their own.
    pub runtime_dir: PathBuf,
}

impl Surroundings {
    /// This machine, as this process may use it.
    pub fn of_this_machine(runtime_dir: &Path) -> std::io::Result<Self> {
        let set = rustix::thread::sched_getaffinity(None)?;
        let cpus = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
        let cpus = cpus.filter_map(|cpu| u32::try_from(cpu).ok()).collect();
        Ok(Self {
            cpus,
            runtime_dir: runtime_dir.to_owned(),
        })
    }
}

impl Config {
    /// Reads a configuration. `name` is the file's, for the messages.
    ///
    /// # Errors
    /// Every mistake in it, in the order of its lines.
    pub fn parse(text: &str, name: &str, surroundings: &Surroundings) -> Result<Self, Mistakes> {
        let (document, errors) = DeTable::parse_recoverable(text);
        let mut sink = Sink::default();
        for error in &errors {
            sink.add(error.span().unwrap_or(0..0), "", error.message().trim());
        }
        let config = if errors.is_empty() {
            Reader {
                sink: &mut sink,
                surroundings,
            }
            .config(&document)
        } else {
            // A half-read file has keys missing that are really there: the first thing to mend is its form.
            Self::default()
        };
        sink.into_result(config, text, name)
    }
}

/// What of a configuration may be named elsewhere in it, and what was.
struct Names {
    volumes: BTreeSet<Id>,
    subsystems: BTreeSet<Id>,
    /// Volumes that something stands on.
    users: Vec<Placed<Id>>,
    /// Names that subsystems were given.
    nqns: Vec<String>,
    networks: BTreeSet<Id>,
    functions: BTreeSet<Id>,
    /// Ports of networks: with the function and the network of each.
    ports: Vec<Placed<(Id, Id, PortSpec)>>,
}

struct Reader<'a> {
    sink: &'a mut Sink,
    surroundings: &'a Surroundings,
}

/// A value with its place, kept until all of the file is known.
struct Placed<T> {
    value: T,
    key: String,
    span: Range<usize>,
}

impl Reader<'_> {
    fn config(&mut self, document: &Spanned<DeTable<'_>>) -> Config {
        let mut config = Config::default();
        let mut root = Section::root(document);
        if let Some(mut card) = root.section("card", self.sink) {
            config.card = self.card(&mut card);
            card.finish(self.sink);
        }
        let mut paths: Vec<Placed<(Id, String)>> = Vec::new();
        for (id, mut section) in root.named_sections("volume", self.sink) {
            let volume = self.volume(&id, config.card.data, &mut section, &mut paths);
            section.finish(self.sink);
            config.volumes.extend(volume.map(|volume| (id, volume)));
        }
        self.no_file_twice(&paths);
        let mut names = Names {
            volumes: root.names("volume"),
            subsystems: root.names("subsystem"),
            users: Vec::new(),
            nqns: Vec::new(),
            networks: root.names("network"),
            functions: root.names("function"),
            ports: Vec::new(),
        };
        for (id, mut section) in root.named_sections("subsystem", self.sink) {
            let subsystem = self.subsystem(&mut section, &mut names);
            section.finish(self.sink);
            config.subsystems.insert(id, subsystem);
        }
        let mut segments: Vec<Placed<Id>> = Vec::new();
        let mut underlays: Vec<Placed<Id>> = Vec::new();
        for (id, mut section) in root.named_sections("network", self.sink) {
            segments.push(Placed {
                value: id.clone(),
                key: section.key("vni"),
                span: section.place("vni"),
            });
            underlays.push(Placed {
                value: id.clone(),
                key: section.key("underlay"),
                span: section.place("underlay"),
            });
            let network = self.network(&mut section, &names);
            section.finish(self.sink);
            config.networks.extend(network.map(|network| (id, network)));
        }
        self.no_segment_twice(&config.networks, &segments);
        let mut sockets: Vec<Placed<(Id, PathBuf)>> = Vec::new();
        for (id, mut section) in root.named_sections("function", self.sink) {
            let function = self.function(&id, &mut section, &mut names, &mut sockets);
            section.finish(self.sink);
            config
                .functions
                .extend(function.map(|function| (id, function)));
        }
        self.no_volume_shared(&config, &names.users);
        self.no_socket_twice(&sockets);
        self.no_station_twice(&names.ports);
        self.uplinks_fit(&config, &underlays);
        root.finish(self.sink);
        config
    }

    fn card(&mut self, section: &mut Section<'_>) -> CardSpec {
        let default = CardSpec::default();
        let sink = &mut *self.sink;
        CardSpec {
            poll: section
                .word("poll", Poll::WORDS, sink)
                .unwrap_or(default.poll),
            poll_us: section
                .integer("poll_us", 0..=POLL_US_MAX, sink)
                .unwrap_or(default.poll_us),
            data: section
                .word("data", DataMode::WORDS, sink)
                .unwrap_or(default.data),
            reactors: self.reactors(section),
        }
    }

    fn reactors(&mut self, section: &mut Section<'_>) -> Vec<u32> {
        let key = section.key("reactors");
        let usable: Vec<String> = self.surroundings.cpus.iter().map(u32::to_string).collect();
        let mut cpus = Vec::new();
        for item in section.array("reactors", self.sink).unwrap_or_default() {
            let cpu = item.get_ref().as_integer();
            let cpu =
                cpu.and_then(|number| u32::from_str_radix(number.as_str(), number.radix()).ok());
            let complaint = match cpu {
                None => "a CPU is a whole number".to_owned(),
                Some(cpu) if !self.surroundings.cpus.contains(&cpu) => {
                    format!(
                        "there is no CPU {cpu} to use; there are {}",
                        usable.join(", ")
                    )
                }
                Some(cpu) if cpus.contains(&cpu) => format!("CPU {cpu} stands there twice"),
                Some(cpu) => {
                    cpus.push(cpu);
                    continue;
                }
            };
            self.sink.add(item.span(), &key, complaint);
        }
        cpus
    }

    fn volume(
        &mut self,
        id: &Id,
        data: DataMode,
        section: &mut Section<'_>,
        paths: &mut Vec<Placed<(Id, String)>>,
    ) -> Option<VolumeSpec> {
        let layers = section.array("layers", self.sink).unwrap_or_default();
        let key = section.key("layers");
        let layers = layers
            .iter()
            .filter_map(|layer| self.layer(layer, &key))
            .collect();
        let uri = section.required_text(
            "uri",
            "the place of its data, such as \"file:/srv/disk0.raw\"",
            self.sink,
        )?;
        let (text, span) = (uri.get_ref().clone(), uri.span());
        match VolumeUri::parse(&text) {
            // A host would find zeroes where it wrote, and nobody would tell it.
            Ok(parsed) if parsed.kind.volatile && data == DataMode::Process => self.sink.add(
                span,
                &section.key("uri"),
                format!(
                    "`{}` loses its contents with each data half, and with `data = \"process\"` one may follow another; \
                     a `file` on a tmpfs keeps them",
                    parsed.kind.scheme
                ),
            ),
            Ok(parsed) if parsed.kind.exclusive && !parsed.path().is_empty() => paths.push(Placed {
                value: (id.clone(), parsed.path().to_owned()),
                key: section.key("uri"),
                span,
            }),
            Ok(_) => {}
            Err(error) => self.sink.add(span, &section.key("uri"), error),
        }
        Some(VolumeSpec { uri: text, layers })
    }

    fn layer(&mut self, value: &Spanned<DeValue<'_>>, key: &str) -> Option<LayerSpec> {
        let Some(table) = value.get_ref().as_table() else {
            self.sink.add(
                value.span(),
                key,
                "a layer is a table, such as { kind = \"delay\", read = \"2ms\" }",
            );
            return None;
        };
        let mut section = Section::new(key.to_owned(), value.span(), table);
        let kind = section.required_text("kind", "the layer's kind", self.sink)?;
        let layer = match LayerKind::find(kind.get_ref()) {
            Ok(layer) => layer,
            Err(error) => {
                self.sink.add(kind.span(), &section.key("kind"), error);
                return None;
            }
        };
        let mut parameters = BTreeMap::new();
        let rest = section.rest();
        for (name, place, value) in &rest {
            match parameter(value.get_ref()) {
                Ok(parameter) => drop(parameters.insert(name.clone(), parameter)),
                Err(error) => self.sink.add(place.clone(), &section.key(name), error),
            }
        }
        for mistake in layer.mistakes(&parameters) {
            let place = rest.iter().find(|(name, ..)| *name == mistake.name);
            let place = match place {
                // It is there, and was told to be of the wrong type.
                Some(_) if mistake.is_missing => continue,
                Some((_, place, _)) => place.clone(),
                None => section.span(),
            };
            self.sink
                .add(place, &section.key(&mistake.name), mistake.message);
        }
        Some(LayerSpec {
            kind: kind.into_inner(),
            parameters,
        })
    }

    fn function(
        &mut self,
        id: &Id,
        section: &mut Section<'_>,
        names: &mut Names,
        sockets: &mut Vec<Placed<(Id, PathBuf)>>,
    ) -> Option<FunctionSpec> {
        let sink = &mut *self.sink;
        let kind = section.required_word("kind", FunctionKind::WORDS, sink);
        let attach = section.required_word("attach", Attach::WORDS, sink);
        let mode = section
            .word("mode", SocketMode::WORDS, sink)
            .unwrap_or(SocketMode::Server);
        let queues_max = kind.map_or(QUEUES_MAX, FunctionSpec::queues_max);
        let queues = section.integer("queues", 1..=queues_max, sink).unwrap_or(1);
        let poll = section.word("poll", Poll::WORDS, sink);
        let stop_timeout_ms = section.integer("stop_timeout_ms", STOP_TIMEOUT_MS, sink);
        if let (Some(kind), Some(attach)) = (kind, attach)
            && let Some(complaint) = attach_mistake(kind, attach)
        {
            sink.add(section.place("attach"), &section.key("attach"), complaint);
        }
        if attach == Some(Attach::VfioUser) && mode == SocketMode::Client {
            let complaint = "a VMM connects to a vfio-user function; only \"server\" is possible";
            sink.add(section.place("mode"), &section.key("mode"), complaint);
        }
        if attach == Some(Attach::VfioUser)
            && stop_timeout_ms.is_some_and(|ms| ms > STOP_TIMEOUT_MS_VFIO_MAX)
        {
            let complaint = format!(
                "of a vfio-user function at most {STOP_TIMEOUT_MS_VFIO_MAX}: QEMU gives up after 5000"
            );
            let key = section.key("stop_timeout_ms");
            sink.add(section.place("stop_timeout_ms"), &key, complaint);
        }
        let device = match kind {
            Some(FunctionKind::VirtioBlk) => self.virtio_blk(section, names),
            Some(FunctionKind::VirtioNet) => self.virtio_net(id, section, names),
            Some(FunctionKind::Uplink) => Some(self.uplink(section)),
            Some(FunctionKind::Nvme) => self.nvme(section, names),
            // What the rest should be depends on it.
            None => {
                section.pass_over();
                None
            }
        };
        let socket = self.socket(id, section, mode, sockets);
        Some(FunctionSpec {
            device: device?,
            attach: attach?,
            socket,
            mode,
            queues,
            poll,
            stop_timeout_ms: stop_timeout_ms.unwrap_or(STOP_TIMEOUT_MS_DEFAULT),
        })
    }

    fn virtio_blk(&mut self, section: &mut Section<'_>, names: &mut Names) -> Option<DeviceSpec> {
        let config_wce = section.boolean("config_wce", self.sink).unwrap_or(false);
        let volume = section.required_text("volume", "the ID of a volume", self.sink)?;
        let volume = self.volume_reference(section.key("volume"), &volume, names)?;
        Some(DeviceSpec::VirtioBlk { volume, config_wce })
    }

    fn volume_reference(
        &mut self,
        key: String,
        name: &Spanned<String>,
        names: &mut Names,
    ) -> Option<Id> {
        let id = self.reference(&key, "volume", name, &names.volumes)?;
        names.users.push(Placed {
            value: id.clone(),
            key,
            span: name.span(),
        });
        Some(id)
    }

    /// An ID that is declared in the file.
    fn reference(
        &mut self,
        key: &str,
        what: &str,
        name: &Spanned<String>,
        declared: &BTreeSet<Id>,
    ) -> Option<Id> {
        let id = name.get_ref().parse::<Id>().ok();
        let id = id.filter(|id| declared.contains(id));
        if id.is_none() {
            let known = list(declared.iter().map(Id::as_str));
            let complaint = format!("no {what} `{}`; there are {known}", name.get_ref());
            self.sink.add(name.span(), key, complaint);
        }
        id
    }

    fn socket(
        &mut self,
        id: &Id,
        section: &mut Section<'_>,
        mode: SocketMode,
        sockets: &mut Vec<Placed<(Id, PathBuf)>>,
    ) -> Option<PathBuf> {
        let key = section.key("socket");
        let stated = section.text("socket", self.sink);
        let span = stated.as_ref().map_or(section.span(), Spanned::span);
        let path = match &stated {
            Some(text) => PathBuf::from(text.get_ref()),
            None if mode == SocketMode::Client => {
                self.sink.add(
                    span,
                    &key,
                    "with mode = \"client\", the path of the other side's socket is needed",
                );
                return None;
            }
            None => self.surroundings.runtime_dir.join(format!("{id}.sock")),
        };
        if !path.is_absolute() {
            self.sink
                .add(span.clone(), &key, "a socket is an absolute path");
        }
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            let long = path.as_os_str().len();
            self.sink.add(
                span.clone(),
                &key,
                format!("a socket's path has at most {SOCKET_PATH_MAX} bytes, this one has {long}"),
            );
        }
        sockets.push(Placed {
            value: (id.clone(), path),
            key,
            span,
        });
        stated.map(|text| text.into_inner().into())
    }

    fn no_volume_shared(&mut self, config: &Config, users: &[Placed<Id>]) {
        for (index, user) in users.iter().enumerate() {
            let shared = users[..index]
                .iter()
                .any(|earlier| earlier.value == user.value);
            let uri = config
                .volumes
                .get(&user.value)
                .and_then(|volume| VolumeUri::parse(&volume.uri).ok());
            if shared && uri.is_some_and(|uri| uri.is_exclusive()) {
                let complaint = "something else uses this volume; only a read-only volume may have several users";
                self.sink.add(user.span.clone(), &user.key, complaint);
            }
        }
    }

    fn no_file_twice(&mut self, paths: &[Placed<(Id, String)>]) {
        for (index, place) in paths.iter().enumerate() {
            if let Some(other) = paths[..index]
                .iter()
                .find(|other| other.value.1 == place.value.1)
            {
                let complaint = format!("volume `{}` has the same file", other.value.0);
                self.sink.add(place.span.clone(), &place.key, complaint);
            }
        }
    }

    fn no_socket_twice(&mut self, sockets: &[Placed<(Id, PathBuf)>]) {
        let control = self
            .surroundings
            .runtime_dir
            .join(crate::runtime_dir::CONTROL_SOCKET);
        for (index, place) in sockets.iter().enumerate() {
            let path = &place.value.1;
            let complaint = match sockets[..index].iter().find(|other| other.value.1 == *path) {
                Some(other) => format!("function `{}` has the same socket", other.value.0),
                None if *path == control => "this is the control socket".to_owned(),
                None => continue,
            };
            self.sink.add(place.span.clone(), &place.key, complaint);
        }
    }
}

fn parameter(value: &DeValue<'_>) -> Result<Parameter, String> {
    match value {
        DeValue::Boolean(flag) => Ok(Parameter::Flag(*flag)),
        DeValue::String(text) => Ok(Parameter::Text(text.clone().into_owned())),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix());
            number
                .map(Parameter::Integer)
                .map_err(|_| "the number is too large".to_owned())
        }
        DeValue::Array(items) => items
            .iter()
            .map(|item| parameter(item.get_ref()))
            .collect::<Result<_, _>>()
            .map(Parameter::List),
        DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Table(_) => {
            Err("text, a whole number, true or false is wanted".to_owned())
        }
    }
}

#[cfg(test)]
mod net_tests;
#[cfg(test)]
mod tests;
