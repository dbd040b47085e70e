#!/usr/bin/env bash
# Every test. Afterwards nothing of ours may be left: no namespace, no process, no lab.
set -euo pipefail
cd "$(dirname "$0")/.."

sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)

# Labs and namespaces of the tests are named bt-…, of drills drill-…; what was there before us
# stays.
namespaces() { ip netns list 2>/dev/null | awk '{ print $1 }' | grep -E '^(bt-|drill-)' | sort; }
before=$(namespaces || true)

# The datapath's file system, which its tests mount; one that was there before us stays.
bpffs=/run/baton/bpf
mounted_before=no
if mountpoint -q "$bpffs"; then mounted_before=yes; fi

left_behind() { comm -13 <(echo "$before") <(namespaces || true) | sed '/^$/d'; }

sweep() {
    local status=$? left
    left=$(left_behind)
    if [ -n "$left" ]; then
        echo "left behind, now removed:" >&2
        for name in $left; do
            echo "  namespace $name: $("${sudo[@]}" ip netns pids "$name" | xargs -r ps -o args= -p | tr '\n' ';')" >&2
            # By process id, and only what runs in a namespace of ours.
            "${sudo[@]}" ip netns pids "$name" | xargs -r "${sudo[@]}" kill -KILL || true
            "${sudo[@]}" ip netns del "$name" || true
        done
        [ "$status" -ne 0 ] || status=1
    fi
    # Tests that start side by side may mount it one over the other.
    while [ "$mounted_before" = no ] && mountpoint -q "$bpffs"; do
        for pins in "$bpffs"/net-*; do
            [ -e "$pins" ] || continue
            echo "left behind, now removed: the pins in $pins" >&2
            [ "$status" -ne 0 ] || status=1
        done
        "${sudo[@]}" umount "$bpffs" || break
    done
    exit "$status"
}
trap sweep EXIT

# The tests start the real binary; cargo builds it with them.
cargo test --workspace --locked "$@"
