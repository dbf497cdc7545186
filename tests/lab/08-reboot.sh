#!/bin/sh
# A guest that reboots comes up again in the same run, with its disk as it left it.
. "$(dirname "$0")/lib.sh"

truncate -s 16M disk.img
guest cloud "$here/08-reboot.guest.sh" --disk path=disk.img
expect 'boot: 1'
expect 'boot: 2'
expect 'boot: 3'
healthy
