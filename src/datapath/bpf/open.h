/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A flow begins: its client's first packet. A backend is chosen, where packets are rewritten a NAT
 * port is taken, and both directions are noted in the half-open tables.
 */
#pragma once

#include "adopt.h"
#include "affinity.h"
#include "drain.h"
#include "flow.h"
#include "hash.h"
#include "lifetimes.h"
#include "live.h"
#include "select.h"

struct port_search {
	struct reply_key key;
	struct service_key listener;
	struct half_reply value;
	__u32 first;
	__u32 found;
};

static long try_port(__u32 nth, void *context)
{
	struct port_search *search = context;
	struct half_reply *there;
	/* A prime step reaches every port, and neighbours soon go separate ways. */
	__u32 port = FIRST_PORT + (search->first + nth * 4099) % PORTS;

	search->key.port = bpf_htons(port);
	search->listener.port = bpf_htons(port);
	/* What is sent there is for a service. */
	if (bpf_map_lookup_elem(&services, &search->listener) ||
	    bpf_map_lookup_elem(&replies, &search->key))
		return 0;
	if (bpf_map_update_elem(&half_replies, &search->key, &search->value, BPF_NOEXIST)) {
		/* Of a half-open flow of the same client whose other half was evicted: ours. */
		there = bpf_map_lookup_elem(&half_replies, &search->key);
		if (!there || !same_address(&there->reply.client, &search->value.reply.client) ||
		    there->reply.port != search->value.reply.port ||
		    there->reply.service != search->value.reply.service)
			return 0;
	}
	search->found = port;
	return 1;
}

/* Takes a port towards the backend; the first candidate is a hash of the flow, so that another
 * node that does not know the flow would take the same. Inserting it is what makes it ours. */
__noinline int open_nat(const struct flow_key *key, const struct service *service,
			const struct backend *backend, struct packet *packet, struct flow *flow)
{
	struct port_search search = {};

	if (!key || !service || !backend || !packet || !flow)
		return VERDICT_DROP;
	search.key = reply_key_of(key, service, backend, 0);
	search.listener.vip = search.key.address;
	search.listener.protocol = packet->protocol;
	search.value.reply.client = key->client;
	search.value.reply.port = key->port;
	search.value.reply.service = key->service;
	search.value.reply.backend = flow->backend;
	search.value.reply.ifindex = packet->ifindex;
	search.value.reply.seen = packet->now;
	search.first = hash_flow(service->seed, &key->client, key->port) % PORTS;
	if (flow->flags & FLOW_ADOPTED) {
		search.value.reply.flags = FLOW_LEARNT;
		try_port(0, &search);
		if (!search.found)
			return drop(DROP_NO_FLOW);
	} else {
		bpf_loop(PORT_TRIES, try_port, &search, 0);
	}
	if (!search.found)
		return drop(DROP_PORTS_EXHAUSTED);
	flow->nat_port = bpf_htons(search.found);
	return GO_ON;
}

/* The reply's key is the client's own: it can be taken by a flow of the same client to the same
 * server through another service, and then there is no way to tell them apart. */
__noinline int open_dnat(const struct flow_key *key, const struct service *service,
			 const struct backend *backend, struct packet *packet, struct flow *flow)
{
	struct reply_key reply_key;
	struct half_reply half = {};

	if (!key || !service || !backend || !packet || !flow)
		return VERDICT_DROP;
	reply_key = reply_key_of(key, service, backend, key->port);
	half.reply.client = key->client;
	half.reply.port = key->port;
	half.reply.service = key->service;
	half.reply.backend = flow->backend;
	half.reply.ifindex = packet->ifindex;
	half.reply.seen = packet->now;
	half.reply.flags = flow->flags & FLOW_ADOPTED ? FLOW_LEARNT : 0;
	if (bpf_map_lookup_elem(&replies, &reply_key))
		return drop(DROP_PORTS_EXHAUSTED);
	bpf_map_update_elem(&half_replies, &reply_key, &half, BPF_ANY);
	return GO_ON;
}

/* A flow that was not known: its first packet. */
__noinline int open_flow(struct packet *packet, const struct flow_key *key,
			 const struct service *service, struct flow *flow)
{
	struct backend *backend;
	int verdict, selected, amid;
	__u32 backend_id;

	if (!packet || !key || !service || !flow)
		return VERDICT_DROP;
	/* Not the beginning of one: nobody knows where it belongs, but after a takeover. */
	amid = packet->protocol == IPPROTO_TCP && !is_syn(packet);
	if (amid && !may_adopt(packet, service))
		return drop_or_drain(packet, DROP_NO_FLOW);
	verdict = check_limits(key, service);
	if (verdict != GO_ON)
		return amid ? drop(REFUSED(0) - verdict) : verdict;
	selected = service->affinity ? affine_backend(service, key, packet->now) : 0;
	if (!selected)
		selected = amid ? first_choice(service, key) : select_backend(service, key);
	if (selected <= 0)
		return amid ? drop(-selected) : REFUSED(-selected);
	backend_id = selected;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!backend)
		return drop(DROP_NO_BACKEND);
	flow->backend = backend_id;
	flow->nat_port = key->port;
	flow->flags = amid ? FLOW_ADOPTED : 0;
	flow->seen = packet->now;
	flow->began = packet->now;
	flow->numbers.end = packet->sequence_end;
	flow->numbers.acknowledged = amid ? packet->acknowledgement : 0;
	if (service->mode == MODE_NAT)
		verdict = open_nat(key, service, backend, packet, flow);
	else if (service->mode == MODE_DNAT)
		verdict = open_dnat(key, service, backend, packet, flow);
	if (verdict != GO_ON)
		return verdict;
	if (bpf_map_update_elem(&half_flows, key, flow, BPF_NOEXIST) == -EEXIST) {
		bpf_map_update_elem(&half_flows, key, flow, BPF_ANY);
		count_flow(FLOWS_REPLACED);
	}
	if (service->affinity)
		begin_affinity(key, backend_id, packet->now);
	count_flow(FLOWS_BEGUN);
	count_begun(key->service, backend_id);
	return GO_ON;
}
