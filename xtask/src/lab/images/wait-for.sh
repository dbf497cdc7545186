#!/bin/sh
# wait-for PATH…: waits until all exist, ten seconds at most. Disks turn up a moment after their driver.
for path; do
    waited=0
    until [ -e "$path" ]; do
        [ $waited = 500 ] && { echo "wait-for: no $path after 10 s" >&2; exit 1; }
        sleep 0.02
        waited=$((waited + 1))
    done
done
