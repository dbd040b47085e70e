/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The way of a packet, the same for both hooks: gate, parse, service, flow (on a miss: select),
 * plan. It reads the packet and writes maps; the packet itself is changed by the hook, as the plan
 * says. What all of it works with is in a record (work.h).
 */
#pragma once

#include "encap.h"
#include "find.h"
#include "frag.h"
#include "gate.h"
#include "icmp.h"
#include "lease.h"
#include "leave.h"
#include "parse.h"
#include "plan.h"
#include "service.h"
#include "work.h"

static __always_inline int check_packet(struct packet *packet, struct plan *plan)
{
	if (packet->broken)
		return drop(packet->broken - 1);
	if (is_bad_source(packet))
		return drop(DROP_BAD_SOURCE);
	if (same_address(&packet->source, &packet->destination))
		return drop(DROP_LAND);
	if (packet->ttl <= 1)
		return answer(plan, ANSWER_TIME_EXCEEDED, DROP_TTL);
	return GO_ON;
}

/* From a client to the backend of its flow. */
static __always_inline int plan_to_backend(struct packet *packet, const struct service *service,
					   __u32 id, const struct flow *flow,
					   const struct backend *backend, struct plan *plan)
{
	plan->mode = service->mode;
	plan->ifindex = backend->ifindex;
	plan->next_hop = backend->address;
	plan->source = packet->source;
	plan->source_port = packet->source_port;
	plan->destination = packet->destination;
	plan->destination_port = packet->destination_port;
	if (service->mode == MODE_NAT) {
		plan->source = backend->nat;
		plan->source_port = flow->nat_port;
	}
	if (service->mode == MODE_NAT || service->mode == MODE_DNAT ||
	    service->mode == MODE_DSR_NAT) {
		plan->destination = backend->address;
		plan->destination_port = backend->port;
	}
	plan->service = id;
	plan->backend = flow->backend;
	if (service->mode == MODE_DSR_IPIP) {
		int verdict = plan_encapsulation(packet, backend, plan);

		if (verdict != GO_ON)
			return verdict;
	}
	return VERDICT_FORWARD;
}

/* The verdict on a flow that could not be begun. */
static __always_inline int tell_refused(struct plan *plan, int verdict)
{
	return verdict <= REFUSED(0) ? answer(plan, ANSWER_RESET, REFUSED(0) - verdict) : verdict;
}

/* From a client to a service. */
static __always_inline int plan_inbound(struct work *work, struct service *service, __u32 id)
{
	struct packet *packet = &work->packet;
	struct plan *plan = &work->plan;
	struct flow *flow = &work->flow;
	struct backend *backend;
	__u32 backend_id;
	int verdict;

	work->key = flow_key_of(packet, id);
	verdict = find_flow(packet, &work->key, service, flow);
	if (verdict != GO_ON)
		return tell_refused(plan, verdict);
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!backend)
		return drop(DROP_STALE);
	if (!keeps_flows(backend) || (flow->flags & FLOW_ENDED)) {
		verdict = leave_backend(packet, &work->key, service, flow, plan);
		if (verdict == BEGIN_ANEW)
			verdict = open_flow(packet, &work->key, service, flow);
		if (verdict != GO_ON)
			return tell_refused(plan, verdict);
		backend_id = flow->backend;
		backend = bpf_map_lookup_elem(&backend_table, &backend_id);
		if (!backend)
			return drop(DROP_STALE);
	}
	return plan_to_backend(packet, service, id, flow, backend, plan);
}

/* From a backend to the client of its flow. */
static __always_inline int plan_to_client(const struct reply *reply, struct plan *plan)
{
	struct service *service;
	__u32 service_id;

	service_id = reply->service;
	service = bpf_map_lookup_elem(&service_table, &service_id);
	if (!service)
		return drop(DROP_STALE);
	plan->mode = service->mode;
	plan->ifindex = reply->ifindex ? reply->ifindex : service->ifindex;
	plan->source = service->vip;
	plan->source_port = service->port;
	plan->destination = reply->client;
	plan->destination_port = reply->port;
	plan->service = service_id;
	plan->backend = reply->backend;
	plan->outbound = 1;
	return VERDICT_FORWARD;
}

/* From a server, perhaps to a client. */
static __always_inline int plan_outbound(struct work *work, struct reply *reply)
{
	struct packet *packet = &work->packet;
	struct plan *plan = &work->plan;
	int verdict = GO_ON;

	reply = find_reply(packet, &work->reply_key, reply, &verdict);
	if (!reply)
		return verdict;
	if (reply->flags & FLOW_ENDED)
		return refuse(packet, plan);
	return plan_to_client(reply, plan);
}

/* The flow that a client's packet is of, whatever state it is in; NULL: none. */
static __always_inline struct flow *peek_flow(const struct flow_key *key)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	return flow ? flow : bpf_map_lookup_elem(&half_flows, key);
}

/* The same of a server's packet. */
static __always_inline struct reply *peek_reply(const struct packet *packet, __u32 server)
{
	struct reply_key key = {
		.address = packet->destination,
		.server = server,
		.port = packet->destination_port,
	};
	struct reply *reply = bpf_map_lookup_elem(&replies, &key);
	struct half_reply *half;

	if (reply)
		return reply;
	half = bpf_map_lookup_elem(&half_replies, &key);
	return half ? &half->reply : NULL;
}

