#!/usr/bin/env bash
# The figures of docs/failover.md, all in one run: what an outage takes, beside keepalived with
# conntrackd and nftables in the same lab, in turn; which connections survive while thousands are
# opened; what replication carries. BENCH_RUNS is how often each drill is run (10; a run takes about
# ten seconds, and there are nine kinds), BENCH_SECONDS how long each rate of replication lasts;
# BENCH_DOCUMENT a document whose marked places get the figures. Further arguments (outage, churn,
# replication, --faults kill, --add, --json, --report FILE) go to `baton lab bench-ha`.
set -euo pipefail

baton=${1:?usage: bench-ha.sh PATH/TO/baton [ARGUMENT…]}
shift
document=()
[ -z "${BENCH_DOCUMENT:-}" ] || document=(--document "$BENCH_DOCUMENT")
# shellcheck disable=SC2086 # words of BENCH_ARGUMENTS are arguments
exec "$baton" lab bench-ha --runs "${BENCH_RUNS:-10}" --seconds "${BENCH_SECONDS:-5}" \
    "${document[@]}" ${BENCH_ARGUMENTS:-} "$@"
