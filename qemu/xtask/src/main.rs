//! `cargo xtask`: the verbs of the project.
fn main() {}
