//! The kinds of volumes and layers, by the words that a configuration may use for them.
//!
//! What is written here can be checked before anything is opened: schemes, options and the form of their values. What
//! only the kind itself can know (that a file is there, that a size fits) is answered when the volume is opened.

use crate::spec::Parameter;
use crate::units;

/// The form of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bytes, as [`units::parse_size`] reads them.
    Size,
    /// Time, as [`units::parse_duration`] reads it.
    Duration,
    /// A whole number that is not negative.
    Number,
    /// `on` or `off`; in a layer, also `true` or `false`.
    Switch,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Any text.
    Text,
}

impl Form {
    /// Checks a value; the error says what is allowed.
    pub fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Size => units::parse_size(text)
                .map(drop)
                .map_err(|error| error.to_string()),
            Self::Duration => units::parse_duration(text)
                .map(drop)
                .map_err(|error| error.to_string()),
            Self::Number if text.parse::<u64>().is_err() => {
                Err("a whole number is wanted".to_owned())
            }
            Self::Switch if !["on", "off"].contains(&text) => {
                Err("`on` or `off` is wanted".to_owned())
            }
            Self::Word(words) if !words.contains(&text) => {
                Err(format!("one of {} is wanted", words.join(", ")))
            }
            Self::Number | Self::Switch | Self::Word(_) | Self::Text => Ok(()),
        }
    }

    fn check_parameter(self, value: &Parameter) -> Result<(), String> {
        match (self, value) {
            (_, Parameter::List(values)) => values
                .iter()
                .try_for_each(|value| self.check_parameter(value)),
            (_, Parameter::Text(text)) => self.check(text),
            (Self::Size | Self::Number, Parameter::Integer(number)) if *number >= 0 => Ok(()),
            (Self::Switch, Parameter::Flag(_)) => Ok(()),
            (Self::Size, _) => Err(units::BadSize.to_string()),
            (Self::Duration, _) => Err(units::BadDuration.to_string()),
            (Self::Number, _) => Err("a whole number is wanted".to_owned()),
            (Self::Switch, _) => Err("`true` or `false` is wanted".to_owned()),
            (Self::Word(_) | Self::Text, _) => Err("text is wanted".to_owned()),
        }
    }
}

/// What a kind of volume is told in its URI.
#[derive(Debug)]
pub struct VolumeKind {
    /// The URI's scheme.
    pub scheme: &'static str,
    /// Whether a path stands after the scheme.
    has_path: bool,
    /// Its options.
    options: &'static [(&'static str, Form)],
    /// Options that it cannot do without.
    required: &'static [&'static str],
    /// Whether writes of one function would meet another's: then one function only may use it.
    pub exclusive: bool,
}

/// Every kind of volume.
pub const VOLUMES: &[VolumeKind] = &[
    VolumeKind {
        scheme: "null",
        has_path: false,
        options: &[("size", Form::Size), ("block_size", Form::Size)],
        required: &["size"],
        exclusive: false,
    },
    VolumeKind {
        scheme: "ram",
        has_path: false,
        options: &[("size", Form::Size), ("block_size", Form::Size)],
        required: &["size"],
        exclusive: true,
    },
    VolumeKind {
        scheme: "file",
        has_path: true,
        options: &[
            ("size", Form::Size),
            ("block_size", Form::Size),
            ("read_only", Form::Switch),
            ("direct", Form::Word(&["auto", "on", "off"])),
        ],
        required: &[],
        exclusive: true,
    },
];

/// What a kind of layer is told.
#[derive(Debug)]
pub struct LayerKind {
    /// Its word.
    pub kind: &'static str,
    parameters: &'static [(&'static str, Form)],
}

/// Every kind of layer.
pub const LAYERS: &[LayerKind] = &[
    LayerKind {
        kind: "delay",
        parameters: &[
            ("read", Form::Duration),
            ("write", Form::Duration),
            ("flush", Form::Duration),
            ("discard", Form::Duration),
            ("write_zeroes", Form::Duration),
            ("jitter", Form::Duration),
            ("range", Form::Text),
            ("rate", Form::Text),
            ("when", Form::Word(&["before", "after"])),
            ("seed", Form::Number),
        ],
    },
    LayerKind {
        kind: "fault",
        parameters: &[
            ("action", Form::Word(&["error", "stall", "torn", "reorder"])),
            (
                "error",
                Form::Word(&["io", "nospace", "readonly", "unsupported", "unavailable"]),
            ),
            ("window", Form::Number),
            ("kinds", Form::Text),
            ("range", Form::Text),
            ("rate", Form::Text),
            ("skip", Form::Number),
            ("count", Form::Number),
            ("seed", Form::Number),
        ],
    },
];

impl LayerKind {
    /// The layer of that word; the error says which there are.
    pub fn find(kind: &str) -> Result<&'static Self, String> {
        let found = LAYERS.iter().find(|layer| layer.kind == kind);
        found.ok_or_else(|| format!("layers are {}", list(LAYERS.iter().map(|layer| layer.kind))))
    }

    /// Checks one parameter; the error says what is allowed.
    pub fn check(&self, name: &str, value: &Parameter) -> Result<(), String> {
        match self.parameters.iter().find(|(known, _)| *known == name) {
            Some((_, form)) => form.check_parameter(value),
            None => Err(format!(
                "a {} layer knows {}",
                self.kind,
                list(self.parameter_names())
            )),
        }
    }

    fn parameter_names(&self) -> impl Iterator<Item = &'static str> {
        self.parameters.iter().map(|(name, _)| *name)
    }
}

