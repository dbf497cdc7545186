# Runs in L1: run-lab-tests LIMIT NAME[@KERNEL]…. xtask reads the lines that begin with @.
limit=$1
shift
for test; do
    name=${test%@*}
    KERNEL=${test#"$name"}
    KERNEL=${KERNEL#@}
    export KERNEL
    echo "@begin $test"
    # By its path: busybox would take its own shell, which knows no ip(8) but its own.
    timeout -s KILL "$limit" /bin/sh "/lab/tests/$name.sh" 2>&1
    status=$?
    # Nothing of one test lives on into the next.
    killall -q -KILL partita
    grep -o " /tmp/$name[^ ]*" /proc/mounts | xargs -r umount -l
    rm -rf "/tmp/$name"
    printf '\n@end %s %s\n' "$test" "$status"
done
