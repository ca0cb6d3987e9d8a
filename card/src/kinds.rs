//! The kinds of volumes and layers: the one place that names them.
//!
//! Each kind reads its own options. So a configuration is checked by the very code that will read it when the volume is
//! opened, before anything is opened; what only the storage can know (that a file is there, that a size fits) shows then.

use std::collections::BTreeMap;
use std::sync::Arc;

use bluff_block::{OpenError, Uri, UriError, Volume, null, ram};
use bluff_layers::{Delay, DelayOptions, Fault, FaultOptions, OptionError};

use crate::spec::Parameter;

/// What a kind of volume is.
#[derive(Debug)]
pub struct VolumeKind {
    /// The URI's scheme.
    pub scheme: &'static str,
    /// Reads a URI; says whether it asks for a read-only volume.
    parse: fn(Uri) -> Result<bool, UriError>,
    open: fn(Uri) -> Result<Arc<dyn Volume>, OpenError>,
    /// Whether writes of one function would meet another's: then one function only may use it.
    pub exclusive: bool,
    /// Whether its contents are in the memory of the data half, and end with it.
    pub volatile: bool,
}

/// Every kind of volume.
pub const VOLUMES: &[VolumeKind] = &[
    VolumeKind {
        scheme: "null",
        parse: |uri| null::parse(uri).map(|_| false),
        open: null::open,
        exclusive: false,
        volatile: false,
    },
    VolumeKind {
        scheme: "ram",
        parse: |uri| ram::parse(uri).map(|_| false),
        open: ram::open,
        exclusive: true,
        volatile: true,
    },
    VolumeKind {
        scheme: "file",
        parse: |uri| bluff_file::parse(uri).map(|(_, options)| options.read_only),
        open: bluff_file::open,
        exclusive: true,
        volatile: false,
    },
];

/// Parameters as layers read them.
type Options = BTreeMap<String, String>;
/// Puts a layer around a volume.
type Wrap = fn(Arc<dyn Volume>, &Options) -> Result<Arc<dyn Volume>, OptionError>;

/// What a kind of layer is.
#[derive(Debug)]
pub struct LayerKind {
    /// Its word.
    pub kind: &'static str,
    parse: fn(&Options) -> Result<(), OptionError>,
    wrap: Wrap,
}

/// Every kind of layer.
pub const LAYERS: &[LayerKind] = &[
    LayerKind {
        kind: "delay",
        parse: |options| DelayOptions::from_options(options).map(drop),
        wrap: |inner, options| {
            let options = DelayOptions::from_options(options)?;
            Ok(Arc::new(Delay::new(inner, options)))
        },
    },
    LayerKind {
        kind: "fault",
        parse: |options| FaultOptions::from_options(options).map(drop),
        wrap: |inner, options| {
            let options = FaultOptions::from_options(options)?;
            Ok(Arc::new(Fault::new(inner, vec![options])))
        },
    },
];

/// What is wrong with a parameter of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterMistake {
    /// The parameter.
    pub name: String,
    /// Whether it is missing.
    pub is_missing: bool,
    /// What is wrong, and what is allowed.
    pub message: String,
}

