/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * `dsr = "ipip"`: the client's packet travels to its backend inside IPv4 or IPv6, whichever the
 * backend's address is (RFC 2003, RFC 2473). What it carries is changed in its TTL alone.
 *
 * The outer source is this node's own address towards the backend: ICMP errors of routers on the
 * way come back here, and a filter of forged sources has nothing to object to. All flows to one
 * backend then look alike to a NIC or router that spreads by addresses; over IPv6 the flow label
 * tells them apart.
 *
 * Nothing is fragmented: the outer header has DF set, since the far end takes the packet apart
 * before its kernel would put fragments together. What does not fit is for its sender to cut.
 */
#pragma once

#include "counters.h"
#include "csum.h"
#include "hash.h"
#include "mtu.h"
#include "parse.h"
#include "plan.h"

/* Ethernet addresses of a frame that goes out. */
struct way_out {
	__u8 destination[6];
	__u8 source[6];
	/* enum leg_flag (ways.h) of the interface */
	__u32 flags;
};

#define OUTER_TTL 64
#define IPV4_DONT_FRAGMENT 0x4000
#define IPV6_FLOW_LABEL 0xfffff
/* What a length field can say. */
#define LONGEST_PACKET 65535

/* Outer addresses, and whether it fits. Segments of TCP may be cut shorter by the outer header,
 * datagrams may not. */
static __always_inline int plan_encapsulation(const struct packet *packet,
					      const struct backend *backend, struct plan *plan)
{
	__u32 longest = longest_sent(packet), outer;

	plan->source = backend->nat;
	plan->destination = backend->address;
	outer = is_mapped(&plan->destination) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	plan->outer = outer;
	if (packet->length + outer > LONGEST_PACKET)
		return drop(DROP_TOO_BIG);
	if (!backend->mtu || longest + outer <= backend->mtu)
		return GO_ON;
	if (packet->segment && packet->protocol == IPPROTO_TCP && longest <= backend->mtu) {
		plan->resegment = 1;
		return GO_ON;
	}
	plan->mtu = backend->mtu - outer;
	return answer(plan, ANSWER_TOO_BIG, DROP_TOO_BIG);
}

/* One hop less for what is carried; gives its TOS, or traffic class. */
static __always_inline int leave_hop(void *data, void *end, const struct packet *packet, __u8 *tos)
{
	void *header = data + (packet->l3 & L3_MASK);

	if (packet->family == ETH_P_IP) {
		struct iphdr *ip = header;

		if ((void *)(ip + 1) > end)
			return -1;
		ip->ttl--;
		ip->check = adjust(ip->check, difference(0, bpf_htons(0x0100), 0));
		*tos = ip->tos;
	} else {
		struct ipv6hdr *ip = header;

		if ((void *)(ip + 1) > end)
			return -1;
		ip->hop_limit--;
		*tos = bpf_ntohl(*(__be32 *)ip) >> 20;
	}
	return 0;
}

static __always_inline __u8 carried_protocol(const struct packet *packet)
{
	return packet->family == ETH_P_IP ? IPPROTO_IPIP : IPPROTO_IPV6;
}

/* DSCP and ECN are those of what is carried (RFC 6040, normal mode). The identification of a
 * packet that is not to be fragmented means nothing (RFC 6864). */
static __always_inline void outer_ipv4(struct iphdr *ip, const struct packet *packet,
				       const struct plan *plan, __u8 tos)
{
	__be32 *words = (__be32 *)ip;

	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = sizeof(*ip) / 4;
	ip->tos = tos;
	ip->tot_len = bpf_htons(packet->length + sizeof(*ip));
	ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
	ip->ttl = OUTER_TTL;
	ip->protocol = carried_protocol(packet);
	ip->saddr = plan->source.words[3];
	ip->daddr = plan->destination.words[3];
	ip->check = ~fold16((__u64)words[0] + words[1] + words[2] + words[3] + words[4]);
}

