//! What the two sides agree on (vfio-user, "VFIO_USER_VERSION").
//!
//! The reply's list is a subset of what the client proposed, in two ways: capabilities that it did not name are left
//! out, and the defaults of the specification hold for them; numbers are at most the client's where it stated a wish.
//! QEMU receives the reply into the buffer of its request, and breaks with a longer one. So nothing else is said, and
//! that as short as JSON can.

use std::time::Duration;

use serde_json::{Map, Value};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::framing::MAX_FILES;
use crate::spec::HEADER_LEN;

/// The longest version data that is read.
const MAX_JSON: usize = 8192;
/// The default of `max_data_xfer_size`.
const DEFAULT_XFER: u32 = 1 << 20;

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of data in one message, and so of memory that a message takes: 1 MiB. QEMU takes up to 64 MiB.
    pub max_data_xfer_size: u32,
    /// How many mappings there may be: 65535, the default of the specification, which a client that does not ask
    /// may count on.
    pub max_dma_maps: u32,
    /// Bytes that all mappings with a file may have together: 16 TiB, more than any guest has.
    pub max_mapped: u64,
    /// Page sizes that can be mapped, one bit for each. Addresses, sizes and offsets are multiples of the smallest: 4096.
    pub pgsizes: u64,
    /// How long the client may take to answer `DMA_READ` and `DMA_WRITE`: 5 s.
    pub dma_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_data_xfer_size: DEFAULT_XFER,
            max_dma_maps: 65535,
            max_mapped: 16 << 40,
            pgsizes: 4096,
            dma_timeout: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// Bytes of the largest message: a write, or the reply to a `DMA_READ`.
    pub fn max_message(&self) -> usize {
        (HEADER_LEN + 16 + self.max_data_xfer_size as usize).max(HEADER_LEN + 4 + MAX_JSON)
    }

    /// The smallest page.
    pub(crate) fn page(&self) -> u64 {
        1 << self.pgsizes.trailing_zeros()
    }
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Descriptors that the client takes in one message.
    pub client_fds: usize,
    /// Bytes of data that the client takes in one message; zero: none, so no DMA messages.
    pub client_xfer: u32,
    /// How many mappings there may be.
    pub max_dma_maps: u32,
    /// The client may send `REGION_WRITE_MULTI`.
    pub write_multiple: bool,
}

