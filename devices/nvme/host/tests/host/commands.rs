//! Admin and I/O commands as the model reads them.

use std::time::Duration;

use bluff_nvme_host::spec::{admin, feature, log, status};
use bluff_nvme_host::{Buffer, Command, Error, copy_ranges, dsm_ranges};

use crate::bring_up::controller;
use crate::model::BLOCKS;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn identify_features_and_logs() {
    let (model, mut controller) = controller();
    let id = controller.identify_controller().unwrap();
    assert_eq!((id.serial().as_str(), id.mdts()), ("SERIAL", 5));
    assert!(id.has_shadow_doorbells() && id.has_sgls());
    let ns = controller.identify_namespace(1).unwrap();
    assert_eq!((ns.nsze(), ns.block()), (BLOCKS, 512));
    assert_eq!(controller.active_namespaces(0).unwrap(), [1, 5]);
    assert_eq!(controller.active_namespaces(1).unwrap(), [5]);
    assert_eq!(controller.set_queue_count(9, 9).unwrap(), (4, 2));
    controller.set_feature(feature::TEMPERATURE, 0, 77).unwrap();
    assert_eq!(controller.feature(feature::TEMPERATURE, 0).unwrap(), 77);
    let page = controller.log_page(log::SMART, u32::MAX, 8, 512).unwrap();
    let want: Vec<u8> = (0..512u32).map(|i| (i + 8 + 2) as u8).collect();
    assert_eq!(page, want);
    assert!(!controller.abort(0, 3).unwrap());
    controller.format(1, 0, 0).unwrap();
    let bad = controller.admin(&Command::new(0xc0, 0)).unwrap_err();
    assert_eq!(bad.status(), Some(status::INVALID_OPCODE));
    assert_eq!(model.with(|s| s.log.pop()), Some(0xc0));
}

#[test]
fn events_come_while_other_commands_are_waited_for() {
    let (model, mut controller) = controller();
    for _ in 0..3 {
        controller.request_event().unwrap();
    }
    assert_eq!(controller.poll_event().unwrap(), None);
    model.event(0x10);
    controller.identify(1, 0).unwrap();
    model.event(0x20);
    assert_eq!(controller.requests(), 2);
    assert_eq!(controller.poll_event().unwrap(), Some(0x10));
    assert_eq!(controller.poll_event().unwrap(), Some(0x20));
    assert_eq!(controller.poll_event().unwrap(), None);
    assert_eq!(controller.requests(), 1);
    assert_eq!(
        model.with(|s| s.log.iter().filter(|o| **o == admin::ASYNC_EVENT).count()),
        3
    );
}

#[test]
fn io_commands_do_what_they_say() {
    let (model, mut controller) = controller();
    let mut queues = controller.create_queues(1, 1, 8, None).unwrap();
    let mut data = Buffer::holding(controller.memory(), &[7; 1024]).unwrap();
    let pointer = data.prp().unwrap();
    let mut run = |command: Command| queues.run(0, &command, LIMIT);
    run(Command::write(1, 3, 2).fua().data(pointer)).unwrap();
    let disk = |model: &crate::model::Model| model.with(|s| s.disk[2 * 512..6 * 512].to_vec());
    let want = [&[0; 512][..], &[7; 1024], &[0; 512]].concat();
    assert_eq!(disk(&model), want);
    run(Command::compare(1, 3, 2).data(pointer)).unwrap();
    let differs = run(Command::compare(1, 2, 2).data(pointer)).unwrap_err();
    assert_eq!(differs.status(), Some(status::COMPARE));
    data.fill(0);
    run(Command::read(1, 3, 2).data(pointer)).unwrap();
    assert_eq!(data.read(), [7; 1024]);
    run(Command::write_zeroes(1, 4, 1, true)).unwrap();
    assert_eq!(disk(&model)[1024..], [0; 1024]);
    run(Command::flush(1)).unwrap();
    let past = run(Command::read(1, BLOCKS - 1, 2).data(pointer)).unwrap_err();
    assert!(matches!(
        past,
        Error::Failed {
            opcode: 2,
            status: status::LBA_RANGE
        }
    ));
    controller.delete_queues(queues).unwrap();
}

#[test]
fn words_are_where_the_specifications_have_them() {
    let c = Command::write(9, 0x1_0000_0002, 1 << 16)
        .fua()
        .cid(0xabcd)
        .0;
    assert_eq!(c[0], 0xabcd_0001);
    assert_eq!((c[1], c[10], c[11], c[12]), (9, 2, 1, 0x4000_ffff));
    let c = Command::write_zeroes(1, 0, 3, true).0;
    assert_eq!((c[0], c[12]), (8, 0x0200_0002));
    let c = Command::deallocate(1, 256).0;
    assert_eq!((c[0], c[10], c[11]), (9, 255, 4));
    let c = Command::copy(1, 5, 2).0;
    assert_eq!((c[0], c[10], c[12]), (0x19, 5, 1));
    let c = Command::abort(3, 0x77).0;
    assert_eq!((c[0], c[10]), (8, 0x0077_0003));
    let c = Command::format(1, 1, 2).0;
    assert_eq!((c[0], c[10]), (0x80, 0x0401));
    let c = Command::create_cq(5, 256, 0x1_2000, Some(3)).0;
    assert_eq!(
        (c[0], c[6], c[10], c[11]),
        (5, 0x1_2000, 0x00ff_0005, 0x0003_0003)
    );
    let c = Command::create_sq(6, 65536, 0x1000, 5).0;
    assert_eq!((c[0], c[10], c[11]), (1, 0xffff_0006, 0x0005_0005));
    let c = Command::log_page(2, 1, 4096, 0x50000).0;
    assert_eq!((c[10], c[11], c[12]), (0x3fff_0002, 1, 4096));
    let c = Command::doorbell_buffers(0x1_0000_1000, 0x2000).0;
    assert_eq!((c[6], c[7], c[8], c[9]), (0x1000, 1, 0x2000, 0));
    let ranges = dsm_ranges(&[(0x0102, 3)]);
    assert_eq!(ranges, [0, 0, 0, 0, 3, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    let ranges = copy_ranges(&[(0x0102, 3)]);
    assert_eq!(
        (ranges.len(), &ranges[8..18]),
        (32, &[2, 1, 0, 0, 0, 0, 0, 0, 2, 0][..])
    );
}
