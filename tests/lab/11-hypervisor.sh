#!/bin/sh
# The hypervisor's own tests, which a host without CONFIG_KVM_HYPERV skips half of, all of them: the
# Hyper-V interface as a few bytes of guest code see it, the kernel's and ours; and interrupts of
# controllers that are not KVM's.
# programs: hypervisor/hyper_v hypervisor/kvm hypervisor/split
. "$(dirname "$0")/lib.sh"

for program in hyper_v kvm split; do
    # One at a time: each has partitions of its own, and shall have the processor too.
    "/lab/programs/$program" --nocapture --test-threads=1 >console.log 2>&1 || {
        cat console.log
        fail "$program failed"
    }
    refute skipped
    expect 'test result: ok. [1-9][0-9]* passed; 0 failed; 0 ignored'
    sed -n "s/^test result/$program/p" console.log
done