impl LayerKind {
    /// The layer of that word; the error says which there are.
    pub fn find(kind: &str) -> Result<&'static Self, String> {
        let found = LAYERS.iter().find(|layer| layer.kind == kind);
        found.ok_or_else(|| format!("layers are {}", list(LAYERS.iter().map(|layer| layer.kind))))
    }

    /// Every mistake in its parameters.
    pub fn mistakes(&self, parameters: &BTreeMap<String, Parameter>) -> Vec<ParameterMistake> {
        let mut options = options(parameters);
        let mut mistakes: Vec<ParameterMistake> = Vec::new();
        // A layer tells the first one, so each is told without those before it.
        while let Err(error) = (self.parse)(&options) {
            let (name, is_missing, message) = match error {
                OptionError::Unknown { name, allowed } => {
                    (name, false, format!("unknown key; allowed: {allowed}"))
                }
                OptionError::Value {
                    name,
                    value,
                    allowed,
                } => (name, false, format!("{value:?} is not {allowed}")),
                OptionError::Missing(name) => (name.to_owned(), true, self.missing(name, &options)),
            };
            options.remove(&name);
            // One that is missing is there with a mistake, or nothing more can be told without it.
            let is_told = mistakes.iter().any(|mistake| mistake.name == name);
            if !is_told {
                mistakes.push(ParameterMistake {
                    name,
                    is_missing,
                    message,
                });
            }
            if is_missing {
                break;
            }
        }
        mistakes
    }

    /// That a parameter is missing, and what it may be.
    fn missing(&self, name: &str, options: &Options) -> String {
        let mut options = options.clone();
        options.insert(name.to_owned(), String::new());
        match (self.parse)(&options) {
            Err(OptionError::Value { allowed, .. }) => format!("missing; allowed: {allowed}"),
            _ => "missing".to_owned(),
        }
    }

    /// Puts the layer around a volume.
    ///
    /// # Errors
    /// Where a parameter does not fit.
    pub fn wrap(
        &self,
        inner: Arc<dyn Volume>,
        parameters: &BTreeMap<String, Parameter>,
    ) -> Result<Arc<dyn Volume>, OptionError> {
        (self.wrap)(inner, &options(parameters))
    }
}

fn options(parameters: &BTreeMap<String, Parameter>) -> Options {
    let each = parameters.iter();
    each.map(|(name, value)| (name.clone(), text(value)))
        .collect()
}

/// A parameter as layers read it.
fn text(parameter: &Parameter) -> String {
    match parameter {
        Parameter::Flag(true) => "on".into(),
        Parameter::Flag(false) => "off".into(),
        Parameter::Integer(number) => number.to_string(),
        Parameter::Text(text) => text.clone(),
        Parameter::List(all) => all.iter().map(text).collect::<Vec<_>>().join(","),
    }
}

/// A URI that was read by the kind that it names.
#[derive(Debug)]
pub struct VolumeUri {
    /// The kind of volume.
    pub kind: &'static VolumeKind,
    uri: Uri,
    read_only: bool,
}

impl VolumeUri {
    /// Reads a URI; the error says what is wrong with it and what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        let schemes = list(VOLUMES.iter().map(|kind| kind.scheme));
        let uri = Uri::parse(text).map_err(|error| match error {
            UriError::NoKind => format!("{error}; kinds are {schemes}"),
            error => error.to_string(),
        })?;
        let Some(kind) = VOLUMES.iter().find(|kind| kind.scheme == uri.kind()) else {
            return Err(format!(
                "unknown scheme `{}`; schemes are {schemes}",
                uri.kind()
            ));
        };
        let read_only = (kind.parse)(uri.clone()).map_err(|error| error.to_string())?;
        Ok(Self {
            kind,
            uri,
            read_only,
        })
    }

    /// What stands between the scheme and the options.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// Whether only one function may stand on it.
    pub fn is_exclusive(&self) -> bool {
        self.kind.exclusive && !self.read_only
    }

    /// Opens the volume.
    ///
    /// # Errors
    /// What the storage says.
    pub fn open(self) -> Result<Arc<dyn Volume>, OpenError> {
        (self.kind.open)(self.uri)
    }
}

