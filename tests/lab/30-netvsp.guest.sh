set -e
mac=52:54:00:12:34:56
up
ethtool -i "$nic" | grep '^driver: hv_netvsc'
ethtool -k "$nic" | grep -E '^(tcp-segmentation|large-receive)-offload: on'
ethtool -l "$nic" | grep '^Combined:' | sed 's/[[:space:]]\+/ /' | sort | uniq -c | grep "2 Combined: $(nproc)"
ls -d "/sys/class/net/$nic/queues/tx-1"
answered
leased
fetched
tcp -P 2
received=$(packets rx)
tcp -P 2 -R
echo "reverse: $(($(packets rx) - received)) frames, $(cat "/sys/class/net/$nic/statistics/rx_bytes") bytes"
udp
udp -R
ethtool -S "$nic" | grep -E 'tx_busy|tx_no_memory|x_queue_.*_packets'

# The NIC puts tags into frames and takes them out.
ethtool -k "$nic" | grep -E '^[rt]x-vlan-offload: on'
tagged
jumbo
reloaded hv_netvsc
followed
