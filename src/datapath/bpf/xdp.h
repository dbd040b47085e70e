/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The XDP hook: works with frames before there is a socket buffer, so checksums are whole and
 * there is no GSO. Interface and Ethernet addresses come from maps (ways.h). What it can't send on
 * by itself, a neighbour that has to be looked for first above all, is handed over to the TC hook
 * unchanged (handover.h). Drops are counted by whichever hook drops, traffic by the one that sends.
 *
 * Frames may be jumbo ones in several buffers; headers are in the first.
 */
#pragma once

#include "answer_xdp.h"
#include "encap.h"
#include "handover.h"
#include "rewrite.h"
#include "ways.h"

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

/* The destination's Ethernet address and our own; NULL where TC has to see to it. */
static __always_inline struct way_out *xdp_way(const struct packet *packet,
					       const struct plan *plan)
{
	int direct = plan->mode == MODE_DSR_L2;

	return find_way(packet, plan, direct ? &plan->next_hop : &plan->destination, direct);
}

static __always_inline int xdp_send(const struct packet *packet, const struct plan *plan)
{
	count_sent(packet, plan);
	if (plan->ifindex == packet->ifindex)
		return XDP_TX;
	return bpf_redirect(plan->ifindex, 0);
}

static __always_inline int xdp_forward(struct xdp_md *xdp, struct packet *packet,
				       struct plan *plan)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct ethhdr *ethernet = data;
	struct change change = {};
	struct way_out *way = xdp_way(packet, plan);

	if (!way)
		return hand_over(xdp);
	if (plan->mode == MODE_DSR_IPIP) {
		if (xdp_encapsulate(xdp, packet, plan, way->destination, way->source)) {
			drop(DROP_REWRITE);
			return XDP_DROP;
		}
		return xdp_send(packet, plan);
	}
	if ((void *)(ethernet + 1) > end ||
	    (plan->mode != MODE_DSR_L2 &&
	     (packet->quoted_l4 ? rewrite_error(data, end, packet, plan)
				: rewrite_headers(data, end, packet, plan, &change) ||
					  xdp_checksum(data, end, packet, &change)))) {
		drop(DROP_REWRITE);
		return XDP_DROP;
	}
	__builtin_memcpy(ethernet->h_dest, way->destination, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, way->source, ETH_ALEN);
	return xdp_send(packet, plan);
}

SEC("xdp.frags")
int baton_xdp(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct packet packet = { .ifindex = xdp->ingress_ifindex };
	__u32 size = bpf_xdp_get_buff_len(xdp);
	struct plan plan = {};
	int verdict;

	/* Headers may go on in the next buffer, of which nothing can be seen here. */
	if (end - data < PULL_BYTES && end - data < size)
		return XDP_PASS;
	verdict = decide(data, end, size, &packet, &plan);
	if (verdict == VERDICT_HOLD)
		verdict = hold_fragment(xdp, size, &packet);
	switch (verdict) {
	case VERDICT_FORWARD:
		return xdp_forward(xdp, &packet, &plan);
	case VERDICT_ANSWER:
		return xdp_answer(xdp, &packet, &plan);
	case VERDICT_PASS:
		return XDP_PASS;
	default:
		return XDP_DROP;
	}
}
