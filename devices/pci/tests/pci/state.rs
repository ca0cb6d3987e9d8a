//! A function that another process goes on with.

use bluff_pci::{Error, Interrupt, PciFunction, Region};

use crate::rig::{
    BOUND, COMMAND, Call, ENABLE, MASTER, MEMORY, MSIX_CONTROL, PMCSR, Rig, TABLE, heard, memory,
};

const V: Interrupt = Interrupt::Msix(2);
const CONTROL: u64 = TABLE + 2 * 16 + 12;

#[test]
fn another_goes_on() {
    let mut rig = Rig::running();
    rig.set_u32(0x10, 0xfe00_0000);
    rig.set_u16(MSIX_CONTROL, ENABLE);
    rig.bar_set_u32(0, TABLE + 2 * 16, 0xfee0_0000);
    rig.bar_set_u32(0, CONTROL, 1);
    let _ = rig.vector(2).signal();
    let _ = rig.intx().assert();
    rig.function.device_mut().state = vec![1, 2, 3];
    let state = rig.function.save();

    let mut next = Rig::new();
    next.function.set_memory(memory(), BOUND, Box::new(|| {}));
    let event = next.connect(V);
    let untold = next.connect(Interrupt::Msix(3));
    next.seen.take();
    next.function.load(&state).unwrap();
    // The device has its state before it has memory.
    assert_eq!(next.function.device().state, [1, 2, 3]);
    assert_eq!(next.seen.take(), [Call::DmaOn(1)]);
    let all: [u8; 4096] = rig.read(Region::Config, 0);
    assert_eq!(next.read(Region::Config, 0), all);
    assert_eq!(next.bar_u32(0, TABLE + 2 * 16), 0xfee0_0000);
    assert_eq!(heard(&event), 0);
    next.bar_set_u32(0, CONTROL, 0);
    assert_eq!(heard(&event), 1, "it was pending");
    assert!(next.intx().is_asserted());
    // A mask bit that nobody wrote counts here no more than there.
    let _ = next.vector(3).signal();
    assert_eq!(heard(&untold), 1);
    assert_eq!(next.function.save().len(), state.len());
}

#[test]
fn states_that_are_not_ours() {
    let mut rig = Rig::running();
    let before: [u8; 4096] = Rig::new().read(Region::Config, 0);
    rig.function.device_mut().state = b"bad".to_vec();
    let state = rig.function.save();
    let refused = |state: &[u8]| {
        let mut rig = Rig::new();
        assert!(matches!(rig.function.load(state), Err(Error::State(_))));
        assert_eq!(rig.read::<4096>(Region::Config, 0), before, "as it was");
    };
    refused(&state);
    let good = &state[..state.len() - 3];
    for len in 0..good.len() {
        // Each length would take a while.
        if len < 8 || len % 97 == 0 || len == good.len() - 1 {
            refused(&good[..len]);
        }
    }
    for (at, value) in [
        (0, 2),
        (1, 2),
        (2, 0xff),
        // A power state that does not exist.
        (3 + PMCSR as usize, 1),
        // Flags of the first vector.
        (3 + 4096 + 16, 4),
    ] {
        let mut state = good.to_vec();
        state[at] = value;
        refused(&state);
    }
    // What software cannot write is not taken over.
    let mut state = good.to_vec();
    state[3..3 + 0x40].fill(0xff);
    let mut rig = Rig::new();
    rig.function.load(&state).unwrap();
    assert_eq!(rig.u32(0), 0x0010_1b36);
    assert_eq!(rig.u16(COMMAND), 0x0540 | MEMORY | MASTER);
    assert_eq!(rig.u32(0x10), 0xffff_0004);
}
