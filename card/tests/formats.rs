//! The control half records what hosts format to, as far as it makes sense, whatever a data half says that may be in a host's hand.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_card::config::{Config, Surroundings};
use bluff_card::daemon::{self, Settings};
use bluff_card::data_half::Options;
use bluff_card::formats::{FILE, Formats, Key};
use bluff_card::message::{FromData, Link, Numbered, ToData, VolumeInfo};
use bluff_card::spec::{NamespaceFormat, SubsystemKey};

type Half = Link<Numbered<FromData>, Numbered<ToData>>;

const NQN: &str = "nqn.2026-11.example:s0";
/// Where the data half says that it has got to its end.
const DONE: &str = "done";

/// Opens every volume, and attaches every function.
fn begin(link: &mut Half) -> Result<()> {
    for _ in 0..1 + 3 + 3 {
        let (Numbered { number, message }, _) = link.receive()?.context("it blocks")?;
        let answer = match message {
            ToData::Start { .. } => FromData::Started { reactors: 1 },
            ToData::OpenVolume { volume, .. } => {
                let info = VolumeInfo {
                    size: 1 << 30,
                    block_size: if volume.as_str() == "disk1" {
                        4096
                    } else {
                        512
                    },
                    read_only: volume.as_str() == "disk2",
                    channels: None,
                };
                FromData::VolumeOpened { volume, info }
            }
            ToData::AttachFunction {
                function,
                subsystem,
                ..
            } => {
                let is_nvme = function.as_str() != "blk0";
                ensure!(subsystem.is_some() == is_nvme, "{function}: {subsystem:?}");
                FromData::FunctionAttached { function, files: 0 }
            }
            other => anyhow::bail!("{other:?} was not expected"),
        };
        let message = answer;
        link.send(&Numbered { number, message }, &[])?;
    }
    Ok(())
}

/// Asks for formats; gives what control says to it.
fn ask(
    link: &mut Half,
    seq: u64,
    subsystem: &SubsystemKey,
    formats: &[(u32, u32)],
) -> Result<Option<String>> {
    let format = |(nsid, block_size): &(u32, u32)| NamespaceFormat {
        nsid: *nsid,
        block_size: *block_size,
    };
    let message = FromData::KeepFormats {
        subsystem: subsystem.clone(),
        seq,
        formats: formats.iter().map(format).collect(),
    };
    link.send(&Numbered { number: 0, message }, &[])?;
    match link.receive()?.context("it blocks")?.0.message {
        ToData::FormatsKept { seq: of, error } if of == seq => Ok(error),
        other => anyhow::bail!("{other:?} was not expected"),
    }
}

fn data_half(socket: OwnedFd, options: &Options) -> Result<()> {
    let mut link = Half::new(socket);
    begin(&mut link)?;
    let id = |text: &str| text.parse().context("an ID");
    let shared = SubsystemKey::Shared(id("s0")?);
    let own = SubsystemKey::Own(id("nvme1")?);
    let many: Vec<_> = (1..=1025).map(|nsid| (nsid, 512)).collect();
    for (subsystem, formats, says) in [
        (
            SubsystemKey::Shared(id("s9")?),
            &[(1, 4096)][..],
            "no function has",
        ),
        (
            SubsystemKey::Shared(id("s1")?),
            &[(1, 4096)],
            "no function has",
        ),
        (
            SubsystemKey::Own(id("nvme0")?),
            &[(1, 4096)],
            "no function has",
        ),
        (
            SubsystemKey::Own(id("blk0")?),
            &[(1, 4096)],
            "no function has",
        ),
        (shared.clone(), &[], "0 namespaces"),
        (shared.clone(), &many, "1025 namespaces"),
        (shared.clone(), &[(2, 4096)], "no namespace 2"),
        (shared.clone(), &[(0, 4096)], "no namespace 0"),
        (shared.clone(), &[(1, 1024)], "none of 1024"),
        (shared.clone(), &[(1, 0)], "none of 0"),
        (shared.clone(), &[(1, u32::MAX)], "none of"),
        (shared.clone(), &[(5, 512)], "blocks of 4096"),
        (shared.clone(), &[(1, 4096), (1, 512)], "twice"),
        (shared.clone(), &[(1, 4096), (5, 512)], "blocks of 4096"),
        (own.clone(), &[(1, 512)], "read-only"),
    ] {
        let error = ask(&mut link, 7, &subsystem, formats)?;
        let error = error.with_context(|| format!("{subsystem:?} {formats:?} was recorded"))?;
        ensure!(error.contains(says), "{subsystem:?} {formats:?}: {error}");
        ensure!(!options.state_dir.join(FILE).exists(), "it is recorded");
    }
    // What is recorded is there when it is said.
    let key = |volume: &str| -> Result<Key> {
        Ok(Key {
            nqn: NQN.to_owned(),
            volume: id(volume)?,
        })
    };
    for (formats, expected) in [
        (&[(1, 4096)][..], [Some(4096), None]),
        (&[(1, 512), (5, 4096)], [Some(512), Some(4096)]),
    ] {
        let error = ask(&mut link, 7, &shared, formats)?;
        ensure!(error.is_none(), "{error:?}");
        let all = Formats::read(&options.state_dir)?;
        let found = [all.get(&key("disk0")?), all.get(&key("disk1")?)];
        ensure!(found == expected, "{found:?}");
    }
    std::fs::write(options.state_dir.join(DONE), "")?;
    Ok(())
}

fn config(runtime_dir: &Path) -> Config {
    let text = format!(
        "[volume.disk0]\nuri = \"null:?size=1GiB\"\n[volume.disk1]\nuri = \"null:?size=1GiB\"\n\
         [volume.disk2]\nuri = \"null:?size=1GiB\"\n\
         [subsystem.s0]\nnqn = \"{NQN}\"\nnamespaces = [\"disk0\", {{ volume = \"disk1\", nsid = 5 }}]\n\
         [subsystem.s1]\nnamespaces = [\"disk0\"]\n\
         [function.nvme0]\nkind = \"nvme\"\nattach = \"vfio-user\"\nsubsystem = \"s0\"\n\
         [function.nvme1]\nkind = \"nvme\"\nattach = \"vfio-user\"\nnamespaces = [\"disk2\"]\n\
         [function.blk0]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk0\"\n"
    );
    let surroundings = Surroundings::of_this_machine(runtime_dir).unwrap();
    Config::parse(&text, "card.toml", &surroundings).unwrap()
}

#[test]
fn a_data_half_records_nothing_that_makes_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let state = dir.path().join("state");
    let settings = Settings {
        config: config(&run),
        runtime_dir: run,
        state_dir: state.clone(),
        body: data_half,
    };
    let daemon = std::thread::spawn(|| daemon::run(settings));
    let start = Instant::now();
    while !daemon.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(30), "it hangs");
        std::thread::yield_now();
    }
    // It ends because its data half does.
    let error = daemon.join().unwrap().unwrap_err();
    assert!(state.join(DONE).exists(), "{error:#}");
}
