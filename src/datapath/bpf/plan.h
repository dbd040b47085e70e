/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is to become of a packet: the core decides it, the hook carries it out. For fragments it is
 * kept for a while (frag.h), so it holds all that the hook needs besides the packet.
 */
#pragma once

#include "bounds.h"
#include "counters.h"
#include "types.h"

/* What a packet is answered with: `VERDICT_ANSWER`, see answer.h. */
enum answer {
	ANSWER_NONE = 0,
	/* TCP: RST to the sender (RFC 9293 §3.10.7.1). Anything else: as ANSWER_UNREACHABLE. */
	ANSWER_RESET,
	/* ICMP port unreachable. */
	ANSWER_UNREACHABLE,
	/* ICMP fragmentation needed, ICMPv6 packet too big, with `plan->mtu`. */
	ANSWER_TOO_BIG,
	/* ICMP time exceeded in transit. */
	ANSWER_TIME_EXCEEDED,
};

struct plan {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	/* Where it goes out; 0: the hook looks it up. */
	__u32 ifindex;
	/* In MODE_DSR_L2: whose the Ethernet destination is. */
	struct address next_hop;
	/* Whom it is counted for when it is sent on, … */
	__u32 service;
	__u32 backend;
	/* Of ANSWER_TOO_BIG: longest packet that the sender may send, where this one is too long. */
	__u32 mtu;
	/* … and in which direction. */
	__u8 outbound;
	/* enum forward_mode */
	__u8 mode;
	/* In MODE_DSR_IPIP, whose addresses above are the outer header's: its bytes, … */
	__u8 outer;
	/* … and whether the segments that it will be cut into have to get shorter by them. */
	__u8 resegment;
	/* enum answer, of VERDICT_ANSWER. */
	__u8 answer;
	/* enum drop_reason of the packet that is answered, which goes no further. */
	__u8 reason;
	__u8 pad[2];
} WHOLE_WORDS;

/* The packet goes no further, and its sender is told. It is counted under `reason`, or under
 * DROP_ANSWER_LIMITED where there were too many answers already. */
static __always_inline int answer(struct plan *plan, enum answer answer, enum drop_reason reason)
{
	plan->answer = answer;
	plan->reason = reason;
	return VERDICT_ANSWER;
}
