set -e
# One disk by ATA, by storvsc, or by both.
by() {
    for disk in /sys/block/sd*; do
        case $(readlink -f "$disk") in
        */ata[0-9]*/*) driver=ata ;;
        */00000001-0000-8899-*) driver=storvsc ;;
        */f8b3781a-*) driver=scsi ;;
        *) driver=unknown ;;
        esac
        [ "$driver" != "$1" ] || echo "/dev/${disk##*/}"
    done
}
wait-for /dev/sda
if grep -q prefer_ms_hyperv=0 /proc/cmdline; then
    wait-for /dev/sdb
    wait-for /dev/sdc
fi
ata=$(by ata) storvsc=$(by storvsc)
echo "dmi: $(cat /sys/class/dmi/id/sys_vendor) / $(cat /sys/class/dmi/id/product_name)"
echo "disks: $(ls -d /sys/block/sd* | wc -l), ata ${ata:-none}, storvsc ${storvsc:-none}"
disk=${ata:-$storvsc}
filled "$disk" 4
scsi=$(by scsi)
[ -z "$scsi" ] || echo "scsi: $(cat "/sys/block/${scsi#/dev/}/size")"
if [ "$ata" ]; then
    # The other path reads the same disk, and may not write to it.
    same=$(dd if="$ata" bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)
    [ "$same" = "$(dd if="$storvsc" bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)" ] &&
        echo 'both paths: the same'
    sg_raw -v -s 512 -i /dev/zero "$storvsc" 2a 00 00 00 00 00 00 00 01 00 2>&1 | sed 's/^/refused: /'
    [ "$same" = "$(dd if="$ata" bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)" ] &&
        echo 'unchanged'
fi