/// A URI that was read, as far as the whole card needs to know it.
#[derive(Debug)]
pub struct VolumeUri<'a> {
    /// The kind of volume.
    pub kind: &'static VolumeKind,
    /// What stands between the scheme and the options.
    pub path: &'a str,
    /// Whether it was asked to be read-only.
    pub read_only: bool,
}

impl<'a> VolumeUri<'a> {
    /// Reads a URI; the error says what is wrong with it and what is allowed.
    pub fn parse(uri: &'a str) -> Result<Self, String> {
        let schemes = || list(VOLUMES.iter().map(|kind| kind.scheme));
        let Some((scheme, rest)) = uri.split_once(':') else {
            return Err(format!(
                "a URI begins with its scheme and a colon; schemes are {}",
                schemes()
            ));
        };
        let Some(kind) = VOLUMES.iter().find(|kind| kind.scheme == scheme) else {
            return Err(format!(
                "unknown scheme `{scheme}`; schemes are {}",
                schemes()
            ));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        match (kind.has_path, path.is_empty()) {
            (true, true) => return Err(format!("a path is missing: `{scheme}:/path`")),
            (true, false) if !path.starts_with('/') => {
                return Err(format!("the path must be absolute: `{scheme}:/{path}`"));
            }
            (false, false) => return Err(format!("`{scheme}` has no path: `{scheme}:?size=1GiB`")),
            (true, false) | (false, true) => {}
        }
        let mut volume = Self {
            kind,
            path,
            read_only: false,
        };
        let mut seen: Vec<&str> = Vec::new();
        for option in query.split('&').filter(|option| !option.is_empty()) {
            volume.option(option, &mut seen)?;
        }
        match kind.required.iter().find(|name| !seen.contains(name)) {
            Some(name) => Err(format!("`{scheme}` needs the option `{name}`")),
            None => Ok(volume),
        }
    }

    fn option(&mut self, option: &'a str, seen: &mut Vec<&'a str>) -> Result<(), String> {
        let Some((name, value)) = option.split_once('=') else {
            return Err(format!("option `{option}` has no value: `{option}=…`"));
        };
        let options = self.kind.options;
        let Some((_, form)) = options.iter().find(|(known, _)| *known == name) else {
            let known = list(options.iter().map(|(name, _)| *name));
            return Err(format!(
                "unknown option `{name}`; `{}` knows {known}",
                self.kind.scheme
            ));
        };
        if seen.contains(&name) {
            return Err(format!("option `{name}` stands there twice"));
        }
        seen.push(name);
        form.check(value)
            .map_err(|error| format!("option `{name}`: {error}"))?;
        if name == "read_only" {
            self.read_only = value == "on";
        }
        Ok(())
    }

    /// Whether only one function may stand on it.
    pub fn is_exclusive(&self) -> bool {
        self.kind.exclusive && !self.read_only
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
    fn uris_of_the_issue() {
        assert_eq!(
            VolumeUri::parse("null:?size=1TiB").unwrap().kind.scheme,
            "null"
        );
        assert_eq!(
            VolumeUri::parse("ram:?size=256MiB").unwrap().kind.scheme,
            "ram"
        );
        assert_eq!(
            VolumeUri::parse("file:/srv/disk0.raw").unwrap().path,
            "/srv/disk0.raw"
        );
        assert!(VolumeUri::parse("file:/srv/disk0.raw?size=1GiB&direct=off").is_ok());
    }

    #[test]
    fn each_mistake_names_what_is_allowed() {
        for (uri, part) in [
            ("/srv/disk0.raw", "schemes are `null`, `ram` and `file`"),
            ("nfs:/srv", "unknown scheme `nfs`"),
            ("file:", "a path is missing"),
            ("file:disk0.raw", "must be absolute"),
            ("ram:/x?size=1GiB", "has no path"),
            ("ram:", "needs the option `size`"),
            ("ram:?size=1GB", "option `size`: a size is"),
            ("ram:?size=1GiB&size=2GiB", "twice"),
            (
                "file:/x?cache=on",
                "unknown option `cache`; `file` knows `size`",
            ),
            ("file:/x?direct=maybe", "one of auto, on, off"),
            ("file:/x?direct", "has no value"),
        ] {
            let error = VolumeUri::parse(uri).unwrap_err();
            assert!(error.contains(part), "{uri}: {error}");
        }
    }

    #[test]
    fn writable_data_has_one_user() {
        assert!(VolumeUri::parse("file:/x").unwrap().is_exclusive());
        assert!(
            !VolumeUri::parse("file:/x?read_only=on")
                .unwrap()
                .is_exclusive()
        );
        assert!(!VolumeUri::parse("null:?size=1GiB").unwrap().is_exclusive());
    }

    #[test]
    fn layers_check_their_parameters() {
        let delay = LayerKind::find("delay").unwrap();
        assert!(
            delay
                .check("read", &Parameter::Text("2ms".to_owned()))
                .is_ok()
        );
        assert!(
            delay
                .check("read", &Parameter::Integer(2))
                .unwrap_err()
                .contains("a duration is")
        );
        assert!(
            delay
                .check("raed", &Parameter::Integer(2))
                .unwrap_err()
                .contains("knows `read`")
        );
        assert!(
            LayerKind::find("crypt")
                .unwrap_err()
                .contains("`delay` and `fault`")
        );
    }
}
