/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * An established flow ends, or seems to: by a FIN or RST of either end, or by us. Whether it is over
 * is decided from both entries: by `takes_over_from` when its client begins anew, and by the
 * collector (collect.h), which alone removes entries of flows that have ended.
 */
#pragma once

#include "affinity.h"
#include "events.h"
#include "flow.h"
#include "lifetimes.h"
#include "live.h"
#include "numbers.h"

/* Removes both directions of a flow. */
__noinline int remove_flow(const struct flow_key *key, const struct flow *flow,
			   const struct service *service)
{
	struct backend *backend;
	struct flow *there;
	__u32 backend_id;

	if (!key || !flow || !service)
		return 0;
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	there = bpf_map_lookup_elem(&flows, key);
	/* One that was closed before has left them already, and extended the affinity then. */
	if (there && there->counted) {
		uncount(key, there);
		if (service->affinity)
			extend_affinity(key, flow->backend);
	}
	emit(EVENT_ENDED, key, flow);
	if (backend && mode_has_replies(service->mode)) {
		struct reply_key reply_key = reply_key_of(key, service, backend, flow->nat_port);

		bpf_map_delete_elem(&replies, &reply_key);
	}
	bpf_map_delete_elem(&flows, key);
	return 0;
}

/* The flags of the reply's entry; none where there is none. */
__noinline __u32 reply_flags(const struct flow_key *key, const struct flow *flow,
			     const struct service *service)
{
	struct reply_key reply_key;
	struct backend *backend;
	struct reply *reply;
	__u32 backend_id;

	if (!key || !flow || !service)
		return 0;
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!backend || !mode_has_replies(service->mode))
		return 0;
	reply_key = reply_key_of(key, service, backend, flow->nat_port);
	reply = bpf_map_lookup_elem(&replies, &reply_key);
	return reply ? reply->flags : 0;
}

/* Whether a packet would begin a flow where one has ended. */
static __always_inline int takes_over_from(const struct flow_key *key, const struct flow *flow,
					   const struct service *service)
{
	return flow_is_closed(flow->flags, reply_flags(key, flow, service));
}

/* Ends a TCP flow: whoever goes on gets a RST. It stays for as long as any that is closed. */
static __always_inline void mark_ended(const struct flow_key *key, struct flow *flow,
				       struct reply *reply, __u32 now)
{
	uncount(key, flow);
	flow->flags |= FLOW_ENDED | FLOW_RST;
	flow->seen = now;
	if (reply)
		reply->flags |= FLOW_ENDED | FLOW_RST;
	count_flow(FLOWS_ENDED);
}

/* The client's RST on an established flow. */
static __always_inline void reset_by_client(const struct packet *packet, const struct flow_key *key,
				       const struct service *service, struct flow *flow)
{
	__u32 backend_id = flow->backend;
	struct backend *backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	struct reply_key reply_key;
	struct reply *reply;

	if (!backend)
		return;
	if (!mode_has_replies(service->mode)) {
		/* What the client itself has sent is all that there is to go by. */
		if (flow->flags & FLOW_LEARNT)
			flow->flags |= FLOW_DOUBT;
		else if (packet->sequence == flow->numbers.end)
			flow->flags |= FLOW_RST;
		else
			count_flow(RESETS_DISBELIEVED);
		return;
	}
	reply_key = reply_key_of(key, service, backend, flow->nat_port);
	reply = bpf_map_lookup_elem(&replies, &reply_key);
	if (!reply)
		return;
	switch (judge_reset(packet, &flow->numbers, &reply->numbers, reply->flags)) {
	case BELIEVED:
		flow->flags |= FLOW_RST;
		break;
	case DOUBTED:
		reply->flags |= FLOW_DOUBT;
		break;
	default:
		break;
	}
}

/* The backend's RST on an established flow, or its SYN+ACK. That one comes where the backend has
 * forgotten the connection, and the client begins anew from the same port: both ends' numbers are
 * others from here on. */
static __always_inline void turn_by_backend(const struct packet *packet, struct reply *reply)
{
	struct flow_key key = flow_key_of_reply(reply);
	struct flow *flow = bpf_map_lookup_elem(&flows, &key);

	if (!flow || (reply->flags & FLOW_ENDED))
		return;
	if (packet->tcp_flags & TCP_SYN) {
		reply->numbers.acknowledged = packet->acknowledgement;
		/* Sent once more. */
		if (packet->sequence_end == reply->numbers.end)
			return;
		reply->numbers.end = packet->sequence_end;
		reply->flags = FLOW_SYN_ACK;
		flow->flags = FLOW_LEARNT;
		return;
	}
	switch (judge_reset(packet, &reply->numbers, &flow->numbers, flow->flags)) {
	case BELIEVED:
		reply->flags |= FLOW_RST;
		break;
	case DOUBTED:
		flow->flags |= FLOW_DOUBT;
		break;
	default:
		break;
	}
}

/* Takes a flow that has been closed out of the counts: its entries stay for what is still on its
 * way, but it is no load any more. In DSR the client's end is all that shows. */
__noinline int note_end(const struct flow_key *key, struct flow *flow,
			const struct service *service)
{
	if (!key || !flow || !service || !flow->counted)
		return 0;
	if (mode_has_replies(service->mode)
		    ? flow_is_closed(flow->flags, reply_flags(key, flow, service))
		    : flow->flags & (FLOW_FIN | FLOW_RST)) {
		uncount(key, flow);
		if (service->affinity)
			extend_affinity(key, flow->backend);
	}
	return 0;
}

/* The same where a reply showed it. */
static __always_inline void note_end_of_reply(const struct reply *reply)
{
	struct flow_key key = flow_key_of_reply(reply);
	__u32 service_id = reply->service;
	struct service *service = bpf_map_lookup_elem(&service_table, &service_id);
	struct flow *flow = bpf_map_lookup_elem(&flows, &key);

	if (service && flow)
		note_end(&key, flow, service);
}
