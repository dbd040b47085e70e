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
} WHOLE_WORDS;

struct recent_ends {
	struct recent_end ends[RECENT_ENDS];
};

enum recent_of { RECENT_SERVICES, RECENT_SERVERS };

MAP(recent_ends, PERCPU_ARRAY, __u32, struct recent_ends, 2);

/* The place that an end has among those that were found a moment ago. */
static __always_inline struct recent_end *recent_place(enum recent_of of,
						       const struct address *address, __be16 port)
{
	__u32 key = of;
	__u32 place = bpf_ntohl(address->words[3]) + bpf_ntohs(port);
	struct recent_ends *all = bpf_map_lookup_elem(&recent_ends, &key);

	return all ? &all->ends[place % RECENT_ENDS] : NULL;
}

/* The number that an end was found to have a moment ago; 0: it has to be looked for. */
static __always_inline __u32 recent_end(enum recent_of of, const struct address *address,
					__be16 port, __u8 protocol)
{
	struct recent_end *end = recent_place(of, address, port);

	if (!end || end->changes != changes || end->at.port != port ||
	    end->at.protocol != protocol || !same_address(&end->at.vip, address))
		return 0;
	return end->number;
}

/* `before`: what `changes` was before it was looked for. The number is taken away first and given
 * last, so that no interruption sees it with another's place. */
static __always_inline void keep_end(enum recent_of of, const struct service_key *at,
				     __u32 number, __u32 before)
{
	struct recent_end *end = recent_place(of, &at->vip, at->port);

	if (!end)
		return;
	end->number = 0;
	barrier();
	end->at = *at;
	end->changes = before;
	barrier();
	end->number = number;
}
