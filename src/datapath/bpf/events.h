/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What happens to flows, for replication: one event for each flow that is established or ends.
 * Off (`reporting.on`) until somebody reads them. When the ring is full, the event is lost and
 * counted: the reader is out of sync from then on and compares tables.
 */
#pragma once

#include "types.h"

/* Bytes; at 64 bytes an event (with the ring's header) room for 65,536. */
#define EVENT_RING (4 * 1024 * 1024)

enum event_kind {
	EVENT_ESTABLISHED = 1,
	EVENT_ENDED = 2,
};

struct event {
	struct flow_key key;
	/* enum event_kind */
	__u32 kind;
	struct flow flow;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENT_RING);
} events SEC(".maps");

struct reporting {
	/* Events that found no room. */
	__u64 lost;
	/* Whether anybody reads them. */
	__u32 on;
	__u32 pad;
};

/* In a section, so in a map, of its own: userspace maps it. */
volatile struct reporting reporting SEC(".data.events");

static __always_inline void emit(enum event_kind kind, const struct flow_key *key,
				 const struct flow *flow)
{
	struct event *event;

	if (!reporting.on)
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&reporting.lost, 1);
		return;
	}
	event->kind = kind;
	event->key = *key;
	event->flow = *flow;
	bpf_ringbuf_submit(event, 0);
}
