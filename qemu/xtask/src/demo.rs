//! `cargo xtask demo`: a VM works on a virtio-blk function and an NVMe function of the card, and two VMs on two cards share a network; from
//! nothing to a summary.

mod network;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_qemu::device::{VfioUserPci, VhostUserBlk};
use bluff_qemu::emulator::Qemu;
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;
use bluff_qemu::namespace::Entrance;
use bluff_qemu::process::Process;

use crate::metadata::Workspace;
use crate::{guest, packages, run};

/// What can be asked of the demonstration.
#[derive(clap::Args)]
pub struct Options {
    /// Only this part
    #[arg(long, value_enum)]
    part: Option<Part>,
}

/// A part of the demonstration.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Storage,
    Network,
}

/// How long the daemon may take to be ready, and a script in the guest to come to its end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the demonstration.
pub fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    let start = Instant::now();
    packages::ensure(packages::GUESTS)?;
    run::say("building bluffd and bluffctl");
    let programs = guest::build(workspace)?;
    run::say("QEMU, kernel and tools for the guest (fetched once, into the cache folder)");
    let (qemu, image) = (Qemu::new()?, Image::debian_13()?);
    let (major, minor, micro) = qemu.version();
    println!("    QEMU {major}.{minor}.{micro}");
    let folder = tempfile::Builder::new().prefix("bluff-demo-").tempdir()?;
    let wanted = |part| options.part.is_none_or(|only| only == part);
    let mut facts = Vec::new();
    if wanted(Part::Storage) {
        run::say("starting bluffd");
        let config = disks(folder.path());
        print!("{}", indent(&config));
        let card = Card::start(&programs, &folder.path().join("card"), &config, None)?;
        facts.extend(show(&card, &qemu, &image).map_err(|error| card.explain(error))?);
        card.end()?;
    }
    if wanted(Part::Network) {
        facts.extend(network::run(&programs, folder.path(), &qemu, &image)?);
    }
    println!("\n==> what was shown");
    for fact in facts {
        println!("    {fact}");
    }
    println!(
        "    nothing is left behind; {} s in all",
        start.elapsed().as_secs()
    );
    Ok(true)
}

/// A daemon in a folder of its own.
struct Card {
    programs: PathBuf,
    folder: PathBuf,
    daemon: Process,
}

impl Card {
    /// Starts it, in a network namespace or where we are.
    fn start(
        programs: &Path,
        folder: &Path,
        config: &str,
        place: Option<Entrance>,
    ) -> Result<Self> {
        std::fs::create_dir(folder)?;
        std::fs::write(folder.join("card.toml"), config)?;
        let mut command = Command::new(programs.join("bluffd"));
        command.arg("--config").arg(folder.join("card.toml"));
        command.arg("--runtime-dir").arg(folder.join("run"));
        command.arg("--state-dir").arg(folder.join("state"));
        if let Some(place) = place {
            command = place.command(&command);
        }
        command.stdin(Stdio::null());
        let log = folder.join("bluffd.log");
        let mut daemon = Process::spawn(&mut command, "bluffd", &log)?;
        let end = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&log)?
            .lines()
            .any(|line| line == "ready")
        {
            daemon.check_alive()?;
            ensure!(Instant::now() < end, "bluffd does not get ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self {
            programs: programs.into(),
            folder: folder.into(),
            daemon,
        })
    }

    fn ctl(&self, arguments: &[&str]) -> Result<String> {
        println!("    $ bluffctl {}", arguments.join(" "));
        let output = Command::new(self.programs.join("bluffctl"))
            .arg("--runtime-dir")
            .arg(self.folder.join("run"))
            .args(arguments)
            .output()
            .context("bluffctl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "bluffctl: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Adds what the daemon said last.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let log = bluff_qemu::process::tail(self.daemon.log(), 30);
        error.context(format!("bluffd said last:\n{log}"))
    }

    /// Ends the daemon as an operator would.
    fn end(mut self) -> Result<()> {
        const SIGTERM: i32 = 15;
        self.daemon.signal(SIGTERM)?;
        let status = self.daemon.wait(PATIENCE)?;
        ensure!(status.success(), "bluffd ended with {status}");
        Ok(())
    }
}

