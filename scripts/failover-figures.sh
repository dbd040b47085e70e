#!/usr/bin/env bash
# The figures of docs/failover.md: every fault at three advertisement intervals, Baton and
# keepalived in turn, in the same lab with the same traffic. Prints the Markdown table; the reports
# stay in reports/failover/.
#
#   scripts/failover-figures.sh [BATON]
#
# RUNS (5), INTERVALS ("10ms 100ms 1s") and FAULTS choose less. A run takes 7 to 20 seconds.
set -euo pipefail

baton=${1:-target/release/baton}
runs=${RUNS:-5}
intervals=${INTERVALS:-10ms 100ms 1s}
faults=${FAULTS:-kill pause link-down power-off takeover yield restart}
dir=reports/failover
mkdir -p "$dir"

# drill INTERVAL FAULT RELAYS: exit 0 if there is a report.
drill() {
    local report=$dir/$1-$2-$3.json
    rm -f "$report"
    # 1 with a report: it ran, and something expected did not happen, such as two nodes with the
    # VIP. That is a result too.
    "$baton" drill "$2" --relays "$3" --advert-interval "$1" --rate 200 --runs "$runs" \
        --report "$report" >"$report.txt" 2>"$report.log" || [ "$?" -eq 1 ] || exit 1
    [ -s "$report" ]
}

for interval in $intervals; do
    for fault in $faults; do
        for relays in baton keepalived; do
            case $relays/$fault in keepalived/takeover | keepalived/yield) continue ;; esac
            echo "$(date +%T) $fault at $interval, $relays, $runs runs" >&2
            # keepalived does not always start on a busy machine: once more.
            if ! drill "$interval" "$fault" "$relays" && ! drill "$interval" "$fault" "$relays"; then
                tail -3 "$dir/$interval-$fault-$relays.json.log" >&2
            fi
            grep FAILED "$dir/$interval-$fault-$relays.json.txt" >&2 || true
        done
    done
done
"$baton" lab figures "$dir"/*.json