/// A capability that is a number of at least zero.
fn number(list: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, Error> {
    match list.get(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or(Error::Version(name)),
    }
}

/// Reads the client's version data, and says what was agreed on and the data of the reply, with its NUL; no data where
/// the client sent none.
///
/// # Errors
/// [`Error::Version`].
pub(crate) fn negotiate(data: &[u8], limits: &Limits) -> Result<(Agreed, Vec<u8>), Error> {
    let mut agreed = Agreed {
        client_fds: 1,
        client_xfer: DEFAULT_XFER,
        max_dma_maps: limits.max_dma_maps,
        write_multiple: false,
    };
    if data.is_empty() {
        return Ok((agreed, Vec::new()));
    }
    let Some((0, text)) = data.split_last() else {
        return Err(Error::Version("version data does not end with NUL"));
    };
    if text.len() > MAX_JSON {
        return Err(Error::Version("version data is too long"));
    }
    let parsed: Value =
        serde_json::from_slice(text).map_err(|_| Error::Version("version data is no JSON"))?;
    let Value::Object(top) = &parsed else {
        return Err(Error::Version("version data is no object"));
    };
    let nothing = Map::new();
    let list = match top.get("capabilities") {
        None => &nothing,
        Some(Value::Object(list)) => list,
        Some(_) => return Err(Error::Version("capabilities are no object")),
    };
    let mut reply = Map::new();
    let mut say = |name: &str, value: Value| drop(reply.insert(name.to_owned(), value));
    if let Some(n) = number(list, "max_msg_fds")? {
        // More than we ever send is as good as that.
        agreed.client_fds = n.min(MAX_FILES as u64) as usize;
        say("max_msg_fds", MAX_FILES.into());
    }
    if let Some(n) = number(list, "max_data_xfer_size")? {
        agreed.client_xfer = u32::try_from(n).unwrap_or(u32::MAX);
        say("max_data_xfer_size", limits.max_data_xfer_size.into());
    }
    if let Some(n) = number(list, "max_dma_maps")? {
        let wanted = u32::try_from(n).unwrap_or(u32::MAX);
        agreed.max_dma_maps = agreed.max_dma_maps.min(wanted);
        say("max_dma_maps", agreed.max_dma_maps.into());
    }
    if let Some(n) = number(list, "pgsizes")? {
        let both = n & limits.pgsizes;
        if both == 0 {
            return Err(Error::Version("pgsizes has none that can be mapped"));
        }
        say("pgsizes", both.into());
    }
    match list.get("write_multiple") {
        None => {}
        Some(Value::Bool(on)) => {
            agreed.write_multiple = *on;
            say("write_multiple", (*on).into());
        }
        Some(_) => return Err(Error::Version("write_multiple")),
    }
    // Neither migration nor twin_socket is answered: what is not named is not supported.
    let mut top = Map::new();
    top.insert("capabilities".to_owned(), Value::Object(reply));
    let mut text = Value::Object(top).to_string().into_bytes();
    text.push(0);
    Ok((agreed, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agree(text: &str) -> Result<(Agreed, String), Error> {
        let data = [text.as_bytes(), &[0]].concat();
        let (agreed, reply) = negotiate(&data, &Limits::default())?;
        let reply = std::ffi::CString::from_vec_with_nul(reply).unwrap();
        Ok((agreed, reply.into_string().unwrap()))
    }

    /// As QEMU 11.1.3 sends it.
    const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

    #[test]
    fn qemu_gets_what_it_proposed_without_migration() {
        let (agreed, reply) = agree(QEMU).unwrap();
        assert!(reply.len() <= QEMU.len(), "longer than the request");
        let want = Agreed {
            client_fds: 16,
            client_xfer: 1 << 20,
            max_dma_maps: 65535,
            write_multiple: true,
        };
        assert_eq!(agreed, want);
        let got: Value = serde_json::from_str(&reply).unwrap();
        let want = serde_json::json!({"capabilities": {"max_data_xfer_size": 1048576, "max_dma_maps": 65535,
            "max_msg_fds": 16, "pgsizes": 4096, "write_multiple": true}});
        assert_eq!(got, want);
    }

    #[test]
    fn what_is_not_proposed_is_not_answered() {
        let defaults = Agreed {
            client_fds: 1,
            client_xfer: 1 << 20,
            max_dma_maps: 65535,
            write_multiple: false,
        };
        let empty = r#"{"capabilities":{}}"#;
        assert_eq!(agree(empty).unwrap(), (defaults, empty.to_owned()));
        let twin = r#"{"capabilities":{"twin_socket":{"supported":true},"x":[1]}}"#;
        assert_eq!(agree(twin).unwrap(), (defaults, empty.to_owned()));
        assert_eq!(
            negotiate(&[], &Limits::default()).unwrap(),
            (defaults, vec![])
        );
    }

    #[test]
    fn numbers_are_at_most_the_clients() {
        let text = r#"{"capabilities":{"max_msg_fds":0,"max_data_xfer_size":7,"max_dma_maps":3,"pgsizes":18446744073709551615}}"#;
        let (agreed, reply) = agree(text).unwrap();
        assert_eq!((agreed.client_fds, agreed.client_xfer), (0, 7));
        assert_eq!(agreed.max_dma_maps, 3);
        assert!(reply.contains(r#""pgsizes":4096"#) && reply.contains(r#""max_dma_maps":3"#));
    }

    #[test]
    fn d4_version_data_that_makes_no_sense_is_refused() {
        let limits = Limits::default();
        for raw in [
            &b"{}"[..],
            b"{\0",
            b"\0",
            b"}\0",
            b"[]\0",
            b"null\0",
            b"{}\0\0",
            b"{\"capabilities\":1}\0",
            b"\xff\xfe\0",
        ] {
            let refused = negotiate(raw, &limits);
            assert!(matches!(refused, Err(Error::Version(_))), "{raw:?}");
        }
        for value in [
            "-1",
            "1.5",
            "\"1\"",
            "null",
            "true",
            "1e400",
            "[1]",
            "18446744073709551616",
        ] {
            for name in [
                "max_msg_fds",
                "max_data_xfer_size",
                "max_dma_maps",
                "pgsizes",
            ] {
                let text = format!("{{\"capabilities\":{{\"{name}\":{value}}}}}\0");
                let refused = negotiate(text.as_bytes(), &limits);
                assert!(matches!(refused, Err(Error::Version(_))), "{text}");
            }
        }
        for bad in [
            r#"{"capabilities":{"write_multiple":1}}"#,
            r#"{"capabilities":{"pgsizes":2048}}"#,
        ] {
            assert!(agree(bad).is_err(), "{bad}");
        }
        let deep = "[".repeat(4000) + "\0";
        assert!(negotiate(deep.as_bytes(), &limits).is_err());
        let long = format!("{{\"x\":\"{}\"}}\0", "x".repeat(MAX_JSON));
        assert!(negotiate(long.as_bytes(), &limits).is_err());
    }
}
