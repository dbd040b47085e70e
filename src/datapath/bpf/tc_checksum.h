/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The transport checksum of a socket buffer, which follows a change of addresses and ports. Used by
 * the relay's TC hook and by the program on backends.
 */
#pragma once

#include "rewrite.h"

/* Since Linux 6.16; older kernels refuse it. */
#ifndef BPF_F_IPV6
#define BPF_F_IPV6 (1ULL << 7)
#endif

/* The transport checksum follows the change. The kernel's helper knows whether it is partial (then
 * it holds the pseudo-header's sum alone, and ports do not matter) or complete. */
static __always_inline int tc_checksum(struct __sk_buff *skb, const struct packet *packet,
				       const struct change *change)
{
	__u32 offset = (packet->l4 & L4_MASK) + checksum_offset(packet);
	__u64 udp = packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u64 ipv6 = packet->family == ETH_P_IPV6 ? BPF_F_IPV6 : 0;
	long error;

	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	error = bpf_l4_csum_replace(skb, offset, 0, fold32(change->pseudo),
				    BPF_F_PSEUDO_HDR | ipv6 | udp);
	if (error == -EINVAL && ipv6)
		error = bpf_l4_csum_replace(skb, offset, 0, fold32(change->pseudo),
					    BPF_F_PSEUDO_HDR | udp);
	if (error)
		return error;
	return bpf_l4_csum_replace(skb, offset, 0, fold32(change->ports), udp);
}