static __always_inline void outer_ipv6(struct ipv6hdr *ip, const struct packet *packet,
				       const struct plan *plan, __u8 tos)
{
	__u32 label = hash_flow(0, &packet->source, packet->source_port) & IPV6_FLOW_LABEL;

	*(__be32 *)ip = bpf_htonl(6u << 28 | (__u32)tos << 20 | label);
	ip->payload_len = bpf_htons(packet->length);
	ip->nexthdr = carried_protocol(packet);
	ip->hop_limit = OUTER_TTL;
	__builtin_memcpy(&ip->saddr, &plan->source, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &plan->destination, sizeof(ip->daddr));
}

/* Of a socket buffer. The flags tell the kernel what the outer header is, so that a GSO packet
 * stays one and is cut, if at all, with both headers on each segment. */
__noinline int tc_encapsulate(struct __sk_buff *skb, const struct packet *packet,
			      const struct plan *plan)
{
	__be16 type;
	__u64 flags;
	long error;
	__u8 tos;

	if (!packet || !plan)
		return -1;
	/* UDP's segments are datagrams, whose size is not ours to change. */
	flags = plan->resegment ? 0 : BPF_F_ADJ_ROOM_FIXED_GSO;
	if (leave_hop((void *)(long)skb->data, (void *)(long)skb->data_end, packet, &tos))
		return -1;
	if (is_mapped(&plan->destination)) {
		struct iphdr outer;

		outer_ipv4(&outer, packet, plan, tos);
		flags |= BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
		if (bpf_skb_adjust_room(skb, sizeof(outer), BPF_ADJ_ROOM_MAC, flags))
			return -1;
		error = bpf_skb_store_bytes(skb, ETH_HLEN, &outer, sizeof(outer),
					    BPF_F_RECOMPUTE_CSUM);
		type = bpf_htons(ETH_P_IP);
	} else {
		struct ipv6hdr outer;

		outer_ipv6(&outer, packet, plan, tos);
		flags |= BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
		if (bpf_skb_adjust_room(skb, sizeof(outer), BPF_ADJ_ROOM_MAC, flags))
			return -1;
		error = bpf_skb_store_bytes(skb, ETH_HLEN, &outer, sizeof(outer),
					    BPF_F_RECOMPUTE_CSUM);
		type = bpf_htons(ETH_P_IPV6);
	}
	if (error)
		return error;
	return bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type), 0);
}

/* Of a frame, with the Ethernet addresses of the way out. */
__noinline int xdp_encapsulate(struct xdp_md *xdp, const struct packet *packet,
			       const struct plan *plan, const struct way_out *way)
{
	struct ethhdr *ethernet;
	void *end;
	int ipv4;
	__u8 tos;

	if (!packet || !plan || !way)
		return -1;
	ipv4 = is_mapped(&plan->destination);
	if (leave_hop((void *)(long)xdp->data, (void *)(long)xdp->data_end, packet, &tos))
		return -1;
	if (bpf_xdp_adjust_head(xdp, -(int)(ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr))))
		return -1;
	ethernet = (void *)(long)xdp->data;
	end = (void *)(long)xdp->data_end;
	if ((void *)(ethernet + 1) > end)
		return -1;
	__builtin_memcpy(ethernet->h_dest, way->destination, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, way->source, ETH_ALEN);
	if (ipv4) {
		struct iphdr *outer = (void *)(ethernet + 1);

		if ((void *)(outer + 1) > end)
			return -1;
		ethernet->h_proto = bpf_htons(ETH_P_IP);
		outer_ipv4(outer, packet, plan, tos);
	} else {
		struct ipv6hdr *outer = (void *)(ethernet + 1);

		if ((void *)(outer + 1) > end)
			return -1;
		ethernet->h_proto = bpf_htons(ETH_P_IPV6);
		outer_ipv6(outer, packet, plan, tos);
	}
	return 0;
}
