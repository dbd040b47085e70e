/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The way of an XDP frame: out of which interface, and with which Ethernet addresses. Userspace
 * mirrors routes and neighbours into these maps (neighbours.rs); what they do not have is handed
 * over to the TC hook, after which the kernel looks routes up and neighbours for.
 *
 * Not `bpf_fib_lookup`: it answers only where `forwarding` is on, which makes a router of the node
 * for everybody and takes its own IPv6 default routes away.
 */
#pragma once

#include "core.h"

enum leg_flag {
	/* Frames that came by another interface can be redirected to it. */
	LEG_REDIRECT = 1,
};

/* An interface that frames go out of. */
struct leg {
	__u8 mac[6];
	/* enum leg_flag */
	__u8 flags;
	__u8 pad;
	__u32 mtu;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct leg);
	__uint(max_entries, LEGS);
} legs SEC(".maps");

/* Of a route: the interface as a whole, then bits of the destination. */
struct way_key {
	__u32 prefix;
	__u32 ifindex;
	struct address to;
};

enum way_kind {
	/* The destination is a neighbour. */
	WAY_ON_LINK = 1,
	/* Behind a gateway. */
	WAY_GATEWAY = 2,
	/* Something that only the kernel knows to do (several gateways, tunnels, no way at all). */
	WAY_KERNEL = 3,
};

struct way {
	struct address gateway;
	/* enum way_kind */
	__u32 kind;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct way_key);
	__type(value, struct way);
	__uint(max_entries, WAYS);
} ways SEC(".maps");

struct neighbour_key {
	struct address address;
	__u32 ifindex;
};

struct neighbour {
	__u8 mac[6];
	__u16 pad;
	/* Low 32 bits of jiffies64 at about the last frame to it: what is in use is kept fresh. */
	__u32 used;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct neighbour_key);
	__type(value, struct neighbour);
	__uint(max_entries, NEIGHBOURS);
} neighbours SEC(".maps");

/* Ethernet addresses of a frame that goes out. */
struct way_out {
	__u8 destination[6];
	__u8 source[6];
};

/* Finds the way of a packet to `to` out of the plan's interface; `direct`: it is a neighbour
 * whatever the routes say. Fails where the TC hook has to see to it. */
static __noinline int find_way(const struct packet *packet, const struct plan *plan,
			       const struct address *to, int direct, struct way_out *out)
{
	__u32 ifindex = plan->ifindex;
	struct neighbour_key key = { .address = *to, .ifindex = ifindex };
	struct leg *leg = bpf_map_lookup_elem(&legs, &ifindex);
	struct neighbour *neighbour;

	if (!leg || packet->length + plan->outer > leg->mtu ||
	    (ifindex != packet->ifindex && !(leg->flags & LEG_REDIRECT)))
		return -1;
	if (!direct) {
		struct way_key route = { .prefix = 160, .ifindex = ifindex, .to = *to };
		struct way *way = bpf_map_lookup_elem(&ways, &route);

		if (!way || way->kind == WAY_KERNEL)
			return -1;
		if (way->kind == WAY_GATEWAY)
			key.address = way->gateway;
	}
	neighbour = bpf_map_lookup_elem(&neighbours, &key);
	if (!neighbour)
		return -1;
	/* Now and then is enough, and leaves the cache line alone. */
	if (packet->now - neighbour->used > USED_GRAIN)
		neighbour->used = packet->now;
	__builtin_memcpy(out->destination, neighbour->mac, sizeof(out->destination));
	__builtin_memcpy(out->source, leg->mac, sizeof(out->source));
	return 0;
}
