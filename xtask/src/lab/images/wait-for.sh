#!/bin/sh
# wait-for PATH…: waits until all exist, half a minute at most. Disks turn up a moment after their driver.
for path; do
    waited=0
    until [ -e "$path" ]; do
        [ $waited = 1500 ] && { echo "wait-for: no $path after 30 s" >&2; exit 1; }
        sleep 0.02
        waited=$((waited + 1))
    done
done
