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
 * How a flow begins is in open.h, how it gets established in establish.h, how it ends in end.h.
 */
#pragma once

#include "bounds.h"
#include "numbers.h"
#include "parse.h"
#include "types.h"

MAP(flows, HASH, struct flow_key, struct flow, DEFAULT_FLOWS);

MAP(replies, HASH, struct reply_key, struct reply, DEFAULT_FLOWS);

MAP(half_flows, LRU_HASH, struct flow_key, struct flow, DEFAULT_HALF_OPEN);

MAP(half_replies, LRU_HASH, struct reply_key, struct half_reply, DEFAULT_HALF_OPEN);

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

static __always_inline struct flow_key flow_key_of_reply(const struct reply *reply)
{
	struct flow_key key = {
		.client = reply->client,
		.port = reply->port,
		.service = reply->service,
	};
	return key;
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

/* Instead of a verdict: what is there of the flow can't be gone on with; it is to be established. */
#define BEGIN_ANEW -1
#define ESTABLISH -2
