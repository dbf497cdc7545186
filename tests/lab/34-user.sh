#!/bin/sh
# User-mode networking, by a synthetic NIC and by an emulated one: the guest gets an address by DHCP, fetches a
# file from the host as passt lets it see the host, and a port of the host leads to the guest. When partita has
# ended, so has passt.
. "$(dirname "$0")/lib.sh"

# passt leaves its root folder behind, which a process whose root is the initramfs cannot.
if [ -z "${MOVED:-}" ]; then
    mkdir /moved
    mount -t tmpfs none /moved
    for folder in /*; do
        [ "$folder" != /moved ] && [ -d "$folder" ] || continue
        mkdir "/moved$folder"
        mount --rbind "$folder" "/moved$folder"
    done
    cd /moved
    mount --move . /
    exec chroot . env MOVED=yes /bin/sh "$here/$name.sh"
fi

# A network for passt to copy, and a name server.
ip link add lab0 type dummy
ip addr add 192.168.77.1/24 dev lab0
ip link set lab0 up
ip route add default via 192.168.77.254 dev lab0
echo 'nameserver 192.168.77.53' >/etc/resolv.conf
mkdir www
head -c 2097152 /dev/urandom >www/file
sha256sum <www/file >file.sum
busybox httpd -p 127.0.0.1:8000 -h www

# user KERNEL PREFIX [partita option]...
user() {
    kernel=$1 nic=$2
    shift 2
    rm -f console.log
    {
        until_shown 'port: open'
        echo 'from the host' | nc 127.0.0.1 2222
    } &
    guest "$kernel" "$here/$name.guest.sh" --nic "${nic}backend=user,hostfwd=tcp:2222-22" "$@"
    healthy
    expect '^dhcp: 192.168.77.1 by 192.168.77.254, names by 192.168.77.53'
    expect "^$(cut -d' ' -f1 file.sum)"
    expect '^from the host'
    ! pidof passt || fail 'passt is still there'
}
user cloud ''
user full attach=e1000, --cpus 2
