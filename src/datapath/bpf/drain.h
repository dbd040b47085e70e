/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * After an upgrade whose tables are others, the older version's filter stays behind ours for as long
 * as its flows live (drain.rs): what is of no flow of ours and begins none is left to it. It drops
 * what it does not know either, so the kernel's stack sees none of it.
 */
#pragma once

#include "bounds.h"
#include "counters.h"
#include "parse.h"

/* Interfaces that have an older filter too. */
MAP(draining, HASH, __u32, __u32, LEGS);

/* Drops a packet of no flow, unless the older filter may know it. */
static __always_inline int drop_or_drain(const struct packet *packet, enum drop_reason reason)
{
	__u32 ifindex = packet->ifindex;

	return bpf_map_lookup_elem(&draining, &ifindex) ? VERDICT_PASS : drop(reason);
}
