#!/bin/bash
# Counts how often the emulator under L1 lets guests down: boots of a kernel with two VPs, and rounds of the
# comparisons of disks and NICs. Run on the host:
#   benches/lab/stability.sh [--emulator backports|distribution] [--one-core] [--kernel NAME] [--boots N]
#       [--rounds N] [WHAT]...
# WHAT is boots, storage and network; all three, if none is named. A boot is good, a panic, a hang or something else;
# a round of a comparison that fails is repeated, once. What was counted is printed, and is in target/lab/stability
# with what every call said.
set -u
cd "$(dirname "$0")/../.."
emulator=backports cores=all kernel=new boots=30 rounds=10 whats=
while [ $# -gt 0 ]; do
    case $1 in
    --emulator) emulator=$2 && shift ;;
    --one-core) cores=one ;;
    --kernel) kernel=$2 && shift ;;
    --boots) boots=$2 && shift ;;
    --rounds) rounds=$2 && shift ;;
    boots | storage | network) whats="$whats $1" ;;
    *)
        sed -n '4,6s/^# *//p' "$0" >&2
        exit 2
        ;;
    esac
    shift
done
folder=${CARGO_TARGET_DIR:-target}/lab/stability/$emulator-$cores-$kernel
mkdir -p "$folder"

# lab LOG SECONDS [argument]...: one L1; what it says goes to a log of its own.
lab() {
    local log=$folder/$1 seconds=$2
    shift 2
    cargo xtask lab --emulator "$emulator" $([ $cores = one ] || echo --all-cores) --timeout "$seconds" \
        --file benches/lab:/lab/benches "$@" >"$log" 2>&1
}

say() { echo "$emulator, $cores cores, $kernel: $*" | tee -a "$folder/counted"; }

# In L1s of five boots each. Boots that an L1 has not got to by its end are lost with it.
count_boots() {
    local left=$boots part=0 began=$SECONDS
    rm -f "$folder"/boots.*
    while [ "$left" -gt 0 ]; do
        local these=$((left < 5 ? left : 5))
        part=$((part + 1))
        lab "boots.$part" $((60 + these * 300)) -- sh /lab/benches/boots.sh "$kernel" "$these"
        local ended
        ended=$(grep -c '^boot: ' "$folder/boots.$part")
        [ "$ended" = "$these" ] || {
            for _ in $(seq $((these - ended))); do echo 'boot: lost'; done >>"$folder/boots.$part"
        }
        left=$((left - these))
    done
    local counts=
    for what in good panic hang other lost; do
        counts="$counts, $what $(cat "$folder"/boots.* | grep -c "^boot: $what")"
    done
    say "$boots boots$counts; $(cat "$folder"/boots.* | sed -n 's/.*good .*seconds=//p' | sort -n |
        awk '{ s[NR] = $1 } END { print "median " s[int((NR + 1) / 2)] " s" }'); $((SECONDS - began)) s in all"
}

# count_rounds NAME
count_rounds() {
    local good=0 repeats=0 failed=0 panics=0 hangs=0 began=$SECONDS
    for round in $(seq "$rounds"); do
        for try in 1 2; do
            local log=$1.$round.$try
            if lab "$log" 420 --peers -- env ROUNDS=1 sh "/lab/benches/$1.sh"; then
                good=$((good + 1))
                break
            elif grep -q -e 'Kernel panic' -e 'BUG:' -e 'Oops' -e 'Call Trace' "$folder/$log"; then
                panics=$((panics + 1))
            elif grep -q -e 'did not end within' -e 'does not answer a ping' "$folder/$log"; then
                hangs=$((hangs + 1))
            fi
            [ $try = 1 ] && repeats=$((repeats + 1)) || failed=$((failed + 1))
        done
    done
    say "$rounds rounds of $1: good $good, repeated $repeats, failed twice $failed; panics $panics, hangs $hangs;" \
        "$((SECONDS - began)) s in all"
}

for what in ${whats:-boots storage network}; do
    case $what in
    boots) count_boots ;;
    *) count_rounds "$what" ;;
    esac
done
