# `make help` lists the targets. Every target does its own set-up and may be run twice.

SHELL := /bin/bash
.DEFAULT_GOAL := help
BATON := target/release/baton

# Namespaces and raw sockets need root: as another user, cargo builds as you are and what it
# built runs through sudo.
ifneq ($(shell id -u),0)
SUDO := sudo
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := sudo -E
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := sudo -E
endif

.PHONY: help setup build demo test bench bench-ha figures lint deny

help: ## list the targets
	@echo "Baton: a layer-4 load balancer that is never a single point of failure."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Start with: make demo"

setup: ## install the Debian packages that build, tests and drills need (says which before)
	@scripts/setup.sh

build: setup ## build target/release/baton
	cargo build --release --locked

demo: build ## a relay pair with real SOCKS servers, its Active killed under load
	@$(SUDO) scripts/demo.sh $(abspath $(BATON))

test: setup ## every test: pure, real sockets, namespaces, drills
	@scripts/test.sh

bench: build ## Baton beside nftables, routing, HAProxy and nginx, in one run (8 minutes)
	@$(SUDO) $(foreach name,$(filter BENCH_%,$(.VARIABLES)),$(name)=$($(name))) scripts/bench.sh $(abspath $(BATON))

bench-ha: build ## failover and replication beside keepalived + conntrackd, in one run (15 minutes)
	@$(SUDO) $(foreach name,$(filter BENCH_%,$(.VARIABLES)),$(name)="$($(name))") scripts/bench-ha.sh $(abspath $(BATON))

figures: build ## outage per fault beside keepalived, for docs/failover.md (takes minutes)
	@$(SUDO) scripts/failover-figures.sh $(abspath $(BATON))

lint: setup ## fmt, clippy, docs, shellcheck, dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked
	shellcheck .ci/run scripts/*.sh
	@scripts/deny.sh
