# Comes before the script of every guest: words that several of them use.

# filled DISK COUNT: makes a file system on DISK with COUNT files in it, and shows the checksum of each
# as it is on the disk, not in the page cache.
filled() {
    mkfs.ext4 -q -F "$1"
    mkdir -p /mnt
    mount -t ext4 "$1" /mnt
    for i in $(seq "$2"); do
        head -c $((i * 77777)) /dev/urandom >"/mnt/$i"
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    (cd /mnt && sha256sum [0-9]* | sed 's/^/sum: /')
    umount /mnt
}

# listening PORT [COMMAND]...: waits until somebody listens at a TCP port, as COMMAND sees it.
listening() {
    port=$1
    shift
    for _ in $(seq 300); do
        "$@" ss -ltn | grep -q ":$port " && return
        sleep 0.1
    done
    echo "nobody listens at port $port" >&2
    return 1
}

# in_time COMMAND...: repeats a short one until it succeeds.
in_time() {
    for _ in $(seq 30); do
        "$@" && return
        sleep 0.2
    done
    return 1
}

# The words below are for a NIC on a tap, whose host's end is host_end's of lib.sh. $mac is its address.

# named ADDRESS: waits for the NIC that has it, and says its name.
named() {
    for _ in $(seq 300); do
        address=$(grep -l "$1" /sys/class/net/*/address 2>/dev/null | grep -v -e /lo/ -e tagged | head -1)
        [ -n "$address" ] && break
        sleep 0.1
    done
    basename "$(dirname "$address")"
}

# carrier 0|1: waits until the link is so.
carrier() {
    for _ in $(seq 300); do
        [ "$(cat "/sys/class/net/$nic/carrier" 2>/dev/null)" = "$1" ] && return
        sleep 0.1
    done
    return 1
}

# Takes the NIC into use.
up() {
    nic=$(named "$mac")
    ip link set "$nic" up
    ip addr replace 10.0.0.2/24 dev "$nic"
    carrier 1
}

answered() { ping -c 3 -i 0.2 -W 5 "${1:-10.0.0.1}"; }
packets() { cat "/sys/class/net/$nic/statistics/$1_packets"; }

# The host leases an address.
leased() {
    printf '#!/bin/sh\necho "dhcp: $1 $ip $router"\n' >/tmp/leased
    chmod +x /tmp/leased
    udhcpc -i "$nic" -n -q -t 20 -T 1 -s /tmp/leased 2>/dev/null | grep '^dhcp: bound 10.0.0.100 10.0.0.1$'
}

# The host compares what is shown with its own.
fetched() {
    until wget -q --spider http://10.0.0.1/file 2>/dev/null; do sleep 0.5; done
    echo "file: $(wget -q -O - http://10.0.0.1/file | md5sum)"
}

# tcp [iperf3 option]...: one way, and the other with -R.
tcp() { iperf3 -c 10.0.0.1 -t 1 -i 0 "$@" | grep -E '(sender|receiver)$'; }

# udp [iperf3 option]...: most of the datagrams arrive.
udp() {
    iperf3 -c 10.0.0.1 -u -b 5M -l 1400 -t 1 -i 0 "$@" | tee /tmp/udp | grep -E 'sender|receiver'
    sed -n 's,.* \([0-9]*\)/\([0-9]*\) (.*receiver.*,\1 \2,p' /tmp/udp | {
        read -r lost all
        [ "$all" -gt 100 ] && [ $((lost * 2)) -lt "$all" ]
    }
}

# A VLAN of its own.
tagged() {
    ip link add link "$nic" name tagged type vlan id 7
    ip link set tagged up
    ip addr add 10.0.7.2/24 dev tagged
    answered 10.0.7.1
    ip link del tagged
}

# A packet of 8000 bytes is one frame.
jumbo() {
    ip link set "$nic" mtu 9000
    up
    answered >/dev/null
    sent=$(packets tx)
    ping -c 5 -i 0.2 -s 8000 -W 5 10.0.0.1
    [ $(($(packets tx) - sent)) -lt 15 ]
}

# reloaded DRIVER: ten times, while frames come in.
reloaded() {
    echo 'reload: begin'
    for _ in $(seq 10); do
        rmmod "$1"
        modprobe "$1"
        up
    done
    answered
    echo 'reload: done'
}

# The link follows the tap, which is taken away in the end.
followed() {
    echo 'tap: down'
    carrier 0
    echo 'tap: up'
    carrier 1
    answered
    echo 'tap: gone'
    carrier 0
}
