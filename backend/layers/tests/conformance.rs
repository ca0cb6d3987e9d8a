//! The suite through the layers, around a ram volume.

use std::sync::Arc;
use std::time::Duration;

use bluff_block::conformance::{self, Profile, TestVolume};
use bluff_block::{Volume, ram::Ram};
use bluff_layers::delay::When;
use bluff_layers::fault::{Action, FaultOptions};
use bluff_layers::{Delay, DelayOptions, Fault};

fn ram() -> Arc<dyn Volume> {
    Arc::new(Ram::new(512, 8 << 20).unwrap())
}

fn run(make: impl Fn() -> Arc<dyn Volume>) {
    conformance::run(&Profile::default(), &|| TestVolume::new(make()));
}

#[test]
fn delay_before() {
    let options = DelayOptions {
        jitter: Duration::from_micros(300),
        rate: 0.5,
        ..DelayOptions::all(Duration::from_micros(200))
    };
    run(|| Arc::new(Delay::new(ram(), options.clone())));
}

#[test]
fn delay_after() {
    let options = DelayOptions {
        when: When::After,
        jitter: Duration::from_micros(300),
        ..DelayOptions::all(Duration::from_micros(100))
    };
    run(|| Arc::new(Delay::new(ram(), options.clone())));
}

#[test]
fn fault_without_faults() {
    run(|| Arc::new(Fault::new(ram(), Vec::new())));
}

#[test]
fn fault_that_reorders() {
    let fault = FaultOptions::all(Action::Reorder(16));
    run(|| Arc::new(Fault::new(ram(), vec![fault.clone()])));
}

#[test]
fn layers_on_layers() {
    run(|| {
        let slow: Arc<dyn Volume> = Arc::new(Delay::new(
            ram(),
            DelayOptions::all(Duration::from_micros(50)),
        ));
        Arc::new(Fault::new(
            slow,
            vec![FaultOptions::all(Action::Reorder(4))],
        ))
    });
}

#[test]
fn a_volume_that_never_answers() {
    let profile = Profile::default();
    conformance::run_silent(&profile, &|| {
        TestVolume::new(Arc::new(Fault::silent(ram())))
    });
    let hour = DelayOptions::all(Duration::from_secs(3600));
    conformance::run_silent(&profile, &|| {
        TestVolume::new(Arc::new(Delay::new(ram(), hour.clone())))
    });
    let silent: Arc<dyn Volume> = Arc::new(Fault::silent(ram()));
    conformance::run_silent(&profile, &|| {
        TestVolume::new(Arc::new(Delay::new(
            silent.clone(),
            DelayOptions::default(),
        )))
    });
}
