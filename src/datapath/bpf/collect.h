/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The collector of old flows. Userspace walks `flows` in slices and writes the keys of those that
 * look old into `sweep`; this program looks at each again, with both directions, and removes what
 * has timed out, or whose backend has gone. So a packet that came in between keeps its flow, but for a few instructions.
 */
#pragma once

#include "flow.h"

struct sweep {
	/* In: how many of `keys` are set. */
	__u32 count;
	/* Out: how many were removed. */
	__u32 removed;
	/* In: how many jiffies closed flows are kept at most, since the table is getting full; 0: as
	 * their service says. */
	__u32 closed_timeout;
	__u32 pad;
	struct flow_key keys[SWEEP];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct sweep);
	__uint(max_entries, 1);
} sweep SEC(".maps");

struct sweep_context {
	struct sweep *sweep;
	__u32 now;
};

static long collect_one(__u32 nth, void *data)
{
	struct sweep_context *context = data;
	struct flow_key key;
	struct flow *there, flow;
	struct service *service;
	struct backend *backend;
	struct reply *reply = NULL;
	__u32 service_id, backend_id, age, timeout;
	__u8 flags = 0;

	if (nth >= SWEEP)
		return 1;
	key = context->sweep->keys[nth];
	there = bpf_map_lookup_elem(&flows, &key);
	if (!there)
		return 0;
	flow = *there;
	service_id = key.service;
	service = bpf_map_lookup_elem(&service_table, &service_id);
	backend_id = flow.backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!service || !backend)
		return 0;
	age = context->now - flow.seen;
	if (mode_has_replies(service->mode)) {
		struct reply_key reply_key = reply_key_of(&key, service, backend, flow.nat_port);

		reply = bpf_map_lookup_elem(&replies, &reply_key);
	}
	if (reply) {
		__u32 reply_age = context->now - reply->seen;

		/* A packet may have come after `now` was read: a wrapped age is none. */
		if ((__s32)reply_age < (__s32)age)
			age = reply_age;
		flags = reply->flags;
	}
	timeout = timeout_of(service, flow.flags, flags);
	if (flow_is_closed(flow.flags, flags) && context->sweep->closed_timeout &&
	    context->sweep->closed_timeout < timeout)
		timeout = context->sweep->closed_timeout;
	if (backend->state != BACKEND_GONE && ((__s32)age < 0 || age < timeout))
		return 0;
	remove_flow(&key, &flow, service);
	context->sweep->removed++;
	return 0;
}

SEC("syscall")
int baton_collect(void *unused)
{
	__u32 zero = 0;
	struct sweep_context context = {};

	context.sweep = bpf_map_lookup_elem(&sweep, &zero);
	if (!context.sweep)
		return -1;
	context.now = now_jiffies();
	context.sweep->removed = 0;
	bpf_loop(context.sweep->count < SWEEP ? context.sweep->count : SWEEP, collect_one, &context,
		 0);
	return 0;
}

struct clock {
	__u64 jiffies;
	__u64 nanoseconds;
};

/* The clock of the gate and of the flows, which userspace has no other way to read; with the
 * monotonic clock at the same moment, to tell how long a jiffy is. */
SEC("syscall")
int baton_clock(struct clock *clock)
{
	clock->jiffies = now_jiffies();
	clock->nanoseconds = bpf_ktime_get_ns();
	return 0;
}

enum repaired {
	REPAIR_SERVICE = 0,
	REPAIR_BACKEND = 1,
};

struct repair {
	/* enum repaired */
	__u32 of;
	__u32 id;
	/* How many flows too many are counted; negative: too few. */
	__s32 surplus;
};

/* Puts a count of live flows right, which changes all the while. */
SEC("syscall")
int baton_repair(struct repair *repair)
{
	__u32 id = repair->id;
	struct live *live = repair->of == REPAIR_SERVICE
				    ? bpf_map_lookup_elem(&service_live, &id)
				    : bpf_map_lookup_elem(&backend_live, &id);

	if (!live)
		return -1;
	__sync_fetch_and_add(&live->ended, repair->surplus);
	return 0;
}
