/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The far end of `dsr = "ipip"` (encap.h is the near one). Out of the tunnel comes what is for one
 * of our VIPs, whoever sent it: its sender gets no further with it than with a plain packet.
 * Fragments of tunnelled packets are left to the kernel; relays send none.
 */
#pragma once

#include "backend.h"
#include "csum.h"

/* Since Linux 6.3; needed where the two families differ. */
#define ADJUST_TO_IPV4 (1ULL << 7)
#define ADJUST_TO_IPV6 (1ULL << 8)

#define ECN_MASK 3
#define ECN_NONE 0
#define ECN_ECT1 1
#define ECN_CE 3

#define TCP_OPTIONS 10
#define TCP_OPTION_END 0
#define TCP_OPTION_PAD 1
#define TCP_OPTION_MSS 2

struct tunnelled {
	struct tunnel_key key;
	/* Bytes of the outer header. */
	__u32 outer;
	/* ETH_P_IP or ETH_P_IPV6. */
	__u16 outer_family;
	__u16 family;
	__u8 outer_ecn;
	__u8 ecn;
};

/* Outer and inner header; fails where it is no tunnelled packet. */
static __always_inline int read_tunnelled(void *data, void *end, struct tunnelled *packet)
{
	struct ethhdr *ethernet = data;
	void *inner;
	__u8 next;

	if ((void *)(ethernet + 1) > end)
		return -1;
	packet->outer_family = bpf_ntohs(ethernet->h_proto);
	if (packet->outer_family == ETH_P_IP) {
		struct iphdr *ip = (void *)(ethernet + 1);

		if ((void *)(ip + 1) > end || ip->ihl != 5 ||
		    ip->frag_off & bpf_htons(IPV4_MORE_FRAGMENTS | IPV4_FRAGMENT_OFFSET))
			return -1;
		map_ipv4(&packet->key.backend, ip->daddr);
		packet->outer_ecn = ip->tos & ECN_MASK;
		next = ip->protocol;
		packet->outer = sizeof(*ip);
		inner = ip + 1;
	} else if (packet->outer_family == ETH_P_IPV6) {
		struct ipv6hdr *ip = (void *)(ethernet + 1);

		if ((void *)(ip + 1) > end)
			return -1;
		__builtin_memcpy(&packet->key.backend, &ip->daddr, sizeof(ip->daddr));
		packet->outer_ecn = bpf_ntohl(*(__be32 *)ip) >> 20 & ECN_MASK;
		next = ip->nexthdr;
		packet->outer = sizeof(*ip);
		inner = ip + 1;
	} else {
		return -1;
	}
	if (next == IPPROTO_IPIP) {
		struct iphdr *ip = inner;

		if ((void *)(ip + 1) > end || ip->version != 4)
			return -1;
		packet->family = ETH_P_IP;
		packet->ecn = ip->tos & ECN_MASK;
		map_ipv4(&packet->key.vip, ip->daddr);
		return 0;
	}
	if (next == IPPROTO_IPV6) {
		struct ipv6hdr *ip = inner;

		if ((void *)(ip + 1) > end || ip->version != 6)
			return -1;
		packet->family = ETH_P_IPV6;
		packet->ecn = bpf_ntohl(*(__be32 *)ip) >> 20 & ECN_MASK;
		__builtin_memcpy(&packet->key.vip, &ip->daddr, sizeof(ip->daddr));
		return 0;
	}
	return -1;
}

/* What the network has noted outside goes inside. */
static __always_inline int set_ecn(void *data, void *end, __u16 family, __u8 ecn)
{
	void *header = data + sizeof(struct ethhdr);

	if (family == ETH_P_IP) {
		struct iphdr *ip = header;
		__u8 tos;

		if ((void *)(ip + 1) > end)
			return -1;
		tos = (ip->tos & ~ECN_MASK) | ecn;
		ip->check = adjust(ip->check, difference(0, bpf_htons(ip->tos), bpf_htons(tos)));
		ip->tos = tos;
	} else {
		__be32 *first = header;

		if ((void *)(first + 1) > end)
			return -1;
		*first = (*first & bpf_htonl(~((__u32)ECN_MASK << 20))) | bpf_htonl((__u32)ecn << 20);
	}
	return 0;
}

