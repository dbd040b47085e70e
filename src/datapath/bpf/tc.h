/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The TC hook (clsact, ingress): works with socket buffers, so that GSO and partial checksums stay
 * as they are. It is the hook for veth, virtio and whatever XDP does not do well, and it takes
 * what the XDP hook passes on (a neighbour that has to be looked for first).
 */
#pragma once

#include "answer_tc.h"
#include "encap.h"
#include "handover.h"
#include "mtu.h"
#include "rewrite.h"
#include "tc_checksum.h"

/* Of a tag's 16 bits. */
#define VLAN_ID 0x0fff

/* To the backend itself, whatever the destination address is. */
static __always_inline int tc_redirect_to(const struct packet *packet, const struct plan *plan)
{
	struct bpf_redir_neigh neighbour = {};

	if (packet->family == ETH_P_IP) {
		neighbour.nh_family = AF_INET;
		neighbour.ipv4_nh = plan->next_hop.words[3];
	} else {
		neighbour.nh_family = AF_INET6;
		__builtin_memcpy(neighbour.ipv6_nh, &plan->next_hop, sizeof(neighbour.ipv6_nh));
	}
	return bpf_redirect_neigh(plan->ifindex, &neighbour, sizeof(neighbour), 0);
}

/* A step that packets of known flows don't need is a function; the others are not, since where
 * returns are guarded against speculation each costs as much as parsing half a header. */
__noinline int tc_read_other(struct __sk_buff *skb, struct packet *packet, int closed)
{
	if (!packet)
		return VERDICT_DROP;
	return read_other((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, packet,
			  closed);
}

__noinline int tc_hold(struct __sk_buff *skb, struct packet *packet)
{
	if (!packet)
		return VERDICT_DROP;
	return hold_fragment(skb, skb->len, packet);
}

static __always_inline int tc_rewrite(struct __sk_buff *skb, struct packet *packet,
				      struct plan *plan)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct change change = {};

	if (rewrite_headers(data, end, packet, plan, &change))
		return -1;
	return tc_checksum(skb, packet, &change);
}

__noinline int tc_rewrite_error(struct __sk_buff *skb, struct packet *packet, struct plan *plan)
{
	if (!packet || !plan)
		return -1;
	return rewrite_error((void *)(long)skb->data, (void *)(long)skb->data_end, packet, plan);
}

static __always_inline int tc_forward(struct __sk_buff *skb, struct packet *packet,
				      struct plan *plan)
{
	/* Of VLAN 0, which is a priority and no VLAN; it would be taken along to the other side. */
	if (skb->vlan_present)
		bpf_skb_vlan_pop(skb);
	if (!plan->ifindex) {
		drop(DROP_NO_ROUTE);
		return TC_ACT_SHOT;
	}
	if (check_mtu(skb, packet, plan) != GO_ON)
		return tc_answer(skb, packet, plan);
	/* Nothing is rewritten, not even the TTL: for the backend it is as if the client's packet
	 * had come to it directly. */
	if (plan->mode == MODE_DSR_L2)
		return tc_redirect_to(packet, plan);
	if (plan->mode == MODE_DSR_IPIP) {
		if (tc_encapsulate(skb, packet, plan)) {
			drop(DROP_REWRITE);
			return TC_ACT_SHOT;
		}
		return bpf_redirect_neigh(plan->ifindex, NULL, 0, 0);
	}
	if (packet->quoted_l4 ? tc_rewrite_error(skb, packet, plan)
			      : tc_rewrite(skb, packet, plan)) {
		drop(DROP_REWRITE);
		return TC_ACT_SHOT;
	}
	/* The kernel looks the route up from here, out of that interface, and the neighbour. */
	return bpf_redirect_neigh(plan->ifindex, NULL, 0, 0);
}

SEC("tc")
int baton_tc(struct __sk_buff *skb)
{
	__u32 linear = skb->data_end - skb->data;
	int handed_over = was_handed_over(skb);
	struct packet *packet;
	struct work *work;
	int verdict, action, closed;

	/* The kernel has taken the tag out before it calls us. */
	if (skb->vlan_present && skb->vlan_tci & VLAN_ID)
		return TC_ACT_UNSPEC;
	if (linear < PULL_BYTES && linear < skb->len)
		bpf_skb_pull_data(skb, skb->len < PULL_BYTES ? skb->len : PULL_BYTES);
	work = begin_work();
	if (!work)
		return TC_ACT_SHOT;
	packet = &work->packet;
	packet->ifindex = skb->ifindex;
	packet->segment = skb->gso_size;
	packet->handed_over = handed_over;
	closed = gate_is_closed(now_jiffies());
	verdict = parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, packet);
	if (verdict == VERDICT_PASS)
		verdict = tc_read_other(skb, packet, closed);
	verdict = decide(work, closed, verdict);
	if (verdict == VERDICT_HOLD)
		verdict = tc_hold(skb, packet);
	switch (verdict) {
	case VERDICT_FORWARD:
		action = tc_forward(skb, packet, &work->plan);
		if (action == TC_ACT_REDIRECT && !work->plan.answer)
			count_sent(packet, &work->plan);
		return action;
	case VERDICT_ANSWER:
		return tc_answer(skb, packet, &work->plan);
	case VERDICT_PASS:
		return TC_ACT_UNSPEC;
	default:
		return TC_ACT_SHOT;
	}
}

/* What this node sends, on interfaces that have a VIP: nothing in its name without a lease. */
SEC("tc")
int baton_egress(struct __sk_buff *skb)
{
	if (!gate_is_closed(now_jiffies()) ||
	    !speaks_for_vip((void *)(long)skb->data, (void *)(long)skb->data_end))
		return TC_ACT_UNSPEC;
	drop(DROP_SENT_NO_LEASE);
	return TC_ACT_SHOT;
}
