#!/usr/bin/env bash
# The main job in one go: a relay pair with real SOCKS servers in network namespaces, a client
# that fetches through the shared address, the Active killed under load, and what clients saw.
set -euo pipefail

baton=${1:?usage: demo.sh PATH/TO/baton}
lab=demo-$$
vip=10.77.0.100
web=http://10.78.0.1/
work=$(mktemp -d)

bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
number=0
step() {
    number=$((number + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$number" "$*" "$plain"
}
indent() { sed 's/^\(.\)/   \1/'; }
# The table of a drill; what it said on the way only if it failed.
drill() {
    if ! "$baton" drill "$@" --report "$work/drill.json" >"$work/table" 2>"$work/log"; then
        cat "$work/log" >&2
        return 1
    fi
    indent <"$work/table"
}
in_lab() {
    local node=$1
    shift
    "$baton" lab exec --name "$lab" "$node" -- "$@"
}
# Milliseconds since boot, so that a clock that is set does not matter.
now() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

fetcher='' download=''
clean_up() {
    trap - EXIT INT TERM
    [ -z "$fetcher" ] || kill "$fetcher" 2>/dev/null || true
    [ -z "$download" ] || kill "$download" 2>/dev/null || true
    "$baton" lab down --name "$lab" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

step "A client, two relays, two backends with real Dante SOCKS servers, each a network namespace"
"$baton" lab up --name "$lab" --mode passthrough 2>&1 | sed -e '/^Next:/,$d' -e 's/^lab:/  /'

step "relay1 is Active: it has the VIP $vip and forwards in the kernel; relay2 has a live copy"
in_lab relay1 "$baton" status | sed '/^$/,$d' | indent

step "The client fetches $web with: curl --socks5 $vip:1080"
printf '   answer of the web server, whose client is a Dante server: '
in_lab client curl -sS --max-time 3 --socks5 "$vip:1080" "$web"

step "A download of 48 MB through SOCKS, ten fetches a second; the Active's daemon gets kill -9"
files=$("$baton" lab status --name "$lab" --json | sed -n 's/^ *"dir": "\(.*\)",\{0,1\}$/\1/p')/files
mkdir "$files"
head -c 48000000 /dev/urandom >"$files/large"
in_lab client curl -sS --max-time 30 --limit-rate 12M --socks5 "$vip:1080" -o "$work/large" \
    "${web}files/large" 2>"$work/download" &
download=$!
(
    while :; do
        begin=$(now)
        if in_lab client curl -s --connect-timeout 0.3 --max-time 1 --socks5 "$vip:1080" -o /dev/null "$web"; then
            echo "$begin ok"
        else
            echo "$begin failed"
        fi
        sleep 0.08
    done >"$work/fetches"
) &
fetcher=$!
sleep 2
victim=$(in_lab relay1 "$baton" status --json | sed -n 's/^ *"pid": \([0-9]*\).*/\1/p')
killed=$(now)
before=$(stat -c %s "$work/large")
kill -KILL "$victim"
sleep 3
kill "$fetcher" 2>/dev/null || true
wait "$fetcher" 2>/dev/null || true
fetcher=''
awk -v killed="$killed" '
    $2 == "ok" { ok++; if ($1 > killed && !back) back = $1 }
    $2 == "failed" { failed++ }
    END {
        printf "   %d fetches through SOCKS, %d failed; ", ok + failed, failed
        if (back) printf "the first good one began %d ms after the kill\n", back - killed
        else print "none came through after the kill"
        exit !back
    }' "$work/fetches"
if ! wait "$download" || ! cmp -s "$files/large" "$work/large"; then
    download=''
    cat "$work/download" >&2
    echo "   the download did not survive" >&2
    exit 1
fi
download=''
echo "   the download went on through relay2: 48 MB, not a byte wrong, $((before / 1000000)) MB of them before the kill"

step "relay2 is Active now, and says why"
in_lab relay2 "$baton" status | sed '/^$/,$d' | indent
"$baton" lab down --name "$lab" >/dev/null 2>&1

step "The same as a drill, in a lab of its own, under load: long-lived and new connections, UDP"
drill kill --mode passthrough

step "Beside each other: the kernel's modes keep connections, the proxy can't"
for mode in passthrough dsr proxy; do
    for fault in power-off takeover; do
        printf '   %s, %s …\n' "$mode" "$fault"
        drill "$fault" --mode "$mode" --advert-interval 10ms >/dev/null
        mv "$work/drill.json" "$work/$mode-$fault.json"
    done
done
echo
"$baton" lab figures "$work"/*-*.json | indent

cat <<'TXT'

Times are milliseconds, median (worst). Through a proxy, connections that were open on the relay are
lost, and their clients are told at once; docs/failover.md has the measured outage of every fault.
Nothing is left behind.
Next:
  target/release/baton lab up                  the lab, to stay; it says what to try in it
  target/release/baton drill power-off         or: pause, link-down, restart, yield, backend-hang
  target/release/baton drill kill --help       intervals, rates, runs, --json, keepalived beside it
  docs/dante.md                                a pool of Dante servers behind Baton
  config/                                      sample configurations; baton check -c FILE
TXT
