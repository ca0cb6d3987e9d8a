//! Every path of CC and CSTS, wrong orders among them, and accesses of every width.

use bluff_testing::times;
use proptest::prelude::*;

use super::*;

const RDY: u32 = 1;
const CFS: u32 = 2;
const OCCURRING: u32 = 4;
const COMPLETE: u32 = 8;
const NSSRO: u32 = 16;
/// IOCQES 4, IOSQES 6.
const SIZES: u32 = 4 << 20 | 6 << 16;
const EN: u32 = 1;
const SHN_NORMAL: u32 = 1 << 14;
const SHN_ABRUPT: u32 = 2 << 14;

fn limits() -> Limits {
    Limits {
        cap: Cap {
            mqes_z: 4095,
            timeout: 4,
            mps_min: 0,
            mps_max: 4,
        },
    }
}

/// With queues that fit.
fn registers() -> Registers {
    let mut r = Registers::new(limits());
    assert!(r.write(0x24, &0x001f_003fu32.to_le_bytes()).is_empty());
    assert!(r.write(0x28, &0x1_0000_0000u64.to_le_bytes()).is_empty());
    assert!(r.write(0x30, &0x2_0000u64.to_le_bytes()).is_empty());
    r
}

fn cc(r: &mut Registers, value: u32) -> Vec<Effect> {
    r.write(0x14, &value.to_le_bytes())
}

