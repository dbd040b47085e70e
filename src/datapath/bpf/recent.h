/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What was found a moment ago: of tables that userspace alone writes (services, servers, ways),
 * what they said, kept per CPU in small arrays, because a look into a hash table costs as much as
 * all of parsing. Userspace counts `changes` up after each change of those tables (maps.rs), which
 * makes all that is kept here void. Only what is there is kept, never that something is not.
 */
#pragma once

#include "bounds.h"
#include "parse.h"
#include "types.h"

/* In a section, so in a map, of its own, which outlives the daemon: programs of two daemons may be
 * attached side by side for a moment. */
volatile __u32 changes SEC(".data.changes");

/* A service or a server, by where it is. Of no use while `number` is 0. */
struct recent_end {
	struct service_key at;
	__u32 changes;
	__u32 number;
};

struct recent_ends {
	struct recent_end ends[RECENT_ENDS];
};

enum recent_of { RECENT_SERVICES, RECENT_SERVERS };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct recent_ends);
	__uint(max_entries, 2);
} recent_ends SEC(".maps");

/* The place that an end has among those that were found a moment ago. */
static __always_inline struct recent_end *recent_end(enum recent_of of,
						     const struct service_key *at)
{
	__u32 key = of;
	__u32 place = bpf_ntohl(at->vip.words[3]) + bpf_ntohs(at->port);
	struct recent_ends *all = bpf_map_lookup_elem(&recent_ends, &key);

	return all ? &all->ends[place % RECENT_ENDS] : NULL;
}

/* `now`: what `changes` is. */
static __always_inline int is_recent(const struct recent_end *end, const struct service_key *at,
				     __u32 now)
{
	return end->number && end->changes == now && same_address(&end->at.vip, &at->vip) &&
	       end->at.port == at->port && end->at.protocol == at->protocol;
}

/* `before`: what `changes` was before it was looked for. The number is taken away first and given
 * last, so that no interruption sees it with another's place. */
static __always_inline void keep_end(struct recent_end *end, const struct service_key *at,
				     __u32 number, __u32 before)
{
	end->number = 0;
	barrier();
	end->at = *at;
	end->changes = before;
	barrier();
	end->number = number;
}
