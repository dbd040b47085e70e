/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Fragments: later ones have no ports, so they go the way of the first: what was planned for it
 * is kept under what all fragments of a datagram share. So they need no flow, whatever becomes of
 * it meanwhile, and every mode and direction is alike.
 *
 * It is kept for 2 s. A host may wait for all of a datagram for 15 s (RFC 791) or 60 s (RFC 8200),
 * but nobody sends a lost fragment again, so what lies between the first and the last is queueing
 * and reordering on the way: milliseconds. And identifications come round: IPv4's in less than a
 * second at 1 Gbit/s (RFC 4963). A first fragment always replaces what an older datagram left.
 *
 * The table is an LRU of its own: a flood of first fragments pushes out other datagrams' records,
 * never a flow.
 *
 * A fragment that comes ahead of its first is handed to the daemon, which holds it for a moment
 * and has `baton_reinject` put it back into the interface that it came by (src/datapath/fragments.rs).
 * Without a daemon, or when too many come, it is dropped.
 *
 * Fragments that overlap are left to the end host, which has all of them; but none may reach into
 * the transport header that we go by (parse.h).
 */
#pragma once

#include "counters.h"
#include "parse.h"
#include "plan.h"
#include "service.h"

/* A datagram in fragments: by its ends and its identification, of IPv4 also by its protocol
 * (RFC 791, RFC 8200). Not by the interface: its fragments may come by several. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	/* IPv6: 0. */
	__u8 protocol;
	__u8 pad[3];
};

/* What became of the first; element of `fragments`. */
struct fragment_record {
	/* bpf_ktime_get_coarse_ns() from which on it is void. */
	__u64 until;
	struct plan plan;
	/* enum verdict: `VERDICT_FORWARD`, `VERDICT_PASS`; `VERDICT_DROP`: it did not come in time. */
	__u8 verdict;
	__u8 protocol;
	__u8 pad[2];
};

/* When it is full, the datagram goes that was not heard of for longest. */
MAP(fragments, LRU_HASH, struct fragment_key, struct fragment_record, FRAGMENTS);

/* Where a record is put together: the stack has no room for it. */
MAP(new_fragment, PERCPU_ARRAY, __u32, struct fragment_record, 1);

/* To the daemon: `struct held_fragment`, then the frame. Without a reader there is no buffer. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} held_fragments SEC(".maps");

struct held_fragment {
	/* Where it came by. */
	__u32 ifindex;
	/* Of the frame, in bytes. */
	__u32 length;
};

/* How many were handed over in the window that is numbered so. Not exact: CPUs may overwrite each
 * other's count. */
static volatile __u64 hold_window;
static volatile __u32 holds;

static __always_inline struct fragment_key fragment_key_of(const struct packet *packet)
{
	struct fragment_key key = {
		.source = packet->source,
		.destination = packet->destination,
		.id = packet->fragment_id,
		.protocol = packet->family == ETH_P_IP ? packet->protocol : 0,
	};
	return key;
}

/* What is known of the first; NULL: nothing that still holds. */
static __always_inline struct fragment_record *find_fragment_record(struct fragment_key *key)
{
	struct fragment_record *record = bpf_map_lookup_elem(&fragments, key);

	return record && (__s64)(record->until - bpf_ktime_get_coarse_ns()) > 0 ? record : NULL;
}

/* Keeps what a first fragment was planned, or that it went up the stack. */
__noinline int note_first_fragment(struct packet *packet, const struct plan *plan, int verdict)
{
	struct fragment_record *record;
	struct fragment_key key;
	__u32 zero = 0;

	if (!packet || !plan)
		return 0;
	key = fragment_key_of(packet);
	/* Nor does the rest of it go the way of an older datagram. */
	if (verdict != VERDICT_FORWARD && verdict != VERDICT_PASS) {
		bpf_map_delete_elem(&fragments, &key);
		return 0;
	}
	/* Others' datagrams are not asked about. */
	if (verdict == VERDICT_PASS && !address_use(&packet->destination) &&
	    !is_server_address(&packet->source))
		return 0;
	record = bpf_map_lookup_elem(&new_fragment, &zero);
	if (!record)
		return 0;
	record->until = bpf_ktime_get_coarse_ns() + FRAGMENT_NS;
	record->plan = *plan;
	record->verdict = verdict;
	record->protocol = packet->protocol;
	bpf_map_update_elem(&fragments, &key, record, BPF_ANY);
	return 0;
}

