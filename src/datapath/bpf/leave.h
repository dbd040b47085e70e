/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Packets of flows that can't go on: their backend is down or gone, or they were ended
 * (FLOW_ENDED). A service that keeps such flows has no backends that are down: userspace calls
 * them drained.
 *
 * - TCP: whoever sends gets a RST, which has the right number since it answers; a client that is
 *   silent is sent one by userspace (collect.h). After that, a SYN begins a new flow at once.
 * - UDP: the flow is forgotten, by the collector at once (ON_DOWN_REMAP) or by the client's next
 *   datagram, whose sender is told (ON_DOWN_RESET). The next one begins a new flow.
 *
 * A SYN or datagram that is quicker than the collector takes the flow along, and begins anew.
 */
#pragma once

#include "end.h"
#include "flow.h"
#include "plan.h"

/* A TCP segment of a flow that is over, from either end: a RST, but never for a RST. */
static __always_inline int refuse(const struct packet *packet, struct plan *plan)
{
	if (packet->tcp_flags & TCP_RST)
		return drop(DROP_BACKEND_DOWN);
	return answer(plan, ANSWER_RESET, DROP_BACKEND_DOWN);
}

/* A client's packet of a flow that can't go on. `BEGIN_ANEW`: with another, from here. */
__noinline int leave_backend(struct packet *packet, const struct flow_key *key,
			     const struct service *service, const struct flow *flow,
			     struct plan *plan)
{
	struct reply *reply = NULL;
	struct backend *backend;
	struct flow *there;
	__u32 backend_id;

	if (!packet || !key || !service || !flow || !plan)
		return VERDICT_DROP;
	if (packet->protocol != IPPROTO_TCP || is_syn(packet)) {
		remove_flow(key, flow, service);
		count_flow(FLOWS_MOVED);
		if (packet->protocol == IPPROTO_TCP || service->on_down == ON_DOWN_REMAP)
			return BEGIN_ANEW;
		return answer(plan, ANSWER_UNREACHABLE, DROP_BACKEND_DOWN);
	}
	there = bpf_map_lookup_elem(&flows, key);
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (there && backend && !(there->flags & FLOW_ENDED)) {
		if (mode_has_replies(service->mode)) {
			struct reply_key reply_key =
				reply_key_of(key, service, backend, flow->nat_port);

			reply = bpf_map_lookup_elem(&replies, &reply_key);
		}
		mark_ended(key, there, reply, packet->now);
	}
	return refuse(packet, plan);
}
