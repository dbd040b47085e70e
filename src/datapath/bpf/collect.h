/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The collector of flows. Userspace walks the tables in slices and writes the keys of flows that
 * look as if they were over into `sweep`; this program looks at each again, with both directions,
 * and removes what has timed out. So a packet that came in between keeps its flow, but for a few
 * instructions.
 *
 * It also ends flows whose backend has left, and those that the operator wants ended: UDP's are
 * removed, TCP's marked (FLOW_ENDED), so that whoever goes on gets a RST, until they time out like
 * any that was reset. What userspace needs to tell both ends at once is in `swept`.
 */
#pragma once

#include "end.h"
#include "flow.h"
#include "gate.h"

/* Bits of `sweep.how`. */
enum sweep_how {
	/* The keys are of `half_flows`. */
	SWEEP_HALF_OPEN = 1,
	/* By the operator: all of them end. */
	SWEEP_END = 2,
	/* What was ended and is there still is told again. */
	SWEEP_AGAIN = 4,
};

enum sweep_done {
	SWEPT_NOTHING = 0,
	SWEPT_REMOVED,
	/* Of TCP: its ends are to be told. */
	SWEPT_ENDED,
};

/* What was done with a flow, and the numbers that its ends believe. */
struct swept {
	struct numbers client;
	struct numbers server;
	__u16 backend;
	__be16 nat_port;
	/* enum sweep_done */
	__u8 done;
	__u8 pad[3];
};

struct sweep {
	/* In: how many of `keys` are set. */
	__u32 count;
	/* Out: how many were removed or ended. */
	__u32 removed;
	/* In: how many jiffies closed flows are kept at most, since the table is getting full; 0: as
	 * their service says. */
	__u32 closed_timeout;
	/* In: enum sweep_how */
	__u32 how;
	struct flow_key keys[SWEEP];
	struct swept swept[SWEEP];
};

MAP(sweep, ARRAY, __u32, struct sweep, 1);

struct sweep_context {
	struct sweep *sweep;
	__u32 now;
	/* Whether the gate is open: nobody else ends flows because of backends. */
	__u32 open;
};

static __always_inline void tell(struct swept *swept, const struct flow *flow,
				 const struct reply *reply)
{
	swept->client = flow->numbers;
	if (reply)
		swept->server = reply->numbers;
	swept->backend = flow->backend;
	swept->nat_port = flow->nat_port;
	swept->done = SWEPT_ENDED;
}

/* How long both directions have been silent. */
static __always_inline __u32 age_of(const struct flow *flow, const struct reply *reply, __u32 now)
{
	__u32 age = now - flow->seen;

	/* A packet may have come after `now` was read: a wrapped age is none. */
	if (reply && (__s32)(now - reply->seen) < (__s32)age)
		age = now - reply->seen;
	return (__s32)age < 0 ? 0 : age;
}

/* Ends an established flow, by the operator or because its backend has left; whether it has gone. */
static __noinline int end_flow(struct sweep_context *context, const struct flow_key *key,
			       struct flow *flow, struct reply *reply, struct swept *swept)
{
	__u32 service_id = key->service;
	struct service *service = bpf_map_lookup_elem(&service_table, &service_id);
	struct flow copy;

	if (!service)
		return 0;
	copy = *flow;
	if (copy.flags & FLOW_ENDED) {
		if (context->sweep->how & SWEEP_AGAIN)
			tell(swept, flow, reply);
		return 0;
	}
	/* Nobody to tell, or nothing that they do not know. */
	if (service->protocol != IPPROTO_TCP ||
	    flow_is_closed(copy.flags, reply ? reply->flags : 0)) {
		remove_flow(key, &copy, service);
		count_flow(FLOWS_ENDED);
		swept->done = SWEPT_REMOVED;
		return 1;
	}
	mark_ended(key, flow, reply, context->now);
	tell(swept, flow, reply);
	return 0;
}

/* Whether the flows of a backend are to be looked for by the collector: UDP that is reset waits for
 * its client, which has nobody to tell otherwise. */
