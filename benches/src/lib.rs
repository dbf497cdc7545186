//! What the synthetic devices cost, measured without a VM: both ends in one process.
