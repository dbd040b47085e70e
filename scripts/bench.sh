#!/usr/bin/env bash
# Proxy mode beside HAProxy and nginx stream on one relay, in one run. BENCH_SECONDS is the length
# of each load (there are 5 × 4 × BENCH_RUNS of them), BENCH_RUNS the rounds; further arguments
# (--congestion cubic, --json, --report FILE) go to `baton lab bench`.
set -euo pipefail

baton=${1:?usage: bench.sh PATH/TO/baton [ARGUMENT…]}
shift
exec "$baton" lab bench --seconds "${BENCH_SECONDS:-5}" --runs "${BENCH_RUNS:-3}" "$@"
