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

for interval in $intervals; do
    for fault in $faults; do
        for relays in baton keepalived; do
            case $relays/$fault in keepalived/takeover | keepalived/yield) continue ;; esac
            report=$dir/$interval-$fault-$relays.json
            echo "$(date +%T) $fault at $interval, $relays, $runs runs" >&2
            code=0
            "$baton" drill "$fault" --relays "$relays" --advert-interval "$interval" \
                --runs "$runs" --report "$report" >"$report.txt" 2>"$report.log" || code=$?
            # 1 with a report: it ran, and something expected did not happen, such as two nodes
            # with the VIP. That is a result too.
            if [ "$code" -gt 1 ] || [ ! -s "$report" ]; then
                tail -3 "$report.log" >&2
                exit 1
            fi
            grep FAILED "$report.txt" >&2 || true
        done
    done
done
"$baton" lab figures "$dir"/*.json
