sense() {
    what=$1
    shift
    echo "$what: $(sg_raw "$@" 2>&1 | sed -n 's/.*Additional sense: //p')"
}
modprobe sg 2>/dev/null
sense 'past the end' -r 512 /dev/sda 28 00 ff ff ff f0 00 00 01 00
sense 'past the end, 64 bit' -r 512 /dev/sda 88 00 ff ff ff ff ff ff ff ff 00 00 00 01 00 00
sense 'no such command' /dev/sda ef 00 00 00 00 00
# Protection information, which the disk was not formatted with.
sense 'wrong field' -r 512 /dev/sda 28 e0 00 00 00 00 00 00 01 00
sense 'unmap past the end' -s 24 -i /dev/zero /dev/sda 42 00 00 00 00 00 00 00 18 00
# Fewer and more bytes than the command speaks of.
sg_raw -r 512 /dev/sda 28 00 00 00 00 00 00 00 08 00 >/dev/null 2>&1
sg_raw -r 65536 /dev/sda 28 00 00 00 00 00 00 00 01 00 >/dev/null 2>&1
sg_raw -s 512 -i /dev/zero /dev/sda 2a 00 00 00 00 00 00 00 08 00 >/dev/null 2>&1
sg_turs /dev/sda && sg_readcap /dev/sda && sg_luns /dev/sda && sg_modes /dev/sda &&
    dd if=/dev/sda of=/dev/null bs=64k iflag=direct 2>/dev/null && echo 'still works'
