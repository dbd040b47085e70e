/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Whether a packet fits through the interface that it is to leave by: a redirect does not ask, and
 * what is too long would vanish. With GSO the pieces count, not the whole.
 *
 * What does not fit is answered with ANSWER_TOO_BIG, IPv4 without DF too: nothing here can cut a
 * packet in two, and a sender that is told cuts its packets itself.
 */
#pragma once

#include "parse.h"
#include "plan.h"

/* Every link takes packets of this length: no need to ask. */
#define FITS_ALWAYS 576

/* The longest packet that is sent: a whole one, or one of the segments that it will be cut into. */
static __always_inline __u32 longest_sent(const struct packet *packet)
{
	if (!packet->segment)
		return packet->length;
	return packet->l4 - packet->l3 + packet->segment +
	       (packet->protocol == IPPROTO_TCP ? packet->tcp_header : sizeof(struct udphdr));
}

/* `GO_ON`, or the answer for its sender, for packets up to `longest`; `plan->mtu` is what would have
 * room on the way out. */
static __always_inline int check_length(struct __sk_buff *skb, struct plan *plan, __u32 longest)
{
	__u32 mtu = 0;

	/* The interface has gone: let the redirect find out. */
	if (bpf_check_mtu(skb, plan->ifindex, &mtu, 0, 0) < 0 || longest <= mtu)
		return GO_ON;
	plan->mtu = mtu;
	return answer(plan, ANSWER_TOO_BIG, DROP_TOO_BIG);
}

/* The same. What goes in a tunnel has been looked at already (encap.h). */
static __always_inline int check_mtu(struct __sk_buff *skb, const struct packet *packet,
				     struct plan *plan)
{
	__u32 longest = longest_sent(packet);

	if (longest <= FITS_ALWAYS || plan->mode == MODE_DSR_IPIP)
		return GO_ON;
	return check_length(skb, plan, longest);
}
