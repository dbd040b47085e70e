/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the XDP hook has decided on and can't send on goes to the TC hook of the same interface,
 * which decides once more. The mark in front of such a frame (its metadata, which no packet from
 * outside can bring along) tells it that the flow has seen this packet already. A driver without
 * metadata loses the mark: then a UDP flow of dsr may be taken for established one packet early.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct handover {
	__u32 magic;
	/* The interface whose XDP hook it was. */
	__u32 ifindex;
};

#define HANDED_OVER 0xba70ba70

/* Marks the frame, which goes on unchanged. Pointers into it are void afterwards. */
static __always_inline int hand_over(struct xdp_md *xdp)
{
	struct handover *mark;

	if (bpf_xdp_adjust_meta(xdp, -(int)sizeof(*mark)))
		return XDP_PASS;
	mark = (void *)(long)xdp->data_meta;
	if ((void *)(mark + 1) > (void *)(long)xdp->data)
		return XDP_PASS;
	mark->magic = HANDED_OVER;
	mark->ifindex = xdp->ingress_ifindex;
	return XDP_PASS;
}

/* Whether it was marked. To be asked before the buffer is changed in any way. */
static __always_inline int was_handed_over(struct __sk_buff *skb)
{
	struct handover *mark = (void *)(long)skb->data_meta;

	return (void *)(mark + 1) <= (void *)(long)skb->data && mark->magic == HANDED_OVER &&
	       mark->ifindex == skb->ifindex;
}