/* An ICMP error goes the way of its flow (icmp.h). */
__noinline int decide_error(struct packet *packet, struct plan *plan)
{
	__u32 service_id, backend_id, server, ours;
	struct backend *backend;
	struct service *service;
	struct reply *reply;

	if (!packet || !plan)
		return VERDICT_DROP;
	ours = address_use(&packet->destination);
	service_id = look_for_service(packet);
	service = service_id ? bpf_map_lookup_elem(&service_table, &service_id) : NULL;
	if (service && service->mode != MODE_PROXY) {
		struct flow_key key = flow_key_of(packet, service_id);
		struct flow *flow = peek_flow(&key);

		if (!flow)
			return drop_or_drain(packet, DROP_ICMP_NO_FLOW);
		backend_id = flow->backend;
		backend = bpf_map_lookup_elem(&backend_table, &backend_id);
		if (!backend || backend->state == BACKEND_GONE)
			return drop(DROP_STALE);
		if (packet->ttl <= 1)
			return drop(DROP_TTL);
		return plan_to_backend(packet, service, service_id, flow, backend, plan);
	}
	server = service ? 0 : look_for_server(packet);
	if (!server)
		return VERDICT_PASS;
	reply = peek_reply(packet, server);
	if (!reply)
		return ours ? drop_or_drain(packet, DROP_ICMP_NO_FLOW) : VERDICT_PASS;
	if (packet->ttl <= 1)
		return drop(DROP_TTL);
	return plan_to_client(reply, plan);
}

/* A packet that a hook has sent on: only once however many hooks have looked at it. */
static __always_inline void count_sent(const struct packet *packet, const struct plan *plan)
{
	if (plan->outbound)
		count_out(plan->service, plan->backend, packet->length);
	else
		count_in(plan->service, plan->backend, packet->length);
}

/* A packet with nothing to be found for it: what is for an address of ours, is for the stack if
 * the gate is open. */
static __always_inline int pass_or_drop(struct packet *packet, int closed)
{
	if (closed && (address_use(&packet->destination) & (ADDRESS_VIP | ADDRESS_NAT)))
		return drop(DROP_GATE_CLOSED);
	return VERDICT_PASS;
}

/* What is neither TCP nor UDP: an ICMP error becomes a packet of the flow that it is about. */
static __always_inline int read_other(void *data, void *end, __u32 size, struct packet *packet,
				      int closed)
{
	int verdict = check_question(data, end, packet);

	if (verdict != GO_ON)
		return verdict;
	return !closed && is_icmp(packet) ? parse_error(data, end, size, packet) : VERDICT_PASS;
}

/* The established flow that a packet from a server belongs to. */
static __always_inline struct reply *find_established(struct work *work, __u32 server)
{
	work->reply_key = reply_key_to(&work->packet, server);
	return bpf_map_lookup_elem(&replies, &work->reply_key);
}

static __always_inline int decide_packet(struct work *work, int closed, int verdict)
{
	struct packet *packet = &work->packet;
	struct plan *plan = &work->plan;
	struct service *service = NULL;
	__u32 service_id, server = 0;
	struct reply *reply = NULL;

	if (verdict != GO_ON)
		return verdict == VERDICT_PASS ? pass_or_drop(packet, closed) : verdict;
	if (packet->quoted_l4)
		return decide_error(packet, plan);
	/* Its ports are not to be believed: is it for an address of ours at all? */
	if (packet->broken)
		return address_use(&packet->destination) ? drop(packet->broken - 1) : VERDICT_PASS;
	if (packet->fragment == FRAGMENT_LATER)
		return join_fragment(packet, plan, closed);
	/* No service listens where a flow's replies go to (`try_port`): a packet from a server that
	 * is of one need not be asked whether it is for a service. */
	service_id = recent_service(packet);
	if (!service_id) {
		server = recent_server(packet);
		if (server)
			reply = find_established(work, server);
		if (!reply)
			service_id = look_for_service(packet);
	}
	if (service_id)
		service = bpf_map_lookup_elem(&service_table, &service_id);
	if (service && service->mode != MODE_PROXY) {
		if (closed)
			return drop(DROP_GATE_CLOSED);
		verdict = check_packet(packet, plan);
		if (verdict != GO_ON)
			return verdict;
		return plan_inbound(work, service, service_id);
	}
	if (service)
		return pass_or_drop(packet, closed);
	if (!server) {
		server = look_for_server(packet);
		if (!server)
			return pass_or_drop(packet, closed);
		reply = find_established(work, server);
	}
	/* Asked first: a closed gate must not refresh the flow. */
	if (closed)
		return is_reply(&work->reply_key) ? drop(DROP_GATE_CLOSED)
						: pass_or_drop(packet, closed);
	verdict = plan_outbound(work, reply);
	if (verdict != VERDICT_PASS)
		return verdict == VERDICT_FORWARD && packet->ttl <= 1
			       ? answer(plan, ANSWER_TIME_EXCEEDED, DROP_TTL)
			       : verdict;
	/* Nobody sends to a NAT address but servers, and servers only to ports of flows. */
	if (address_use(&packet->destination))
		return drop_or_drain(packet, DROP_REPLY_NO_FLOW);
	return VERDICT_PASS;
}

/* The whole way of what `parse`, or `read_other`, gave `verdict` for. The plan is set where the
 * verdict is `VERDICT_FORWARD`, and what it has of answers where it is `VERDICT_ANSWER`. */
static __always_inline int decide(struct work *work, int closed, int verdict)
{
	verdict = decide_packet(work, closed, verdict);
	if (work->packet.fragment == FRAGMENT_FIRST)
		note_first_fragment(&work->packet, &work->plan, verdict);
	return verdict;
}
