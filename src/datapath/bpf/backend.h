/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The maps of the program on backends. Userspace writes what services there are, the program the
 * rest. Full tables are refused by `baton backend-setup`, but for flows, of which the one that was
 * not heard of for longest goes.
 */
#pragma once

#include "bounds.h"
#include "parse.h"
#include "types.h"

/* Services that one machine is a backend of. */
#define BACKEND_SERVICES 1024
/* Flows that came through a relay. One that is pushed out is known again with its client's next
 * packet. */
#define RELAYED_FLOWS 131072
#define RELAYED_FRAGMENTS 1024

/* What is tunnelled to one of our addresses for a VIP. */
struct tunnel_key {
	struct address backend;
	struct address vip;
};

MAP(tunnels, HASH, struct tunnel_key, __u32, BACKEND_SERVICES);

/* VIP, port, protocol of a tunnelled service -> the greatest MSS that it may offer. */
MAP(clamps, HASH, struct service_key, __u32, BACKEND_SERVICES);

enum relayed_by {
	/* Flows whose packets have the relay's mark. */
	RELAYED_MARKED = 0,
	/* All, since the network between does not keep the mark. */
	RELAYED_ALL = 1,
};

/* Who this server is to clients of a service. */
struct face {
	struct address vip;
	__be16 port;
	/* enum relayed_by */
	__u16 by;
};

/* Address, port, protocol of this server -> its VIP. */
MAP(faces, HASH, struct server_key, struct face, BACKEND_SERVICES);

struct relayed_key {
	struct address client;
	struct address server;
	__be16 client_port;
	__be16 server_port;
	__u32 protocol;
};

/* Flows that came through a relay; the value means nothing. */
MAP(relayed, LRU_HASH, struct relayed_key, __u32, RELAYED_FLOWS);

/* A datagram of ours that leaves in fragments, of which the first alone has ports. */
struct sent_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u32 protocol;
};

MAP(sent_fragments, LRU_HASH, struct sent_key, struct face, RELAYED_FRAGMENTS);

/* What is counted. New ones go at the end. */
enum backend_count {
	/* Taken out of a tunnel. */
	BACKEND_UNTUNNELLED = 0,
	/* Not taken out: congestion met by what does not understand it (RFC 6040). */
	BACKEND_CONGESTION,
	/* Flows that were seen to come through a relay. */
	BACKEND_LEARNT,
	/* Replies that got a VIP as source. */
	BACKEND_REWRITTEN,
	/* SYN+ACKs whose MSS was lowered. */
	BACKEND_CLAMPED,
	/* Packets that the kernel refused to change, and so were dropped. */
	BACKEND_REFUSED,
	BACKEND_COUNTS
};

MAP(backend_counts, PERCPU_ARRAY, __u32, __u64, BACKEND_COUNTS);

static __always_inline void count(enum backend_count what)
{
	__u32 key = what;
	__u64 *counted = bpf_map_lookup_elem(&backend_counts, &key);

	if (counted)
		(*counted)++;
}
