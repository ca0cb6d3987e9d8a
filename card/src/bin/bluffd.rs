//! `bluffd`: the daemon that presents a card's functions.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bluff_card::config::{Config, Surroundings};
use bluff_card::data_half::{ARGUMENT, Options};
use bluff_card::{daemon, data, descriptors, runtime_dir};
use clap::Parser;

/// Presents the functions of a card to their hosts.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The card: its volumes and functions
    #[arg(long, value_name = "FILE", required_unless_present = "data_half")]
    config: Option<PathBuf>,
    /// Where sockets stand [default: /run/diamond-bluff, or diamond-bluff in XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Where state is kept [default: /var/lib/diamond-bluff, or diamond-bluff in XDG_STATE_HOME]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Only check the configuration
    #[arg(long)]
    check: bool,
    /// Be the data half of the daemon at the other end of the standard input
    #[arg(long = ARGUMENT, hide = true)]
    data_half: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    // A thread that panics would leave the others to serve half of a card. The process dies, and another goes on: of the
    // daemon's own making, or of whoever watches the daemon.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::abort();
    }));
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bluffd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let state_dir = arguments
        .state_dir
        .map_or_else(daemon::default_state_dir, Ok);
    let Some(file) = arguments.config else {
        let socket = std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("standard input")?;
        return data::run(
            socket,
            &Options {
                state_dir: state_dir?,
                is_process: true,
            },
        );
    };
    let runtime_dir = arguments
        .runtime_dir
        .unwrap_or_else(runtime_dir::default_path);
    let runtime_dir =
        std::path::absolute(&runtime_dir).with_context(|| runtime_dir.display().to_string())?;
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let surroundings =
        Surroundings::of_this_machine(&runtime_dir).context("the CPUs of this machine")?;
    let config = Config::parse(&text, &file.display().to_string(), &surroundings)?;
    if arguments.check {
        return Ok(());
    }
    // Before the data half is there, which inherits it.
    descriptors::raise();
    daemon::run(daemon::Settings {
        config,
        runtime_dir,
        state_dir: state_dir?,
        body: data::run,
    })
}
