//! Asynchronous events of the controller's health, over the socket: told once, then masked until their page is read.

use std::sync::atomic::Ordering::Relaxed;

use bluff_nvme_host::spec::{admin, feature, log, register as reg};
use bluff_nvme_host::{Bar, Buffer, Command};

use crate::rig::*;

/// SMART / health: temperature threshold, spare below threshold; log page 2 (Base 2.1 §5.1.2.1).
const TEMPERATURE: u32 = 0x02_01_01;
const SPARE: u32 = 0x02_02_01;
/// Notice: Namespace Attribute Changed; log page 4.
const NAMESPACE: u32 = 0x04_00_02;
/// Error: Invalid Doorbell Write Value; log page 1.
const DOORBELL: u32 = 0x01_01_00;

/// Waits for the next event.
fn event(host: &mut Host) -> u32 {
    let mut event = None;
    until(|| {
        event = host.controller.poll_event().unwrap();
        event.is_some()
    });
    event.unwrap()
}

/// Nothing is told: not with commands that come and go meanwhile.
#[track_caller]
fn nothing(host: &mut Host) {
    for _ in 0..3 {
        host.controller.feature(feature::ARBITRATION, 0).unwrap();
        assert_eq!(host.controller.poll_event().unwrap(), None);
    }
}

fn warnings(host: &mut Host) -> u8 {
    host.controller
        .log_page(log::SMART, u32::MAX, 0, 512)
        .unwrap()[0]
}

#[test]
fn warnings_are_events_and_masked_until_their_page_is_read() {
    for poll in POLLS {
        let card = Card::new(poll, 1);
        card.ram(512, 1 << 20);
        let port = card.port("port", 2);
        let mut host = port.host();
        host.enable_with_event();
        let counters = &port.counters;
        let warm = |kelvins| {
            counters.kelvins.store(kelvins, Relaxed);
            counters.health_changed();
        };
        let spare = |percent| {
            counters.spare_threshold.store(20, Relaxed);
            counters.spare.store(percent, Relaxed);
            counters.health_changed();
        };
        for _ in 0..4 {
            host.controller.request_event().unwrap();
        }
        // Not enabled: the page says it, and nobody is told.
        host.controller.set_feature(feature::EVENTS, 0, 0).unwrap();
        warm(400);
        nothing(&mut host);
        assert_eq!(warnings(&mut host), 2);
        warm(300);
        // Spare, temperature and namespaces.
        let all = 1 | 1 << 1 | 1 << 8;
        host.controller
            .set_feature(feature::EVENTS, 0, all)
            .unwrap();
        nothing(&mut host);
        // The host does nothing, and hears of it.
        spare(10);
        assert_eq!(event(&mut host), SPARE, "{poll:?}");
        // The other one of this type waits; another type does not.
        warm(400);
        nothing(&mut host);
        card.ram(512, 1 << 20);
        assert_eq!(event(&mut host), NAMESPACE);
        let queues = host.queues(1, 1, 16, false).remove(0);
        let bar = host.controller.bar().clone();
        bar.doorbell(queues.sqs[0].doorbell(), 99).unwrap();
        assert_eq!(event(&mut host), DOORBELL);
        // Read, and retained: still masked (Get Log Page, RAE).
        let mut page = Buffer::new(&host.memory, 512).unwrap();
        let retain = Command::new(admin::GET_LOG_PAGE, u32::MAX)
            .data(page.prp().unwrap())
            .with(10, u32::from(log::SMART) | 1 << 15 | 127 << 16);
        host.controller.admin(&retain).unwrap();
        assert_eq!(page.read()[0], 3);
        nothing(&mut host);
        // Read: the page has said both, so neither is told any more.
        assert_eq!(warnings(&mut host), 3);
        nothing(&mut host);
        // What begins anew is told anew.
        warm(300);
        nothing(&mut host);
        warm(400);
        assert_eq!(event(&mut host), TEMPERATURE);
        assert_eq!(host.controller.status().unwrap() & reg::CFS, 0);
    }
}