/// A card with disks.
fn disks(folder: &Path) -> String {
    let volume = |n: u32, size: &str| {
        let path = folder.join(format!("disk{n}.raw"));
        format!(
            "[volume.disk{n}]\nuri = \"file:{}?size={size}\"\n\n",
            path.display()
        )
    };
    let volumes = [volume(0, "1GiB"), volume(1, "1GiB"), volume(2, "256MiB")].concat();
    volumes
        + "[function.blk0]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk0\"\nqueues = 2\n\n\
           [function.nvme0]\nkind = \"nvme\"\nattach = \"vfio-user\"\nnamespaces = [\"disk1\"]\n\
           serial = \"DB0001\"\nqueues = 2\n"
}

/// Every line, set in.
fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// A script in the guest, and what it says.
fn sh(guest: &Guest, script: &str) -> Result<String> {
    println!("    guest# {script}");
    let said = guest.sh(script)?;
    if !said.is_empty() {
        print!("{}", indent(&said));
    }
    Ok(said)
}

/// The demonstration itself; gives the facts for the summary.
fn show(card: &Card, qemu: &Qemu, image: &Image) -> Result<Vec<String>> {
    let mut facts = Vec::new();
    run::say("booting a VM that has both functions as PCI devices");
    let function = VhostUserBlk::new("blk0", &card.folder.join("run/blk0.sock")).queues(2);
    let start = Instant::now();
    let guest = Guest::builder(qemu, image)
        .vhost_user_blk(function)
        .vfio_user(&VfioUserPci::new(
            "nvme0",
            &card.folder.join("run/nvme0.sock"),
        ))
        .start()?;
    println!("    up after {:.1} s", start.elapsed().as_secs_f64());
    print!("{}", indent(&card.ctl(&["function", "list"])?));

    run::say("what the guest sees");
    sh(
        &guest,
        "lsblk -d -o NAME,SIZE,LOG-SEC,PHY-SEC,DISC-MAX,TYPE /dev/vda",
    )?;
    let serial = sh(&guest, "cat /sys/block/vda/serial")?;
    ensure!(serial.trim() == "blk0", "the serial is {serial}");
    let driver = sh(&guest, "basename $(readlink /sys/block/vda/device/driver)")?;
    let queues = sh(&guest, "ls /sys/block/vda/mq | wc -l")?;
    ensure!(queues.trim() == "2", "the guest has {queues} queues");
    facts.push(format!(
        "the guest's own driver, {driver}, drives bluffd's function with {queues} queues"
    ));

    run::say("a file system, written and read back");
    sh(&guest, "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")?;
    sh(&guest, "head -c 32M /dev/urandom >/mnt/data && sync")?;
    let sum = sh(&guest, "sha256sum /mnt/data")?;
    sh(&guest, "echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(
        sh(&guest, "sha256sum /mnt/data")? == sum,
        "what was read is not what was written"
    );
    facts.push(
        "32 MiB were written through ext4 and read back from the disk with the same checksum"
            .into(),
    );

    run::say("random I/O with verification, seen from the card");
    let fio = "fio --name=load --directory=/mnt --size=64M --rw=randrw --bs=4k --iodepth=16 --numjobs=2 \
               --ioengine=libaio --direct=1 --verify=crc32c --time_based --runtime=8 --group_reporting \
               --output-format=terse >/tmp/fio; echo fio ended with $?";
    // The files first, so that what is shown is the load and not their making.
    guest.sh(&format!(
        "{} --create_only=1",
        fio.split(" >").next().unwrap_or(fio)
    ))?;
    println!("    guest# {fio} &");
    let job = guest.spawn(fio)?;
    // Of a moment when the load is under way: its first requests are counted.
    let at_work = |top: &str| {
        let mut lines = top
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.any(|words| matches!(words[..], ["blk0", "all", iops, ..] if iops != "0"))
    };
    let top = loop {
        let top = card.ctl(&["top", "--once"])?;
        if at_work(&top) {
            break top;
        }
        ensure!(
            !job.has_ended_within(Duration::ZERO),
            "fio has ended and nothing was counted"
        );
    };
    print!("{}", indent(&top));
    let end = job.wait(PATIENCE)?.text();
    ensure!(end.contains("fio ended with 0"), "fio: {end}");
    facts.push("fio wrote and verified 4 KiB blocks on both queues without an error".into());

    run::say("the disk grows while it is mounted");
    print!(
        "{}",
        indent(&card.ctl(&["volume", "resize", "disk0", "2GiB"])?)
    );
    sh(
        &guest,
        "timeout 30 sh -c 'until [ $(blockdev --getsize64 /dev/vda) = 2147483648 ]; do sleep 0.1; done'; lsblk -d -n -o NAME,SIZE /dev/vda",
    )?;
    sh(
        &guest,
        "resize2fs /dev/vda 2>/dev/null && df -h /mnt | tail -n 1",
    )?;
    facts
        .push("the volume grew from 1 to 2 GiB online, and the guest's file system with it".into());

    nvme(card, &guest, &mut facts)?;

    run::say("the guest reboots");
    sh(&guest, "sync && umount /mnt")?;
    guest.reboot()?;
    sh(&guest, "mount /dev/vda /mnt")?;
    ensure!(
        sh(&guest, "sha256sum /mnt/data")? == sum,
        "the data is not what it was before the reboot"
    );
    sh(&guest, "umount /mnt && e2fsck -fn /dev/vda | tail -n 1")?;
    facts.push("after a reboot the data is there, and e2fsck finds nothing wrong".into());
    guest.quit(PATIENCE)?;
    Ok(facts)
}

