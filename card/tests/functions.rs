//! The control half with a data half of its own making: sockets, client mode, resize and counters, from end to end.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bluff_card::config::{Config, Surroundings};
use bluff_card::control::client::Client;
use bluff_card::control::{FunctionEntry, Request, Response};
use bluff_card::daemon::{self, Settings};
use bluff_card::data_half::Options;
use bluff_card::message::{
    FromData, Link, Numbered, SessionInfo, Subject, ToData, VolumeInfo, statistics_parts,
};
use bluff_card::spec::Id;
use bluff_card::stats::{FunctionStatistics, QueueStatistics, Statistics};

const LIMIT: Duration = Duration::from_secs(20);

/// Opens every volume, attaches every function, and says of each connection that it hung up once it did.
fn data_half(socket: OwnedFd, _: &Options) -> Result<()> {
    let mut link: Link<Numbered<FromData>, Numbered<ToData>> = Link::new(socket);
    loop {
        let (Numbered { number, message }, mut descriptors) =
            link.receive()?.context("it blocks")?;
        let is_last = matches!(message, ToData::Drain { .. });
        let mut answers = Vec::new();
        match message {
            ToData::Start { .. } => answers.push(FromData::Started { reactors: 1 }),
            ToData::OpenVolume { volume, .. } => {
                let info = VolumeInfo {
                    size: 1 << 30,
                    block_size: 512,
                    read_only: false,
                    channels: None,
                };
                answers.push(FromData::VolumeOpened { volume, info });
            }
            ToData::AttachFunction { function, .. } => {
                answers.push(FromData::FunctionAttached { function, files: 0 });
            }
            ToData::Connection { function, .. } => {
                let session = SessionInfo {
                    features: 1 << 32,
                    status: None,
                    queues: 1,
                };
                let report = FromData::FrontEnd {
                    function: function.clone(),
                    session,
                };
                link.send(
                    &Numbered {
                        number: 0,
                        message: report,
                    },
                    &[],
                )?;
                // Until the other side is gone; a listener that ends resets those it has not accepted.
                let mut connection = UnixStream::from(descriptors.pop().context("a connection")?);
                connection.set_nonblocking(false)?;
                let end = std::io::copy(&mut connection, &mut std::io::sink());
                let reason = end.err().map(|error| error.to_string());
                let report = FromData::FrontEndGone { function, reason };
                link.send(
                    &Numbered {
                        number: 0,
                        message: report,
                    },
                    &[],
                )?;
            }
            ToData::ResizeVolume { volume, size } if size > 1 << 40 => {
                let error = "no space".to_owned();
                answers.push(FromData::Failed {
                    about: Subject::Volume(volume),
                    error,
                });
            }
            ToData::ResizeVolume { volume, size } => {
                answers.push(FromData::VolumeResized { volume, size });
            }
            ToData::Statistics { .. } => {
                let queues = vec![
                    QueueStatistics {
                        reads: 7,
                        ..Default::default()
                    };
                    200
                ];
                let function = |id: &Id| FunctionStatistics {
                    function: id.clone(),
                    messages: None,
                    queues: queues.clone(),
                    net: None,
                };
                let functions = ["blk0", "blk1"].map(|id| function(&id.parse().expect("an ID")));
                let statistics = Statistics {
                    functions: functions.to_vec(),
                    ..Default::default()
                };
                answers.extend(statistics_parts(statistics));
            }
            ToData::Drain { .. } => answers.push(FromData::Drained),
            other => anyhow::bail!("{other:?} was not expected"),
        }
        for message in answers {
            link.send(&Numbered { number, message }, &[])?;
        }
        if is_last {
            return Ok(());
        }
    }
}

fn config(runtime_dir: &Path, front_end: &Path) -> Config {
    let text = format!(
        "[volume.disk0]\nuri = \"ram:?size=1GiB\"\n[volume.disk1]\nuri = \"null:?size=1GiB\"\n\
         [function.blk0]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk0\"\n\
         [function.blk1]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk1\"\n\
         mode = \"client\"\nsocket = \"{}\"\n",
        front_end.display()
    );
    let surroundings = Surroundings::of_this_machine(runtime_dir).unwrap();
    Config::parse(&text, "card.toml", &surroundings).unwrap()
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{what} does not happen");
        std::thread::yield_now();
    }
}

