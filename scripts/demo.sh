#!/usr/bin/env bash
# The main job in one go: a relay pair with real SOCKS servers in namespaces, clients that fetch
# through the shared address, the Active killed under load, and what the clients saw.
set -euo pipefail

baton=${1:?usage: demo.sh PATH/TO/baton}
lab=demo
vip=10.77.0.100
web=http://10.78.0.1/
fetches=$(mktemp)

lab() { "$baton" lab "$@"; }
in_lab() { local node=$1; shift; "$baton" lab exec --name "$lab" "$node" -- "$@"; }
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || step() { printf '\n== %s\n' "$*"; }

loader=
clean_up() {
    [ -z "$loader" ] || kill "$loader" 2>/dev/null || true
    lab down --name "$lab" >/dev/null 2>&1 || true
    rm -f "$fetches"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
