/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is counted, per CPU: traffic per service and backend, and drops per reason. Userspace sums
 * them up and never resets them.
 */
#pragma once

#include "bounds.h"
#include "types.h"

/* Why a packet of ours was not forwarded. docs/counters.md explains each; new ones go at the end,
 * since the numbers outlive the daemon in a pinned map. */
enum drop_reason {
	DROP_GATE_CLOSED = 0,
	DROP_TRUNCATED,
	DROP_BAD_LENGTH,
	DROP_BAD_HEADER,
	DROP_BAD_CHECKSUM,
	DROP_BAD_SOURCE,
	DROP_LAND,
	DROP_FRAGMENT,
	DROP_TTL,
	DROP_NO_FLOW,
	DROP_REPLY_NO_FLOW,
	DROP_HANDSHAKE,
	DROP_NO_BACKEND,
	DROP_BACKEND_DOWN,
	DROP_PORTS_EXHAUSTED,
	DROP_TABLE_FULL,
	DROP_STALE,
	DROP_NO_ROUTE,
	DROP_REWRITE,
	DROP_TOO_BIG,
	DROP_UNSUPPORTED,
	DROP_TINY_FRAGMENT,
	DROP_EARLY_FRAGMENT,
	DROP_SERVICE_FULL,
	DROP_BACKEND_FULL,
	DROP_SOURCE_FULL,
	DROP_ANSWER_LIMITED,
	DROP_ICMP_FORGED,
	DROP_ICMP_NO_FLOW,
	DROP_ARP_NO_LEASE,
	DROP_ND_NO_LEASE,
	DROP_SENT_NO_LEASE,
	DROP_REASONS
};

struct traffic {
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
	/* Flows begun (the first packet was sent on), and of them established. */
	__u64 flows_begun;
	__u64 flows_established;
};

MAP(drops, PERCPU_ARRAY, __u32, __u64, DROP_REASONS);

MAP(service_traffic, PERCPU_ARRAY, __u32, struct traffic, SERVICES);

MAP(backend_traffic, PERCPU_ARRAY, __u32, struct traffic, BACKENDS);

__noinline int count_drop(__u32 reason)
{
	__u64 *count = bpf_map_lookup_elem(&drops, &reason);

	if (count)
		(*count)++;
	return 0;
}

/* Counts, and gives the verdict. */
static __always_inline int drop(enum drop_reason reason)
{
	count_drop(reason);
	return VERDICT_DROP;
}

static __always_inline void count_in(__u32 service, __u32 backend, __u32 bytes)
{
	struct traffic *of_service = bpf_map_lookup_elem(&service_traffic, &service);
	struct traffic *of_backend = bpf_map_lookup_elem(&backend_traffic, &backend);

	if (of_service) {
		of_service->packets_in++;
		of_service->bytes_in += bytes;
	}
	if (of_backend) {
		of_backend->packets_in++;
		of_backend->bytes_in += bytes;
	}
}

static __always_inline void count_out(__u32 service, __u32 backend, __u32 bytes)
{
	struct traffic *of_service = bpf_map_lookup_elem(&service_traffic, &service);
	struct traffic *of_backend = bpf_map_lookup_elem(&backend_traffic, &backend);

	if (of_service) {
		of_service->packets_out++;
		of_service->bytes_out += bytes;
	}
	if (of_backend) {
		of_backend->packets_out++;
		of_backend->bytes_out += bytes;
	}
}

static __always_inline void count_begun(__u32 service, __u32 backend)
{
	struct traffic *of_service = bpf_map_lookup_elem(&service_traffic, &service);
	struct traffic *of_backend = bpf_map_lookup_elem(&backend_traffic, &backend);

	if (of_service)
		of_service->flows_begun++;
	if (of_backend)
		of_backend->flows_begun++;
}

static __always_inline void count_established(__u32 service, __u32 backend)
{
	struct traffic *of_service = bpf_map_lookup_elem(&service_traffic, &service);
	struct traffic *of_backend = bpf_map_lookup_elem(&backend_traffic, &backend);

	if (of_service)
		of_service->flows_established++;
	if (of_backend)
		of_backend->flows_established++;
}
