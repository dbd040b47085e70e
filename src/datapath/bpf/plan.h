/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is to become of a packet: the core decides it, the hook carries it out. For fragments it is
 * kept for a while (frag.h), so it holds all that the hook needs besides the packet.
 */
#pragma once

#include "types.h"

/* What becomes of a packet: `VERDICT_FORWARD` does this. */
struct plan {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	/* enum forward_mode */
	__u32 mode;
	/* Where it goes out; 0: the hook looks it up. */
	__u32 ifindex;
	/* In MODE_DSR_L2: whose the Ethernet destination is. */
	struct address next_hop;
	/* Whom it is counted for when it is sent on, and in which direction. */
	__u32 service;
	__u32 backend;
	__u32 outbound;
	/* Longest packet that the sender may send, where this one is too long. */
	__u32 mtu;
	/* In MODE_DSR_IPIP, whose addresses above are the outer header's: its bytes, … */
	__u32 outer;
	/* … and whether the segments that it will be cut into have to get shorter by them. */
	__u32 resegment;
};
