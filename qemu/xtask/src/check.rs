//! `cargo xtask check`: what holds without running anything. It needs no network once the dependencies are fetched.

mod arrows;
mod duplicates;
mod length;
mod licences;
mod spdx;

use anyhow::Result;

use crate::metadata::Workspace;
use crate::run;

/// Runs every check, also after one has failed.
pub fn run(workspace: &Workspace) -> Result<bool> {
    let mut failed: Vec<&str> = Vec::new();
    let mut report = |name: &'static str, complaints: Vec<String>| {
        for complaint in &complaints {
            println!("{name}: {complaint}");
        }
        if !complaints.is_empty() {
            failed.push(name);
        }
    };

    run::say("folder arrows, licences, duplicate versions, length of files");
    report("arrows", arrows::complaints(workspace));
    report("licences", licences::complaints(workspace));
    report("duplicates", duplicates::complaints(workspace)?);
    for warning in length::warnings(workspace)? {
        println!("warning: {warning}");
    }

    let clippy = [
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    // A workspace of its own, which nothing else here builds.
    let fuzz = ["fetch", "--locked", "--manifest-path", "fuzz/Cargo.toml"];
    report("lock file of the fuzz targets", cargo(workspace, &fuzz));
    report(
        "format",
        cargo(workspace, &["fmt", "--all", "--", "--check"]),
    );
    report("clippy", cargo(workspace, &clippy));
    report(
        "documentation",
        cargo(workspace, &["doc", "--locked", "--no-deps", "--workspace"]),
    );

    match failed.as_slice() {
        [] => println!("check passed"),
        names => println!("check failed: {}", names.join(", ")),
    }
    Ok(failed.is_empty())
}

fn cargo(workspace: &Workspace, arguments: &[&str]) -> Vec<String> {
    let mut command = run::cargo(arguments);
    command
        .current_dir(&workspace.root)
        .env("RUSTDOCFLAGS", "-D warnings");
    run::say(&run::display(&command));
    run::succeed(&mut command)
        .err()
        .map(|error| format!("{error:#}"))
        .into_iter()
        .collect()
}
