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
    exit "$status"
}
trap sweep EXIT

# The tests start the real binary; cargo builds it with them.
cargo test --workspace --locked "$@"
