//! Ends in the middle of I/O: over storage that answers late and in any order, and over storage that does not answer at all. An end is over
//! soon; nothing is written to the host's memory afterwards; the controller works again; and no old write lands on what is written then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_layers::delay::When;
use bluff_layers::fault::Action;
use bluff_layers::{Delay, DelayOptions, Fault, FaultHandle, FaultOptions};
use bluff_nvme_host::spec::register as reg;
use bluff_nvme_host::verify::{self, Shape, Traffic};
use bluff_nvme_host::{Bar, HostMemory};
use bluff_reactor::Poll;
use bluff_testing::times;

use crate::rig::*;

const SIZE: u64 = 1 << 20;
const MEMORY: u64 = 16 << 20;
const MARK: u8 = 0x5a;

/// Late, and in any order; and silent, when it is told to be.
fn slow(seed: u64) -> (Arc<Fault>, FaultHandle) {
    let delay = DelayOptions {
        jitter: Duration::from_millis(2),
        rate: 0.7,
        when: match seed % 2 {
            0 => When::Before,
            _ => When::After,
        },
        seed,
        ..DelayOptions::all(Duration::ZERO)
    };
    let late = Arc::new(Delay::new(ram(512, SIZE), delay));
    let order = FaultOptions {
        rate: 0.5,
        seed,
        ..FaultOptions::all(Action::Reorder(6))
    };
    let mixed = Arc::new(Fault::new(late, vec![order]));
    let stall = Fault::new(mixed, Vec::new());
    let handle = stall.handle();
    (Arc::new(stall), handle)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Disable,
    ShutDown { abrupt: bool },
    ShutDownAndDisable,
    Subsystem,
    FunctionLevel,
    Device,
    Disconnect,
    Unmap,
}

const ENDS: [End; 9] = [
    End::Disable,
    End::ShutDown { abrupt: false },
    End::ShutDown { abrupt: true },
    End::ShutDownAndDisable,
    End::Subsystem,
    End::FunctionLevel,
    End::Device,
    End::Disconnect,
    End::Unmap,
];

fn region(at: u64) -> Arc<HostMemory> {
    HostMemory::flat(at, MEMORY).unwrap()
}

fn mark(memory: &HostMemory) {
    let bytes = vec![MARK; MEMORY as usize];
    memory.memory().write(BASE, &bytes).unwrap();
}

#[track_caller]
fn assert_marked(memory: &HostMemory) {
    let mut bytes = vec![0; MEMORY as usize];
    memory.memory().read(BASE, &mut bytes).unwrap();
    let wrong = bytes.iter().position(|b| *b != MARK);
    assert_eq!(wrong, None, "written after the end");
}

/// Ends what is in flight; gives the host that goes on, with memory of its own.
fn end(
    port: &Port,
    mut host: Host,
    traffic: Traffic<bluff_nvme_host::ClientBar>,
    how: End,
) -> Host {
    let old = host.memory.clone();
    let began = Instant::now();
    let bar = host.controller.bar().clone();
    match how {
        End::Disable => host.controller.disable().unwrap(),
        End::ShutDown { abrupt } => host.controller.shut_down(abrupt).unwrap(),
        End::ShutDownAndDisable => {
            let cc = bar.read32(reg::CC).unwrap();
            bar.write32(reg::CC, cc | reg::CC_SHN_ABRUPT).unwrap();
            host.controller.disable().unwrap();
        }
        End::Subsystem => host.controller.subsystem_reset().unwrap(),
        End::FunctionLevel => host.pci.function_level_reset().unwrap(),
        End::Device => host.client.reset().unwrap(),
        End::Unmap => host.client.dma_unmap(BASE, MEMORY).unwrap(),
        End::Disconnect => {}
    }
    if how == End::Disconnect {
        // Whoever names the client holds its connection.
        drop(bar);
        traffic.abandon();
        drop(host);
        port.gone();
        let took = began.elapsed();
        assert!(took < SOON, "{how:?}: {took:?}");
        mark(&old);
        return port.host_with_both(old, region(BASE + (1 << 30)));
    }
    let took = began.elapsed();
    assert!(took < SOON, "{how:?}: {took:?}");
    mark(&old);
    traffic.abandon();
    match how {
        End::ShutDown { .. } => host.controller.disable().unwrap(),
        End::Subsystem => {
            let status = host.controller.status().unwrap();
            assert_ne!(status & reg::NSSRO, 0);
            bar.write32(reg::CSTS, reg::NSSRO).unwrap();
            assert_eq!(host.controller.status().unwrap(), 0);
        }
        // Its queues' memory has gone, and does not come back.
        End::Unmap => {
            host.controller
                .wait_status(reg::CFS, reg::CFS, "CFS")
                .unwrap();
            host.controller.disable().unwrap();
            assert_eq!(host.controller.status().unwrap(), 0);
        }
        _ => {}
    }
    host.controller.forget();
    host.again(region(BASE + (1 << 30)))
}

fn run(poll: Poll, silent: bool, how: End, seed: u64) {
    println!("{poll:?} {how:?}, silent: {silent}, {seed}");
    let card = Card::new(poll, 2);
    let mut volumes = Vec::new();
    let mut handles = Vec::new();
    for i in 0..2 {
        let (volume, handle) = slow(seed + i);
        volumes.push(verify::Volume::new(card.add(volume, 512), 512, SIZE));
        handles.push(handle);
    }
    let port = card.port("port", 4);
    let mut host = port.host_with(region(BASE));
    let old = host.memory.clone();
    for round in 0..2 {
        host.enable_with_event();
        let shape = Shape {
            seed: seed + 100 * round,
            ..Shape::default()
        };
        let mut traffic = host.traffic(2, 2, true, &volumes, shape);
        if round == 1 {
            traffic.run(200, 16, PATIENCE).unwrap();
            traffic.verify(PATIENCE).unwrap();
            traffic.into_queues();
            assert_marked(&old);
            host.controller.shut_down(false).unwrap();
            return;
        }
        traffic.run(100, 16, PATIENCE).unwrap();
        if silent {
            for handle in &handles {
                handle.set(vec![FaultOptions::all(Action::Stall)]);
            }
        }
        traffic.fill(16).unwrap();
        if silent {
            // It has got something that it does not answer. More is sent until then: what was in flight before may all have come back.
            until(|| {
                traffic.take().unwrap();
                traffic.fill(16).unwrap();
                handles.iter().all(|h| h.struck() > 0)
            });
        }
        host = end(&port, host, traffic, how);
        for handle in &handles {
            handle.clear();
            handle.resume();
        }
    }
}

fn all(poll: Poll, silent: bool) {
    for round in 0..times(1, 10) {
        for (i, how) in ENDS.into_iter().enumerate() {
            run(poll, silent, how, 1000 * round + 10 * i as u64);
        }
    }
}

#[test]
fn c07_c17_ends_over_late_storage() {
    for poll in POLLS {
        all(poll, false);
    }
}

#[test]
fn c07_c17_r25_ends_over_storage_that_never_answers() {
    for poll in POLLS {
        all(poll, true);
    }
}
