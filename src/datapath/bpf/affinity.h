/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Affinity: for a while after a flow of a client's has begun or ended, its new flows to that service
 * go to the same backend, whatever the scheduler says. One that may have no new flows (down,
 * drained, full, gone) breaks it: the client gets another and keeps to that one, also when the
 * first is back, since to move twice is worse than to move once.
 *
 * What a client keeps to is noted when its flow is established, and before that in a table of its
 * own: so its flows that begin at the same time go together, and a flood of beginnings pushes out
 * other beginnings alone. In both tables the oldest make room.
 */
#pragma once

#include "gate.h"
#include "select.h"

MAP(affinities, LRU_HASH, struct flow_key, struct affinity, DEFAULT_AFFINITIES);

MAP(half_affinities, LRU_HASH, struct flow_key, struct affinity, DEFAULT_HALF_OPEN);

/* The key of a client of a service. */
static __always_inline struct flow_key client_of(const struct flow_key *key)
{
	struct flow_key client = { .client = key->client, .service = key->service };

	return client;
}

/* The backend that a client keeps to; 0: none that may have its flow. */
__noinline __u32 affine_backend(const struct service *service, const struct flow_key *key,
				__u32 now)
{
	struct affinity *affinity;
	struct backend *backend;
	struct flow_key client;
	struct live *live;
	__u32 id;

	if (!service || !key)
		return 0;
	client = client_of(key);
	affinity = bpf_map_lookup_elem(&affinities, &client);
	if (!affinity || (__s32)(now - affinity->since) >= (__s32)service->affinity)
		affinity = bpf_map_lookup_elem(&half_affinities, &client);
	if (!affinity || (__s32)(now - affinity->since) >= (__s32)service->affinity)
		return 0;
	id = affinity->backend;
	backend = open_backend(id, &live);
	return backend && backend->service == key->service ? id : 0;
}

/* A flow has begun. */
static __always_inline void begin_affinity(const struct flow_key *key, __u32 backend, __u32 now)
{
	struct flow_key client = client_of(key);
	struct affinity affinity = { .backend = backend, .since = now };

	bpf_map_update_elem(&half_affinities, &client, &affinity, BPF_ANY);
}

/* A flow is established. */
static __always_inline void keep_affinity(const struct flow_key *key, __u32 backend, __u32 now)
{
	struct flow_key client = client_of(key);
	struct affinity affinity = { .backend = backend, .since = now };

	bpf_map_update_elem(&affinities, &client, &affinity, BPF_ANY);
	bpf_map_delete_elem(&half_affinities, &client);
}

/* A flow has ended. */
static __always_inline void extend_affinity(const struct flow_key *key, __u32 backend)
{
	struct flow_key client = client_of(key);
	struct affinity *affinity = bpf_map_lookup_elem(&affinities, &client);

	if (affinity && affinity->backend == backend)
		affinity->since = now_jiffies();
}
