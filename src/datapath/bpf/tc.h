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

static __always_inline int tc_forward(struct __sk_buff *skb, struct packet *packet,
				      struct plan *plan)
{
	struct change change = {};

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
	if (packet->quoted_l4 ? rewrite_error((void *)(long)skb->data,
					      (void *)(long)skb->data_end, packet, plan)
			      : rewrite_headers((void *)(long)skb->data,
						(void *)(long)skb->data_end, packet, plan,
						&change) ||
					tc_checksum(skb, packet, &change)) {
		drop(DROP_REWRITE);
		return TC_ACT_SHOT;
	}
	/* The kernel looks the route up from here, out of that interface, and the neighbour. */
	return bpf_redirect_neigh(plan->ifindex, NULL, 0, 0);
}

SEC("tc")
int baton_tc(struct __sk_buff *skb)
{
	struct packet packet = {
		.ifindex = skb->ifindex,
		.segment = skb->gso_size,
		.handed_over = was_handed_over(skb),
	};
	struct plan plan = {};
	int verdict, action;
	__u32 linear = skb->data_end - skb->data;

	/* The kernel has taken the tag out before it calls us. */
	if (skb->vlan_present && skb->vlan_tci & VLAN_ID)
		return TC_ACT_UNSPEC;
	if (linear < PULL_BYTES && linear < skb->len)
		bpf_skb_pull_data(skb, skb->len < PULL_BYTES ? skb->len : PULL_BYTES);
	verdict = decide((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet,
			 &plan);
	if (verdict == VERDICT_HOLD)
		verdict = hold_fragment(skb, skb->len, &packet);
	switch (verdict) {
	case VERDICT_FORWARD:
		action = tc_forward(skb, &packet, &plan);
		if (action == TC_ACT_REDIRECT && !plan.answer)
			count_sent(&packet, &plan);
		return action;
	case VERDICT_ANSWER:
		return tc_answer(skb, &packet, &plan);
	case VERDICT_PASS:
		return TC_ACT_UNSPEC;
	default:
		return TC_ACT_SHOT;
	}
}
