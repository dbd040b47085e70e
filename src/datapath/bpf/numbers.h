/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What TCP's numbers show of a flow: whether a FIN or a RST is to be believed, since whoever knows
 * the addresses and ports of a connection can send one in another's name.
 *
 * Each direction keeps two numbers of its own segments, `end` (one past the last byte) and
 * `acknowledged`, in the entry that is written anyway. As RFC 5961 has it for end hosts:
 *
 * - A RST is believed if its number is exactly what the other end has acknowledged. That nobody
 *   can guess who does not see the traffic, and nobody can shift who does not speak for the other
 *   end.
 * - It is doubted (FLOW_DOUBT at the other end) if it follows on what its own direction has sent
 *   and the other end has not acknowledged yet. If it was false, the other end says so at once (its
 *   challenge ACK comes by here); if it stays silent, the flow ends after `half_close_timeout`.
 * - Any other is not believed. All are sent on: the end hosts judge for themselves, and where one
 *   of them answers with a challenge, the RST that comes back has the exact number.
 * - In DSR the other end does not come by: a RST is believed if it follows exactly on what the
 *   client has sent last.
 * - A FIN is believed near what its direction has sent; all it does is to shorten a timeout.
 *
 * After a jump that no window explains (`FLOW_LEARNT`: packets went through another node for a
 * while) the next segment tells.
 */
#pragma once

#include "lifetimes.h"
#include "parse.h"
#include "types.h"

/* Bytes that may be in flight in one direction, and so missing here. */
#define IN_FLIGHT (4u << 20)

static __always_inline int is_near(__u32 number, __u32 expected)
{
	return number - expected + IN_FLIGHT <= 2 * IN_FLIGHT;
}

/* Notes a segment; writes only what changes, to leave the cache line alone. SYN and RST are judged
 * apart. */
static __always_inline void note_segment(struct numbers *numbers, __u8 *flags,
					 const struct packet *packet)
{
	__u8 were = *flags, are = were & ~(FLOW_DOUBT | FLOW_LEARNT);
	__u32 ahead = packet->sequence_end - numbers->end;

	if (packet->tcp_flags & (TCP_SYN | TCP_RST))
		return;
	if ((packet->tcp_flags & TCP_ACK) && numbers->acknowledged != packet->acknowledgement)
		numbers->acknowledged = packet->acknowledgement;
	if (ahead && (ahead < IN_FLIGHT || (were & FLOW_LEARNT)))
		numbers->end = packet->sequence_end;
	if (packet->tcp_flags & TCP_FIN) {
		if (is_near(packet->sequence_end, numbers->end))
			are |= FLOW_FIN;
		else
			count_flow(FINS_DISBELIEVED);
	}
	if (are != were)
		*flags = are;
}

enum belief {
	DISBELIEVED = 0,
	DOUBTED,
	BELIEVED,
};

/* What a RST is worth, by the numbers of its own direction and of the other. */
static __always_inline enum belief judge_reset(const struct packet *packet,
					       const struct numbers *own,
					       const struct numbers *other, __u8 other_flags)
{
	if (packet->sequence == other->acknowledged && !(other_flags & FLOW_LEARNT))
		return BELIEVED;
	if ((other_flags & FLOW_LEARNT) ||
	    (packet->sequence == own->end &&
	     packet->sequence - other->acknowledged < IN_FLIGHT)) {
		count_flow(RESETS_DOUBTED);
		return DOUBTED;
	}
	count_flow(RESETS_DISBELIEVED);
	return DISBELIEVED;
}
