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
#include "recent.h"

enum leg_flag {
	/* Frames that came by another interface can be redirected to it. */
	LEG_REDIRECT = 1,
	/* Frames can't be sent back by XDP_TX, but by redirecting them to where they came from: after
	 * XDP_TX veth wakes its peer only if that has a program as well (veth_xdp_flush). */
	LEG_NO_TX = 2,
};

/* An interface that frames go out of. */
struct leg {
	__u8 mac[6];
	/* enum leg_flag */
	__u8 flags;
	__u8 pad;
	__u32 mtu;
};

MAP(legs, HASH, __u32, struct leg, LEGS);

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

MAP(neighbours, HASH, struct neighbour_key, struct neighbour, NEIGHBOURS);

/* A way that was found a moment ago, see recent.h. */
struct recent_way {
	struct address to;
	/* Of no use while it is 0. */
	__u32 ifindex;
	__u32 direct;
	__u32 changes;
	/* When it was looked up, low 32 bits of jiffies64. */
	__u32 since;
	__u32 mtu;
	struct way_out out;
} WHOLE_WORDS;

struct recent_ways {
	struct recent_way ways[RECENT_WAYS];
};

MAP(recent_ways, PERCPU_ARRAY, __u32, struct recent_ways, 1);

/* What the tables say of the way to `found->to` out of an interface. */
__noinline int look_for_way(struct recent_way *found, __u32 ifindex, int direct, __u32 now)
{
	struct neighbour *neighbour;
	struct neighbour_key key;
	struct leg *leg;

	if (!found)
		return -1;
	leg = bpf_map_lookup_elem(&legs, &ifindex);
	if (!leg)
		return -1;
	key.address = found->to;
	key.ifindex = ifindex;
	if (!direct) {
		struct way_key route = { .prefix = 160, .ifindex = ifindex, .to = found->to };
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
	if (now - neighbour->used > USED_GRAIN)
		neighbour->used = now;
	found->mtu = leg->mtu;
	found->out.flags = leg->flags;
	__builtin_memcpy(found->out.destination, neighbour->mac, sizeof(found->out.destination));
	__builtin_memcpy(found->out.source, leg->mac, sizeof(found->out.source));
	return 0;
}

/* Sends a frame back out of the interface that it came by. */
static __always_inline int xdp_send_back(__u32 ifindex, __u32 flags)
{
	return flags & LEG_NO_TX ? bpf_redirect(ifindex, 0) : XDP_TX;
}

/* Finds the way of a packet to `to` out of the plan's interface; `direct`: it is a neighbour
 * whatever the routes say. NULL where the TC hook has to see to it. */
static __always_inline struct way_out *find_way(const struct packet *packet,
						const struct plan *plan, const struct address *to,
						int direct)
{
	__u32 place = bpf_ntohl(to->words[3]) ^ bpf_ntohl(to->words[1]);
	__u32 zero = 0, before = changes;
	struct recent_ways *all = bpf_map_lookup_elem(&recent_ways, &zero);
	struct recent_way *way;

	if (!all)
		return NULL;
	way = &all->ways[place % RECENT_WAYS];
	/* For no longer than the use of a neighbour need not be noted again. */
	if (way->ifindex != plan->ifindex || way->changes != before || way->direct != direct ||
	    packet->now - way->since > USED_GRAIN || !same_address(&way->to, to)) {
		way->ifindex = 0;
		barrier();
		way->to = *to;
		if (look_for_way(way, plan->ifindex, direct, packet->now))
			return NULL;
		way->direct = direct;
		way->changes = before;
		way->since = packet->now;
		barrier();
		way->ifindex = plan->ifindex;
	}
	if (packet->length + plan->outer > way->mtu ||
	    (plan->ifindex != packet->ifindex && !(way->out.flags & LEG_REDIRECT)))
		return NULL;
	return &way->out;
}