/// The NVMe function: a PCI function as a whole, which the card defines.
fn nvme(card: &Card, guest: &Guest, facts: &mut Vec<String>) -> Result<()> {
    run::say("the NVMe function, by the guest's own driver and nvme-cli");
    let list = sh(guest, "nvme list")?;
    ensure!(list.contains("DB0001"), "nvme list does not have it");
    sh(
        guest,
        "nvme id-ctrl /dev/nvme0 | grep -E '^(vid|sn|mn|fr|mdts|ver|oncs|nn|subnqn) '",
    )?;
    sh(
        guest,
        "fio --name=nvme --filename=/dev/nvme0n1 --size=64M --rw=randrw --bs=4k --iodepth=16 --numjobs=2 \
         --offset_increment=64M --ioengine=libaio --direct=1 --verify=crc32c --group_reporting \
         --output-format=terse >/tmp/fio && echo fio found nothing wrong",
    )?;
    print!("{}", indent(&card.ctl(&["function", "show", "nvme0"])?));
    let smart = sh(
        guest,
        "nvme smart-log /dev/nvme0 | grep -E '^(critical_warning|host_read_commands|host_write_commands|media_errors)'",
    )?;
    ensure!(
        smart.contains("host_write_commands"),
        "the SMART log is not there"
    );
    facts.push("the guest's NVMe driver and nvme-cli drive bluffd's controller; fio verified its namespace on both queues".into());

    run::say("a namespace is added to the running guest");
    print!(
        "{}",
        indent(&card.ctl(&["namespace", "add", "nvme0", "disk2"])?)
    );
    sh(
        guest,
        "timeout 30 sh -c 'until [ -b /dev/nvme0n2 ]; do sleep 0.1; done'; lsblk -d -n -o NAME,SIZE /dev/nvme0n1 /dev/nvme0n2",
    )?;
    facts.push("a namespace was added, and the guest saw it without being asked to look".into());
    Ok(())
}
