//! What devices may show their drivers, for fuzzers and tests: ordinary functions, so that a corpus
//! can be replayed. They fail by panicking.

mod e1000;
mod ide;

pub use e1000::fuzz_e1000;
pub use ide::fuzz_ide;
