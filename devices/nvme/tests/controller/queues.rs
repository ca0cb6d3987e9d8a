//! Queues that come and go in any order, under I/O; shared completion queues.

use std::sync::Arc;

use bluff_layers::fault::Action;
use bluff_layers::{Delay, DelayOptions, Fault, FaultOptions};
use bluff_nvme_host::spec::status;
use bluff_nvme_host::verify::{Shape, Traffic};
use bluff_nvme_host::{Buffer, Command, Queues};
use bluff_testing::{Chance, times};

use crate::rig::*;

const SIZE: u64 = 1 << 20;

#[test]
fn c13_queues_in_all_orders_under_io() {
    for poll in POLLS {
        let card = Card::new(poll, 2);
        let delay = DelayOptions::all(std::time::Duration::from_micros(200));
        let late = Delay::new(ram(512, SIZE), delay);
        let volume = bluff_nvme_host::verify::Volume::new(card.add(Arc::new(late), 512), 512, SIZE);
        let volumes = [volume];
        let port = card.port("port", 8);
        let mut host = port.host();
        host.enable_with_event();
        host.controller.set_queue_count(8, 8).unwrap();
        let mut chance = Chance::new(5);
        // One that stays; the others come and go beside it.
        let vector = Some((8, host.vectors[8].clone()));
        let stays = host.controller.create_queues(8, 1, 17, vector).unwrap();
        let shape = Shape::default();
        let mut beside = Traffic::new(vec![stays], &volumes, &host.memory, shape).unwrap();
        for round in 0..times(20, 1000) {
            beside.fill(8).unwrap();
            let mut ids: Vec<u16> = (1..=7).collect();
            chance.shuffle(&mut ids);
            // Three completion queues, of which each has some of the submission queues.
            let cqids: Vec<u16> = (1..=3).map(|i| ids[i]).collect();
            let c = &mut host.controller;
            let mut all = Vec::new();
            for &id in &cqids {
                let vector = Some((id, host.vectors[usize::from(id)].clone()));
                all.push((c.create_cq(id, 128, vector).unwrap(), Vec::new()));
            }
            for (i, &id) in ids.iter().enumerate() {
                let (cq, sqs) = &mut all[i % 3];
                let early = c.create_sq(id, 17, 0);
                assert_eq!(refused(early), status::QUEUE_IDENTIFIER);
                sqs.push(c.create_sq(id, 17, cq.id()).unwrap());
                assert_eq!(
                    refused(c.create_sq(id, 17, cq.id())),
                    status::QUEUE_IDENTIFIER
                );
            }
            let shape = Shape {
                seed: round,
                host: 100,
                may_fail: true,
                ..shape
            };
            let queues = all.into_iter();
            let queues = queues.map(|(cq, sqs)| Queues::new(c.bar(), cq, sqs));
            let queues: Vec<_> = queues.collect();
            let mut traffic = Traffic::new(queues, &volumes, &host.memory, shape).unwrap();
            traffic.run(50, 16, PATIENCE).unwrap();
            // Deleted with commands in flight: these come back, done or aborted.
            traffic.fill(16).unwrap();
            chance.shuffle(&mut ids);
            for id in &ids {
                let early = Command::delete_cq(cqids[0]);
                assert_eq!(refused(c.admin(&early)), status::QUEUE_DELETION);
                c.admin(&Command::delete_sq(*id)).unwrap();
                let twice = c.admin(&Command::delete_sq(*id));
                assert_eq!(refused(twice), status::QUEUE_IDENTIFIER);
                if cqids.contains(id) {
                    break;
                }
            }
            for id in &ids {
                let _ = c.admin(&Command::delete_sq(*id));
            }
            // Those that were not fetched were never begun, and nobody hears of them (Base 2.1 §5.2.3).
            traffic.take().unwrap();
            traffic.abandon();
            for id in &cqids {
                c.admin(&Command::delete_cq(*id)).unwrap();
                let twice = c.admin(&Command::delete_cq(*id));
                assert_eq!(refused(twice), status::QUEUE_IDENTIFIER);
            }
            beside.run(50, 8, PATIENCE).unwrap();
        }
        beside.verify(PATIENCE).unwrap();
    }
}

/// The bound: commands that storage does not answer are aborted with their queue.
#[test]
fn a_queue_is_deleted_over_storage_that_never_answers() {
    for poll in POLLS {
        let card = Card::new(poll, 1);
        let stall = Fault::new(ram(512, SIZE), vec![FaultOptions::all(Action::Stall)]);
        let handle = stall.handle();
        card.add(Arc::new(stall), 512);
        let port = card.port("port", 2);
        let mut host = port.host();
        host.enable();
        let mut queues = host.queues(1, 2, 16, true).remove(0);
        let mut data = Buffer::new(&host.memory, 512).unwrap();
        data.fill(0x77);
        let read = Command::read(1, 0, 1).data(data.prp().unwrap());
        let gone = queues.submit(0, &read).unwrap();
        let stays = queues.submit(1, &read).unwrap();
        queues.ring().unwrap();
        until(|| handle.struck() == 2);
        let began = std::time::Instant::now();
        host.controller.admin(&Command::delete_sq(1)).unwrap();
        assert!(began.elapsed() < SOON);
        // Its completions came before the deletion's.
        let mut found = queues.poll().unwrap().expect("it is there");
        assert_eq!((found.completion.sq, found.completion.cid), (1, gone));
        assert_eq!(refused(found.ok()), status::SQ_DELETED);
        assert_eq!(data.read(), [0x77; 512]);
        handle.clear();
        handle.resume();
        found = queues.finish(1, stays, PATIENCE).unwrap();
        found.ok().unwrap();
        host.controller.admin(&Command::delete_sq(2)).unwrap();
        host.controller.admin(&Command::delete_cq(1)).unwrap();
    }
}

/// Without I/O an end waits for nothing, however long the bound is.
#[test]
fn an_idle_controller_ends_at_once() {
    for poll in POLLS {
        let mut card = Card::new(poll, 2);
        card.bound = std::time::Duration::from_secs(1000);
        card.ram(512, SIZE);
        let port = card.port("port", 8);
        let mut host = port.host();
        for abrupt in [false, true] {
            host.enable();
            let queues = host.queues(4, 2, 16, true);
            host.controller.shut_down(abrupt).unwrap();
            host.controller.disable().unwrap();
            drop(queues);
            host.enable();
            let queues = host.queues(4, 2, 16, true);
            host.controller.disable().unwrap();
            drop(queues);
        }
        host.enable();
        host.queues(4, 2, 16, true);
        host.client.reset().unwrap();
        assert_eq!(host.controller.status().ok(), Some(0xffff_ffff));
        drop(host);
        port.gone();
    }
}
