/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The transport checksum of a socket buffer, which follows a change of addresses and ports. Used by
 * the relay's TC hook and by the program on backends.
 *
 * A buffer's checksum is whole, or partial: then it holds the pseudo-header's sum alone, ports do
 * not matter, and a device does the rest. Which it is no program is told; the kernel's helper knows.
 * It is asked once, for the addresses, since it costs as much as all of parsing: what it has made of
 * the field shows which it was, and the ports are then added here or not at all.
 */
#pragma once

#include "rewrite.h"

/* Since Linux 6.16; older kernels refuse it. */
#ifndef BPF_F_IPV6
#define BPF_F_IPV6 (1ULL << 7)
#endif

enum checksum_kind {
	CHECKSUM_UNKNOWN = 0,
	CHECKSUM_WHOLE,
	CHECKSUM_PARTIAL,
};

/* A sum's two zeros are one. */
static __always_inline int same_sum(__u16 one, __u16 other)
{
	return one == other || (!one && other == 0xffff) || (one == 0xffff && !other);
}

/* What a checksum was that a change of addresses by `sum` has made of `before`. */
static __always_inline enum checksum_kind kind_of_checksum(__u16 before, __u16 after, __u64 sum)
{
	int whole = same_sum(after, adjust(before, sum));
	int partial = same_sum(after, fold16(sum + before));

	if (whole == partial)
		return CHECKSUM_UNKNOWN;
	return whole ? CHECKSUM_WHOLE : CHECKSUM_PARTIAL;
}

static __always_inline __u16 *find_checksum(struct __sk_buff *skb, __u32 offset)
{
	__u16 *checksum = (void *)(long)skb->data + offset;

	return (void *)(checksum + 1) > (void *)(long)skb->data_end ? NULL : checksum;
}

/* The transport checksum follows the change. UDP's 0 over IPv4 means that there is none. */
static __always_inline int tc_checksum(struct __sk_buff *skb, const struct packet *packet,
				       const struct change *change)
{
	__u32 offset = (packet->l4 & L4_MASK) + checksum_offset(packet);
	__u64 udp = packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u64 ipv6 = packet->family == ETH_P_IPV6 ? BPF_F_IPV6 : 0;
	__u16 *checksum, before, after;
	long error;

	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	checksum = find_checksum(skb, offset);
	if (!checksum)
		return -1;
	before = *checksum;
	if (udp && !before)
		return 0;
	error = bpf_l4_csum_replace(skb, offset, 0, fold32(change->pseudo),
				    BPF_F_PSEUDO_HDR | ipv6 | udp);
	if (error == -EINVAL && ipv6)
		error = bpf_l4_csum_replace(skb, offset, 0, fold32(change->pseudo),
					    BPF_F_PSEUDO_HDR | udp);
	if (error)
		return error;
	checksum = find_checksum(skb, offset);
	if (!checksum)
		return -1;
	switch (kind_of_checksum(before, *checksum, change->pseudo)) {
	case CHECKSUM_PARTIAL:
		return 0;
	case CHECKSUM_WHOLE:
		after = adjust(*checksum, change->ports);
		*checksum = udp && !after ? 0xffff : after;
		return 0;
	default:
		return bpf_l4_csum_replace(skb, offset, 0, fold32(change->ports), udp);
	}
}
