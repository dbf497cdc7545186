# Three NICs of one guest on a virtual switch, each in a network of its own: two hear each other,
# with offloads and at an MTU of 9000, and the third, on another VLAN, hears neither. One of them is
# captured.
. "$(dirname "$0")/lib.sh"

guest cloud "$here/$name.guest.sh" --memory 512M --stats \
    --nic backend=switch:lan,mac=52:54:00:00:00:01,pcap="$work/first.pcapng" \
    --nic backend=switch:lan,mac=52:54:00:00:00:02 \
    --nic backend=switch:lan,vlan=7,mac=52:54:00:00:00:03
healthy
# A section header in this machine's byte order, and the frames of the file that was copied.
[ "$(head -c 12 first.pcapng | od -An -tx4 | tr -d ' \n' | cut -c1-8)" = 0a0d0d0a ] ||
    fail 'the capture does not begin as pcapng does'
[ "$(stat -c %s first.pcapng)" -gt 4000000 ] || fail 'the capture is too short'
# What the third sent reached nobody.
grep '^stats: switch lan port 0: sent [1-9].* received [1-9]' partita.log || fail 'nothing went through port 0'
grep '^stats: switch lan port 2: .* received 0' partita.log || fail 'something reached port 2'
