//! `bluffctl`: asks a running `bluffd`.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bluff_card::control::client::Client;
use bluff_card::control::{NetworkEntry, Request, Response};
use bluff_card::ctl::top::Round;
use bluff_card::message::{CapturePlace, CaptureSpec, CaptureWay};
use bluff_card::spec::{Id, NSID_MAX};
use bluff_card::stats::{NetworkStatistics, Statistics};
use bluff_card::{ctl, runtime_dir};
use clap::{Parser, Subcommand};
use libc::{SIGINT, SIGTERM};
use serde::Serialize;

/// How far two samples of `top` are apart.
const PERIOD: Duration = Duration::from_secs(1);

/// Asks a running bluffd.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The daemon's runtime directory [default: /run/diamond-bluff, or diamond-bluff in XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", global = true)]
    runtime_dir: Option<PathBuf>,
    /// JSON, for machines
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// How the daemon is
    Status,
    /// Functions: what hosts see
    #[command(subcommand)]
    Function(FunctionVerb),
    /// Volumes: what functions stand on
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Namespaces: what NVMe functions stand on
    #[command(subcommand)]
    Namespace(NamespaceVerb),
    /// Networks: what network functions are in
    #[command(subcommand)]
    Network(NetworkVerb),
    /// What a network function sends and receives, or what a network's tunnel carries, as a pcapng file; until Ctrl-C
    Capture {
        /// A function, or network:ID for the tunnel of a network, whose frames are shown with outer headers
        place: CapturePlace,
        /// The file; - is the standard output
        #[arg(short, long, value_name = "FILE")]
        write: PathBuf,
        /// Only frames that are received (in) or sent (out), as the function sees it
        #[arg(long, value_parser = direction)]
        direction: Option<CaptureWay>,
        /// Bytes of each frame
        #[arg(long, value_name = "BYTES", default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(1..=262_144))]
        snaplen: u32,
        /// End after so many frames
        #[arg(long, value_name = "FRAMES", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// What goes on, each second
    Top {
        /// One round only
        #[arg(long)]
        once: bool,
    },
}

#[derive(Subcommand)]
enum FunctionVerb {
    /// All functions
    List,
    /// One function and its counters
    Show {
        /// Its ID
        id: Id,
    },
    /// Change a function, until bluffd ends
    Set {
        /// Its ID
        id: Id,
        /// link=down pulls the cable of a network function out, link=up plugs it in
        #[arg(value_parser = setting)]
        setting: Setting,
    },
}

/// What is set of a function.
#[derive(Clone, Copy)]
enum Setting {
    Link { up: bool },
}

fn setting(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some(("link", "up")) => Ok(Setting::Link { up: true }),
        Some(("link", "down")) => Ok(Setting::Link { up: false }),
        _ => Err("allowed: link=up and link=down".to_owned()),
    }
}

fn direction(text: &str) -> Result<CaptureWay, String> {
    match text {
        "in" => Ok(CaptureWay::In),
        "out" => Ok(CaptureWay::Out),
        _ => Err("allowed: in, out".to_owned()),
    }
}

#[derive(Subcommand)]
enum NetworkVerb {
    /// All networks
    List,
    /// One network
    Show {
        /// Its ID
        id: Id,
    },
    /// The addresses that a network knows, and where they are
    Fdb {
        /// Its ID
        id: Id,
    },
}

#[derive(Subcommand)]
enum VolumeVerb {
    /// All volumes
    List,
    /// Give a volume another size, which the host sees at once
    Resize {
        /// Its ID
        id: Id,
        /// The size, such as 10GiB
        #[arg(value_parser = bluff_block::parse_size)]
        size: u64,
    },
}

