//! The stage of `cargo xtask test` that boots guests.

use anyhow::Result;

use crate::metadata::Workspace;
use crate::tally::Tally;
use crate::test::{self, Options};
use crate::{packages, run};

/// The programs that guests are shown, and that the demonstration and the benchmark run.
const PROGRAMS: &[&str] = &["bluff-card", "bluff-reference"];

/// Builds the programs as they are shipped; says where they are.
pub fn build(workspace: &Workspace) -> Result<std::path::PathBuf> {
    let mut command = run::cargo(["build", "--locked", "--release"]);
    for package in PROGRAMS {
        command.args(["--package", package]);
    }
    run::succeed(command.current_dir(&workspace.root))?;
    Ok(workspace.target.join("release"))
}

/// Runs every guest test and counts them.
pub fn run(workspace: &Workspace, options: &Options) -> Result<Tally> {
    packages::ensure(packages::GUESTS)?;
    let programs = build(workspace)?;
    let mut command = test::cargo_test(workspace, options.long);
    command.args(["--package", "guest-tests", "--test", "guests"]);
    command
        .env("BLUFF_GUEST_TESTS", "1")
        .env("BLUFF_PROGRAMS", programs);
    test::count(command)
}
