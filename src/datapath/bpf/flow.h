/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The flow table: who talks to which backend.
 *
 * A flow is half-open until both ends have shown that they are there: TCP, when the client
 * confirms the backend's SYN+ACK by its number; UDP, when the backend answers (in DSR, where we
 * do not see answers: at the client's second packet). Half-open flows live in tables of their
 * own, where the oldest makes room for the newest, so that a SYN flood pushes out other half-open
 * flows and nothing else. An established flow is never evicted: when `flows` is full, a flow stays
 * half-open, its packets are dropped and counted (DROP_TABLE_FULL), and the next try may find room.
 *
 * A flow has an entry for each direction, in maps of their own. Each direction writes its own
 * entry only. In DSR there is one, since replies do not come by.
 *
 * Whether a flow is over is decided from both entries: by `flow_is_over` when its client begins
 * anew, and by the collector (collect.h), which alone removes entries of flows that have ended.
 */
#pragma once

#include "adopt.h"
#include "affinity.h"
#include "bounds.h"
#include "counters.h"
#include "drain.h"
#include "events.h"
#include "hash.h"
#include "lifetimes.h"
#include "live.h"
#include "numbers.h"
#include "select.h"
#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct flow_key);
	__type(value, struct flow);
	__uint(max_entries, DEFAULT_FLOWS);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct reply_key);
	__type(value, struct reply);
	__uint(max_entries, DEFAULT_FLOWS);
} replies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct flow_key);
	__type(value, struct flow);
	__uint(max_entries, DEFAULT_HALF_OPEN);
} half_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct reply_key);
	__type(value, struct half_reply);
	__uint(max_entries, DEFAULT_HALF_OPEN);
} half_replies SEC(".maps");

static __always_inline int mode_has_replies(__u8 mode)
{
	return mode == MODE_NAT || mode == MODE_DNAT;
}

static __always_inline struct flow_key flow_key_of(struct packet *packet, __u32 service)
{
	struct flow_key key = {
		.client = packet->source,
		.port = packet->source_port,
		.service = service,
	};
	return key;
}

/* The key of a flow's other direction. */
static __always_inline struct reply_key reply_key_of(const struct flow_key *key,
						     const struct service *service,
						     const struct backend *backend, __be16 nat_port)
{
	struct reply_key reply = {
		.address = service->mode == MODE_NAT ? backend->nat : key->client,
		.server = backend->server,
		.port = nat_port,
	};
	return reply;
}

/* Whether a backend goes on with the flows it has. */
static __always_inline int keeps_flows(const struct backend *backend)
{
	return backend->state == BACKEND_UP || backend->state == BACKEND_DRAINED;
}

/* Whether a reply's entry is that of this flow, and not of another that has its key by now. */
static __always_inline int is_reply_of(const struct reply *reply, const struct flow_key *key)
{
	return reply->port == key->port && reply->service == key->service &&
	       same_address(&reply->client, &key->client);
}

/* Whether a flow has ended and may make room for a new one: reset, or closed from both ends. */
static __always_inline int flow_is_closed(__u8 in, __u8 out)
{
	return ((in | out) & FLOW_RST) || (in & out & FLOW_FIN);
}

static __always_inline __u32 timeout_of(const struct service *service, __u8 in, __u8 out)
{
	if (flow_is_closed(in, out))
		return service->closed_timeout;
	if ((in | out) & (FLOW_FIN | FLOW_DOUBT))
		return service->half_close_timeout;
	return service->idle_timeout;
}

static __always_inline int is_syn(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP &&
	       (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* Notes a packet of the client's. Writes only what changes, to leave the cache line alone. */
static __always_inline void touch_flow(struct flow *flow, const struct packet *packet)
{
	if (flow->seen != packet->now)
		flow->seen = packet->now;
	if (packet->protocol == IPPROTO_TCP)
		note_segment(&flow->numbers, &flow->flags, packet);
}

/* The same, of the backend's. */
static __always_inline void touch_reply(struct reply *reply, const struct packet *packet)
{
	if (reply->seen != packet->now)
		reply->seen = packet->now;
	if (packet->protocol == IPPROTO_TCP)
		note_segment(&reply->numbers, &reply->flags, packet);
}

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
		return verdict;
	selected = service->affinity ? affine_backend(service, key, packet->now) : 0;
	if (!selected)
		selected = amid ? first_choice(service, key) : select_backend(service, key);
	if (selected <= 0)
		return drop(-selected);
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

/* Instead of a verdict: what is there of the flow can't be gone on with; it is to be established. */
#define BEGIN_ANEW -1
#define ESTABLISH -2

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

static __always_inline struct flow_key flow_key_of_reply(const struct reply *reply)
{
	struct flow_key key = {
		.client = reply->client,
		.port = reply->port,
		.service = reply->service,
	};
	return key;
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
