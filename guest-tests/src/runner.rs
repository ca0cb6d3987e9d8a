//! Runs cases against what serves functions ([`Peer`]), one after another, each with a bound.
//!
//! ```text
//!   cargo test -p guest-tests --test guests [-- [--list] [FILTER...]]
//! ```
//! A filter is a part of `PEER/CASE`. Without the variable [`VARIABLE`] nothing is booted; with it, what is missing on the machine
//! is a failure. Without a filter, and without [`LONG_VARIABLE`], only what a [`Stage`] names is run: every change waits for it.

use std::fmt::Debug;
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
use bluff_qemu::process::{children_time, kill_all, tail};
use tempfile::TempDir;

use crate::backend::{Backend, Running, Volume};

/// `cargo xtask test` sets it to 1.
pub const VARIABLE: &str = "BLUFF_GUEST_TESTS";

/// `cargo xtask test --long` sets it to 1: every case against every back end, with full counts.
pub const LONG_VARIABLE: &str = "BLUFF_TEST_LONG";

/// Whether full counts are asked for.
pub fn is_long() -> bool {
    std::env::var(LONG_VARIABLE).as_deref() == Ok("1")
}

/// What serves functions to guests, as the runner sees it. Each kind of function has a trait of its own beyond this.
pub trait Peer: Sync {
    /// What not every peer can do.
    type Ability: Copy + Debug + PartialEq + Sync + 'static;

    /// Its name in those of the cases.
    fn name(&self) -> &'static str;

    /// Whether it claims this.
    fn has(&self, ability: Self::Ability) -> bool;
}

/// A peer, and which cases are run against it each time.
pub struct Stage<P: ?Sized + 'static = dyn Backend> {
    /// The peer.
    pub backend: &'static P,
    /// The cases.
    pub always: Always,
}

/// Which cases are run without [`LONG_VARIABLE`].
#[derive(Clone, Copy, Debug)]
pub enum Always {
    /// All of them.
    All,
    /// Those of these names.
    Named(&'static [&'static str]),
    /// None, and not with [`LONG_VARIABLE`] either: a filter has to name them. For a peer that is not there yet.
    Filtered,
}

impl Always {
    fn has(self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => is_long() || names.contains(&name),
            Self::Filtered => false,
        }
    }
}

/// One thing that a guest must see.
pub struct Case<P: Peer + ?Sized = dyn Backend> {
    /// What is shown, in words joined by `_`.
    pub name: &'static str,
    /// What the peer must claim for this case to apply.
    pub needs: &'static [P::Ability],
    /// Above this it has failed.
    pub bound: Duration,
    /// The case itself.
    pub run: fn(&Context<'_, P>) -> Result<()>,
}

/// What a case works with.
pub struct Context<'a, P: ?Sized = dyn Backend> {
    peer: &'a P,
    folder: TempDir,
}

impl<P: Peer + ?Sized> Context<'_, P> {
    /// What serves the functions.
    pub fn peer(&self) -> &P {
        self.peer
    }

    /// A folder that goes when the case ends.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the peer claims this.
    pub fn has(&self, ability: P::Ability) -> bool {
        self.peer.has(ability)
    }

    /// A folder for what one peer of this case needs; the runner shows the logs in it where the case fails.
    pub fn peer_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder().join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// A guest under QEMU 11.1 (or what stands in for it on this machine).
    pub fn guest(&self) -> Result<Builder> {
        Ok(Guest::builder(&Qemu::new()?, &Image::debian_13()?))
    }

    /// A guest with busybox and no other program: less for QEMU to load at each boot and reset.
    pub fn small_guest(&self) -> Result<Builder> {
        let image = Image::debian_13()?.without_tools();
        Ok(Guest::builder(&Qemu::new()?, &image))
    }

    /// A guest with busybox, ethtool, and the driver of network functions.
    pub fn network_guest(&self) -> Result<Builder> {
        let image = Image::debian_13()?.for_networks();
        Ok(Guest::builder(&Qemu::new()?, &image).memory_mib(256))
    }

    /// A guest under Debian 12's QEMU 7.2.
    pub fn old_guest(&self) -> Result<Builder> {
        Ok(Guest::builder(&Qemu::debian_12()?, &Image::debian_13()?))
    }
}

