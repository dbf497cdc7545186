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

# per_io VMM: from what its last guest's console and partita's log say, a line for each job: exits to
# user space, signals, interrupts and system calls of io_uring for each I/O. About a hundred of a job's
# exits to user space are its console's.
per_io() {
    awk -v vmm="$1" '
        function after(word,    i) {
            for (i = 1; i < NF; i++) if ($i == word) return $(i + 1) + 0
        }
        NR == FNR && $2 ~ /^(rand)?(read|write)-/ {
            job[++jobs] = $2
            for (i = 3; i <= NF; i++) if (split($i, pair, "=") == 2 && pair[1] == "ios") ios[jobs] = pair[2]
        }
        NR == FNR { next }
        /^stats: after/ { looks++ }
        /exits to user space:/ { exits[looks] += after("space:") }
        /^stats: channel/ {
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
        }' console "$1.log"
}

# compare VMM...: runs VMM_run of each, in turn. Then the median of each, since emulated processors stand
# still now and then, and the first's ratio to the second.
compare() {
    for round in $(seq "$rounds"); do
        for vmm; do
            began=$(milliseconds)
            ${vmm}_run | watch_console "$vmm" | tee console
            cat console >>results
            if [ -e "$vmm.log" ]; then
                sed "s/^/$vmm: /" "$vmm.log"
                per_io "$vmm" | tee -a results
            fi
        done
    done
    echo
    awk -v first="$1" -v second="${2:-$1}" '
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
        $2 ~ /^(randread|read)-/ {
            note($2 ", I/O/s", field("iops"))
            if (field("ios") > 0) note($2 ", exits each", field("exits") / field("ios"))
        }
        function median(list,    n, i, j, v, swap) {
            n = split(list, v, " ")
            for (i = 1; i <= n; i++)
                for (j = i + 1; j <= n; j++)
                    if (v[j] + 0 < v[i] + 0) { swap = v[i]; v[i] = v[j]; v[j] = swap }
            return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
        }
        END { for (i = 1; i <= count; i++) {
            what = order[i]
            p = median(values[what " " first])
            q = median(values[what " " second])
            printf "%-36s %s %10.3f   %s %10.3f   ratio %.2f\n", what, first, p, second, q, q ? p / q : 0
        } }' results | tee "/lab/out/$name.txt"
}
