//! Volume URIs: `kind:path?option=value&option=value`.

/// What is wrong with a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no size: a whole number, alone or with KiB, MiB, GiB, TiB or PiB")]
pub struct SizeError(pub String);

/// Reads a size in bytes: `4096`, `64KiB`, `1TiB`.
///
/// # Errors
/// [`SizeError`] where it is none, or over 64 bits.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let error = || SizeError(text.into());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let shift = match &text[digits..] {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        "PiB" => 50,
        _ => return Err(error()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// Reads a block size in bytes: 512 or 4096.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse_block_size(text: &str) -> Result<u32, String> {
    match parse_size(text) {
        Ok(512) => Ok(512),
        Ok(4096) => Ok(4096),
        Ok(n) => Err(format!("{n} is not 512 or 4096")),
        Err(e) => Err(e.to_string()),
    }
}

/// What is wrong with a volume URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// No scheme.
    #[error("a volume URI begins with its kind and a colon, as in file:/srv/disk.raw")]
    NoKind,
    /// An option without a value.
    #[error("option {0:?} has no value")]
    NoValue(String),
    /// An option given twice.
    #[error("option {0:?} is given twice")]
    Twice(String),
    /// An option that this kind does not have.
    #[error("unknown option {name:?}; there are {allowed}")]
    Unknown {
        /// The option.
        name: String,
        /// What there is instead.
        allowed: String,
    },
    /// A value that does not fit.
    #[error("option {name:?}: {why}")]
    Value {
        /// The option.
        name: String,
        /// What is wrong, or what is allowed.
        why: String,
    },
    /// The path is missing, or is there and must not be.
    #[error("{0}")]
    Path(&'static str),
}

/// A parsed URI. Each kind takes the options that it knows; what is left over is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    kind: String,
    path: String,
    options: Vec<(String, String)>,
}

impl Uri {
    /// Takes a URI apart. `%XX` is decoded in the path and in values.
    ///
    /// # Errors
    /// [`UriError`] where it is not of this form.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let (kind, rest) = text.split_once(':').ok_or(UriError::NoKind)?;
        if kind.is_empty() {
            return Err(UriError::NoKind);
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut options: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (name, value) = pair
                .split_once('=')
                .ok_or_else(|| UriError::NoValue(pair.into()))?;
            if options.iter().any(|(n, _)| n == name) {
                return Err(UriError::Twice(name.into()));
            }
            options.push((name.into(), decode(value)));
        }
        Ok(Self {
            kind: kind.into(),
            path: decode(path),
            options,
        })
    }

    /// What stands before the colon.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What stands between the colon and the question mark.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Takes an option out.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let i = self.options.iter().position(|(n, _)| n == name)?;
        Some(self.options.remove(i).1)
    }

    /// Takes an option out and reads it.
    ///
    /// # Errors
    /// [`UriError::Value`] with what `read` said.
    pub fn take_as<T, E: ToString>(
        &mut self,
        name: &str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, UriError> {
        self.take(name)
            .map(|v| {
                read(&v).map_err(|e| UriError::Value {
                    name: name.into(),
                    why: e.to_string(),
                })
            })
            .transpose()
    }

    /// Takes `size` and `block_size` out, in bytes, where they are given.
    ///
    /// # Errors
    /// [`UriError::Value`] for a size of 0 or one that is no multiple of the block size.
    pub fn take_shape(&mut self) -> Result<(Option<u64>, Option<u32>), UriError> {
        let block_size = self.take_as("block_size", parse_block_size)?;
        let unit = u64::from(block_size.unwrap_or(512));
        let size = self.take_as("size", |v| match parse_size(v) {
            Ok(n) if n == 0 || !n.is_multiple_of(unit) => {
                Err(format!("{v} is not a multiple of {unit} over 0"))
            }
            Ok(n) => Ok(n),
            Err(e) => Err(e.to_string()),
        })?;
        Ok((size, block_size))
    }

    /// Ends the reading: everything must have been taken.
    ///
    /// # Errors
    /// [`UriError::Unknown`] for the first option that was not.
    pub fn finish(self, allowed: &[&str]) -> Result<(), UriError> {
        match self.options.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(UriError::Unknown {
                name,
                allowed: allowed.join(", "),
            }),
        }
    }
}

fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = (*first == b'%').then(|| tail.get(..2)).flatten();
        let hex = hex.and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[2..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64KiB"), Ok(65536));
        assert_eq!(parse_size("1TiB"), Ok(1 << 40));
        assert_eq!(parse_size("16383PiB"), Ok(16383 << 50));
        for bad in [
            "",
            "KiB",
            "1 MiB",
            "1MB",
            "1.5GiB",
            "-1",
            "99999999TiB",
            "16384PiB",
            "1kb",
            "٣",
        ] {
            assert_eq!(parse_size(bad), Err(SizeError(bad.into())), "{bad}");
        }
    }

    #[test]
    fn uris() {
        let mut uri = Uri::parse("file:/srv/a%20b.raw?size=1GiB&direct=off").unwrap();
        assert_eq!((uri.kind(), uri.path()), ("file", "/srv/a b.raw"));
        assert_eq!(uri.take_as("size", parse_size), Ok(Some(1 << 30)));
        let left = uri.finish(&["size"]);
        assert!(matches!(left, Err(UriError::Unknown { name, .. }) if name == "direct"));
        assert_eq!(Uri::parse("/srv/a.raw"), Err(UriError::NoKind));
        assert_eq!(
            Uri::parse("null:?size"),
            Err(UriError::NoValue("size".into()))
        );
        assert_eq!(
            Uri::parse("null:?a=1&a=2"),
            Err(UriError::Twice("a".into()))
        );
    }
}
