#!/bin/sh
# with-script SCRIPT OUT: makes OUT a copy of /lab/initrd whose guest runs SCRIPT.
[ $# = 2 ] || { echo 'usage: with-script SCRIPT OUT' >&2; exit 2; }
[ -r "$1" ] || { echo "with-script: cannot read $1" >&2; exit 1; }
cp /lab/initrd "$2" && script-layer "$1" >>"$2"
