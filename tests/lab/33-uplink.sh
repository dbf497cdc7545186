#!/bin/sh
# Two machines, of one and of two processors, whose switches are joined at a socket, and the host joined
# to another switch by a tap: TCP, UDP and a file over either. A partita that was killed leaves its
# socket's file, which stands in nobody's way, and a file that is no socket is left alone.
. "$(dirname "$0")/lib.sh"

# machine NUMBER [partita option]...: in a folder of its own.
machine() {
    number=$1
    shift
    mkdir -p "machine$number"
    (
        cd "machine$number"
        export KERNEL_OPTIONS="machine=$number"
        guest cloud "$here/33-uplink.guest.sh" --memory 384M "$@" --switch "name=lan,uplink=socket:$work/lan" \
            --nic "backend=switch:lan,mac=52:54:00:00:00:0$number"
        healthy
    ) >"machine$number.log" 2>&1
}

echo mine >file
! partita run --kernel /lab/cloud/vmlinuz --nic backend=switch:lan \
    --switch "name=lan,uplink=socket:$work/file" 2>refusal || fail 'a file was taken for a socket'
grep 'file is there and is no socket' refusal
[ "$(cat file)" = mine ] || fail 'the file was changed'

# One that dies.
partita run --kernel /lab/cloud/vmlinuz --nic backend=switch:lan --serial null \
    --switch "name=lan,uplink=socket:$work/lan" </dev/null &
dies=$!
wait-for lan
kill -KILL $dies
wait $dies || true
[ -S lan ] || fail 'it left no file'

# The host.
mkdir www
head -c 4194304 /dev/urandom >www/file
sha256sum <www/file >www/sum
iperf3 -s >/dev/null 2>&1 &
busybox httpd -h www
{ until ip addr add 10.0.1.2/24 dev lab0; do sleep 0.1; done; } 2>/dev/null &

machine 2 --cpus 2 &
second=$!
machine 1 --switch name=host,uplink=tap:lab0,pcap=host.pcapng --nic backend=switch:host,mac=52:54:00:00:00:11 || {
    cat machine1.log machine2.log
    fail 'machine 1'
}
cat machine1.log
wait $second || { cat machine2.log; fail 'machine 2'; }
for other in 10.0.0.2 10.0.1.2; do
    grep -q "^$other: the same" machine1.log || fail "the file of $other came over changed"
    [ "$(grep -c "^$other: iperf3 .* [1-9][0-9.]* [KMG]*bits/sec.*receiver" machine1.log)" = 4 ] ||
        fail "iperf3 with $other"
done
# The file of 4 MiB and all else that went to the host and back.
[ "$(stat -c %s machine1/host.pcapng)" -gt 4194304 ] || fail 'the capture is too short'
[ ! -e lan ] || fail 'the socket is still there'
! ip link show lab0 2>/dev/null || fail 'the tap is still there'
