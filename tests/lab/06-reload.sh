#!/bin/sh
# kernels: cloud new
# hv_storvsc is unloaded and loaded ten times, right after reads and writes each time; nothing is
# lost, no channel stays behind, and the disk works at the end as at the beginning.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
guest "$KERNEL" "$here/06-reload.guest.sh" --cpus 2 --disk path=disk.img
expect 'reloaded: 10'
healthy
