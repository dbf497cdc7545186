#!/bin/sh
# A synthetic NIC on a tap with a queue for each processor: the indirection table that a guest sets takes
# effect at once.
. "$(dirname "$0")/lib.sh"

ip tuntap add dev lab0 mode tap multi_queue vnet_hdr
ip addr add 10.0.0.1/24 dev lab0
ip link set lab0 up
iperf3 -s >/dev/null 2>&1 &

guest cloud "$here/35-rss.guest.sh" --cpus 2 --stats --nic backend=tap:lab0
healthy
for channel in 0 1; do
    grep "^stats: nic0.$channel: .* crossed [1-9].* astray 0" partita.log || fail "nothing crossed from $channel"
done