fn read32(r: &Registers, at: u64) -> u32 {
    let mut bytes = [0; 4];
    r.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn read64(r: &Registers, at: u64) -> u64 {
    let mut bytes = [0; 8];
    r.read(at, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn run(effects: &[Effect]) -> Run {
    match effects {
        [Effect::Start(run, _), ..] => *run,
        other => panic!("no start: {other:?}"),
    }
}

fn ready() -> (Registers, Run) {
    let mut r = registers();
    let run = run(&cc(&mut r, SIZES | EN));
    r.started(run, true);
    assert_eq!(r.csts(), RDY);
    (r, run)
}

#[test]
fn what_a_host_reads_before_it_does_anything() {
    let r = Registers::new(limits());
    let cap = read64(&r, 0);
    assert_eq!(cap & 0xffff, 4095, "MQES");
    assert_eq!(cap >> 16 & 1, 1, "CQR");
    assert_eq!(cap >> 17 & 3, 0, "AMS");
    assert_eq!(cap >> 24 & 0xff, 4, "TO");
    assert_eq!(cap >> 32 & 0xf, 0, "DSTRD");
    assert_eq!(cap >> 36 & 1, 1, "NSSRS");
    assert_eq!(cap >> 37 & 0xff, 0b0100_0001, "CSS");
    assert_eq!(cap >> 45 & 7, 0, "BPS, CPS");
    assert_eq!((cap >> 48 & 0xf, cap >> 52 & 0xf), (0, 4), "MPSMIN, MPSMAX");
    assert_eq!(cap >> 56 & 7, 0, "PMRS, CMBS, NSSS");
    assert_eq!(cap >> 59, 1, "CRMS");
    assert_eq!(read32(&r, 0x08), 0x0002_0100, "VS");
    assert_eq!(read32(&r, 0x68), 4, "CRTO: CRWMT as TO");
    for at in (0x0c..0x1000).step_by(4).filter(|at| *at != 0x68) {
        assert_eq!(read32(&r, at), 0, "{at:#x}");
    }
    assert_eq!(read64(&r, 0x1000), 0, "doorbells");
    assert_eq!(read64(&r, u64::MAX - 3), 0, "no overflow");
}

#[test]
fn the_time_out_is_rounded_up_and_has_room() {
    use std::time::Duration;
    for (ms, units) in [
        (0, 2),
        (1, 3),
        (500, 3),
        (501, 4),
        (1000, 4),
        (200_000, 255),
    ] {
        assert_eq!(Cap::timeout_for(Duration::from_millis(ms)), units, "{ms}");
    }
}

#[test]
fn enabled_started_disabled_stopped() {
    let mut r = registers();
    let effects = cc(&mut r, SIZES | EN);
    let queues = AdminQueues {
        sq: 0x1_0000_0000,
        sq_entries: 64,
        cq: 0x2_0000,
        cq_entries: 32,
        page: 4096,
    };
    let run = run(&effects);
    assert_eq!(effects, [Effect::Start(run, queues)]);
    assert_eq!((r.csts(), r.takes_commands()), (0, false));
    r.started(run, true);
    assert_eq!((r.csts(), r.takes_commands()), (RDY, true));
    assert_eq!(cc(&mut r, SIZES | EN), [], "nothing changes");
    assert_eq!(cc(&mut r, SIZES), [Effect::Stop(Stop::Disabled)]);
    assert_eq!(
        (r.csts(), r.takes_commands()),
        (RDY, false),
        "until nothing uses memory"
    );
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), 0);
    // The admin queues' registers stay, all else is as after a reset (§3.7.2).
    assert_eq!(
        (read32(&r, 0x24), read64(&r, 0x28), read64(&r, 0x30)),
        (0x001f_003f, 0x1_0000_0000, 0x2_0000)
    );
    assert_eq!(read32(&r, 0x14), SIZES);
}

#[test]
fn what_cannot_be_enabled_is_fatal_until_it_is_disabled() {
    let queue = |at: u64, value: u64| Some((at, value.to_le_bytes()));
    let aqa = |value: u32| Some((0x24u64, (u64::from(value)).to_le_bytes()));
    for (what, config, before, fits) in [
        ("as it should be", SIZES, None, true),
        ("no sizes yet", 0, None, true),
        ("64 KiB pages", SIZES | 4 << 7, None, true),
        ("128 KiB pages", SIZES | 5 << 7, None, false),
        ("largest pages", SIZES | 15 << 7, None, false),
        ("command sets by identifier", SIZES | 0b110 << 4, None, true),
        ("no I/O command set", SIZES | 0b111 << 4, None, false),
        ("a reserved command set", SIZES | 0b001 << 4, None, false),
        ("weighted arbitration", SIZES | 1 << 11, None, false),
        ("a vendor's arbitration", SIZES | 7 << 11, None, false),
        ("small submission entries", 4 << 20 | 5 << 16, None, false),
        ("large completion entries", 5 << 20 | 6 << 16, None, false),
        ("AQA of zeroes", SIZES, aqa(0), false),
        ("one submission entry", SIZES, aqa(0x001f_0000), false),
        ("one completion entry", SIZES, aqa(0x0000_001f), false),
        ("two of each", SIZES, aqa(0x0001_0001), true),
        ("4096 of each", SIZES, aqa(0x0fff_0fff), true),
        ("reserved bits of AQA", SIZES, aqa(0xf001_f001), true),
        ("reserved bits of ASQ", SIZES, queue(0x28, 0x1_0fff), true),
        (
            "ASQ not aligned to 8 KiB",
            SIZES | 1 << 7,
            queue(0x28, 0x1_1000),
            false,
        ),
        (
            "ACQ not aligned to 8 KiB",
            SIZES | 1 << 7,
            queue(0x30, 0x1_1000),
            false,
        ),
        (
            "ACQ aligned to 8 KiB",
            SIZES | 1 << 7,
            queue(0x30, 0x1_2000),
            true,
        ),
    ] {
        let mut r = registers();
        if let Some((at, value)) = before {
            let len = if at == 0x24 { 4 } else { 8 };
            assert!(r.write(at, &value[..len]).is_empty());
        }
        let effects = cc(&mut r, config | EN);
        assert_eq!(!effects.is_empty(), fits, "{what}");
        assert_eq!(r.csts(), if fits { 0 } else { CFS }, "{what}");
        if !fits {
            assert_eq!(
                cc(&mut r, SIZES | EN),
                [],
                "{what}: only after it was disabled"
            );
            assert_eq!(r.csts(), CFS);
            assert_eq!(cc(&mut r, 0), [], "{what}: nothing runs");
            assert_eq!(r.csts(), 0, "{what}");
        }
    }
}

#[test]
fn admin_queues_that_are_not_in_memory_are_fatal() {
    let mut r = registers();
    let run = run(&cc(&mut r, SIZES | EN));
    r.started(run, false);
    assert_eq!(r.csts(), CFS);
    assert_eq!(cc(&mut r, 0), [Effect::Stop(Stop::Disabled)]);
    assert_eq!(r.csts(), 0);
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), 0);
}

#[test]
fn a_controller_that_fails_later_says_so_until_it_is_reset() {
    let (mut r, run) = ready();
    r.fail(run);
    assert_eq!((r.csts(), r.takes_commands()), (CFS | RDY, false));
    assert_eq!(
        cc(&mut r, SIZES | EN | SHN_NORMAL),
        [Effect::Stop(Stop::Shutdown(ShutdownKind::Normal))]
    );
    assert_eq!(r.csts(), CFS | RDY | OCCURRING);
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), CFS | RDY | COMPLETE);
    assert_eq!(cc(&mut r, 0), []);
    assert_eq!(r.csts(), 0);
}

