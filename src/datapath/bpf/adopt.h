/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Flows of the node before that were too young to be replicated. For a while after a takeover a
 * client's segment of no flow is taken for one of them, where nothing has to be guessed: the schedule
 * is by hash, so it says which backend that node chose, and the port towards it is the first
 * candidate, which is a hash too. Wherever that node had to take a second choice, this one does
 * not find the flow; it never takes another's.
 *
 * An adopted flow is half-open until the backend answers with anything but a RST (in DSR, until the
 * client's second segment): who sends segments of no flow fills no more than the half-open table.
 * A backend that does not know the connection says so to the client by its RST.
 */
#pragma once

#include "bounds.h"
#include "gate.h"
#include "select.h"
#include "types.h"

static __always_inline int may_adopt(const struct packet *packet, const struct service *service)
{
	return (__s64)(gate.adopt_until - now_jiffies()) > 0 && select_by_hash(service) &&
	       (packet->tcp_flags & (TCP_SYN | TCP_RST | TCP_ACK)) == TCP_ACK;
}

/* The id of the backend that the schedule names first; less than 0: minus the drop reason. */
__noinline int first_choice(const struct service *service, const struct flow_key *key)
{
	__u32 id, slot, chosen, zero = 0;
	struct schedule *schedule;
	struct live *live;
	void *map;

	if (!service || !key)
		return -DROP_NO_FLOW;
	id = key->service;
	map = bpf_map_lookup_elem(&schedules, &id);
	if (!map)
		return -DROP_NO_FLOW;
	schedule = bpf_map_lookup_elem(map, &zero);
	if (!schedule || !schedule->length)
		return -DROP_NO_FLOW;
	slot = first_draw(service, key) % schedule->length;
	/* The compiler knows that it is less; the verifier wants to see it. */
	barrier_var(slot);
	if (slot >= SLOTS)
		return -DROP_NO_FLOW;
	chosen = schedule->slots[slot];
	return open_backend(chosen, &live) ? (int)chosen : -DROP_NO_FLOW;
}
