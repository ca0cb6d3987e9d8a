//! Mistakes in a configuration, as people read them.

use std::fmt;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// The key, from the root: `function.blk0.queues`. Empty where the file is not TOML.
    pub key: String,
    /// What is wrong, and what is allowed.
    pub message: String,
}

/// All mistakes of a file, in the order of its lines. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Mistakes {
    /// The file's name.
    pub file: String,
    /// What is wrong in it.
    pub list: Vec<Mistake>,
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (
            index,
            Mistake {
                line,
                column,
                key,
                message,
            },
        ) in self.list.iter().enumerate()
        {
            let line_end = if index == 0 { "" } else { "\n" };
            let colon = if key.is_empty() { "" } else { ": " };
            write!(
                f,
                "{line_end}{}:{line}:{column}: {key}{colon}{message}",
                self.file
            )?;
        }
        Ok(())
    }
}

/// The line and column, from 1, of a byte in a text.
pub(super) fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}