#[test]
fn what_is_reported_of_an_earlier_run_is_not_about_this_one() {
    let (mut r, first) = ready();
    assert_eq!(cc(&mut r, 0).len(), 1);
    r.started(first, true);
    r.fail(first);
    assert_eq!(r.csts(), RDY, "stopping");
    assert_eq!(r.stopped(), []);
    let second = run(&cc(&mut r, EN));
    assert_ne!(first, second);
    r.started(first, false);
    r.fail(first);
    assert_eq!(r.csts(), 0);
    r.started(second, true);
    assert_eq!(r.csts(), RDY);
}

#[test]
fn disabled_before_it_was_ready() {
    let mut r = registers();
    let run = run(&cc(&mut r, EN));
    assert_eq!(cc(&mut r, 0), [Effect::Stop(Stop::Disabled)]);
    r.started(run, true);
    assert_eq!(r.csts(), 0, "too late");
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), 0);
}

/// C7: CC.EN cleared while the controller is in the middle of something, then set again at once.
#[test]
fn c07_enable_toggled_while_stopping() {
    let (mut r, first) = ready();
    assert_eq!(cc(&mut r, 0), [Effect::Stop(Stop::Disabled)]);
    for _ in 0..3 {
        assert_eq!(
            cc(&mut r, EN),
            [],
            "one stop at a time, and no start before it is over"
        );
        assert_eq!(r.csts(), RDY);
        assert_eq!(cc(&mut r, 0), []);
    }
    assert_eq!(cc(&mut r, EN), []);
    let effects = r.stopped();
    assert_ne!(run(&effects), first);
    assert_eq!(r.csts(), 0, "it was not ready in between");
    r.started(run(&effects), true);
    assert_eq!(r.csts(), RDY);
}

#[test]
fn queues_cannot_be_moved_while_they_are_used() {
    let (mut r, _) = ready();
    for at in [0x24, 0x28, 0x2c, 0x30, 0x34] {
        assert!(r.write(at, &[0xff; 4]).is_empty());
    }
    assert!(r.write(0x28, &[0xff; 8]).is_empty());
    assert_eq!(
        (read32(&r, 0x24), read64(&r, 0x28), read64(&r, 0x30)),
        (0x001f_003f, 0x1_0000_0000, 0x2_0000)
    );
}

#[test]
fn of_cc_only_what_may_change_does_while_it_is_enabled() {
    let (mut r, _) = ready();
    assert_eq!(
        cc(&mut r, EN | 7 << 4 | 3 << 7 | 1 << 11 | 1 << 24 | 0xe),
        []
    );
    assert_eq!(
        read32(&r, 0x14),
        EN,
        "entry sizes have changed, nothing else"
    );
    assert_eq!(cc(&mut r, SIZES | EN), []);
    assert_eq!((r.cc().iosqes(), r.cc().iocqes(), r.csts()), (6, 4, RDY));
}

#[test]
fn shut_down_then_disabled_then_enabled() {
    for (shn, kind) in [
        (SHN_NORMAL, ShutdownKind::Normal),
        (SHN_ABRUPT, ShutdownKind::Abrupt),
    ] {
        let (mut r, _) = ready();
        assert!(!r.is_safe());
        assert_eq!(
            cc(&mut r, SIZES | EN | shn),
            [Effect::Stop(Stop::Shutdown(kind))]
        );
        assert_eq!((r.csts(), r.takes_commands()), (RDY | OCCURRING, false));
        assert_eq!(cc(&mut r, SIZES | EN | SHN_ABRUPT), [], "it is going on");
        assert_eq!(r.stopped(), []);
        assert_eq!(r.csts(), RDY | COMPLETE);
        assert!(r.is_safe());
        assert_eq!(cc(&mut r, SIZES | EN), []);
        assert_eq!(r.csts(), RDY | COMPLETE, "only a reset makes it go on");
        assert!(!r.takes_commands());
        assert_eq!(cc(&mut r, SIZES), [], "nothing runs");
        assert_eq!(r.csts(), 0);
        assert_eq!(cc(&mut r, SIZES | EN).len(), 1);
    }
}

#[test]
fn disabled_while_it_shuts_down() {
    let (mut r, _) = ready();
    assert_eq!(cc(&mut r, EN | SHN_NORMAL).len(), 1);
    assert_eq!(cc(&mut r, 0), [], "its queues are ending already");
    assert_eq!(r.csts(), RDY | OCCURRING);
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), 0);
}

