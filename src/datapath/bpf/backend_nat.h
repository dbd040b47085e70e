/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The far end of `dsr = "nat"`: which flows came through a relay is learnt from the mark that the
 * relay puts on each packet (DSCP_RELAYED), and what this server sends in them gets the VIP as its
 * source. Others, as health checks and whoever else speaks to the server's own address, are
 * answered from there.
 */
#pragma once

#include "backend.h"
#include "tc_checksum.h"

static __always_inline struct face *find_face(const struct address *address, __be16 port,
					      __u8 protocol)
{
	struct server_key key = { .address = *address, .port = port, .protocol = protocol };

	return bpf_map_lookup_elem(&faces, &key);
}

/* Whether it has the relay's mark. */
static __always_inline int is_marked(void *data, void *end, const struct packet *packet)
{
	__be32 *first = data + sizeof(struct ethhdr);
	__u8 tos;

	if ((void *)(first + 1) > end)
		return 0;
	tos = bpf_ntohl(*first) >> (packet->family == ETH_P_IP ? 16 : 20);
	return tos >> 2 == DSCP_RELAYED;
}

/* A client's packet: whether its flow comes through a relay. */
static __noinline int learn(struct __sk_buff *skb, const struct packet *packet)
{
	struct relayed_key key = {
		.client = packet->source,
		.server = packet->destination,
		.client_port = packet->source_port,
		.server_port = packet->destination_port,
		.protocol = packet->protocol,
	};
	struct face *face;
	__u32 one = 1;

	if (packet->broken || packet->fragment == FRAGMENT_LATER)
		return 0;
	face = find_face(&packet->destination, packet->destination_port, packet->protocol);
	if (!face || face->by == RELAYED_ALL)
		return 0;
	if (!is_marked((void *)(long)skb->data, (void *)(long)skb->data_end, packet)) {
		/* The same ports, now without a relay. */
		if (packet->protocol == IPPROTO_UDP || packet->tcp_flags & TCP_SYN)
			bpf_map_delete_elem(&relayed, &key);
		return 0;
	}
	if (!bpf_map_lookup_elem(&relayed, &key)) {
		bpf_map_update_elem(&relayed, &key, &one, BPF_ANY);
		count(BACKEND_LEARNT);
	}
	return 0;
}

/* The VIP that a packet of this server's goes out as; fails where it goes as it is. */
static __noinline int face_of(const struct packet *packet, struct face *out)
{
	struct sent_key sent = {
		.source = packet->source,
		.destination = packet->destination,
		.id = packet->fragment_id,
		.protocol = packet->protocol,
	};
	struct relayed_key key = {
		.client = packet->destination,
		.server = packet->source,
		.client_port = packet->destination_port,
		.server_port = packet->source_port,
		.protocol = packet->protocol,
	};
	struct face *face;

	if (packet->fragment == FRAGMENT_LATER) {
		face = bpf_map_lookup_elem(&sent_fragments, &sent);
		if (!face)
			return -1;
		*out = *face;
		return 0;
	}
	face = find_face(&packet->source, packet->source_port, packet->protocol);
	if (!face || (face->by != RELAYED_ALL && !bpf_map_lookup_elem(&relayed, &key))) {
		/* An identification that comes round must not find the old one. */
		if (packet->fragment == FRAGMENT_FIRST)
			bpf_map_delete_elem(&sent_fragments, &sent);
		return -1;
	}
	*out = *face;
	if (packet->fragment == FRAGMENT_FIRST)
		bpf_map_update_elem(&sent_fragments, &sent, out, BPF_ANY);
	return 0;
}

static __always_inline int set_source(void *data, void *end, const struct packet *packet,
				      const struct face *face, struct change *change)
{
	__be16 *port = data + (packet->l4 & L4_MASK);

	if (packet->family == ETH_P_IP) {
		struct iphdr *ip = data + sizeof(struct ethhdr);

		if ((void *)(ip + 1) > end)
			return -1;
		change->pseudo = difference(0, ip->saddr, face->vip.words[3]);
		ip->saddr = face->vip.words[3];
		ip->check = adjust(ip->check, change->pseudo);
	} else {
		struct ipv6hdr *ip = data + sizeof(struct ethhdr);

		if ((void *)(ip + 1) > end)
			return -1;
		change->pseudo = difference_of_addresses(0, &packet->source, &face->vip);
		__builtin_memcpy(&ip->saddr, &face->vip, sizeof(ip->saddr));
	}
	if (packet->fragment == FRAGMENT_LATER)
		return 0;
	if ((void *)(port + 1) > end)
		return -1;
	change->ports = difference(0, *port, face->port);
	*port = face->port;
	return 0;
}

/* A packet that this machine sends. */
static __noinline int give_vip(struct __sk_buff *skb, const struct packet *packet)
{
	struct change change = {};
	struct face face;

	if (face_of(packet, &face))
		return VERDICT_PASS;
	if (set_source((void *)(long)skb->data, (void *)(long)skb->data_end, packet, &face,
		       &change) ||
	    tc_checksum(skb, packet, &change)) {
		count(BACKEND_REFUSED);
		return VERDICT_DROP;
	}
	count(BACKEND_REWRITTEN);
	return VERDICT_FORWARD;
}
