//! Frames a second through the virtual switch, from one port to another.

use std::time::Duration;

use benches::wire::Wire;
use benches::{pin, processors};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Frames in one measured iteration.
const FRAMES: u64 = 4096;

fn switch(c: &mut Criterion) {
    let cpus = processors();
    let mut group = c.benchmark_group("switch");
    group.throughput(Throughput::Elements(FRAMES));
    for len in [64usize, 1500] {
        let wire = Wire::new(len);
        group.bench_function(BenchmarkId::new("one core", len), |b| {
            b.iter_custom(|iterations| wire.one_thread(iterations * FRAMES));
        });
        group.bench_function(BenchmarkId::new("two cores", len), |b| {
            b.iter_custom(|iterations| {
                wire.two_threads(iterations * FRAMES, |cpu| pin(&cpus, Some(cpu)))
            });
        });
        pin(&cpus, None);
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = switch
}
criterion_main!(benches);
