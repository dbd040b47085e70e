/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Incremental checksums (RFC 1624): a difference is a sum of ones' complements, taken over what is
 * replaced and what replaces it. The order and place of 16-bit words do not matter to it.
 */
#pragma once

#include "types.h"

static __always_inline __u64 difference(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __u64 difference_of_addresses(__u64 sum, const struct address *from,
						     const struct address *to)
{
	sum = difference(sum, from->words[0], to->words[0]);
	sum = difference(sum, from->words[1], to->words[1]);
	sum = difference(sum, from->words[2], to->words[2]);
	return difference(sum, from->words[3], to->words[3]);
}

/* To 32 bits, as the kernel's helpers take it (`__wsum`). */
static __always_inline __u32 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

static __always_inline __u16 fold16(__u64 sum)
{
	sum = fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* A checksum field after a change by `sum` (RFC 1624, equation 3). */
static __always_inline __u16 adjust(__u16 checksum, __u64 sum)
{
	return ~fold16(sum + (__u16)~checksum);
}