#[derive(Subcommand)]
enum NamespaceVerb {
    /// The namespaces of a function
    List {
        /// The function
        function: Id,
    },
    /// Make a volume a namespace of a function, and of all that share its subsystem; hosts see it at once
    Add {
        /// The function
        function: Id,
        /// The volume
        volume: Id,
        /// Its number; left out: the lowest that is free
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(NSID_MAX)))]
        nsid: Option<u32>,
    },
    /// Take the namespace on a volume away; hosts see it at once
    Remove {
        /// The function
        function: Id,
        /// The volume
        volume: Id,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // `bluffctl … | head` has what it wanted.
        Err(error) if is_output_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bluffctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The standard output failed: not to be taken for the socket of the daemon, which can break in the same way.
#[derive(Debug, thiserror::Error)]
#[error("standard output")]
struct OutputError(#[from] std::io::Error);

fn is_output_closed(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<OutputError>();
    error.is_some_and(|OutputError(error)| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(arguments: Arguments) -> Result<()> {
    let mut client = Client::connect(
        &arguments
            .runtime_dir
            .unwrap_or_else(runtime_dir::default_path),
    )?;
    let json = arguments.json;
    match arguments.verb {
        Verb::Status => match client.ask(Request::Status)? {
            Response::Status(status) => print(json, &status, || ctl::status(&status)),
            other => unexpected(&other),
        },
        Verb::Function(FunctionVerb::List) => match client.ask(Request::ListFunctions)? {
            Response::Functions(functions) => {
                print(json, &functions, || ctl::functions(&functions))
            }
            other => unexpected(&other),
        },
        Verb::Function(FunctionVerb::Show { id }) => show(&mut client, json, id),
        Verb::Function(FunctionVerb::Set { id, setting }) => {
            let Setting::Link { up } = setting;
            match client.ask(Request::SetLink { function: id, up })? {
                Response::Function(function) => {
                    print(json, &function, || ctl::function(&function, None))
                }
                other => unexpected(&other),
            }
        }
        Verb::Network(NetworkVerb::List) => match client.ask(Request::ListNetworks)? {
            Response::Networks(networks) => {
                print(json, &networks, || ctl::net::networks(&networks))
            }
            other => unexpected(&other),
        },
        Verb::Network(NetworkVerb::Show { id }) => {
            match client.ask(Request::ShowNetwork { id })? {
                Response::Network(network) => show_network(&mut client, json, &network),
                other => unexpected(&other),
            }
        }
        Verb::Network(NetworkVerb::Fdb { id }) => {
            match client.ask(Request::ListAddresses { network: id })? {
                Response::Addresses(all) => print(json, &all, || ctl::net::addresses(&all)),
                other => unexpected(&other),
            }
        }
        Verb::Volume(VolumeVerb::List) => match client.ask(Request::ListVolumes)? {
            Response::Volumes(volumes) => print(json, &volumes, || ctl::volumes(&volumes)),
            other => unexpected(&other),
        },
        Verb::Volume(VolumeVerb::Resize { id, size }) => {
            match client.ask(Request::ResizeVolume { id, size })? {
                Response::Volume(volume) => print(json, &volume, || {
                    ctl::volumes(std::slice::from_ref(&volume))
                }),
                other => unexpected(&other),
            }
        }
        Verb::Namespace(verb) => {
            let request = match verb {
                NamespaceVerb::List { function } => Request::ListNamespaces { function },
                NamespaceVerb::Add {
                    function,
                    volume,
                    nsid,
                } => Request::AddNamespace {
                    function,
                    volume,
                    nsid,
                },
                NamespaceVerb::Remove { function, volume } => {
                    Request::RemoveNamespace { function, volume }
                }
            };
            match client.ask(request)? {
                Response::Namespaces(entry) => print(json, &entry, || ctl::namespaces(&entry)),
                other => unexpected(&other),
            }
        }
        Verb::Capture {
            place,
            write,
            direction,
            snaplen,
            count,
        } => {
            let spec = CaptureSpec {
                snaplen,
                only: direction,
                count,
            };
            capture(client, place, spec, &write)
        }
        Verb::Top { once } => top(&mut client, json, once),
    }
}

fn show(client: &mut Client, json: bool, id: Id) -> Result<()> {
    #[derive(Serialize)]
    struct Shown<'a, F: Serialize, S: Serialize> {
        function: &'a F,
        statistics: Option<&'a S>,
    }
    let function = match client.ask(Request::ShowFunction { id: id.clone() })? {
        Response::Function(function) => function,
        other => return unexpected(&other),
    };
    let statistics = sample(client, Some(id.clone()))?;
    let statistics = statistics
        .functions
        .iter()
        .find(|statistics| statistics.function == id);
    print(
        json,
        &Shown {
            function: &function,
            statistics,
        },
        || ctl::function(&function, statistics),
    )
}

fn show_network(client: &mut Client, json: bool, network: &NetworkEntry) -> Result<()> {
    #[derive(Serialize)]
    struct Shown<'a> {
        #[serde(flatten)]
        network: &'a NetworkEntry,
        statistics: Option<&'a NetworkStatistics>,
    }
    let all = sample(client, None)?.networks;
    let statistics = all.iter().find(|counted| counted.network == network.id);
    let shown = Shown {
        network,
        statistics,
    };
    print(json, &shown, || ctl::net::network(network, statistics))
}

/// Writes what passes a place, until that ends, or this program is told to.
fn capture(client: Client, place: CapturePlace, spec: CaptureSpec, file: &Path) -> Result<()> {
    let (told, signals) = UnixStream::pair().context("signals")?;
    for signal in [SIGINT, SIGTERM] {
        let signals = signals.try_clone().context("signals")?;
        signal_hook::low_level::pipe::register(signal, signals).context("signals")?;
    }
    let is_standard = file.as_os_str() == "-";
    let to: Box<dyn Write> = match is_standard {
        true => Box::new(std::io::stdout().lock()),
        false => Box::new(File::create(file).with_context(|| file.display().to_string())?),
    };
    let stream = client.capture(place.clone(), spec)?;
    eprintln!("capturing {place}");
    let half = stream.try_clone().context("the control socket")?;
    std::thread::spawn(move || {
        let mut told = told;
        if told.read(&mut [0]).is_ok() {
            // The rest still comes, and the end of the file.
            let _ = half.shutdown(Shutdown::Write);
        }
    });
    let copied = ctl::capture::copy(stream, to)?;
    let ctl::capture::Copied { frames, missed } = copied;
    eprintln!("{frames} frames captured");
    match missed {
        Some(missed) => eprintln!("{missed} frames dropped: they came faster than they were read"),
        None => bail!("the capture broke off: the data half is gone"),
    }
    Ok(())
}

fn sample(client: &mut Client, function: Option<Id>) -> Result<Statistics> {
    match client.ask(Request::Statistics { function })? {
        Response::Statistics(statistics) => Ok(statistics),
        other => bail!("bluffd answered another question: {other:?}"),
    }
}

fn top(client: &mut Client, json: bool, once: bool) -> Result<()> {
    let mut before = sample(client, None)?;
    let is_screen = std::io::stdout().is_terminal() && !json && !once;
    loop {
        std::thread::sleep(PERIOD);
        let after = sample(client, None)?;
        let round = Round::between(&before, &after);
        if is_screen {
            // From the top left, over what was there.
            write!(std::io::stdout(), "\x1b[H\x1b[2J").map_err(OutputError)?;
        }
        print(json, &round, || round.table())?;
        if once {
            return Ok(());
        }
        before = after;
    }
}

fn print(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = if json {
        serde_json::to_string(value)? + "\n"
    } else {
        text()
    };
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    written.and_then(|()| stdout.flush()).map_err(OutputError)?;
    Ok(())
}

fn unexpected(response: &Response) -> Result<()> {
    bail!("bluffd answered another question: {response:?}")
}
