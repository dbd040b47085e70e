/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The XDP hook: works with frames before there is a socket buffer, so checksums are whole and
 * there is no GSO. Route and neighbour come from one lookup (`bpf_fib_lookup`, which answers only
 * where the interface has `forwarding` on). What it can't send on by itself, a neighbour that has
 * to be looked for first above all, goes on to the TC hook unchanged, which sees it as if it came
 * by for the first time; only the counters of traffic have it twice.
 */
#pragma once

#include "rewrite.h"

/* The transport checksum follows the change. UDP's 0 over IPv4 means that there is none. */
static __always_inline int xdp_checksum(void *data, void *end, const struct packet *packet,
					const struct change *change)
{
	__u32 offset = (packet->l4 & L4_MASK) + checksum_offset(packet);
	__u16 *checksum = data + offset;
	__u16 adjusted;

	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	if ((void *)(checksum + 1) > end)
		return -1;
	if (packet->protocol == IPPROTO_UDP && !*checksum)
		return 0;
	adjusted = adjust(*checksum, (__u64)fold32(change->pseudo) + fold32(change->ports));
	*checksum = packet->protocol == IPPROTO_UDP && !adjusted ? 0xffff : adjusted;
	return 0;
}

/* The way out: interface and Ethernet addresses. */
static __always_inline long xdp_route(struct xdp_md *xdp, const struct packet *packet,
				      const struct plan *plan, struct bpf_fib_lookup *fib)
{
	const struct address *to = plan->mode == MODE_DSR_L2 ? &plan->next_hop : &plan->destination;

	fib->l4_protocol = packet->protocol;
	fib->tot_len = packet->length;
	fib->ifindex = packet->ifindex;
	if (packet->family == ETH_P_IP) {
		fib->family = AF_INET;
		fib->ipv4_src = plan->source.words[3];
		fib->ipv4_dst = to->words[3];
	} else {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_src, &plan->source, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, to, sizeof(fib->ipv6_dst));
	}
	return bpf_fib_lookup(xdp, fib, sizeof(*fib), 0);
}

static __always_inline int xdp_forward(struct xdp_md *xdp, const struct packet *packet,
				       const struct plan *plan)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct ethhdr *ethernet = data;
	struct bpf_fib_lookup fib = {};
	struct change change = {};

	if (plan->mode != MODE_NAT && plan->mode != MODE_DNAT && plan->mode != MODE_DSR_L2)
		return XDP_PASS;
	if (xdp_route(xdp, packet, plan, &fib) != BPF_FIB_LKUP_RET_SUCCESS)
		return XDP_PASS;
	if ((void *)(ethernet + 1) > end ||
	    (plan->mode != MODE_DSR_L2 &&
	     (rewrite_headers(data, end, packet, plan, &change) ||
	      xdp_checksum(data, end, packet, &change)))) {
		drop(DROP_REWRITE);
		return XDP_DROP;
	}
	__builtin_memcpy(ethernet->h_dest, fib.dmac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, fib.smac, ETH_ALEN);
	if (fib.ifindex == packet->ifindex)
		return XDP_TX;
	return bpf_redirect(fib.ifindex, 0);
}

SEC("xdp")
int baton_xdp(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct packet packet = { .ifindex = xdp->ingress_ifindex };
	struct plan plan = {};

	switch (decide(data, end, end - data, &packet, &plan)) {
	case VERDICT_FORWARD:
		return xdp_forward(xdp, &packet, &plan);
	case VERDICT_PASS:
		return XDP_PASS;
	default:
		return XDP_DROP;
	}
}
