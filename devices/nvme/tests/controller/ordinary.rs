//! The ordinary path: what a driver does.

use bluff_nvme_host::verify::Shape;
use bluff_testing::times;

use crate::rig::*;

/// Verified load in every way of polling, with and without interrupts, with shadow doorbells where they are offered.
#[test]
fn verified_traffic_over_queues_and_namespaces() {
    for poll in POLLS {
        for events in [true, false] {
            let card = Card::new(poll, 2);
            let volumes = [card.ram(512, 4 << 20), card.ram(4096, 4 << 20)];
            let port = card.port("port", 8);
            let mut host = port.host();
            host.enable_with_event();
            let bar = host.controller.bar();
            let always = poll == bluff_reactor::Poll::Always;
            assert_eq!(bar.is_mapped(), always);
            let identify = host.controller.identify_controller().unwrap();
            assert_eq!(identify.has_shadow_doorbells(), !always);
            assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, 2]);
            let shape = Shape {
                sgls: true,
                ..Shape::default()
            };
            let mut traffic = host.traffic(2, 2, events, &volumes, shape);
            traffic.run(times(2000, 50_000), 16, PATIENCE).unwrap();
            traffic.verify(PATIENCE).unwrap();
            let mut queues = traffic.into_queues();
            if !always {
                let mut all: Vec<_> = queues.iter_mut().collect();
                host.controller.shadow_doorbells(&mut all).unwrap();
                let mut traffic =
                    bluff_nvme_host::verify::Traffic::new(queues, &volumes, &host.memory, shape)
                        .unwrap();
                traffic.run(times(2000, 50_000), 16, PATIENCE).unwrap();
                traffic.verify(PATIENCE).unwrap();
                queues = traffic.into_queues();
            }
            for queues in queues {
                host.controller.delete_queues(queues).unwrap();
            }
            host.controller.shut_down(false).unwrap();
            host.controller.disable().unwrap();
        }
    }
}
