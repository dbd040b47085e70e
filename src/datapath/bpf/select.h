/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Which backend a new flow gets: a slot of the service's schedule (a Maglev table that userspace
 * builds, so that every node chooses alike and a change of the set moves few). A new schedule
 * replaces the old one whole, by one store of a map into a map.
 */
#pragma once

#include "bounds.h"
#include "hash.h"
#include "service.h"

/* A backend's id for each slot; 0: none. */
struct schedule {
	__u16 slots[SLOTS];
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

static __always_inline __u64 select_hash(const struct service *service, struct packet *packet)
{
	switch (service->select) {
	case SELECT_SOURCE:
		return hash_address(service->seed, &packet->source);
	case SELECT_RANDOM:
		return bpf_get_prandom_u32();
	default:
		return hash_flow(service->seed, &packet->source, packet->source_port);
	}
}

/* A backend that may have a new flow, with its id; NULL: there is none. */
static __always_inline struct backend *select_backend(const struct service *service, __u32 id,
						      struct packet *packet, __u32 *backend_id)
{
	void *map = bpf_map_lookup_elem(&schedules, &id);
	__u32 zero = 0;
	struct schedule *schedule;
	__u64 hash;

	if (!map)
		return NULL;
	schedule = bpf_map_lookup_elem(map, &zero);
	if (!schedule)
		return NULL;
	hash = select_hash(service, packet);
	/* A backend that has just left is in the old schedule still: look on, a few slots. */
	for (int i = 0; i < SLOT_TRIES; i++) {
		__u32 slot = hash % SLOTS;
		struct backend *backend;

		/* The compiler knows that it is less; the verifier wants to see it. */
		barrier_var(slot);
		if (slot >= SLOTS)
			break;
		*backend_id = schedule->slots[slot];
		backend = bpf_map_lookup_elem(&backend_table, backend_id);
		if (backend && backend->state == BACKEND_UP)
			return backend;
		hash = mix(hash);
	}
	return NULL;
}
