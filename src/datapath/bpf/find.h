/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * From a packet to its flow, in either direction: found or begun.
 */
#pragma once

#include "end.h"
#include "establish.h"
#include "flow.h"
#include "open.h"

/* A packet of a flow that is not established. */
__noinline int flow_slow(struct packet *packet, const struct flow_key *key,
			 const struct service *service, struct flow *found)
{
	struct flow *half;
	int verdict;

	if (!packet || !key || !service || !found)
		return VERDICT_DROP;
	half = bpf_map_lookup_elem(&half_flows, key);
	if (half) {
		verdict = go_on_half_open(packet, key, service, half, found);
		if (verdict == ESTABLISH)
			return establish_by_client(key, service, found);
		if (verdict != BEGIN_ANEW)
			return verdict;
		/* Also where nobody takes it now: it is forgotten. */
		if (!bpf_map_delete_elem(&half_flows, key))
			count_flow(FLOWS_REPLACED);
	} else if (address_use(&packet->source)) {
		/* Spoofed, or our own that has come back; it could take the ports of others. */
		return drop(DROP_BAD_SOURCE);
	}
	return open_flow(packet, key, service, found);
}

/* A segment that ends something: noted in the flow, and in the counts of live flows. */
__noinline int note_closing(struct packet *packet, const struct flow_key *key,
			    const struct service *service, struct flow *flow)
{
	if (!packet || !key || !service || !flow)
		return 0;
	if (packet->tcp_flags & TCP_RST)
		reset_by_client(packet, key, service, flow);
	return note_end(key, flow, service);
}

/* The flow of a client's packet, found or begun; `found` is a copy of what matters of it. */
static __always_inline int find_flow(struct packet *packet, const struct flow_key *key,
				     const struct service *service, struct flow *found)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	if (flow) {
		*found = *flow;
		if (!is_syn(packet) || !takes_over_from(key, found, service)) {
			touch_flow(flow, packet);
			if (packet->tcp_flags & (TCP_FIN | TCP_RST))
				note_closing(packet, key, service, flow);
			return GO_ON;
		}
		remove_flow(key, found, service);
	}
	return flow_slow(packet, key, service, found);
}

/* A reply of a flow that is half-open: notes what it shows. UDP is established by it, and so is a
 * flow that was adopted. */
__noinline int reply_half_open(struct packet *packet, const struct reply_key *key)
{
	struct flow_key flow_key;
	struct service *service;
	struct half_reply *half;
	__u32 service_id;
	struct flow *flow;

	if (!packet || !key)
		return VERDICT_DROP;
	half = bpf_map_lookup_elem(&half_replies, key);
	if (!half)
		return VERDICT_PASS;
	flow_key = flow_key_of_reply(&half->reply);
	flow = bpf_map_lookup_elem(&half_flows, &flow_key);
	/* Evicted, or begun anew with another backend or port: this belongs to it no more. */
	if (!flow || flow->backend != half->reply.backend || flow->nat_port != key->port)
		return VERDICT_PASS;
	touch_reply(&half->reply, packet);
	/* Without an ACK where both ends open at the same time (RFC 9293 §3.5). */
	if (packet->tcp_flags & TCP_SYN) {
		half->isn = packet->sequence;
		half->reply.flags = FLOW_SYN_ACK;
		half->reply.numbers.end = packet->sequence_end;
		half->reply.numbers.acknowledged = packet->acknowledgement;
	} else if (packet->tcp_flags & TCP_RST) {
		half->reply.flags |= FLOW_RST;
	}
	/* TCP is confirmed by its client, but where its beginning was not seen. */
	if (packet->protocol == IPPROTO_TCP &&
	    (!(flow->flags & FLOW_ADOPTED) || (packet->tcp_flags & (TCP_SYN | TCP_RST))))
		return GO_ON;
	service_id = flow_key.service;
	service = bpf_map_lookup_elem(&service_table, &service_id);
	if (!service)
		return drop(DROP_STALE);
	return establish(&flow_key, service, flow, key, half);
}

static __always_inline struct reply_key reply_key_to(const struct packet *packet, __u32 server)
{
	struct reply_key key = {
		.address = packet->destination,
		.server = server,
		.port = packet->destination_port,
	};

	return key;
}

/* Whether a packet from a server belongs to a flow, without a note of it. */
static __always_inline int is_reply(const struct reply_key *key)
{
	return bpf_map_lookup_elem(&replies, key) || bpf_map_lookup_elem(&half_replies, key);
}

/* A reply of a flow that is not established; NULL as below. Looked for again afterwards, by then
 * in one table or the other: there is no room on the stack for a copy. */
static __always_inline struct reply *reply_slow(struct packet *packet, const struct reply_key *key,
						int *verdict)
{
	struct half_reply *half;
	struct reply *reply;

	*verdict = reply_half_open(packet, key);
	if (*verdict != GO_ON)
		return NULL;
	half = bpf_map_lookup_elem(&half_replies, key);
	reply = half ? &half->reply : bpf_map_lookup_elem(&replies, key);
	if (!reply)
		*verdict = drop(DROP_STALE);
	return reply;
}

/* A server's segment that begins or ends something: the same. */
__noinline int note_turn(const struct packet *packet, struct reply *reply)
{
	if (!packet || !reply)
		return 0;
	if (packet->tcp_flags & (TCP_SYN | TCP_RST))
		turn_by_backend(packet, reply);
	if (packet->tcp_flags & (TCP_FIN | TCP_RST))
		note_end_of_reply(reply);
	return 0;
}

/* The flow that a packet from a server belongs to, of which `reply` is what `replies` has; NULL: as
 * the verdict says, `VERDICT_PASS` where there is none. */
static __always_inline struct reply *find_reply(struct packet *packet,
						const struct reply_key *key, struct reply *reply,
						int *verdict)
{
	if (!reply)
		return reply_slow(packet, key, verdict);
	touch_reply(reply, packet);
	if (packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))
		note_turn(packet, reply);
	return reply;
}
