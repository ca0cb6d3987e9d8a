//! `cargo xtask`: the verbs of the project.
//!
//! ```text
//! check   format, lints, documentation, folder arrows, licences, duplicate versions
//! test    unit and integration tests, the data path on aarch64 under emulation, guests
//! fuzz    fuzz targets, for a time
//! demo    a VM works on a function of the card, from nothing to a summary
//! bench   the data path against an ideal ring and against others
//! ```
//!
//! Each verb says what it does while it does it, ends in one line that sums it up, and exits with 0 only when all of it
//! succeeded. Nothing here is needed to build or to run the product.

mod bench;
mod check;
mod demo;
mod fuzz;
mod guest;
mod metadata;
mod packages;
mod run;
mod tally;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::metadata::Workspace;

/// The verbs of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Format, lints, documentation, folder arrows, licences, duplicate versions
    Check,
    /// All tests: the workspace, the data path on aarch64 under emulation, guests
    Test(test::Options),
    /// Run the fuzz targets, or list them
    Fuzz(fuzz::Options),
    /// Show a VM at work on a function of the card
    Demo(demo::Options),
    /// Measure the data path
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = Workspace::load().and_then(|workspace| match arguments.verb {
        Verb::Check => check::run(&workspace),
        Verb::Test(options) => test::run(&workspace, &options),
        Verb::Fuzz(options) => fuzz::run(&workspace, &options),
        Verb::Demo(options) => demo::run(&workspace, &options),
        Verb::Bench(options) => bench::run(&workspace, &options),
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
