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

static __always_inline int xdp_send(const struct packet *packet, const struct plan *plan,
				    const struct way_out *way)
{
	count_sent(packet, plan);
	if (plan->ifindex == packet->ifindex)
		return xdp_send_back(packet->ifindex, way->flags);
	return bpf_redirect(plan->ifindex, 0);
}

/* Once more, with all of the frame's length. */
__noinline int xdp_read_long(struct xdp_md *xdp, struct packet *packet)
{
	__u32 ifindex, now;

	if (!packet)
		return VERDICT_DROP;
	ifindex = packet->ifindex;
	now = packet->now;
	__builtin_memset(packet, 0, sizeof(*packet));
	packet->ifindex = ifindex;
	packet->now = now;
	return parse((void *)(long)xdp->data, (void *)(long)xdp->data_end,
		     bpf_xdp_get_buff_len(xdp), packet);
}

__noinline int xdp_read_other(struct xdp_md *xdp, struct packet *packet, int closed)
{
	if (!packet)
		return VERDICT_DROP;
	return read_other((void *)(long)xdp->data, (void *)(long)xdp->data_end,
			  bpf_xdp_get_buff_len(xdp), packet, closed);
}

__noinline int xdp_hold(struct xdp_md *xdp, struct packet *packet)
{
	if (!packet)
		return VERDICT_DROP;
	return hold_fragment(xdp, bpf_xdp_get_buff_len(xdp), packet);
}

static __always_inline int xdp_rewrite(struct xdp_md *xdp, struct packet *packet,
				       struct plan *plan)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct change change = {};

	if (rewrite_headers(data, end, packet, plan, &change))
		return -1;
	return xdp_checksum(data, end, packet, &change);
}

__noinline int xdp_rewrite_error(struct xdp_md *xdp, struct packet *packet, struct plan *plan)
{
	if (!packet || !plan)
		return -1;
	return rewrite_error((void *)(long)xdp->data, (void *)(long)xdp->data_end, packet, plan);
}

/* Headers, checksums and Ethernet addresses of a frame that stays as long as it is. */
static __always_inline int xdp_turn(struct xdp_md *xdp, struct packet *packet, struct plan *plan,
				    const struct way_out *way)
{
	void *end = (void *)(long)xdp->data_end;
	struct ethhdr *ethernet = (void *)(long)xdp->data;

	if ((void *)(ethernet + 1) > end)
		return -1;
	__builtin_memcpy(ethernet->h_dest, way->destination, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, way->source, ETH_ALEN);
	if (plan->mode == MODE_DSR_L2)
		return 0;
	return packet->quoted_l4 ? xdp_rewrite_error(xdp, packet, plan)
				 : xdp_rewrite(xdp, packet, plan);
}

static __always_inline int xdp_forward(struct xdp_md *xdp, struct packet *packet,
				       struct plan *plan)
{
	struct way_out *way = xdp_way(packet, plan);

	if (!way)
		return hand_over(xdp);
	if (plan->mode == MODE_DSR_IPIP ? xdp_encapsulate(xdp, packet, plan, way)
					: xdp_turn(xdp, packet, plan, way)) {
		drop(DROP_REWRITE);
		return XDP_DROP;
	}
	return xdp_send(packet, plan, way);
}

SEC("xdp.frags")
int baton_xdp(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	__u32 linear = end - data;
	struct packet *packet;
	struct work *work;
	int verdict, closed;

	/* Headers may go on in the next buffer, of which nothing can be seen here. */
	if (linear < NETWORK_BYTES && linear < bpf_xdp_get_buff_len(xdp))
		return XDP_PASS;
	work = begin_work();
	if (!work)
		return XDP_DROP;
	packet = &work->packet;
	packet->ifindex = xdp->ingress_ifindex;
	closed = gate_is_closed(now_jiffies());
	verdict = parse(data, end, linear, packet);
	/* Of most frames this buffer is all: it need not be asked how long they are. */
	if (packet->broken && linear < bpf_xdp_get_buff_len(xdp)) {
		if (linear < PULL_BYTES)
			return XDP_PASS;
		verdict = xdp_read_long(xdp, packet);
	}
	if (verdict == VERDICT_PASS)
		verdict = xdp_read_other(xdp, packet, closed);
	verdict = decide(work, closed, verdict);
	if (verdict == VERDICT_HOLD)
		verdict = xdp_hold(xdp, packet);
	switch (verdict) {
	case VERDICT_FORWARD:
		return xdp_forward(xdp, packet, &work->plan);
	case VERDICT_ANSWER:
		return xdp_answer(xdp, packet, &work->plan);
	case VERDICT_PASS:
		return XDP_PASS;
	default:
		return XDP_DROP;
	}
}