/* `VERDICT_FORWARD`: it was tunnelled, and is taken out. */
static __noinline int take_out_of_tunnel(struct __sk_buff *skb)
{
	struct tunnelled packet = {};
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	__be16 type;
	int change_ecn;

	if (read_tunnelled((void *)(long)skb->data, (void *)(long)skb->data_end, &packet) ||
	    !bpf_map_lookup_elem(&tunnels, &packet.key))
		return VERDICT_PASS;
	if (packet.outer_ecn == ECN_CE && packet.ecn == ECN_NONE) {
		count(BACKEND_CONGESTION);
		return VERDICT_DROP;
	}
	change_ecn = packet.ecn != ECN_NONE && packet.ecn != ECN_CE &&
		     (packet.outer_ecn == ECN_CE || packet.outer_ecn == ECN_ECT1);
	if (packet.family != packet.outer_family)
		flags |= packet.family == ETH_P_IP ? ADJUST_TO_IPV4 : ADJUST_TO_IPV6;
	type = bpf_htons(packet.family);
	if (bpf_skb_adjust_room(skb, -(int)packet.outer, BPF_ADJ_ROOM_MAC, flags) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type), 0) ||
	    (change_ecn && set_ecn((void *)(long)skb->data, (void *)(long)skb->data_end,
				   packet.family, packet.outer_ecn))) {
		count(BACKEND_REFUSED);
		return VERDICT_DROP;
	}
	count(BACKEND_UNTUNNELLED);
	return VERDICT_FORWARD;
}

/* Lowers the MSS at `place` to what fits into the tunnel. */
static __always_inline void lower_mss(struct __sk_buff *skb, const struct packet *packet,
				      __u32 place, __u32 most)
{
	__u32 checksum = (packet->l4 & L4_MASK) + offsetof(struct tcphdr, check);
	__be16 before, after = bpf_htons(most);

	if (bpf_skb_load_bytes(skb, place, &before, sizeof(before)) || bpf_ntohs(before) <= most ||
	    bpf_skb_store_bytes(skb, place, &after, sizeof(after), 0))
		return;
	/* The sum is of words; one that lies across two counts with its bytes swapped. */
	if ((place - packet->l4) & 1)
		bpf_l4_csum_replace(skb, checksum, __builtin_bswap16(before),
				    __builtin_bswap16(after), sizeof(after));
	else
		bpf_l4_csum_replace(skb, checksum, before, after, sizeof(after));
	count(BACKEND_CLAMPED);
}

/* It is the server's SYN+ACK that says how long the client's segments may be, and the client's
 * segments that go through the tunnel. */
static __noinline int clamp_mss(struct __sk_buff *skb, const struct packet *packet)
{
	struct service_key key = {
		.vip = packet->source,
		.port = packet->source_port,
		.protocol = packet->protocol,
	};
	__u32 place = (packet->l4 & L4_MASK) + sizeof(struct tcphdr);
	__u32 end = (packet->l4 & L4_MASK) + packet->tcp_header;
	__u32 *most;

	if (packet->protocol != IPPROTO_TCP || packet->fragment != FRAGMENT_NONE ||
	    (packet->tcp_flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK))
		return 0;
	most = bpf_map_lookup_elem(&clamps, &key);
	if (!most)
		return 0;
	for (int i = 0; i < TCP_OPTIONS; i++) {
		__u8 option[2];

		if (place + sizeof(option) > end ||
		    bpf_skb_load_bytes(skb, place, option, sizeof(option)) ||
		    option[0] == TCP_OPTION_END)
			return 0;
		if (option[0] == TCP_OPTION_PAD) {
			place++;
			continue;
		}
		if (option[1] < sizeof(option))
			return 0;
		if (option[0] == TCP_OPTION_MSS) {
			if (option[1] == 4)
				lower_mss(skb, packet, place + sizeof(option), *most);
			return 0;
		}
		place += option[1];
	}
	return 0;
}
