# Sourced after `seconds=`. Brings up the NIC, and has each kind of traffic against the host, with lines
# that tell the host when to look at its counters.
nic=$(ls /sys/class/net | grep -v lo | head -1)
for _ in $(seq 100); do
    [ -n "$nic" ] && break
    sleep 0.1
    nic=$(ls /sys/class/net | grep -v lo | head -1)
done
ip link set "$nic" up
ip addr add 10.0.0.2/24 dev "$nic"
until ping -c 1 -W 2 10.0.0.1 >/dev/null; do sleep 0.2; done
# Of the VMBus, of virtio's queues, or of the NIC itself.
irqs() {
    awk -v nic="$nic" '/HYP:|virtio/ || $NF == nic { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) sum += $i }
        END { print sum + 0 }' /proc/interrupts
}
# run NAME BYTES [iperf3 option]...: prints what the receiver got, in Mbit/s and in packets of BYTES of
# payload, be they one by one or together on their way.
run() {
    name=$1 bytes=$2
    shift 2
    echo "job: $name"
    before=$(irqs)
    rate=$(iperf3 -c 10.0.0.1 -i 0 -f m -t "$seconds" "$@" | sed -n 's,.* \([0-9.]*\) Mbits/sec.*receiver.*,\1,p' | tail -1)
    count=$(($(irqs) - before))
    echo done
    packets=$(awk -v rate="${rate:-0}" -v bytes="$bytes" -v seconds="$seconds" 'BEGIN { printf "%d", rate * 125000 * seconds / bytes }')
    echo "result: $name mbits=$rate packets=$packets"
    echo "interrupts: $name $count"
}
run tcp-out 1448
run tcp-in 1448 -R
run udp-out 1400 -u -b 0 -l 1400
run udp-in 1400 -u -b 0 -l 1400 -R
echo 'job: ping'
before=$(irqs)
round_trip=$(ping -q -c 200 -i 0.01 10.0.0.1 | sed -n 's,.*= [0-9.]*/\([0-9.]*\)/.*,\1,p')
count=$(($(irqs) - before))
echo done
echo "result: ping ms=$round_trip packets=400"
echo "interrupts: ping $count"
