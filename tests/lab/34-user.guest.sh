set -e
nic=$(named :)
ip link set "$nic" up
carrier 1
export nic
cat >/tmp/leased <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
echo "dhcp: $ip by $router, names by $dns"
ip addr add "$ip/$mask" dev $nic
ip route add default via "$router"
echo "$router" >/tmp/router
END
chmod +x /tmp/leased
udhcpc -i "$nic" -n -q -t 20 -T 1 -s /tmp/leased 2>/dev/null
# The router's address is the host's own, as passt has it.
wget -q -O - "http://$(cat /tmp/router):8000/file" | sha256sum
mkfifo /tmp/hold
exec 3<>/tmp/hold
{
    listening 22
    echo 'port: open'
} &
nc -l -p 22 </tmp/hold | grep 'from the host'
