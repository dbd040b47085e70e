/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Answers (answer.h) in XDP frames: cut to what is quoted, room for the new headers in front, and
 * back out of where it came from.
 */
#pragma once

#include "answer.h"
#include "ways.h"

static __always_inline long xdp_load(void *xdp, __u32 offset, void *to, __u32 length)
{
	return bpf_xdp_load_bytes(xdp, offset, to, length);
}

static long xdp_sum_chunk(__u32 nth, void *quote)
{
	return sum_chunk(nth, quote, xdp_load);
}

static __always_inline long xdp_resize(struct xdp_md *xdp, __u32 length)
{
	return bpf_xdp_adjust_tail(xdp, (__s32)(length - bpf_xdp_get_buff_len(xdp)));
}

static __always_inline int xdp_reset(struct xdp_md *xdp, const struct packet *packet,
				     struct answering *answering)
{
	struct response *response = &answering->response;
	if (xdp_resize(xdp, packet->l3 + response->header + sizeof(struct tcphdr)))
		return -1;
	return write_reset((void *)(long)xdp->data, (void *)(long)xdp->data_end, packet, response);
}

static __always_inline int xdp_icmp(struct xdp_md *xdp, const struct packet *packet,
				    const struct plan *plan, struct answering *answering)
{
	struct response *response = &answering->response;
	struct quote quote = {
		.context = xdp,
		.chunk = answering->chunk,
		.offset = packet->l3,
		.length = response->quote,
	};

	bpf_loop(QUOTE_CHUNKS, xdp_sum_chunk, &quote, 0);
	response->quote_sum = quote.sum;
	if (xdp_resize(xdp, packet->l3 + response->quote) ||
	    bpf_xdp_adjust_head(xdp, -(int)(response->header + sizeof(struct icmp_head))))
		return -1;
	return write_icmp((void *)(long)xdp->data, (void *)(long)xdp->data_end, packet, plan,
			  response);
}

__noinline int xdp_answer(struct xdp_md *xdp, struct packet *packet, struct plan *plan)
{
	struct answering *answering = find_answering();
	__u32 ifindex = xdp->ingress_ifindex;
	struct leg *leg;
	int error;

	if (!answering || !packet || !plan)
		return XDP_DROP;
	if (begin_answer((void *)(long)xdp->data, (void *)(long)xdp->data_end, packet, plan,
			 answering) != GO_ON)
		return XDP_DROP;
	error = answering->response.kind == ANSWER_RESET ? xdp_reset(xdp, packet, answering)
					      : xdp_icmp(xdp, packet, plan, answering);
	if (error)
		return XDP_DROP;
	leg = bpf_map_lookup_elem(&legs, &ifindex);
	return xdp_send_back(ifindex, leg ? leg->flags : 0);
}
