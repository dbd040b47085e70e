/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Hashes that every node must compute alike, whatever its byte order: the same flow chooses the
 * same backend and tries the same port first.
 */
#pragma once

#include "types.h"

/* The finalizer of SplitMix64, as in src/scheduler.rs. */
static __always_inline __u64 mix(__u64 number)
{
	number += 0x9e3779b97f4a7c15ULL;
	number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9ULL;
	number = (number ^ (number >> 27)) * 0x94d049bb133111ebULL;
	return number ^ (number >> 31);
}

static __always_inline __u64 hash_address(__u64 seed, const struct address *address)
{
	__u64 high = (__u64)bpf_ntohl(address->words[0]) << 32 | bpf_ntohl(address->words[1]);
	__u64 low = (__u64)bpf_ntohl(address->words[2]) << 32 | bpf_ntohl(address->words[3]);

	return mix(mix(seed ^ high) ^ low);
}

static __always_inline __u64 hash_flow(__u64 seed, const struct address *client, __be16 port)
{
	return mix(hash_address(seed, client) ^ bpf_ntohs(port));
}
