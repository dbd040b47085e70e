#!/usr/bin/env bash
# The bench, all in one run of about eight minutes: what a packet costs in the datapath, memory and
# start, passthrough beside nftables, plain routing, HAProxy and nginx stream, proxy mode beside
# HAProxy and nginx stream. BENCH_SECONDS is the length of each load, BENCH_RUNS the rounds;
# BENCH_DOCUMENT a document whose marked places get the figures (docs/performance.md). Further
# arguments (packets, datapath, --congestion bbr, --json, --report FILE) go to `baton lab bench`.
set -euo pipefail

baton=${1:?usage: bench.sh PATH/TO/baton [ARGUMENT…]}
shift
document=()
[ -z "${BENCH_DOCUMENT:-}" ] || document=(--document "$BENCH_DOCUMENT")
exec "$baton" lab bench --seconds "${BENCH_SECONDS:-1}" --runs "${BENCH_RUNS:-5}" \
    --congestion "${BENCH_CONGESTION:-cubic}" "${document[@]}" "$@"
