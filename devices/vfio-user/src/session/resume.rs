//! Going on with a session that another process began.

use std::collections::VecDeque;

use bluff_attachment::keeper::Descriptors;

use super::{Session, State};
use crate::capabilities::Agreed;
use crate::framing::MAX_FILES;
use crate::function::PciTarget;
use crate::mappings::Bounds;
use crate::record::{Record, duplicate};
use crate::{Error, Limits};

/// What was agreed on with another process, as far as this one may do it.
fn check(agreed: &Agreed, limits: &Limits) -> Result<(), Error> {
    if agreed.client_fds > MAX_FILES || agreed.max_dma_maps > limits.max_dma_maps {
        return Err(Error::Recorded("more than is offered"));
    }
    Ok(())
}

impl Session<PciTarget> {
    /// Goes on where another process ended: maps what the record names, sets interrupts and masks, and has the function take up its
    /// state. A record is checked as what a client says is: the process that wrote it may have been in a host's hand.
    ///
    /// # Errors
    /// [`Error::Recorded`] and others where it does not fit. Then call [`Session::end`].
    ///
    /// # Panics
    /// Where the session is not idle.
    pub fn resume(&mut self, record: &Record, files: &Descriptors) -> Result<(), Error> {
        self.connect();
        if let Some(agreed) = record.agreed {
            check(&agreed, &self.limits)?;
            self.state = State::Ready(agreed);
        }
        let bounds = Bounds {
            count: record.agreed.map_or(0, |a| a.max_dma_maps as usize),
            bytes: self.limits.max_mapped,
            page: self.limits.page(),
        };
        for (mapping, key) in &record.mappings {
            self.mappings.check(mapping, &bounds)?;
            if mapping.file != key.is_some() || !(mapping.read || mapping.write) {
                return Err(Error::Recorded("a mapping that cannot be"));
            }
            self.mappings.insert(*mapping);
        }
        self.target.resume(record, files)?;
        let partial = &record.partial;
        let taken = partial.files.iter().map(|key| duplicate(files, *key));
        let taken = taken.collect::<Result<_, _>>()?;
        let mut whole = VecDeque::new();
        self.framer
            .push(&partial.bytes, taken, partial.truncated, &mut whole)?;
        match whole.is_empty() {
            true => Ok(()),
            false => Err(Error::Recorded("a whole message")),
        }
    }
}
