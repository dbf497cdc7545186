# Sourced by the comparisons of real guests: the same guest script in each VMM, in turn, in one run of the
# lab.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
name=$(basename "$0" .sh)
rounds=${ROUNDS:-2}
work=/tmp/$name
mkdir -p "$work" /lab/out
cd "$work"

# What KVM counts is the sum over the guests that live, so it is read while they do.
kvm() { cat /sys/kernel/debug/kvm/$1; }
# L1's uptime, which busybox's date cannot tell as finely.
milliseconds() {
    read -r uptime _ </proc/uptime
    echo "${uptime%.*}${uptime#*.}0"
}

# Has a partita that runs print its counters to its log: what lies between two looks is one job's.
look() {
    if pid=$(pidof partita); then kill -USR1 "$pid"; fi
}

# jobs TEXT: what the guest's fio does, a line for each job: NAME RW BLOCKSIZE DEPTH. Makes ./initrd.
jobs() {
    { echo "jobs='$1'" && cat "$here/storage.guest.sh"; } >guest.sh
    with-script guest.sh initrd
}

# Prints what happened on the host's side: the time from the start of the VMM to the guest's init, in
# seconds; exits of the VP in each job; and the page faults that KVM took for the guest's memory
# until the last of them.
watch_console() {
    while read -r line; do
        line=$(printf '%s' "$line" | tr -d '\r')
        case $line in
        'job: '*) exits=$(kvm exits) && look ;;
        done)
            exits=$(($(kvm exits) - exits)) && look
            faults=$(kvm pf_taken)
            ;;
        'result: '*) echo "$1 ${line#result: } exits=$exits" ;;
        'guest: init at '*)
            took=$(($(milliseconds) - began))
            echo "$1 exec-to-init ms=$took faults=$(kvm pf_taken) ($line)"
            ;;
        'interrupts: '* | 'guest: '*) echo "$1 $line" ;;
        esac
    done
    echo "$1 memory faults=${faults:-?}"
}

# per_io VMM CONSOLE: from what its last guest's console and partita's log say, a line for each job: exits to
# user space, signals, interrupts and system calls of io_uring for each I/O or packet. About a hundred of a job's
# exits to user space are its console's.
per_io() {
    awk -v vmm="$1" '
        function after(word,    i) {
            for (i = 1; i < NF; i++) if ($i == word) return $(i + 1) + 0
        }
        NR == FNR && / (ios|packets)=/ {
            job[++jobs] = $2
            for (i = 3; i <= NF; i++)
                if (split($i, pair, "=") == 2 && pair[1] ~ /^(ios|packets)$/) ios[jobs] = pair[2]
        }
        NR == FNR { next }
        /^stats: after/ { looks++ }
        /exits to user space:/ { exits[looks] += after("space:") }
        /^stats: (channel|nic)/ {
            signals[looks] += after("signals")
            interrupts[looks] += after("interrupts")
            enters[looks] += after("enters")
        }
        END {
            for (i = 1; i <= jobs; i++) {
                from = 2 * i - 1
                to = 2 * i
                if (ios[i] > 0 && to <= looks)
                    printf "%s per-io %s user-exits=%.3f signals=%.3f interrupts=%.3f enters=%.3f\n", vmm,
                        job[i], (exits[to] - exits[from]) / ios[i], (signals[to] - signals[from]) / ios[i],
                        (interrupts[to] - interrupts[from]) / ios[i], (enters[to] - enters[from]) / ios[i]
            }
        }' "$2" "$1.log"
}

# compare VMM...: runs VMM_run of each, in turn. Then their medians.
compare() {
    for round in $(seq "$rounds"); do
        for vmm; do
            began=$(milliseconds)
            ${vmm}_run | watch_console "$vmm" | tee console
            cat console >>results
            if [ -e "$vmm.log" ]; then
                sed "s/^/$vmm: /" "$vmm.log"
                per_io "$vmm" console | tee -a results
            fi
        done
    done
    medians "$@"
}

# medians VMM...: of each figure in ./results the median, since emulated processors stand still now and
# then, and the first's ratio to each of the others.
medians() {
    echo
    awk -v vmms="$*" '
        function note(what, value) {
            values[what " " $1] = values[what " " $1] " " value
            if (!(what in seen)) { seen[what] = 1; order[++count] = what }
        }
        function field(name,    i, pair) {
            for (i = 3; i <= NF; i++) {
                split($i, pair, "=")
                if (pair[1] == name) return pair[2]
            }
        }
        $2 == "exec-to-init" { note("exec to init, ms", field("ms")) }
        $2 == "memory" { note("memory faults", field("faults")) }
        $2 == "per-io" {
            for (i = 4; i <= NF; i++) {
                split($i, pair, "=")
                note($3 ", " pair[1] " each", pair[2])
            }
        }
        / (ios|packets)=/ {
            if (field("iops") != "") note($2 ", I/O/s", field("iops"))
            if (field("mbits") != "") note($2 ", Mbit/s", field("mbits"))
            if (field("ms") != "") note($2 ", ms", field("ms"))
            each[$2] = field("ios") + field("packets")
            if (each[$2] > 0) note($2 ", exits each", field("exits") / each[$2])
        }
        $2 == "interrupts:" && each[$3] > 0 { note($3 ", guest interrupts each", $4 / each[$3]) }
        function median(list,    n, i, j, v, swap) {
            n = split(list, v, " ")
            if (!n) return "-"
            for (i = 1; i <= n; i++)
                for (j = i + 1; j <= n; j++)
                    if (v[j] + 0 < v[i] + 0) { swap = v[i]; v[i] = v[j]; v[j] = swap }
            return sprintf("%.3f", n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2)
        }
        END {
            n = split(vmms, vmm, " ")
            for (i = 1; i <= count; i++) {
                printf "%-36s", order[i]
                for (j = 1; j <= n; j++) {
                    m[j] = median(values[order[i] " " vmm[j]])
                    printf " %s %10s  ", vmm[j], m[j]
                }
                printf " ratio"
                for (j = 2; j <= n; j++) printf " %s", m[1] != "-" && m[j] + 0 ? sprintf("%.2f", m[1] / m[j]) : "-"
                print ""
            }
        }' results | tee "/lab/out/$name.txt"
}
