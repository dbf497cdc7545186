# Sourced after `streams=` and `seconds=`. Brings up the NIC, and has iperf3 run each kind of traffic
# against the host.
nic=$(ls /sys/class/net | grep -v lo | head -1)
for _ in $(seq 100); do
    [ -n "$nic" ] && break
    sleep 0.1
    nic=$(ls /sys/class/net | grep -v lo | head -1)
done
ip link set "$nic" up
ip addr add 10.0.0.2/24 dev "$nic"
until ping -c 1 -W 2 10.0.0.1 >/dev/null; do sleep 0.2; done
# run NAME [iperf3 option]...: prints what the receiver got, in Mbit/s.
run() {
    name=$1
    shift
    echo "job: $name"
    rate=$(iperf3 -c 10.0.0.1 -i 0 -f m -t "$seconds" "$@" | sed -n 's,.* \([0-9.]*\) Mbits/sec.*receiver.*,\1,p' | tail -1)
    echo "result: $name mbits=$rate"
}
run tcp-out
run tcp-in -R
run udp-out -u -b 0 -l 1400
run udp-in -u -b 0 -l 1400 -R
echo "job: ping"
round_trip=$(ping -q -c 200 -i 0.01 10.0.0.1 | sed -n 's,.*= [0-9.]*/\([0-9.]*\)/.*,\1,p')
echo "result: ping ms=$round_trip"
echo "interrupts: $(awk -v n="$nic" '/HYP|HVS|virtio|Hyper/ { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) sum += $i } END { print sum + 0 }' /proc/interrupts)"
