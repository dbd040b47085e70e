/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Carries out a plan on the packet's network header and ports: addresses, TTL, ports, the IPv4
 * checksum. What it does to the transport checksum is only told (`struct change`), since the
 * hooks differ in it: a socket buffer's may be partial or complete, an XDP frame's is whole.
 */
#pragma once

#include "csum.h"
#include "parse.h"
#include "plan.h"

/* What the transport checksum has to follow. */
struct change {
	/* Addresses: in the pseudo-header. */
	__u64 pseudo;
	/* Ports. */
	__u64 ports;
};

/* A DSCP for local use (RFC 2474, pool 2), best effort for who looks at precedence alone. The
 * backend of a MODE_DSR_NAT service knows by it which packets came through a relay. */
#define DSCP_RELAYED 3
#define TOS_RELAYED (DSCP_RELAYED << 2)
#define TOS_ECN 0x03

static __always_inline void rewrite_ipv4(struct iphdr *ip, const struct plan *plan,
					 struct change *change)
{
	/* TTL is the high byte of the header's fifth 16-bit word. */
	__u64 sum = difference(0, bpf_htons(0x0100), 0);

	change->pseudo = difference(0, ip->saddr, plan->source.words[3]);
	change->pseudo = difference(change->pseudo, ip->daddr, plan->destination.words[3]);
	ip->saddr = plan->source.words[3];
	ip->daddr = plan->destination.words[3];
	ip->ttl--;
	if (plan->mode == MODE_DSR_NAT) {
		__u8 tos = TOS_RELAYED | (ip->tos & TOS_ECN);

		sum = difference(sum, bpf_htons(ip->tos), bpf_htons(tos));
		ip->tos = tos;
	}
	ip->check = adjust(ip->check, sum + fold32(change->pseudo));
}

static __always_inline void rewrite_ipv6(struct ipv6hdr *ip, const struct packet *packet,
					 const struct plan *plan, struct change *change)
{
	change->pseudo = difference_of_addresses(0, &packet->source, &plan->source);
	change->pseudo = difference_of_addresses(change->pseudo, &packet->destination,
						 &plan->destination);
	__builtin_memcpy(&ip->saddr, &plan->source, sizeof(plan->source));
	__builtin_memcpy(&ip->daddr, &plan->destination, sizeof(plan->destination));
	ip->hop_limit--;
	if (plan->mode == MODE_DSR_NAT) {
		__be32 *first = (__be32 *)ip;

		*first = (*first & bpf_htonl(0xf03fffff)) | bpf_htonl(TOS_RELAYED << 20);
	}
}

/* Network header and ports. Fails where the headers are not all within reach, which parse.h has
 * made sure of; the verifier wants to see it again. */
static __always_inline int rewrite_headers(void *data, void *end, const struct packet *packet,
					   const struct plan *plan, struct change *change)
{
	__u32 l3 = packet->l3 & L3_MASK, l4 = packet->l4 & L4_MASK;
	__be16 *ports = data + l4;

	if (packet->family == ETH_P_IP) {
		struct iphdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return -1;
		rewrite_ipv4(ip, plan, change);
	} else {
		struct ipv6hdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return -1;
		rewrite_ipv6(ip, packet, plan, change);
	}
	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	if ((void *)(ports + 2) > end)
		return -1;
	change->ports = difference(0, ports[0], plan->source_port);
	change->ports = difference(change->ports, ports[1], plan->destination_port);
	ports[0] = plan->source_port;
	ports[1] = plan->destination_port;
	return 0;
}
