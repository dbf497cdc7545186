//! The small ones, under criterion: a ring in one thread, and reads of a disk in memory.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use backends::ram::RamDisk;
use benches::rig::{Order, Reads, Rig, Waiting};
use benches::{pin, processors, ring::Ring};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring, one thread");
    for payload in [64usize, 4096] {
        const PACKETS: u64 = 1024;
        let mut ring = Ring::new(31);
        let bytes = vec![0xa5; payload];
        group.throughput(Throughput::Elements(PACKETS));
        group.bench_function(BenchmarkId::from_parameter(payload), |b| {
            b.iter(|| ring.one_thread(black_box(&bytes), PACKETS));
        });
    }
    group.finish();
}

fn reads(c: &mut Criterion) {
    let disk = || Arc::new(RamDisk::new(64 << 20).expect("memory"));
    let rig = Rig::inline(disk()).expect("a worker");
    batches(c, "RAM disk, worker in the same thread", rig);

    let cpus = processors();
    let rig = Rig::new(disk(), Some(&cpus)).expect("a worker");
    batches(c, "RAM disk, worker on another core", rig);
    pin(&cpus, None);
}

fn batches(c: &mut Criterion, name: &str, mut rig: Rig) {
    let mut group = c.benchmark_group(name);
    for block in [512u32, 4096] {
        for depth in [1u16, 4, 16] {
            group.throughput(Throughput::Elements(u64::from(depth)));
            group.bench_function(BenchmarkId::new(format!("{block} B"), depth), |b| {
                let (order, waiting) = (Order::Random, Waiting::Spin);
                let reads = Reads { block, depth, order, waiting, batches: true };
                b.iter_custom(|batches| {
                    let most = batches * u64::from(depth);
                    rig.read(&reads, Duration::MAX, most).expect("a sound controller").time
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = ring, reads
}
criterion_main!(benches);