fn function(client: &mut Client, id: &str) -> FunctionEntry {
    match client
        .ask(Request::ShowFunction {
            id: id.parse().unwrap(),
        })
        .unwrap()
    {
        Response::Function(function) => *function,
        other => panic!("{other:?}"),
    }
}

fn resize(client: &mut Client, size: u64) -> Result<Response> {
    client.ask(Request::ResizeVolume {
        id: "disk0".parse().unwrap(),
        size,
    })
}

/// Has no luck with its reactors.
fn cannot_start(socket: OwnedFd, _: &Options) -> Result<()> {
    let mut link: Link<Numbered<FromData>, Numbered<ToData>> = Link::new(socket);
    while let Ok(Some((Numbered { number, message }, _))) = link.receive() {
        if matches!(message, ToData::Start { .. }) {
            let error = "no more threads".to_owned();
            let about = Subject::Card;
            let message = FromData::Failed { about, error };
            link.send(&Numbered { number, message }, &[])?;
        }
    }
    Ok(())
}

#[test]
fn a_data_half_that_cannot_start_ends_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let settings = Settings {
        config: config(&run, &dir.path().join("front.sock")),
        runtime_dir: run,
        state_dir: dir.path().join("state"),
        body: cannot_start,
    };
    let daemon = std::thread::spawn(|| daemon::run(settings));
    until("its end", || daemon.is_finished().then_some(()));
    let error = format!("{:#}", daemon.join().unwrap().unwrap_err());
    assert!(error.contains("cannot start: no more threads"), "{error}");
}

// No other sends a signal, as that ends every daemon of the process.
#[test]
fn functions_are_reached_connected_counted_and_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let (run, front_end): (PathBuf, PathBuf) =
        (dir.path().join("run"), dir.path().join("front.sock"));
    // A daemon that was killed left this.
    std::fs::create_dir(&run).unwrap();
    drop(UnixListener::bind(run.join("blk0.sock")).unwrap());
    let settings = Settings {
        config: config(&run, &front_end),
        runtime_dir: run.clone(),
        state_dir: dir.path().join("state"),
        body: data_half,
    };
    let daemon = std::thread::spawn(|| daemon::run(settings));
    let mut client = until("the control socket", || Client::connect(&run).ok());
    until("ready", || match client.ask(Request::Status).unwrap() {
        Response::Status(status) => (status.phase == "ready").then_some(()),
        other => panic!("{other:?}"),
    });

    // A function in server mode listens, for nobody but its user and group.
    let mode = run.join("blk0.sock").metadata().unwrap().mode() & 0o777;
    assert_eq!((mode & 0o600, mode & !0o660), (0o600, 0));
    drop(UnixStream::connect(run.join("blk0.sock")).unwrap());
    until("the end of the front end", || {
        (function(&mut client, "blk0").state == "idle").then_some(())
    });

    // A function in client mode comes whenever a front end listens, again and again.
    assert_eq!(function(&mut client, "blk1").state, "idle");
    let listener = UnixListener::bind(&front_end).unwrap();
    for _ in 0..3 {
        let (connection, _) = listener.accept().unwrap();
        until("the front end", || {
            (function(&mut client, "blk1").state == "connected").then_some(())
        });
        drop(connection);
    }

    // Its last connection is gone, and so is the listener: the data half reads again.
    drop(listener);
    until("the end of the front end", || {
        (function(&mut client, "blk1").state == "idle").then_some(())
    });
    assert!(
        matches!(resize(&mut client, 2 << 30).unwrap(), Response::Volume(volume)
        if volume.info.is_some_and(|info| info.size == 2 << 30))
    );
    assert_eq!(
        resize(&mut client, 1 << 50).unwrap_err().to_string(),
        "no space"
    );
    assert!(
        resize(&mut client, 1000)
            .unwrap_err()
            .to_string()
            .contains("multiple of 512")
    );

    // An answer in parts is one answer.
    match client.ask(Request::Statistics { function: None }).unwrap() {
        Response::Statistics(statistics) => {
            let reads: Vec<u64> = statistics
                .functions
                .iter()
                .map(|function| function.total().reads)
                .collect();
            assert_eq!(reads, [1400, 1400]);
        }
        other => panic!("{other:?}"),
    }

    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
        .unwrap();
    daemon.join().unwrap().unwrap();
    assert!(!run.join("blk0.sock").exists());
}
