/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a CPU works with while it looks at one packet, in a record of its own: the stack has 512
 * bytes for all functions that are under way together, and the verifier follows each value on it,
 * where of a map's it knows nothing and so need not tell one packet from another.
 *
 * One is enough: a hook runs to its end before the next packet's on the same CPU, XDP's before TC's.
 * What runs in a process (the collector, `baton_reinject`) may be interrupted by both and leaves it
 * alone.
 *
 * Steps that are functions without `static` are verified once, each by itself and for whatever it
 * may be given, and not anew for every way by which a packet gets there. They take numbers, the
 * hook's context and pointers to records, which they must ask for NULL; they give a number. Pointers
 * into the packet can't be handed over: they begin from the context again. What such a function has
 * found out is forgotten outside; so bounds are looked at where they are needed (`L4_MASK`).
 */
#pragma once

#include "gate.h"
#include "parse.h"
#include "plan.h"

struct work {
	struct packet packet;
	struct plan plan;
	/* Of a client's packet: its flow, and a copy of what matters of it. Not cleared. */
	struct flow_key key;
	struct flow flow;
	/* Of a server's: the key of its flow. Not cleared. */
	struct reply_key reply_key;
};

MAP(work, PERCPU_ARRAY, __u32, struct work, 1);

/* The record, empty but for the time. */
static __always_inline struct work *begin_work(void)
{
	__u32 zero = 0;
	struct work *here = bpf_map_lookup_elem(&work, &zero);

	if (!here)
		return NULL;
	__builtin_memset(here, 0, offsetof(struct work, key));
	here->packet.now = now_jiffies();
	return here;
}
