/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How many flows each service, backend and source has now: what least-connections compares and
 * what limits bound.
 *
 * Established flows count, from `admit` until they are closed (`uncount`), though their entries
 * stay a while longer. Half-open ones never do: anybody can make as many of those as he likes. So
 * a limit is looked at twice: when a flow begins, to refuse it soon or to choose another backend,
 * and when it is established, where it is exact. Between the two it is half-open, which is what a
 * burst may have too many of, and no more.
 *
 * Shared by all CPUs, and written only where a flow begins or ends. The maps outlive the daemon;
 * the collector compares them with the flows that are there and puts right what is off.
 */
#pragma once

#include "bounds.h"
#include "counters.h"
#include "parse.h"
#include "service.h"
#include "types.h"

MAP(service_live, ARRAY, __u32, struct live, SERVICES);

MAP(backend_live, ARRAY, __u32, struct live, BACKENDS);

/* Flows of a source, of services that limit them; one that has none has no entry. There is at
 * least one flow for each, so the table is as big as `flows` and never full before that is. Made
 * as needed: where there is no memory, the flow is let through and not counted. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct source_key);
	__type(value, __u32);
	__uint(max_entries, DEFAULT_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} sources SEC(".maps");

/* Wraps and reads of two numbers that change meanwhile may make it negative for a moment. */
static __always_inline __u32 live_flows(const struct live *live)
{
	__s32 flows = live->begun - live->ended;

	return flows > 0 ? flows : 0;
}

/* Limits of 0 are none. */
static __always_inline int has_room(struct live *live, __u32 most)
{
	return !most || !live || live_flows(live) < most;
}

/* Counts one more where there is room; whether there was. */
static __always_inline int take_place(struct live *live, __u32 most)
{
	__u32 begun = __sync_fetch_and_add(&live->begun, 1);

	if (!most || (__s32)(begun - live->ended) < (__s32)most)
		return 1;
	__sync_fetch_and_add(&live->begun, -1);
	return 0;
}

/* An IPv4 address, or an IPv6 /64: a single host can take any address in it. */
static __always_inline struct source_key source_key_of(const struct flow_key *key)
{
	struct source_key source = { .prefix = key->client, .service = key->service };

	if (!is_ipv4(&key->client)) {
		source.prefix.words[2] = 0;
		source.prefix.words[3] = 0;
	}
	return source;
}

/* Whether a source may have one more flow. */
static __always_inline int source_has_room(const struct flow_key *key, __u32 most)
{
	struct source_key source = source_key_of(key);
	__u32 *flows;

	if (!most)
		return 1;
	flows = bpf_map_lookup_elem(&sources, &source);
	return !flows || (__s32)*flows < (__s32)most;
}

/* Counts a flow among its source's, if there is room. */
static __always_inline int admit_source(const struct flow_key *key, __u32 most, struct flow *flow)
{
	struct source_key source = source_key_of(key);
	__u32 *flows = bpf_map_lookup_elem(&sources, &source);

	if (!flows) {
		__u32 none = 0;

		bpf_map_update_elem(&sources, &source, &none, BPF_NOEXIST);
		flows = bpf_map_lookup_elem(&sources, &source);
		if (!flows)
			return GO_ON;
	}
	if ((__s32)__sync_fetch_and_add(flows, 1) < (__s32)most) {
		flow->counted |= COUNTED_SOURCE;
		return GO_ON;
	}
	__sync_fetch_and_add(flows, -1);
	return drop(DROP_SOURCE_FULL);
}

/* Takes a flow out of its source's. The entry goes with the last: a flow that is counted on
 * another CPU between the two is forgotten, to the advantage of that source. */
static __always_inline void leave_source(const struct flow_key *key)
{
	struct source_key source = source_key_of(key);
	__u32 *flows = bpf_map_lookup_elem(&sources, &source);

	if (flows && (__s32)__sync_fetch_and_add(flows, -1) <= 1)
		bpf_map_delete_elem(&sources, &source);
}

/* Instead of a verdict: a new flow can't be served now, and its client is to be told. */
#define REFUSED(reason) (-16 - (int)(reason))

/* Whether a new flow of this client may begin, as far as the service and the source go. */
static __always_inline int check_limits(const struct flow_key *key, const struct service *service)
{
	__u32 id = key->service;

	if (!has_room(bpf_map_lookup_elem(&service_live, &id), service->max_flows))
		return REFUSED(DROP_SERVICE_FULL);
	if (!source_has_room(key, service->max_per_source))
		return REFUSED(DROP_SOURCE_FULL);
	return GO_ON;
}

/* The word of a flow that has `counted` in it, without `counted`. */
#define NOT_COUNTED bpf_htonl(0xff00ffff)
_Static_assert(__builtin_offsetof(struct flow, counted) == 5, "the second byte of the second word");

/* Takes a flow out of the counts, be it the first to or not. It is the one in the map, or one that
 * never got there. */
__noinline int uncount(const struct flow_key *key, struct flow *flow)
{
	__u32 service_id, backend_id, counted;
	struct live *live;

	if (!key || !flow || !flow->counted)
		return 0;
	counted = bpf_ntohl(__sync_fetch_and_and((__u32 *)flow + 1, NOT_COUNTED)) >> 16 & 0xff;
	/* Another CPU was here before. */
	if (!counted)
		return 0;
	service_id = key->service;
	live = bpf_map_lookup_elem(&service_live, &service_id);
	if (live)
		__sync_fetch_and_add(&live->ended, 1);
	backend_id = flow->backend;
	live = bpf_map_lookup_elem(&backend_live, &backend_id);
	if (live)
		__sync_fetch_and_add(&live->ended, 1);
	if (counted & COUNTED_SOURCE)
		leave_source(key);
	return 0;
}

/* Counts a flow among its service's and its backend's, if there is room. */
static __always_inline int admit_both(const struct flow_key *key, const struct service *service,
				      struct flow *flow)
{
	__u32 service_id = key->service, backend_id = flow->backend;
	struct live *of_service = bpf_map_lookup_elem(&service_live, &service_id);
	struct live *of_backend = bpf_map_lookup_elem(&backend_live, &backend_id);
	struct backend *backend = bpf_map_lookup_elem(&backend_table, &backend_id);

	if (!of_service || !of_backend || !backend)
		return drop(DROP_STALE);
	if (!take_place(of_service, service->max_flows))
		return drop(DROP_SERVICE_FULL);
	if (!take_place(of_backend, backend->max_flows)) {
		__sync_fetch_and_add(&of_service->begun, -1);
		return drop(DROP_BACKEND_FULL);
	}
	flow->counted = COUNTED;
	return GO_ON;
}

/* Counts a flow that is about to be established, if the limits let it; notes in `flow` how. */
__noinline int admit(const struct flow_key *key, const struct service *service, struct flow *flow)
{
	int verdict;

	if (!key || !service || !flow)
		return VERDICT_DROP;
	verdict = admit_both(key, service, flow);
	if (verdict != GO_ON || !service->max_per_source)
		return verdict;
	verdict = admit_source(key, service->max_per_source, flow);
	if (verdict != GO_ON)
		uncount(key, flow);
	return verdict;
}
