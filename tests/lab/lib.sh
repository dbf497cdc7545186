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
# KERNEL_OPTIONS are added to a guest's command line.
: "${KERNEL_OPTIONS:=}"

# guest KERNEL SCRIPT [partita option]...: boots a guest that runs SCRIPT and powers off. Its
# console goes to console.log and, as it comes, to the test's output. It shows warnings and worse:
# each byte costs two exits, and all of the boot's messages would cost as much as the boot itself.
guest() {
    kernel=$1 script=$2
    shift 2
    cat "$here/lib.guest.sh" "$script" >script
    with-script script initrd
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
