//! A hostile guest that stays, and an honest one beside it, each a program of its own: what the first does
//! costs the host nothing that lasts, and the second nothing at all.
//!
//! To repeat a seed that failed: `HOSTILE_SEED=n cargo test --test hostile`. `cargo xtask soak` does the same for
//! hours.

#[path = "../xtask/src/soak/figures.rs"]
mod figures;
#[path = "../xtask/src/soak/machines.rs"]
mod machines;

use std::path::Path;

use machines::{Plan, soak};

#[test]
fn a_hostile_program_costs_the_host_nothing_and_an_honest_one_is_served() {
    let kvm = hypervisor::kvm::open().is_ok_and(|kvm| {
        let interface = hypervisor::kvm::preferred_hyper_v(&kvm);
        hypervisor::kvm::lacking(&kvm, interface).is_none()
    });
    let partitions: &[_] = if kvm { &["kvm", "hosted"] } else { &["hosted"] };
    let seed = std::env::var("HOSTILE_SEED").ok().map(|seed| seed.parse().unwrap());
    for partition in partitions {
        let plan = Plan {
            partita: Path::new(env!("CARGO_BIN_EXE_partita")),
            partition,
            seed: seed.unwrap_or(1),
            warm_up: if seed.is_some() { "rounds=1" } else { "rounds=20" },
            hostility: if seed.is_some() { "rounds=1" } else { "rounds=60" },
        };
        let report = soak(&plan).unwrap();
        eprintln!("{partition}: {report}");
        assert_eq!(report.faults, Vec::<String>::new(), "{partition}: {report}");
    }
}
