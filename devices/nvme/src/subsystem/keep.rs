//! Who remembers what hosts have formatted.
//!
//! ```text
//!   erased, flushed --> Formatting::finish --> FormatKeeper::keep --> recorded somewhere
//!                                                                       |
//!   hosts see the new format, the command is answered <-- Kept::answer <'
//! ```
//!
//! Until the answer the namespaces refuse commands, so nothing can be written in a format that is not the recorded one. What is waited for is not the controller's
//! any more: it can be reset and shut down meanwhile, and the answer still decides which format there is.

use std::fmt;

use super::Formatting;

/// A namespace's LBA format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceFormat {
    /// Its NSID.
    pub nsid: u32,
    /// Bytes of a logical block: 512 or 4096.
    pub block_size: u32,
}

/// Who keeps the block sizes that hosts format namespaces to, for as long as their volumes' contents. What it has kept is given back with
/// [`NamespaceOptions::block_size`](super::NamespaceOptions::block_size) when the namespace is made again, or its host finds everything elsewhere.
pub trait FormatKeeper: fmt::Debug + Send + Sync {
    /// Records that these namespaces have these formats: all or none of them, durably. They are erased already. It must not wait: the answer is given by [`Kept::answer`], on any thread,
    /// now or later.
    fn keep(&self, formats: &[NamespaceFormat], kept: Kept);
}

/// It was certainly not recorded, and never will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the format was not recorded")]
pub struct NotKept;

/// Keeps formats as long as the subsystem is there: for volumes that do not outlive it either.
#[derive(Clone, Copy, Debug, Default)]
pub struct Transient;

impl FormatKeeper for Transient {
    fn keep(&self, _: &[NamespaceFormat], kept: Kept) {
        kept.answer(Ok(()));
    }
}

type Then = Box<dyn FnOnce(Result<(), NotKept>) + Send + Sync>;

/// The end of a format, that a [`FormatKeeper`] has in its hand. Where it is dropped, nobody knows what was recorded: the namespaces stay blocked until their subsystem is made anew, since
/// one of two formats would be the wrong one.
#[must_use]
pub struct Kept {
    formatting: Option<Formatting>,
    then: Option<Then>,
}

impl Kept {
    pub(super) fn new(
        formatting: Formatting,
        then: impl FnOnce(Result<(), NotKept>) + Send + Sync + 'static,
    ) -> Self {
        Self {
            formatting: Some(formatting),
            then: Some(Box::new(then)),
        }
    }

    /// It is recorded, and hosts see the new formats; or it is not, and the namespaces are what they were, erased.
    pub fn answer(mut self, kept: Result<(), NotKept>) {
        if let Some(formatting) = self.formatting.take() {
            match kept {
                Ok(()) => formatting.hold(),
                Err(NotKept) => drop(formatting),
            }
        }
        // After the tables that say so.
        if let Some(then) = self.then.take() {
            then(kept);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(formatting) = self.formatting.take() {
            log::warn!("{formatting:?}: nobody says whether it was recorded");
            formatting.leave();
        }
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kept").field(&self.formatting).finish()
    }
}