impl Context<'_, dyn Backend> {
    /// A new sparse file of this size, for a volume with this many queues.
    pub fn volume(&self, name: &str, bytes: u64, queues: u16) -> Result<Volume> {
        let path = self.folder().join(name);
        sparse_file(&path, bytes)?;
        Ok(Volume {
            path,
            queues,
            layers: String::new(),
            connects: false,
        })
    }

    /// Starts a back end for these volumes. `name` tells the back ends of one case apart.
    pub fn start(&self, name: &str, volumes: &[Volume]) -> Result<Box<dyn Running>> {
        let folder = self.peer_folder(name)?;
        self.peer
            .start(&folder, volumes)
            .with_context(|| format!("start {}", self.peer.name()))
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

/// A case against a peer.
pub struct Test {
    name: String,
    always: bool,
    /// What the peer never claimed, and the case needs.
    missing: Option<String>,
    bound: Duration,
    run: Box<dyn FnOnce() -> Result<()> + Send>,
}

/// Each case against each peer.
pub fn tests<P: Peer + ?Sized>(stages: &[Stage<P>], cases: &'static [Case<P>]) -> Vec<Test> {
    for stage in stages {
        if let Always::Named(names) = stage.always {
            let known = |name: &&str| cases.iter().any(|case| case.name == *name);
            assert!(names.iter().all(known), "no such case: one of {names:?}");
        }
    }
    let all = stages
        .iter()
        .flat_map(|stage| cases.iter().map(move |case| (stage, case)));
    let test = |(stage, case): (&Stage<P>, &'static Case<P>)| {
        let peer = stage.backend;
        let missing = case.needs.iter().find(|ability| !peer.has(**ability));
        Test {
            name: format!("{}/{}", peer.name(), case.name),
            always: stage.always.has(case.name),
            missing: missing.map(|missing| format!("{missing:?}")),
            bound: case.bound,
            run: Box::new(move || run_here(peer, case)),
        }
    };
    all.map(test).collect()
}

/// The `main` of a test program. Its arguments are the process's.
pub fn main(tests: Vec<Test>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<_> = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let mut chosen = tests;
    chosen.retain(|test| match filters.is_empty() {
        true => test.always,
        false => filters
            .iter()
            .any(|filter| test.name.contains(filter.as_str())),
    });
    if arguments.iter().any(|argument| argument == "--list") {
        chosen
            .iter()
            .for_each(|test| println!("{}: test", test.name));
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
    for test in chosen {
        let name = test.name.clone();
        match run(test) {
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

fn run(test: Test) -> Outcome {
    let Test {
        name, bound, run, ..
    } = test;
    if let Some(missing) = test.missing {
        println!("guest test {name} ... does not apply: {missing} is not claimed");
        return Outcome::NotClaimed;
    }
    let (began, before) = (Instant::now(), children_time());
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(run());
    });
    let result = match receiver.recv_timeout(bound) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(anyhow!("the case's thread is gone")),
        Err(RecvTimeoutError::Timeout) => {
            // With its guests and back ends dead, whatever it waits for fails.
            kill_all();
            let detail = receiver
                .recv_timeout(Duration::from_secs(150))
                .and_then(|result| result.map_or_else(Ok, |()| Ok(anyhow!("it passed late"))));
            match detail {
                Ok(error) => Err(error.context(format!("took more than {bound:?}"))),
                Err(_) => {
                    println!("guest test {name} ... FAILED: it hangs, even with its guests dead");
                    std::process::exit(1);
                }
            }
        }
    };
    let _ = thread.join();
    let seconds = began.elapsed().as_secs_f32();
    let cost = (children_time() - before).as_secs_f32();
    match result {
        Ok(()) => {
            println!("guest test {name} ... ok ({seconds:.1} s, {cost:.1} s of processors)");
            Outcome::Passed
        }
        Err(error) => {
            println!("guest test {name} ... FAILED ({seconds:.1} s): {error:#}");
            Outcome::Failed
        }
    }
}

/// Runs a case; its error ends with what the back ends said last.
fn run_here<P: Peer + ?Sized>(peer: &P, case: &Case<P>) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("bluff-test.").tempdir()?;
    let context = Context { peer, folder };
    let done = catch_unwind(AssertUnwindSafe(|| (case.run)(&context)));
    // The panic itself is on standard error already.
    let done = done.unwrap_or_else(|_| Err(anyhow!("the case panicked")));
    done.map_err(|error| {
        let logs = logs(context.folder());
        let said = logs.iter().filter_map(|log| {
            let end = tail(log, 20);
            let name = log.strip_prefix(context.folder()).unwrap_or(log).display();
            (!end.is_empty()).then(|| format!("\n--- {name}, last lines:\n{end}"))
        });
        anyhow!("{error:#}{}", said.collect::<String>())
    })
}

/// The latest two logs of each back end. Each has a folder of its own, and its logs are numbered.
fn logs(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let latest = |folder: &PathBuf| {
        let mut logs = entries(folder);
        logs.retain(|path| path.extension().is_some_and(|kind| kind == "log"));
        logs.split_off(logs.len().saturating_sub(2))
    };
    entries(folder).iter().flat_map(latest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Ability;

    struct Writer;

    impl Peer for Writer {
        type Ability = Ability;

        fn name(&self) -> &'static str {
            "writer"
        }

        fn has(&self, _: Ability) -> bool {
            false
        }
    }

    impl Backend for Writer {
        fn start(&self, folder: &Path, _: &[Volume]) -> Result<Box<dyn Running>> {
            for number in 1..=3 {
                std::fs::write(
                    folder.join(format!("writer-00{number}.log")),
                    format!("line {number}"),
                )?;
            }
            Err(anyhow!("it does not start"))
        }
    }

    fn fails(context: &Context<'_>) -> Result<()> {
        context.start("backend", &[]).map(drop)
    }

    fn panics(context: &Context<'_>) -> Result<()> {
        let _ = context.start("backend", &[]);
        panic!("as it shall");
    }

    #[test]
    fn a_peer_that_is_not_there_yet_is_run_only_where_it_is_named() {
        assert!(Always::All.has("case"));
        assert!(Always::Named(&["case"]).has("case"));
        assert_eq!(Always::Named(&["case"]).has("other"), is_long());
        assert!(!Always::Filtered.has("case"));
    }

    #[test]
    fn what_a_peer_does_not_claim_is_told() {
        static CASES: [Case; 1] = [Case {
            name: "case",
            needs: &[Ability::Packed],
            bound: Duration::MAX,
            run: fails,
        }];
        let stages: [Stage; 1] = [Stage {
            backend: &Writer,
            always: Always::All,
        }];
        let found = tests(&stages, &CASES);
        assert_eq!(found[0].name, "writer/case");
        assert_eq!(found[0].missing.as_deref(), Some("Packed"));
    }

    #[test]
    fn a_failure_ends_with_the_latest_logs() {
        for (run, why) in [
            (
                fails as fn(&Context<'_>) -> Result<()>,
                "start writer: it does not start",
            ),
            (panics, "the case panicked"),
        ] {
            let case = Case {
                name: "case",
                needs: &[],
                bound: Duration::MAX,
                run,
            };
            let error = run_here::<dyn Backend>(&Writer, &case)
                .expect_err("it fails")
                .to_string();
            let expected = format!(
                "{why}\n--- backend/writer-002.log, last lines:\nline 2\n--- backend/writer-003.log, last lines:\nline 3"
            );
            assert_eq!(error, expected);
        }
    }
}
