# Sourced by the lab tests. Each test is a shell script that runs in L1 with `partita` on PATH;
# what its guests run stands in NAME.guest.sh beside it. A test passes if it exits with 0.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
name=$(basename "$0" .sh)
work=/tmp/$name
rm -rf "$work"
mkdir -p "$work"
cd "$work"

fail() {
    echo "FAIL: $*" >&2
    exit 1
}

# PARTITA_OPTIONS are for every guest, such as '--synic user'.
: "${PARTITA_OPTIONS:=}"
# KERNEL is the one that a test which names several `# kernels:` is to boot: the first, run by hand.
: "${KERNEL:=$(sed -n 's/^# kernels: *\([a-z]*\).*/\1/p' "$0")}"
# KERNEL_OPTIONS are added to a guest's command line.
: "${KERNEL_OPTIONS:=}"

# guest KERNEL SCRIPT [partita option]...: boots a guest that runs SCRIPT and powers off. Its
# console goes to console.log and, as it comes, to the test's output. It shows warnings and worse:
# each byte costs two exits, and all of the boot's messages would cost as much as the boot itself.
guest() {
    kernel=$1 script=$2
    shift 2
    cat "$here/lib.guest.sh" "$script" >script
    with-script script initrd "$kernel"
    {
        rc=0
        # shellcheck disable=SC2086
        partita run $PARTITA_OPTIONS --kernel "/lab/$kernel/vmlinuz" --initrd initrd \
            --cmdline "console=ttyS0 panic=-1 loglevel=5 $KERNEL_OPTIONS" "$@" \
            2>partita.log </dev/null || rc=$?
        echo "$rc" >rc
    } | tr -d '\r' | tee console.log
    cat partita.log >&2
    [ "$(cat rc)" = 0 ] || fail "partita exited with $(cat rc)"
    grep -q '^guest: exit 0' console.log || fail "the guest's script did not exit with 0"
}

# refute TEXT: the guest's console must not show it.
refute() {
    ! grep -q -- "$1" console.log || fail "the guest's console shows: $1"
}

# expect TEXT: the guest's console must show it.
expect() {
    grep -q -- "$1" console.log || fail "the guest's console does not show: $1"
}

# No guest may run into one of these.
healthy() {
    refute 'Call Trace'
    refute 'BUG:'
    refute 'I/O error'
}

# whole IMAGE COUNT: the file system on IMAGE is sound, and COUNT files in it are as they were in the
# guest, which has shown a line `sum: SHA256 NAME` for each.
whole() {
    e2fsck -fn "$1" || fail "e2fsck of $1"
    sed -n 's/^sum: //p' console.log >sums
    [ "$(wc -l <sums)" = "$2" ] || fail "$(wc -l <sums) checksums instead of $2"
    while read -r sum file; do
        debugfs -R "cat $file" "$1" 2>/dev/null | sha256sum | grep -q "^$sum" || fail "$file differs"
    done <sums
}

# until_shown TEXT: waits for a line of the guest's console that begins with it.
until_shown() {
    until grep -qs "^$1" console.log; do sleep 0.2; done
}

# host_end MAC MIB: the host's end of the tap lab0 and of its VLAN 7, for a guest's NIC at MAC: DHCP, iperf3,
# and a file of so many MiB over HTTP. When the guest says so, frames come while its driver goes and comes,
# and the tap is set down, up again and taken away.
host_end() {
    until ip addr add 10.0.0.1/24 dev lab0 2>/dev/null; do sleep 0.1; done
    # Frames find their way while the guest cannot answer for its address.
    ip neigh replace 10.0.0.2 lladdr "$1" dev lab0 nud permanent
    modprobe 8021q
    ip link add link lab0 name lab0.7 type vlan id 7
    ip link set lab0.7 up
    ip addr add 10.0.7.1/24 dev lab0.7
    iperf3 -s >/dev/null 2>&1 &
    touch leases
    cat >udhcpd.conf <<END
start 10.0.0.100
end 10.0.0.100
max_leases 1
interface lab0
lease_file $work/leases
pidfile $work/udhcpd.pid
option subnet 255.255.255.0
option router 10.0.0.1
END
    busybox udhcpd -f -a 100 udhcpd.conf &
    dd if=/dev/urandom of=file bs=1M count="$2" 2>/dev/null
    md5sum <file >file.sum
    busybox httpd -h "$work"
    until_shown 'reload: begin'
    ping -q -i 0.005 -s 1400 10.0.0.2 >ping.log 2>&1 &
    pings=$!
    until_shown 'tap: down'
    kill $pings
    ip link set lab0 down
    until_shown 'tap: up'
    ip link set lab0 up
    until_shown 'tap: gone'
    ip link del lab0
}
