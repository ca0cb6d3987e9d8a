//! The block device over the function, and what interrupts it in a machine's daily life.

use anyhow::{Result, ensure};

use super::{Context, Host, MIB, QUEUES, Served, wait_until};
use crate::runner::is_long;

/// Verified I/O on all queues of two namespaces, and a file system; then the driver is unbound and bound, and the guest reset, each in the
/// middle of I/O, and the data is there.
pub(super) fn io_and_resets(context: &Context<'_>) -> Result<()> {
    let function = context
        .nvme()
        .with(context.namespace(1, 256 * MIB, 512)?)
        .with(context.namespace(5, 128 * MIB, 4096)?);
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.guest()?).start()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    let sum = disk.write_file_system("128M")?;
    disk.verified_io("libaio", "128M")?;
    disk.verified_io("io_uring", "128M")?;
    host.disk(5)?.verified_io("io_uring", "64M")?;
    interrupts(&host)?;

    disk.reads()?;
    bind_again(&host)?;
    host.disk(1)?.read_file_system(&sum)?;

    host.disk(1)?.reads()?;
    guest.system_reset()?;
    guest.wait_for_boot()?;
    host.wait_live()?;
    let disk = host.disk(1)?;
    disk.read_file_system(&sum)?;
    if is_long() {
        disk.reads()?;
        guest.reboot()?;
        host.wait_live()?;
        host.disk(1)?.read_file_system(&sum)?;
    }
    served.check()
}

/// That each queue has had interrupts.
fn interrupts(host: &Host<'_>) -> Result<()> {
    let controller = host.controller()?;
    for queue in 0..=QUEUES {
        let line = host
            .guest
            .sh(&format!("grep '{controller}q{queue}$' /proc/interrupts"))?;
        let counts = line.split_whitespace().skip(1);
        let count: u64 = counts.map_while(|word| word.parse::<u64>().ok()).sum();
        ensure!(count > 0, "queue {queue} had no interrupt: {line}");
    }
    Ok(())
}

/// Takes the driver from the function under I/O, and gives it back.
fn bind_again(host: &Host<'_>) -> Result<()> {
    let (guest, controller) = (host.guest, host.controller()?);
    let device = guest.sh(&format!(
        "basename $(readlink -f /sys/class/nvme/{controller}/device)"
    ))?;
    guest.sh(&format!("echo {device} >/sys/bus/pci/drivers/nvme/unbind"))?;
    wait_until(guest, &format!("[ ! -e /sys/class/nvme/{controller} ]"))?;
    // While a job has the old disk open, the new one gets another name.
    guest.sh("killall -9 fio || true")?;
    wait_until(guest, "! pidof fio")?;
    guest.sh(&format!("echo {device} >/sys/bus/pci/drivers/nvme/bind"))?;
    host.wait_live()
}

/// What a guest sends over the socket while it works: nothing where doorbells are mapped, and next to nothing where they have shadows.
///
/// With shadows a queue that finds nothing for its polling time of 1 ms sleeps, and the next doorbell is a message. Other programs that take the guest's processors away for as
/// long make for such moments: they can only add to it, so what is seen once is what the product can do, and it is looked at up to three times. The figure, one in a hundred,
/// is asked of long runs; without shadows there would be a message for each request.
pub(super) fn doorbells(context: &Context<'_>) -> Result<()> {
    let shadowed = if is_long() { 0.01 } else { 0.05 };
    for (poll, most) in [("always", 0.0), ("adaptive", shadowed)] {
        let mut function = context.nvme().with(context.namespace(1, 64 * MIB, 512)?);
        function.poll = poll;
        let mut served = context.serve(&function)?;
        let guest = served.attach(context.guest()?).start()?;
        let host = Host::new(&guest)?;
        let mut found = share_of_messages(&mut *served, &host)?;
        for _ in 1..3 {
            if found > most {
                found = found.min(share_of_messages(&mut *served, &host)?);
            }
        }
        ensure!(
            found <= most,
            "poll = {poll:?}: {found} messages for each request, more than {most}"
        );
        served.check()?;
    }
    Ok(())
}

/// Messages for each request of a load of depth 16.
fn share_of_messages(served: &mut dyn Served, host: &Host<'_>) -> Result<f64> {
    let seconds = if is_long() { 60 } else { 5 };
    let before = served.messages()?;
    host.guest.sh(&format!(
        "fio --name=load --filename={} --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=16 --numjobs={QUEUES} \
         --time_based --runtime={seconds} --group_reporting >/tmp/fio",
        host.disk(1)?.path()
    ))?;
    let after = served.messages()?;
    let (messages, requests) = (after.0 - before.0, after.1 - before.1);
    println!("{messages} messages for {requests} requests");
    ensure!(requests > 1000, "only {requests} requests in {seconds} s");
    Ok(messages as f64 / requests as f64)
}
