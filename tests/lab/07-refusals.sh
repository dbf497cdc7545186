#!/bin/sh
# Commands that make no sense get the sense data that says so, and the disk works on.
. "$(dirname "$0")/lib.sh"

truncate -s 16M disk.img
guest full "$here/07-refusals.guest.sh" --cpus 2 --disk path=disk.img
expect 'past the end: Logical block address out of range'
expect 'no such command: Invalid command operation code'
expect 'wrong field: Invalid field in cdb'
expect 'still works'
refute 'Call Trace'
