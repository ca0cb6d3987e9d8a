//! Several controllers: on one namespace, and many at once.

use bluff_nvme::SubsystemOptions;
use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{ClientBar, HostMemory};
use bluff_testing::times;

use crate::rig::*;

/// Two hosts on one namespace, while others are attached and detached.
#[test]
fn a_namespace_of_two_hosts() {
    for poll in POLLS {
        let card = Card::shared(poll, 2);
        let volumes = [card.ram(512, 1 << 20), card.ram(4096, 1 << 20)];
        let moved = card.ram(512, 1 << 20);
        let ports = [card.port("a", 4), card.port("b", 4)];
        let run = |port: &Port, host: u16| {
            let mut of = port.host();
            of.enable_with_event();
            let shape = Shape {
                seed: host.into(),
                host: host * 100,
                ..Shape::default()
            };
            let mut traffic = of.traffic(2, 1, true, &volumes, shape);
            for _ in 0..times(4, 200) {
                traffic.run(200, 16, PATIENCE).unwrap();
                let shape = Shape {
                    may_fail: true,
                    ..shape
                };
                let queues = of.controller.create_queues(4, 1, 17, None).unwrap();
                let moved = std::slice::from_ref(&moved);
                let mut other = Traffic::new(vec![queues], moved, &of.memory, shape).unwrap();
                other.fill(16).unwrap();
                for attached in [false, true, false, true] {
                    card.subsystem.attach(3, port.id, attached).unwrap();
                    other.run(32, 16, PATIENCE).unwrap();
                }
                other.settle(PATIENCE).unwrap();
                for queues in other.into_queues() {
                    of.controller.delete_queues(queues).unwrap();
                }
            }
            traffic.settle(PATIENCE).unwrap();
            (of, traffic)
        };
        let run = &run;
        let mut all = std::thread::scope(|scope| {
            let threads = [0, 1].map(|i| {
                let port = &ports[i];
                scope.spawn(move || run(port, 1 + i as u16))
            });
            threads.map(|t| t.join().unwrap())
        });
        for (_, traffic) in &mut all {
            traffic.verify(PATIENCE).unwrap();
        }
    }
}

/// 16 controllers with 64 queues and 32 namespaces each at full size, all in use at once.
#[test]
fn many_controllers_at_once() {
    let (controllers, queues, namespaces) = times((8, 8, 8), (16, 64, 32));
    let mut options = SubsystemOptions::new("nqn.2025-01.test:many");
    (options.shared, options.max_namespaces) = (true, 512);
    let card = Card::with(ADAPTIVE, 2, options);
    let ports: Vec<_> = (0..controllers)
        .map(|i| card.port(&format!("port{i}"), queues))
        .collect();
    let mut hosts: Vec<(Host, Traffic<ClientBar>)> = ports
        .iter()
        .enumerate()
        .map(|(i, port)| {
            let own: Vec<Volume> = (0..namespaces)
                .map(|n| {
                    let block = if n % 2 == 0 { 512 } else { 4096 };
                    let volume = card.ram(block, 128 << 10);
                    // Not the other hosts'.
                    for other in ports.iter().filter(|p| p.id != port.id) {
                        card.subsystem.attach(volume.nsid, other.id, false).unwrap();
                    }
                    volume
                })
                .collect();
            let memory = HostMemory::flat(BASE, 64 << 20).unwrap();
            let mut host = port.host_with(memory);
            host.enable_with_event();
            let shape = Shape {
                depth: 4,
                seed: i as u64,
                ..Shape::default()
            };
            let traffic = host.traffic(queues, 1, true, &own, shape);
            (host, traffic)
        })
        .collect();
    for _ in 0..times(5, 100) {
        for (_, traffic) in &mut hosts {
            traffic.fill(4).unwrap();
        }
        for (_, traffic) in &mut hosts {
            traffic.run(times(50, 500), 4, PATIENCE).unwrap();
        }
    }
    for (_, traffic) in &mut hosts {
        traffic.verify(PATIENCE).unwrap();
    }
    for (port, (host, _)) in ports.iter().zip(&mut hosts) {
        assert_eq!(port.counters.totals().errors, 0);
        assert!(port.counters.totals().writes > 0);
        host.controller.shut_down(false).unwrap();
    }
}