#[test]
fn shut_down_and_disabled_in_one_write() {
    let (mut r, _) = ready();
    let stop = Effect::Stop(Stop::Shutdown(ShutdownKind::Normal));
    assert_eq!(cc(&mut r, SHN_NORMAL), [stop], "caches are written back");
    assert_eq!(r.csts(), RDY | OCCURRING);
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), COMPLETE);
}

#[test]
fn shut_down_while_disabled_is_complete_at_once() {
    let mut r = registers();
    assert_eq!(cc(&mut r, 3 << 14), [], "a reserved notification is none");
    assert_eq!(r.csts(), 0);
    assert_eq!(cc(&mut r, SHN_NORMAL), []);
    assert_eq!(r.csts(), COMPLETE);
    assert_eq!(cc(&mut r, 0), []);
    assert_eq!(r.csts(), COMPLETE, "it is not taken back by that alone");
    assert_eq!(cc(&mut r, SHN_ABRUPT), []);
    let run = run(&cc(&mut r, EN));
    r.started(run, true);
    assert_eq!(r.csts(), RDY);
}

#[test]
fn a_reset_takes_a_complete_shutdown_back_whatever_shn_is() {
    let (mut r, _) = ready();
    assert_eq!(cc(&mut r, EN | SHN_NORMAL).len(), 1);
    assert_eq!(r.stopped(), []);
    assert_eq!(cc(&mut r, SHN_NORMAL), []);
    assert_eq!(r.csts(), 0);
    // Not cleared in the write that enables, it holds.
    let effects = cc(&mut r, EN | SHN_NORMAL);
    assert_eq!(effects.len(), 2, "{effects:?}");
    assert_eq!(r.csts(), OCCURRING);
}

#[test]
fn disabled_while_it_shuts_down_and_shn_left_as_it_is() {
    let (mut r, _) = ready();
    assert_eq!(cc(&mut r, EN | SHN_NORMAL).len(), 1);
    assert_eq!(cc(&mut r, SHN_NORMAL), []);
    assert_eq!(r.csts(), RDY | OCCURRING);
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), COMPLETE);
}

#[test]
fn enabled_and_shut_down_in_one_write() {
    let mut r = registers();
    let effects = cc(&mut r, EN | SHN_ABRUPT);
    let run = run(&effects);
    assert_eq!(
        effects[1..],
        [Effect::Stop(Stop::Shutdown(ShutdownKind::Abrupt))]
    );
    assert_eq!(r.csts(), OCCURRING);
    r.started(run, true);
    assert_eq!(r.stopped(), []);
    assert_eq!((r.csts(), r.takes_commands()), (RDY | COMPLETE, false));
    assert_eq!(cc(&mut r, 0), []);
    assert_eq!(r.csts(), 0);
}

#[test]
fn a_shutdown_that_ends_before_the_start_was_reported() {
    let mut r = registers();
    let run = run(&cc(&mut r, EN | SHN_NORMAL));
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), COMPLETE);
    r.fail(run);
    assert_eq!(
        cc(&mut r, 0),
        [],
        "nothing runs, so there is nothing to stop"
    );
    assert_eq!(r.csts(), 0);
}

#[test]
fn subsystem_reset_takes_the_word_and_nothing_else() {
    let (mut r, _) = ready();
    for word in [0, 1, 0x4e56_4d64, 0x6576_6d4e, u32::MAX] {
        assert_eq!(r.write(0x20, &word.to_le_bytes()), [], "{word:#x}");
    }
    assert_eq!(r.write(0x20, b"eMVN"), [Effect::SubsystemReset]);
    assert_eq!(read32(&r, 0x20), 0);
    assert_eq!(r.csts(), RDY, "the subsystem tells all controllers");
    assert_eq!(r.subsystem_reset(), [Effect::Stop(Stop::Reset)]);
    assert_eq!(r.subsystem_reset(), [], "again");
    assert_eq!(r.csts(), RDY | NSSRO);
    assert_eq!(
        (read32(&r, 0x14), read32(&r, 0x24), read64(&r, 0x28)),
        (0, 0, 0)
    );
    assert_eq!(r.stopped(), []);
    assert_eq!(r.csts(), NSSRO);
    assert_eq!(
        r.write(0x1c, &[0xef, 0xff, 0xff, 0xff]),
        [],
        "all but the bit"
    );
    assert_eq!(r.csts(), NSSRO);
    assert_eq!(r.write(0x1c, &NSSRO.to_le_bytes()), []);
    assert_eq!(r.csts(), 0, "written with 1 it is cleared");
}

