/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How flows come and go, counted per CPU. What is in the half-open tables now, and how many were
 * pushed out of them, follows from these: whatever began and has neither been replaced, nor been
 * established, nor timed out, nor is there, was pushed out. The kernel's LRU map does not tell.
 */
#pragma once

#include "bounds.h"

enum flow_count {
	/* Half-open entries that were made, … */
	FLOWS_BEGUN = 0,
	/* … written over by another of the same client, … */
	FLOWS_REPLACED,
	/* … established, … */
	FLOWS_ESTABLISHED,
	/* … timed out, … */
	FLOWS_HALF_EXPIRED,
	/* … ended because their backend left, or by the operator. */
	FLOWS_HALF_ENDED,
	/* Established flows that timed out (of all states), … */
	FLOWS_EXPIRED,
	/* … that were ended because their backend left, or by the operator, … */
	FLOWS_ENDED,
	/* … that went to another backend because theirs left. */
	FLOWS_MOVED,
	/* A RST or FIN whose number is not where the flow is: sent on, and not believed. */
	RESETS_DISBELIEVED,
	FINS_DISBELIEVED,
	/* A RST that may be right: believed if the other end stays silent. */
	RESETS_DOUBTED,
	/* Established flows that were begun in the middle (adopt.h). */
	FLOWS_ADOPTED,
	FLOW_COUNTS
};

MAP(flow_counts, PERCPU_ARRAY, __u32, __u64, FLOW_COUNTS);

__noinline int count_flow(__u32 what)
{
	__u64 *count = bpf_map_lookup_elem(&flow_counts, &what);

	if (count)
		(*count)++;
	return 0;
}
