/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Which backend a new flow gets: a slot of the service's schedule, which userspace builds. For
 * schedulers by hash it is a Maglev table, so that every node chooses alike and a change of the set
 * moves few; those at random draw from the same table, in which each has slots by its weight; for
 * turns it is one round. A new schedule replaces the old one whole, by one store of a map into a
 * map.
 *
 * A backend that is full, or has just left, is passed over: a few more slots are tried, which keeps
 * to the weights, and then every backend once, so that a flow is refused only if none has room.
 */
#pragma once

#include "bounds.h"
#include "hash.h"
#include "live.h"
#include "service.h"

struct schedule {
	/* How many slots are in use; 0: none, so there is no backend. */
	__u32 length;
	/* The same of `backends`. */
	__u32 count;
	/* The ids that are in `slots`, each once. */
	__u16 backends[SERVICE_BACKENDS];
	/* A backend's id for each slot. */
	__u16 slots[SLOTS];
	__u16 pad;
};

/* By sizes: of a type that only an inner map names, clang 14 describes no more than the name. */
struct schedule_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct schedule));
	__uint(max_entries, 1);
};

/* Service id -> its schedule. One that is not there means: no backend. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, SERVICES);
	__array(values, struct schedule_map);
} schedules SEC(".maps");

/* Where to look in a schedule: any number, of which the remainder counts. */
static __always_inline __u64 first_draw(const struct service *service, const struct flow_key *key)
{
	switch (service->select) {
	case SELECT_SOURCE:
		return hash_address(service->seed, &key->client);
	case SELECT_FLOW:
		return hash_flow(service->seed, &key->client, key->port);
	default:
		return 0;
	}
}

static __always_inline __u64 next_draw(const struct service *service, __u32 id, __u64 draw)
{
	struct live *live;

	switch (service->select) {
	case SELECT_RANDOM:
	case SELECT_LEAST:
		return bpf_get_prandom_u32();
	case SELECT_TURN:
		live = bpf_map_lookup_elem(&service_live, &id);
		return live ? __sync_fetch_and_add(&live->turn, 1) : 0;
	default:
		return mix(draw);
	}
}

static __always_inline int select_by_hash(const struct service *service)
{
	return service->select == SELECT_SOURCE || service->select == SELECT_FLOW;
}

/* The backend of an id, if it may have one more flow. */
static __always_inline struct backend *open_backend(__u32 id, struct live **live)
{
	struct backend *backend = bpf_map_lookup_elem(&backend_table, &id);

	*live = bpf_map_lookup_elem(&backend_live, &id);
	if (!backend || backend->state != BACKEND_UP || !has_room(*live, backend->max_flows))
		return NULL;
	return backend;
}

/* Flows in the proportion of weights, to be compared across. */
static __always_inline __u64 load_of(const struct live *live, const struct backend *other)
{
	return (__u64)(live ? live_flows(live) : 0) * (other->weight ? other->weight : 1);
}

struct scan {
	struct schedule *schedule;
	__u32 first;
	__u32 found;
	/* Whether one was passed over for want of room. */
	__u32 full;
};

static long try_backend(__u32 nth, void *context)
{
	struct scan *scan = context;
	__u32 at = (scan->first + nth) % SERVICE_BACKENDS;
	__u32 count = scan->schedule->count;
	struct backend *backend;
	struct live *live;
	__u32 id;

	if (count)
		at = (scan->first + nth) % count;
	barrier_var(at);
	if (at >= SERVICE_BACKENDS)
		return 1;
	id = scan->schedule->backends[at];
	backend = open_backend(id, &live);
	if (backend) {
		scan->found = id;
		return 1;
	}
	backend = bpf_map_lookup_elem(&backend_table, &id);
	if (backend && backend->state == BACKEND_UP)
		scan->full = 1;
	return 0;
}

/* The one that is found by looking at all of them; 0 or less: minus why there is none. */
static __noinline int select_any(struct schedule *schedule, __u64 draw)
{
	struct scan scan = { .schedule = schedule };

	if (!schedule->count)
		return -DROP_NO_BACKEND;
	scan.first = (__u32)draw % schedule->count;
	bpf_loop(schedule->count, try_backend, &scan, 0);
	if (scan.found)
		return scan.found;
	return scan.full ? -DROP_BACKEND_FULL : -DROP_NO_BACKEND;
}

/* The id of a backend that may have a new flow; 0 or less: minus the drop reason why there is none.
 *
 * Least connections is the power of two choices: of two backends drawn at random, the one with
 * fewer flows for its weight. Where they have equally many it is the first, so that a burst, of
 * which nothing is established yet, is spread by weight. */
__noinline int select_backend(const struct service *service, const struct flow_key *key)
{
	struct backend *best = NULL, *backend;
	struct live *best_live = NULL, *live;
	__u32 id, zero = 0, best_id = 0;
	struct schedule *schedule;
	__u64 draw;
	void *map;

	if (!service || !key)
		return -DROP_NO_BACKEND;
	id = key->service;
	map = bpf_map_lookup_elem(&schedules, &id);
	if (!map)
		return -DROP_NO_BACKEND;
	schedule = bpf_map_lookup_elem(map, &zero);
	if (!schedule || !schedule->length)
		return -DROP_NO_BACKEND;
	draw = first_draw(service, key);
	for (int i = 0; i < SLOT_TRIES; i++) {
		__u32 slot, tried;

		if (i || !select_by_hash(service))
			draw = next_draw(service, id, draw);
		slot = draw % schedule->length;
		/* The compiler knows that it is less; the verifier wants to see it. */
		barrier_var(slot);
		if (slot >= SLOTS)
			break;
		tried = schedule->slots[slot];
		if (tried == best_id)
			continue;
		backend = open_backend(tried, &live);
		if (!backend)
			continue;
		if (service->select != SELECT_LEAST)
			return tried;
		if (best)
			return load_of(live, best) < load_of(best_live, backend) ? tried : best_id;
		best = backend;
		best_live = live;
		best_id = tried;
	}
	return best_id ? best_id : select_any(schedule, draw);
}