/// Names as a person would list them: `a`, `b` and `c`.
pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_of_every_kind() {
        for (uri, scheme, path) in [
            ("null:?size=1TiB", "null", ""),
            ("null:", "null", ""),
            ("ram:?size=256MiB", "ram", ""),
            ("file:/srv/disk0.raw", "file", "/srv/disk0.raw"),
            (
                "file:/srv/a%20b.raw?size=1PiB&direct=off",
                "file",
                "/srv/a b.raw",
            ),
        ] {
            let parsed = VolumeUri::parse(uri).unwrap();
            assert_eq!((parsed.kind.scheme, parsed.path()), (scheme, path));
        }
    }

    #[test]
    fn each_mistake_names_what_is_allowed() {
        for (uri, part) in [
            ("/srv/disk0.raw", "kinds are `null`, `ram` and `file`"),
            ("nfs:/srv", "unknown scheme `nfs`; schemes are `null`"),
            ("file:", "needs an absolute path, as in file:/srv"),
            ("file:disk0.raw", "needs an absolute path"),
            ("ram:/x?size=1GiB", "has no path"),
            ("ram:", "option \"size\": a ram volume needs one"),
            ("ram:?size=1GB", "alone or with KiB, MiB, GiB, TiB or PiB"),
            ("ram:?size=16384PiB", "is no size"),
            ("ram:?size=1000", "not a multiple of 512 over 0"),
            ("null:?size=0", "not a multiple of 512 over 0"),
            ("null:?size=1536&block_size=4096", "multiple of 4096"),
            ("null:?size=1GiB&block_size=1024", "1024 is not 512 or 4096"),
            ("file:/x?block_size=8KiB", "8192 is not 512 or 4096"),
            ("ram:?size=1GiB&size=2GiB", "twice"),
            (
                "file:/x?cache=on",
                "unknown option \"cache\"; there are size, block_size, direct, read_only",
            ),
            ("file:/x?direct=maybe", "is not auto, on or off"),
            ("file:/x?read_only=yes", "is not on or off"),
            ("file:/x?direct", "has no value"),
        ] {
            let error = VolumeUri::parse(uri).unwrap_err();
            assert!(error.contains(part), "{uri}: {error}");
        }
    }

    #[test]
    fn writable_data_has_one_user() {
        for (uri, exclusive) in [
            ("file:/x", true),
            ("file:/x?read_only=on", false),
            ("ram:?size=1GiB", true),
            ("null:?size=1GiB", false),
        ] {
            assert_eq!(VolumeUri::parse(uri).unwrap().is_exclusive(), exclusive);
        }
    }

    fn mistakes(kind: &str, parameters: &[(&str, &str)]) -> Vec<(String, String)> {
        let text = |(name, value): &(&str, &str)| {
            ((*name).to_owned(), Parameter::Text((*value).to_owned()))
        };
        let parameters = parameters.iter().map(text).collect();
        let mistakes = LayerKind::find(kind).unwrap().mistakes(&parameters);
        mistakes.into_iter().map(|m| (m.name, m.message)).collect()
    }

    #[test]
    fn layers_tell_every_mistake_in_their_parameters() {
        assert_eq!(
            mistakes("delay", &[("read", "2ms"), ("range", "0-1PiB")]),
            []
        );
        for (kind, name, value, allowed) in [
            ("delay", "read", "2", "a time such as 200us, 2ms or 1s"),
            ("delay", "rate", "2", "a number from 0 to 1"),
            ("delay", "rate", "nan", "a number from 0 to 1"),
            ("delay", "range", "1MiB", "two sizes such as 0-1MiB"),
            ("delay", "range", "2MiB-1MiB", "the first below the second"),
            ("delay", "when", "now", "before or after"),
            ("delay", "raed", "2ms", "allowed: read, write"),
            ("fault", "action", "break", "error, stall, torn or reorder"),
        ] {
            let found = mistakes(kind, &[(name, value)]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, name);
            assert!(found[0].1.contains(allowed), "{found:?}");
        }
        let found = mistakes(
            "fault",
            &[
                ("action", "torn"),
                ("kinds", "reads"),
                ("rate", "-1"),
                ("colour", "red"),
                ("count", "many"),
            ],
        );
        let names: Vec<_> = found.iter().map(|m| m.0.as_str()).collect();
        assert_eq!(names, ["kinds", "rate", "count", "colour"], "{found:?}");
        let found = mistakes("fault", &[("kinds", "read")]);
        let missing = "missing; allowed: error, stall, torn or reorder";
        assert_eq!(found, [("action".to_owned(), missing.to_owned())]);
        assert!(
            LayerKind::find("crypt")
                .unwrap_err()
                .contains("`delay` and `fault`")
        );
    }
}