static __always_inline int has_left(const struct service *service, const struct backend *backend)
{
	if (backend->state == BACKEND_GONE)
		return 1;
	return backend->state == BACKEND_DOWN &&
	       (service->protocol == IPPROTO_TCP || service->on_down == ON_DOWN_REMAP);
}

static __noinline int sweep_flow(struct sweep_context *context, const struct flow_key *key,
				 struct swept *swept)
{
	struct flow *there = bpf_map_lookup_elem(&flows, key);
	__u32 service_id = key->service, backend_id, timeout;
	__u8 flags = 0;
	struct service *service;
	struct backend *backend;
	struct reply *reply = NULL;
	struct flow flow;

	if (!there)
		return 0;
	flow = *there;
	service = bpf_map_lookup_elem(&service_table, &service_id);
	backend_id = flow.backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!service || !backend)
		return 0;
	if (mode_has_replies(service->mode)) {
		struct reply_key reply_key = reply_key_of(key, service, backend, flow.nat_port);

		reply = bpf_map_lookup_elem(&replies, &reply_key);
	}
	if (((context->sweep->how & SWEEP_END) || (context->open && has_left(service, backend))) &&
	    end_flow(context, key, there, reply, swept))
		return 0;
	if (reply)
		flags = reply->flags;
	timeout = timeout_of(service, there->flags, flags);
	if (flow_is_closed(there->flags, flags) && context->sweep->closed_timeout &&
	    context->sweep->closed_timeout < timeout)
		timeout = context->sweep->closed_timeout;
	if (age_of(there, reply, context->now) < timeout)
		return 0;
	remove_flow(key, &flow, service);
	count_flow(FLOWS_EXPIRED);
	swept->done = SWEPT_REMOVED;
	return 0;
}

/* A half-open flow: times out, or ends without a word, since its client tries again and gets
 * another backend; by the operator both ends are told. */
static __noinline int sweep_half_open(struct sweep_context *context, const struct flow_key *key,
				      struct swept *swept)
{
	struct flow *flow = bpf_map_lookup_elem(&half_flows, key);
	__u32 service_id = key->service, backend_id, timeout;
	struct reply_key reply_key = {};
	struct half_reply *half = NULL;
	struct service *service;
	struct backend *backend;
	int end;

	if (!flow)
		return 0;
	service = bpf_map_lookup_elem(&service_table, &service_id);
	backend_id = flow->backend;
	backend = bpf_map_lookup_elem(&backend_table, &backend_id);
	if (!service || !backend)
		return 0;
	if (mode_has_replies(service->mode)) {
		reply_key = reply_key_of(key, service, backend, flow->nat_port);
		half = bpf_map_lookup_elem(&half_replies, &reply_key);
		if (half && !is_reply_of(&half->reply, key))
			half = NULL;
	}
	end = context->sweep->how & SWEEP_END;
	timeout = flow->flags & FLOW_RST ? service->closed_timeout : service->half_open_timeout;
	if (!end && !(context->open && has_left(service, backend)) &&
	    age_of(flow, half ? &half->reply : NULL, context->now) < timeout)
		return 0;
	swept->done = SWEPT_REMOVED;
	if (end && service->protocol == IPPROTO_TCP)
		tell(swept, flow, half ? &half->reply : NULL);
	count_flow(end ? FLOWS_HALF_ENDED : FLOWS_HALF_EXPIRED);
	if (half)
		bpf_map_delete_elem(&half_replies, &reply_key);
	bpf_map_delete_elem(&half_flows, key);
	return 0;
}

static long collect_one(__u32 nth, void *data)
{
	struct sweep_context *context = data;
	struct swept swept = {};
	struct flow_key key;

	if (nth >= SWEEP)
		return 1;
	key = context->sweep->keys[nth];
	if (context->sweep->how & SWEEP_HALF_OPEN)
		sweep_half_open(context, &key, &swept);
	else
		sweep_flow(context, &key, &swept);
	context->sweep->swept[nth] = swept;
	if (swept.done)
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
	context.open = !gate_is_closed(now_jiffies());
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
