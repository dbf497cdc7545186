#!/bin/sh
# What a random read of 4 KiB takes by storvsc, by IDE DMA and by IDE PIO, and what a frame of 1500
# bytes takes by netvsc and by e1000, through the virtual switch: medians over rounds of `partita demo`,
# in each of which the same guest uses all of them, one after the other. Nothing is installed and no lab
# is needed; a quiet machine is.
#
#   cargo build --release && benches/ways.sh [PARTITA] [ROUNDS]
set -eu
partita=${1:-target/release/partita}
rounds=${2:-9}
partitions=${PARTITIONS:-kvm hosted}

for _ in $(seq "$rounds"); do
    for partition in $partitions; do
        # A line for each measurement: what was measured, and numbers for one read of it. Where the
        # host does not count what stays in its kernel, `exits` is null.
        "$partita" demo --json --partition "$partition" |
            grep -oE '\{"partition":[^{}]*"driver":[^{}]*"(ios|frames)":[^{}]*\}' |
            sed 's/[{}"]//g' |
            awk -F, '{
                split("", value)
                for (i = 1; i <= NF; i++) { split($i, pair, ":"); value[pair[1]] = pair[2] }
                ios = "ios" in value ? value["ios"] : value["frames"]
                if ("peer_driver" in value && value["peer_driver"] != value["driver"])
                    value["driver"] = value["driver"] "/" value["peer_driver"]
                exits = value["exits"] == "null" ? -1 : value["exits"] / ios
                printf "%s %s depth=%d %.3f %.3f %.3f %.3f\n", value["partition"], value["driver"],
                    value["depth"], value["nanoseconds"] / ios / 1000, exits,
                    value["user_exits"] / ios, value["interrupts"] / ios
            }'
    done
done | awk '
    # The middle one of the numbers in a list.
    function median(list,   n, i, j, t, numbers) {
        n = split(list, numbers, " ")
        for (i = 2; i <= n; i++)
            for (j = i; j > 1 && numbers[j - 1] + 0 > numbers[j] + 0; j--) {
                t = numbers[j]; numbers[j] = numbers[j - 1]; numbers[j - 1] = t
            }
        return numbers[int((n + 1) / 2)]
    }
    {
        way = $1 " " $2 " " $3
        if (!(way in us)) order[++ways] = way
        us[way] = us[way] " " $4; exits[way] = exits[way] " " $5
        user[way] = user[way] " " $6; interrupts[way] = interrupts[way] " " $7
    }
    END {
        printf "%-7s %-12s %-9s %9s %7s %11s %11s\n", "", "", "", "us each", "exits",
            "to partita", "interrupts"
        for (i = 1; i <= ways; i++) {
            way = order[i]; split(way, name, " ")
            left = median(exits[way])
            printf "%-7s %-12s %-9s %9.1f %7s %11.2f %11.2f\n", name[1], name[2], name[3],
                median(us[way]), left < 0 ? "-" : sprintf("%.2f", left), median(user[way]),
                median(interrupts[way])
        }
        if (ways == 0) exit 1
    }'
