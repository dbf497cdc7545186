set -e
nic=/sys/class/net/eth0
up() {
    for _ in $(seq 100); do
        [ -d $nic ] && break
        sleep 0.1
    done
    ip link set eth0 up
    ip addr replace 10.0.0.2/24 dev eth0
}

up
ethtool -i eth0 | grep '^driver: hv_netvsc'
ethtool -k eth0 | grep -E '^(tcp-segmentation|large-receive)-offload: on'
[ "$(cat $nic/address)" = 52:54:00:12:34:56 ]
[ "$(cat $nic/carrier)" = 1 ]
ping -c 3 -i 0.2 -W 5 10.0.0.1
ls -d $nic/queues/tx-1
wget -q -O - http://10.0.0.1/file | sha256sum
iperf3 -c 10.0.0.1 -P 2 -t 1 -i 0 | grep -E 'SUM.*(sender|receiver)'
received=$(cat $nic/statistics/rx_packets)
iperf3 -c 10.0.0.1 -P 2 -t 1 -i 0 -R | grep -E 'SUM.*(sender|receiver)'
echo "reverse: $(($(cat $nic/statistics/rx_packets) - received)) frames, $(cat $nic/statistics/rx_bytes) bytes"
ethtool -S eth0 | grep -E 'tx_busy|tx_no_memory|x_queue_.*_packets'

# A packet of 8000 bytes is one frame.
ip link set eth0 mtu 9000
up
ping -c 1 -W 5 10.0.0.1 >/dev/null
sent=$(cat $nic/statistics/tx_packets)
ping -c 5 -i 0.2 -s 8000 10.0.0.1
[ $(($(cat $nic/statistics/tx_packets) - sent)) -lt 15 ]

echo 'reload: begin'
for _ in $(seq 10); do
    rmmod hv_netvsc
    modprobe hv_netvsc
    up
done
ping -c 3 -i 0.2 -W 5 10.0.0.1
echo 'reload: done'

echo 'cable: ready'
for _ in $(seq 100); do
    [ "$(cat $nic/carrier)" = 0 ] && break
    sleep 0.1
done
[ "$(cat $nic/carrier)" = 0 ]
