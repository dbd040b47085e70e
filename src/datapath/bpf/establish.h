/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A half-open flow: its client's packets, until both ends have shown that they are there and it is
 * moved to the tables that nothing is evicted from.
 */
#pragma once

#include "affinity.h"
#include "events.h"
#include "flow.h"
#include "lifetimes.h"
#include "live.h"

/* Both ends are there: from the half-open tables into those that nothing is evicted from. `flow`
 * may be the half-open entry itself, which goes last. */
__noinline int establish(const struct flow_key *key, const struct service *service,
			 struct flow *flow, const struct reply_key *reply_key,
			 const struct half_reply *half)
{
	int verdict;
	long error;

	if (!key || !service || !flow || !reply_key)
		return VERDICT_DROP;
	if (half) {
		error = bpf_map_update_elem(&replies, reply_key, &half->reply, BPF_NOEXIST);
		/* Another CPU was here before, or another flow took the key while we were evicted. */
		if (error == -EEXIST)
			return bpf_map_lookup_elem(&flows, key) ? GO_ON : drop(DROP_STALE);
		if (error)
			return drop(DROP_TABLE_FULL);
	}
	verdict = admit(key, service, flow);
	if (verdict != GO_ON)
		goto undo;
	if (flow->flags & FLOW_ADOPTED) {
		flow->flags &= ~FLOW_ADOPTED;
		count_flow(FLOWS_ADOPTED);
	}
	error = bpf_map_update_elem(&flows, key, flow, BPF_NOEXIST);
	/* Another CPU was here before, and has counted it. */
	if (error)
		uncount(key, flow);
	if (error && error != -EEXIST) {
		verdict = drop(DROP_TABLE_FULL);
		goto undo;
	}
	if (!error) {
		if (service->affinity)
			keep_affinity(key, flow->backend, flow->seen);
		count_flow(FLOWS_ESTABLISHED);
		count_established(key->service, flow->backend);
		emit(EVENT_ESTABLISHED, key, flow);
	}
	/* `flow` may be the one in there: not to be read from here on. */
	if (half)
		bpf_map_delete_elem(&half_replies, reply_key);
	bpf_map_delete_elem(&half_flows, key);
	return GO_ON;
undo:
	if (half)
		bpf_map_delete_elem(&replies, reply_key);
	return verdict;
}

/* Whether the client's packet confirms the backend's SYN+ACK. Its first segment after it carries
 * exactly that number, or one a little further on where that one was lost. */
static __always_inline int confirms(const struct half_reply *half, struct packet *packet)
{
	return (half->reply.flags & FLOW_SYN_ACK) && (packet->tcp_flags & TCP_ACK) &&
	       packet->acknowledgement - (half->isn + 1) < 65536;
}

/* A client's packet of a flow that is half-open; `found` becomes a copy. */
static __noinline int go_on_half_open(struct packet *packet, const struct flow_key *key,
				      const struct service *service, struct flow *flow,
				      struct flow *found)
{
	__u32 backend_id = flow->backend;
	struct backend *backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	struct half_reply *half = NULL;
	struct reply_key reply_key;

	if (!backend)
		return drop(DROP_STALE);
	reply_key = reply_key_of(key, service, backend, flow->nat_port);
	if (mode_has_replies(service->mode)) {
		half = bpf_map_lookup_elem(&half_replies, &reply_key);
		/* Evicted, or another's by now. */
		if (!half || !is_reply_of(&half->reply, key))
			return BEGIN_ANEW;
	}
	/* Its backend has left before it came to anything. UDP that nobody answers is a flow all
	 * the same, which a drained backend keeps. */
	if (is_syn(packet) ? backend->state != BACKEND_UP
			   : packet->protocol == IPPROTO_UDP && !keeps_flows(backend)) {
		if (half)
			bpf_map_delete_elem(&half_replies, &reply_key);
		return BEGIN_ANEW;
	}
	touch_flow(flow, packet);
	if (is_syn(packet)) {
		/* Once more, or another try from the same port. */
		flow->flags = 0;
		flow->numbers.end = packet->sequence_end;
	} else if ((packet->tcp_flags & TCP_RST) &&
		   (packet->sequence == flow->numbers.end ||
		    (half && packet->sequence == half->reply.numbers.acknowledged))) {
		flow->flags |= FLOW_RST;
	}
	*found = *flow;
	if (packet->protocol != IPPROTO_TCP)
		/* Of UDP the reply establishes, see reply_half_open; in DSR the second packet. */
		return half || packet->handed_over ? GO_ON : ESTABLISH;
	if (is_syn(packet) || (packet->tcp_flags & TCP_RST) || (flow->flags & FLOW_RST))
		return GO_ON;
	if (half && (flow->flags & FLOW_ADOPTED))
		return GO_ON;
	if (half && !confirms(half, packet))
		return drop(DROP_HANDSHAKE);
	return ESTABLISH;
}

/* Establishes a flow at a packet of its client's. A step of its own, for the sake of the stack. */
__noinline int establish_by_client(const struct flow_key *key, const struct service *service,
				   struct flow *flow)
{
	struct half_reply *half = NULL;
	struct reply_key reply_key;
	struct backend *backend;
	__u32 backend_id;

	if (!key || !service || !flow)
		return VERDICT_DROP;
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!backend)
		return drop(DROP_STALE);
	reply_key = reply_key_of(key, service, backend, flow->nat_port);
	if (mode_has_replies(service->mode)) {
		half = bpf_map_lookup_elem(&half_replies, &reply_key);
		if (!half)
			return drop(DROP_STALE);
	}
	return establish(key, service, flow, &reply_key, half);
}
