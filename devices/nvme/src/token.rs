//! Waiting for several at once.

use std::fmt;
use std::sync::Arc;

use bluff_pci::Done;

/// Held by all who are waited for: what it was made with is called when the last clone goes, be it that its holder has answered or that it has gone.
#[derive(Clone)]
pub struct Token {
    _last: Arc<Last>,
}

struct Last(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Drop for Last {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

impl Token {
    pub(crate) fn new(done: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self {
            _last: Arc::new(Last(Some(Box::new(done)))),
        }
    }

    /// One more to be waited for.
    pub(crate) fn done(&self) -> Done {
        let this = self.clone();
        Box::new(move || drop(this))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}
