/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Answers (answer.h) in socket buffers: cut to what is needed, which also makes one linear packet
 * of one that GSO would cut into many, then room for the new headers.
 *
 * A buffer may be one whose transport checksum the device is to fill in (what comes from a veth
 * is), and no helper takes that mark away. A RST keeps its TCP header where it was, so the mark
 * stays right. In an ICMP answer it is the quoted packet's checksum that gets filled in; what the
 * sum over that part is then is known before (the complement of what the field holds), so the
 * answer's own checksum is right with the device's help and without.
 */
#pragma once

#include "answer.h"

static __always_inline long tc_load(void *skb, __u32 offset, void *to, __u32 length)
{
	return bpf_skb_load_bytes(skb, offset, to, length);
}

static long tc_sum_chunk(__u32 nth, void *quote)
{
	return sum_chunk(nth, quote, tc_load);
}

/* Whether a transport checksum is left to the device: then the kernel's helper leaves ports and
 * the like out of it. */
static __always_inline int tc_is_partial(struct __sk_buff *skb, __u32 offset, __u16 *checksum)
{
	__u16 after = 0;

	if (bpf_skb_load_bytes(skb, offset, checksum, sizeof(*checksum)) ||
	    bpf_l4_csum_replace(skb, offset, 0, 1, 0) ||
	    bpf_skb_load_bytes(skb, offset, &after, sizeof(after)))
		return 0;
	if (after == *checksum)
		return 1;
	bpf_skb_store_bytes(skb, offset, checksum, sizeof(*checksum), 0);
	return 0;
}

/* Any change of the length makes the kernel forget a sum that the device took over the bytes that
 * are about to change. */
static __always_inline long tc_resize(struct __sk_buff *skb, __u32 length)
{
	if (skb->len == length && bpf_skb_change_tail(skb, length + 1, 0))
		return -1;
	return bpf_skb_change_tail(skb, length, 0);
}

static __always_inline int tc_reset(struct __sk_buff *skb, const struct packet *packet,
				    struct answering *answering)
{
	struct response *response = &answering->response;
	__u32 l4 = packet->l4 & L4_MASK;
	__s32 options = l4 - packet->l3 - response->header;
	__u16 checksum = 0;

	response->partial =
		tc_is_partial(skb, l4 + __builtin_offsetof(struct tcphdr, check), &checksum);
	if (tc_resize(skb, l4 + sizeof(struct tcphdr)))
		return -1;
	if (options > 0 && bpf_skb_adjust_room(skb, -options, BPF_ADJ_ROOM_NET, 0))
		return -1;
	return write_reset((void *)(long)skb->data, (void *)(long)skb->data_end, packet, response);
}

static __always_inline int tc_icmp(struct __sk_buff *skb, const struct packet *packet,
				   const struct plan *plan, struct answering *answering)
{
	struct response *response = &answering->response;
	__u32 l4 = packet->l4 & L4_MASK;
	struct quote quote = {
		.context = skb,
		.chunk = answering->chunk,
		.offset = packet->l3,
		.length = response->quote,
	};
	__u16 checksum = 0;

	response->partial = tc_is_partial(skb, l4 + checksum_offset(packet), &checksum);
	if (tc_resize(skb, packet->l3 + response->quote))
		return -1;
	if (response->partial) {
		quote.length = l4 - packet->l3;
		quote.sum = (__u16)~checksum;
	}
	bpf_loop(QUOTE_CHUNKS, tc_sum_chunk, &quote, 0);
	response->quote_sum = quote.sum;
	if (bpf_skb_adjust_room(skb, response->header + sizeof(struct icmp_head), BPF_ADJ_ROOM_MAC,
				0))
		return -1;
	return write_icmp((void *)(long)skb->data, (void *)(long)skb->data_end, packet, plan,
			  response);
}

__noinline int tc_answer(struct __sk_buff *skb, struct packet *packet, struct plan *plan)
{
	struct answering *answering = find_answering();
	int error;

	if (!answering || !packet || !plan)
		return TC_ACT_SHOT;
	/* Of VLAN 0: not to be taken along. */
	if (skb->vlan_present)
		bpf_skb_vlan_pop(skb);
	if (begin_answer((void *)(long)skb->data, (void *)(long)skb->data_end, packet, plan,
			 answering) != GO_ON)
		return TC_ACT_SHOT;
	error = answering->response.kind == ANSWER_RESET ? tc_reset(skb, packet, answering)
					      : tc_icmp(skb, packet, plan, answering);
	return error ? TC_ACT_SHOT : bpf_redirect(skb->ifindex, 0);
}
