//! The client against a server that keeps the rules, and against replies that break them.
//!
//! ```text
//!   Client --- socket pair --- a thread: Session<Function>      server, function: the rules are kept
//!                        `---- a thread: any bytes              hostile
//! ```

mod function;
mod hostile;
mod probe;
mod server;
mod session;