/* A fragment whose first is not known and won't be waited for: dropped where it is for an address
 * of ours, as a whole packet of no flow is. */
static __always_inline int orphan(struct packet *packet, enum drop_reason reason)
{
	return address_use(&packet->destination) ? drop(reason) : VERDICT_PASS;
}

/* Has a later fragment go the way of its first. */
__noinline int join_fragment(struct packet *packet, struct plan *plan, int closed)
{
	struct fragment_record *record;
	struct fragment_key key;
	__u32 ours;

	if (!packet || !plan)
		return VERDICT_DROP;
	key = fragment_key_of(packet);
	record = find_fragment_record(&key);
	ours = address_use(&packet->destination);
	if (closed)
		return ours || (record && record->verdict == VERDICT_FORWARD) ?
			       drop(DROP_GATE_CLOSED) :
			       VERDICT_PASS;
	if (!record)
		return ours || is_server_address(&packet->source) ? VERDICT_HOLD : VERDICT_PASS;
	if (record->verdict == VERDICT_PASS)
		return VERDICT_PASS;
	if (record->verdict == VERDICT_DROP)
		return orphan(packet, DROP_FRAGMENT);
	if (packet->ttl <= 1)
		return drop(DROP_TTL);
	packet->protocol = record->protocol;
	*plan = record->plan;
	return VERDICT_FORWARD;
}

/* Hands a fragment to the daemon. Gives the verdict on what is left here. `context` is the hook's
 * own, `size` the frame's. */
static __always_inline int hold_fragment(void *context, __u32 size, struct packet *packet)
{
	struct held_fragment held = { .ifindex = packet->ifindex, .length = size };
	__u64 window = bpf_ktime_get_coarse_ns() >> HOLD_WINDOW_SHIFT;

	if (hold_window != window) {
		hold_window = window;
		holds = 0;
	}
	if (holds >= HOLDS || size > HELD_BYTES)
		return orphan(packet, DROP_EARLY_FRAGMENT);
	holds++;
	if (bpf_perf_event_output(context, &held_fragments, BPF_F_CURRENT_CPU | (__u64)size << 32,
				  &held, sizeof(held)))
		return orphan(packet, DROP_EARLY_FRAGMENT);
	return VERDICT_DROP;
}

/* What `baton_reinject` is told and says, in `cb` of its context. */
#define REINJECT_IFINDEX 0
#define REINJECT_LAST 1
enum reinject {
	/* Its first has not come: try again. */
	REINJECT_NOT_YET = 0,
	REINJECT_DONE = 1,
};

/* Run by the daemon on a frame that it holds: back into the interface's ingress, if its first has
 * come; or if the daemon waits no longer, for the hook to do away with it. */
SEC("tc")
int baton_reinject(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct fragment_key key;

	parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet);
	key = fragment_key_of(&packet);
	if (!find_fragment_record(&key)) {
		struct fragment_record record = { .verdict = VERDICT_DROP };

		if (!skb->cb[REINJECT_LAST])
			return REINJECT_NOT_YET;
		record.until = bpf_ktime_get_coarse_ns() + FRAGMENT_NS;
		bpf_map_update_elem(&fragments, &key, &record, BPF_ANY);
	}
	bpf_clone_redirect(skb, skb->cb[REINJECT_IFINDEX], BPF_F_INGRESS);
	return REINJECT_DONE;
}
