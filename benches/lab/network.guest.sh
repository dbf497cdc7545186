# Brings up the NIC with the address that the kernel's command line names, and serves the host's iperf3 until
# the VMM is ended.
address=$(sed 's,.* nic-address=\([0-9.]*\).*,\1,' /proc/cmdline)
for _ in $(seq 100); do
    nic=$(ls /sys/class/net | grep -v lo | head -1)
    [ -n "$nic" ] && break
    sleep 0.1
done
ip link set "$nic" up
ip addr add "$address/24" dev "$nic"
exec iperf3 -s >/dev/null