#[test]
fn a_function_reset_leaves_nothing() {
    let mut idle = registers();
    let _ = idle.subsystem_reset();
    assert_eq!(idle.reset(), []);
    assert_eq!((idle.csts(), read64(&idle, 0x28)), (0, 0));

    let (mut r, _) = ready();
    let _ = r.write(0x0c, &[0xff; 4]);
    assert_eq!(cc(&mut r, EN | SHN_NORMAL).len(), 1);
    assert_eq!(
        r.reset(),
        [Effect::Mask(0)],
        "its queues are ending already"
    );
    assert!(r.is_stopping());
    assert_eq!(r.stopped(), []);
    assert_eq!((r.csts(), r.is_stopping()), (0, false));
    for at in [0x0c, 0x14, 0x1c, 0x24, 0x28, 0x2c, 0x30, 0x34] {
        assert_eq!(read32(&r, at), 0, "{at:#x}");
    }
}

#[test]
fn vectors_are_masked_and_cleared_by_bits() {
    let (mut r, _) = ready();
    assert_eq!(
        r.write(0x0c, &0b101u32.to_le_bytes()),
        [Effect::Mask(0b101)]
    );
    assert_eq!(r.write(0x0c, &0b001u32.to_le_bytes()), []);
    assert_eq!((read32(&r, 0x0c), read32(&r, 0x10)), (0b101, 0b101));
    assert_eq!(
        r.write(0x10, &0b001u32.to_le_bytes()),
        [Effect::Mask(0b100)]
    );
    assert_eq!(
        cc(&mut r, 0),
        [Effect::Mask(0), Effect::Stop(Stop::Disabled)],
        "a reset"
    );
}

/// C12: accesses of 1, 2 and 3 bytes, and over a boundary of registers.
#[test]
fn c12_register_access_widths() {
    let mut r = registers();
    let _ = r.write(0x28, &0x1122_3344_5566_7000u64.to_le_bytes());
    // What a dword gives, any part of it gives.
    let mut all = vec![0; 0x1010];
    r.read(0, &mut all);
    for at in 0..0x80 {
        for len in 1..=16 {
            let mut some = vec![0xaa; len];
            r.read(at as u64, &mut some);
            assert_eq!(some, all[at..at + len], "{at:#x} {len}");
        }
    }
    // A write that is not just a register, or a half, is none.
    let before = all;
    for at in 0..0x70u64 {
        for len in [1usize, 2, 3, 4, 5, 7, 8, 16] {
            let whole = len == 4 && at % 4 == 0 || len == 8 && (at == 0x28 || at == 0x30);
            if whole {
                continue;
            }
            assert!(r.write(at, &vec![0xff; len]).is_empty(), "{at:#x} {len}");
            let mut after = vec![0; 0x1010];
            r.read(0, &mut after);
            assert_eq!(after, before, "{at:#x} {len}");
        }
    }
    // By halves, in any order.
    for (at, half) in [
        (0x34, 0x8899_aabbu32),
        (0x30, 0xccdd_eeff),
        (0x2c, 1),
        (0x28, 0xffff_ffff),
    ] {
        assert!(r.write(at, &half.to_le_bytes()).is_empty());
    }
    assert_eq!(
        (read64(&r, 0x30), read64(&r, 0x28)),
        (0x8899_aabb_ccdd_e000, 0x1_ffff_f000)
    );
}

#[test]
fn what_is_read_only_or_absent_stays_as_it_is() {
    let (mut r, _) = ready();
    let mut before = vec![0; 0x1000];
    r.read(0, &mut before);
    for at in (0..0x1000)
        .step_by(4)
        .filter(|at| ![0x0c, 0x10, 0x14].contains(at))
    {
        assert!(r.write(at, &[0xff; 4]).is_empty(), "{at:#x}");
        assert!(r.write(at, &[0xff; 8]).is_empty(), "{at:#x}");
    }
    let mut after = vec![0; 0x1000];
    r.read(0, &mut after);
    assert_eq!(after, before);
}

#[test]
#[should_panic(expected = "nobody asked for a stop")]
fn a_stop_that_nobody_asked_for_is_our_own_mistake() {
    let _ = registers().stopped();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(times(500, 20_000)) })]

    /// The same program as the fuzz target's; every step checks what CSTS may say.
    #[test]
    fn any_writes_are_survived(data in prop::collection::vec(any::<u8>(), 0..600)) {
        crate::fuzzing::fuzz_registers(&data);
    }

    #[test]
    fn sensible_writes_are_survived(data in prop::collection::vec(0..24u8, 0..600)) {
        crate::fuzzing::fuzz_registers(&data);
    }
}
