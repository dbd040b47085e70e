#!/usr/bin/env bash
# Installs the Debian packages that Baton's build, tests, drills and benchmarks need, and says
# which and why before. Does nothing where they are all there.
set -euo pipefail

# package: what it is for
wanted=(
    "gcc: the linker that cargo calls"
    "libc6-dev: the C library's headers, for the linker and the kernel datapath"
    "clang: compiles the kernel datapath for eBPF, which gcc and rustc here do not"
    "llvm: strips what clang compiled"
    "make: builds libbpf, which comes as source with its crate"
    "pkg-config: finds libelf and zlib for libbpf"
    "linux-libc-dev: the kernel's headers, for the kernel datapath"
    "libelf-dev: libbpf reads the compiled datapath with it"
    "zlib1g-dev: libelf needs it"
    "iproute2: ip, which makes the namespaces of the lab"
    "iputils-ping: ping, in the lab's hosts"
    "dante-server: danted, the SOCKS server behind the lab's relays"
    "nginx-light: the web server that the lab's clients fetch from"
    "curl: the lab's client"
    "tcpdump: decodes our packets in the tests"
    "keepalived: VRRP peer of the interoperability tests, and yardstick of the drills"
    "conntrackd: replicates keepalived's connections in make bench-ha"
    "nftables: cuts paths in the lab; forwards for keepalived in the drills"
    "haproxy: peer of the benchmarks, and PROXY protocol receiver of the tests"
    "libnginx-mod-stream: peer of the benchmarks"
    "iperf3: load of the benchmarks"
    "wrk: load of the benchmarks"
    "ethtool: offload settings in the lab"
    "procps: ps, for the checks that nothing is left behind"
    "shellcheck: for make lint"
)

command -v cargo >/dev/null || {
    echo "Rust is missing: install it first (rustup, or Debian's rustup package)." >&2
    exit 1
}
command -v apt-get >/dev/null || {
    echo "This is not Debian: install what the list in scripts/setup.sh names yourself." >&2
    exit 1
}

missing=()
for entry in "${wanted[@]}"; do
    package=${entry%%:*}
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
        missing+=("$package")
        [ "${#missing[@]}" -gt 1 ] || echo "Installing Debian packages that are missing:"
        printf '  %-20s %s\n' "$package" "${entry#*: }"
    fi
done
[ "${#missing[@]}" -gt 0 ] || exit 0

sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)

# None of these packages' daemons may start on this host: policy-rc.d says no to all while we
# install (Debian policy, /usr/share/doc/init-system-helpers/README.policy-rc.d.gz).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
    "${sudo[@]}" chmod 755 "$policy"
    trap '"${sudo[@]}" rm -f "$policy"' EXIT
fi

log=$(mktemp)
if ! { "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "apt-get failed; its output is above." >&2
    exit 1
fi
rm -f "$log"

# Nor at the next boot.
if [ -d /run/systemd/system ]; then
    for package in "${missing[@]}"; do
        case $package in
            dante-server) unit=danted ;;
            nginx-light) unit=nginx ;;
            keepalived | haproxy | nftables) unit=$package ;;
            *) continue ;;
        esac
        "${sudo[@]}" systemctl disable --quiet "$unit" || true
    done
fi
echo "Installed; their daemons were not started."
