#!/usr/bin/env bash
# Licences, sources and bans of the dependency tree (deny.toml); advisories where the database
# can be had (it lives on a public git server, which some workplaces don't reach).
set -euo pipefail

if ! command -v cargo-deny >/dev/null; then
    echo "cargo-deny is not installed (cargo install cargo-deny --locked): tree not checked"
    exit 0
fi
cargo deny --locked check bans licenses sources
if ! cargo deny --locked check advisories; then
    if [ -d "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs" ] &&
        [ -n "$(ls -A "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs" 2>/dev/null)" ]; then
        exit 1
    fi
    echo "advisories NOT checked: the advisory database could not be fetched"
fi
