/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The bounds of every table and loop, and the verdict that each step gives. What happens at a
 * bound is said where the table is; docs/decisions/datapath.md has them all beside their bytes.
 */
#pragma once

#include <bpf/bpf_helpers.h>

/* A map of this kind (BPF_MAP_TYPE_…), from keys to values, with room for so many. */
#define MAP(map, kind, from, to, room)              \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_##kind);  \
		__type(key, from);                  \
		__type(value, to);                  \
		__uint(max_entries, room);          \
	} map SEC(".maps")

/* Services of a node, as in the configuration. */
#define SERVICES 1024
/* Backends of all services together; ids are 16 bits, 0 is none. */
#define BACKENDS 16384
/* VIPs, NAT addresses and those of servers. */
#define ADDRESSES (1024 + BACKENDS)
/* Slots of a schedule: a prime well above the number of backends. */
#define SLOTS 65537
/* Backends of one service. */
#define SERVICE_BACKENDS 1024
/* Slots tried for a backend that may have a flow (least connections: for two that differ), before
 * all backends are looked at. */
#define SLOT_TRIES 6
/* NAT ports tried for a new flow: at 90 % of all ports in use, one flow in a million finds none. */
#define PORT_TRIES 128
/* NAT ports begin here; below are those of well-known servers. */
#define FIRST_PORT 1024
#define PORTS (65536 - FIRST_PORT)
/* IPv6 extension headers that are looked at. */
#define EXTENSION_HEADERS 6
/* Bytes that must be in the linear part: Ethernet, IPv6 with some extension headers, TCP. */
#define PULL_BYTES 192
/* Ethernet and IPv6 alone. */
#define NETWORK_BYTES (14 + 40)

/* Flows; the loader sets the size from `datapath.flows`. */
#define DEFAULT_FLOWS 131072
/* Half-open flows; the loader sets it from `datapath.half_open_flows`. */
#define DEFAULT_HALF_OPEN 32768
/* Datagrams in fragments, under way at the same time. */
#define FRAGMENTS 16384
/* How long the first fragment's way holds for the later ones; see frag.h. */
#define FRAGMENT_NS (2 * 1000000000ULL)
/* Fragments that came ahead of their first and may be held: so many (all CPUs together, about)… */
#define HOLDS 512
/* … in each 2^27 ns, which is 134 ms. */
#define HOLD_WINDOW_SHIFT 27
/* Longest frame that is held, in bytes: a test run, which puts it back, takes less than a page. */
#define HELD_BYTES 3072

/* Clients that keep to a backend; the loader sets it from `datapath.affinities`. */
#define DEFAULT_AFFINITIES 65536
/* Flows that one run of the collector looks at. */
#define SWEEP 256

/* For XDP: interfaces, routes out of them, neighbours. What has no room goes by the TC hook. */
#define LEGS 256
#define WAYS 16384
#define NEIGHBOURS 16384
/* Jiffies within which the use of a neighbour is noted once. */
#define USED_GRAIN 100
/* What was found a moment ago is kept of so many services, servers and ways, per CPU; the latest
 * takes the place of an older one. Powers of two. */
#define RECENT_ENDS 64
#define RECENT_WAYS 256

/* Of records that are copied and compared a lot: by eight bytes at a time, which the compiler does
 * only where it knows that they lie so. */
#define WHOLE_WORDS __attribute__((aligned(8)))

/* A step's verdict, or `GO_ON` to the next. */
enum verdict {
	GO_ON = 0,
	/* Not ours: up the stack. */
	VERDICT_PASS,
	/* Counted where it was given. */
	VERDICT_DROP,
	/* As the plan says. */
	VERDICT_FORWARD,
	/* A fragment that is ahead of its first: `hold_fragment` (frag.h), which gives another. */
	VERDICT_HOLD,
	/* Its sender gets `plan->answer`, and it is counted there. */
	VERDICT_ANSWER,
};
