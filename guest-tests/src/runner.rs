//! Runs cases against back ends, one after another, each with a bound.
//!
//! ```text
//!   cargo test -p guest-tests --test guests [-- [--list] [FILTER...]]
//! ```
//! A filter is a part of `BACKEND/CASE`. Without the variable [`VARIABLE`] nothing is booted; with it, what is missing on the machine
//! is a failure.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use bluff_qemu::device::VhostUserBlk;
use bluff_qemu::emulator::Qemu;
use bluff_qemu::guest::{Builder, Guest};
use bluff_qemu::image::Image;
use bluff_qemu::kernel::sparse_file;
use bluff_qemu::process::kill_all;
use tempfile::TempDir;

use crate::backend::{Ability, Backend, Running, Volume};

/// `cargo xtask test` sets it to 1.
pub const VARIABLE: &str = "BLUFF_GUEST_TESTS";

/// One thing that a guest must see.
#[derive(Clone, Copy)]
pub struct Case {
    /// What is shown, in words joined by `_`.
    pub name: &'static str,
    /// What the back end must claim for this case to apply.
    pub needs: &'static [Ability],
    /// Above this it has failed.
    pub bound: Duration,
    /// The case itself.
    pub run: fn(&Context<'_>) -> Result<()>,
}

/// What a case works with.
pub struct Context<'a> {
    backend: &'a dyn Backend,
    folder: TempDir,
}

impl Context<'_> {
    /// A folder that goes when the case ends.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the back end claims this.
    pub fn has(&self, ability: Ability) -> bool {
        self.backend.has(ability)
    }

    /// A new sparse file of this size, for a volume with this many queues.
    pub fn volume(&self, name: &str, bytes: u64, queues: u16) -> Result<Volume> {
        let path = self.folder().join(name);
        sparse_file(&path, bytes)?;
        Ok(Volume { path, queues })
    }

    /// Starts a back end for these volumes. `name` tells the back ends of one case apart.
    pub fn start(&self, name: &str, volumes: &[Volume]) -> Result<Box<dyn Running>> {
        let folder: PathBuf = self.folder().join(name);
        std::fs::create_dir_all(&folder)?;
        self.backend
            .start(&folder, volumes)
            .with_context(|| format!("start {}", self.backend.name()))
    }

    /// A guest under QEMU 11.1 (or what stands in for it on this machine).
    pub fn guest(&self) -> Result<Builder> {
        Ok(Guest::builder(&Qemu::new()?, &Image::debian_13()?))
    }

    /// A guest under Debian 12's QEMU 7.2.
    pub fn old_guest(&self) -> Result<Builder> {
        Ok(Guest::builder(&Qemu::debian_12()?, &Image::debian_13()?))
    }

    /// The first function of a back end, with all queues of its volume.
    pub fn function(&self, id: &str, running: &dyn Running, volume: &Volume) -> VhostUserBlk {
        VhostUserBlk::new(id, &running.socket(0)).queues(volume.queues)
    }
}

enum Outcome {
    Passed,
    Failed,
    /// It does not apply: the back end never claimed what it needs.
    NotClaimed,
}

/// The `main` of a test program. Its arguments are the process's.
pub fn main(backends: &[&'static dyn Backend], cases: &[Case]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<_> = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let all = backends
        .iter()
        .flat_map(|backend| cases.iter().map(move |case| (*backend, *case)));
    let chosen: Vec<_> = all
        .filter(|(backend, case)| {
            let name = format!("{}/{}", backend.name(), case.name);
            filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
        })
        .collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for (backend, case) in &chosen {
            println!("{}/{}: test", backend.name(), case.name);
        }
        return ExitCode::SUCCESS;
    }
    if std::env::var(VARIABLE).as_deref() != Ok("1") {
        println!(
            "{} guest tests not run: `cargo xtask test` does, or {VARIABLE}=1",
            chosen.len()
        );
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    let (mut passed, mut failed, mut not_claimed) = (0, Vec::new(), 0);
    println!("running {} guest tests", chosen.len());
    for (backend, case) in chosen {
        let name = format!("{}/{}", backend.name(), case.name);
        match run(&name, backend, case) {
            Outcome::Passed => passed += 1,
            Outcome::Failed => failed.push(name),
            Outcome::NotClaimed => not_claimed += 1,
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "guest tests: {verdict}. {passed} passed; {} failed; {not_claimed} do not apply; {} s",
        failed.len(),
        began.elapsed().as_secs()
    );
    failed.iter().for_each(|name| println!("  failed: {name}"));
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(name: &str, backend: &'static dyn Backend, case: Case) -> Outcome {
    if let Some(missing) = case.needs.iter().find(|ability| !backend.has(**ability)) {
        println!(
            "guest test {name} ... does not apply: {} does not claim {missing:?}",
            backend.name()
        );
        return Outcome::NotClaimed;
    }
    let began = Instant::now();
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let done = catch_unwind(AssertUnwindSafe(|| {
            let folder = tempfile::Builder::new().prefix("bluff-test.").tempdir()?;
            (case.run)(&Context { backend, folder })
        }));
        // The panic itself is on standard error already.
        let _ = sender.send(done.unwrap_or_else(|_| Err(anyhow!("the case panicked"))));
    });
    let result = match receiver.recv_timeout(case.bound) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(anyhow!("the case's thread is gone")),
        Err(RecvTimeoutError::Timeout) => {
            // With its guests and back ends dead, whatever it waits for fails.
            kill_all();
            let detail = receiver
                .recv_timeout(Duration::from_secs(150))
                .and_then(|result| result.map_or_else(Ok, |()| Ok(anyhow!("it passed late"))));
            match detail {
                Ok(error) => Err(error.context(format!("took more than {:?}", case.bound))),
                Err(_) => {
                    println!("guest test {name} ... FAILED: it hangs, even with its guests dead");
                    std::process::exit(1);
                }
            }
        }
    };
    let _ = thread.join();
    let seconds = began.elapsed().as_secs_f32();
    match result {
        Ok(()) => {
            println!("guest test {name} ... ok ({seconds:.1} s)");
            Outcome::Passed
        }
        Err(error) => {
            println!("guest test {name} ... FAILED ({seconds:.1} s): {error:#}");
            Outcome::Failed
        }
    }
}
