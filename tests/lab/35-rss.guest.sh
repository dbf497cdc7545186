set -e
nic=/sys/class/net/eth0
for _ in $(seq 300); do
    [ -d $nic ] && break
    sleep 0.1
done
ip link set eth0 up
ip addr replace 10.0.0.2/24 dev eth0
ping -c 1 -W 5 10.0.0.1
for _ in $(seq 300); do
    [ -d $nic/queues/tx-1 ] && break
    sleep 0.1
done
ethtool -x eth0 | head -3

# received QUEUE: frames that have come on it.
received() { ethtool -S eth0 | sed -n "s/.*rx_queue_$1_packets: //p"; }
# only QUEUE WEIGHT...: all flows are to come on one queue. ARP comes on the first all the same.
only() {
    queue=$1
    shift
    ethtool -X eth0 weight "$@"
    here=$(received "$queue") there=$(received $((1 - queue)))
    iperf3 -c 10.0.0.1 -P 4 -t 1 -i 0 -R >/dev/null
    here=$(($(received "$queue") - here)) there=$(($(received $((1 - queue))) - there))
    echo "weights $*: $here frames on queue $queue, $there on the other"
    [ "$here" -gt 100 ]
    [ "$there" -lt 20 ]
}
only 1 0 1
only 0 1 0
only 1 0 1
ping -c 1 -W 5 10.0.0.1
