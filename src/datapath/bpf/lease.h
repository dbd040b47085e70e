/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Who has a VIP: ARP and neighbour discovery. The kernel's stack has the address for as long as it
 * is on the interface, whatever has become of the daemon; so whoever asks for it is not heard
 * without a lease, and what the stack sends in its name (answers, ARP of its own, what is left of
 * sessions) does not go out (egress).
 *
 * Announcements of others pass: this node has to hear where the VIP is now.
 */
#pragma once

#include "counters.h"
#include "gate.h"
#include "icmp_message.h"
#include "parse.h"
#include "service.h"

#define ARP_REQUEST 1
#define NEIGHBOUR_SOLICITATION 135
#define NEIGHBOUR_ADVERTISEMENT 136

/* RFC 826, for IPv4 on Ethernet. */
struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_hardware[ETH_ALEN];
	__u8 sender[4];
	__u8 target_hardware[ETH_ALEN];
	__u8 target[4];
} __attribute__((packed));

/* RFC 4861 §4.3, §4.4: both begin like this. */
struct neighbour_message {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 flags;
	struct address target;
};

static __always_inline int is_vip(struct address *address)
{
	return address_use(address) & ADDRESS_VIP;
}

static __always_inline void arp_address(struct address *address, const __u8 *ipv4)
{
	__be32 word;

	__builtin_memcpy(&word, ipv4, sizeof(word));
	map_ipv4(address, word);
}

/* The ARP message of a frame; NULL: it is none. */
static __always_inline struct arp *arp_of(void *data, void *end)
{
	struct ethhdr *ethernet = data;
	struct arp *arp = (void *)(ethernet + 1);

	if ((void *)(arp + 1) > end || ethernet->h_proto != bpf_htons(ETH_P_ARP) ||
	    arp->protocol != bpf_htons(ETH_P_IP) || arp->protocol_length != sizeof(arp->target) ||
	    arp->hardware_length != ETH_ALEN)
		return NULL;
	return arp;
}

/* Whether a frame asks for a VIP by ARP. */
static __always_inline int arp_asks_for_vip(void *data, void *end)
{
	struct arp *arp = arp_of(data, end);
	struct address sender, target;

	if (!arp || arp->operation != bpf_htons(ARP_REQUEST))
		return 0;
	arp_address(&sender, arp->sender);
	arp_address(&target, arp->target);
	/* Of oneself: an announcement. */
	return !same_address(&sender, &target) && is_vip(&target);
}

/* The neighbour discovery message of this type in a packet that parse.h has been through; NULL: it
 * is none. */
static __always_inline struct neighbour_message *
neighbour_message(void *data, void *end, const struct packet *packet, __u8 type)
{
	struct neighbour_message *message = data + (packet->l4 & L4_MASK);

	if (packet->family != ETH_P_IPV6 || packet->protocol != IPPROTO_ICMPV6 || !packet->l4 ||
	    (void *)(message + 1) > end || message->type != type)
		return NULL;
	return message;
}

/* What is neither TCP nor UDP: `VERDICT_DROP` of what asks for a VIP without a lease. */
static __always_inline int check_question(void *data, void *end, const struct packet *packet)
{
	struct neighbour_message *solicitation;
	struct address target;

	if (packet->family == ETH_P_ARP)
		return arp_asks_for_vip(data, end) && lease_is_over() ? drop(DROP_ARP_NO_LEASE)
								      : GO_ON;
	solicitation = neighbour_message(data, end, packet, NEIGHBOUR_SOLICITATION);
	if (!solicitation)
		return GO_ON;
	target = solicitation->target;
	return is_vip(&target) && lease_is_over() ? drop(DROP_ND_NO_LEASE) : GO_ON;
}

/* Whether a frame of the stack's is sent in the name of a VIP, or says that one is here. */
static __always_inline int speaks_for_vip(void *data, void *end)
{
	struct ethhdr *ethernet = data;
	struct iphdr *ipv4 = (void *)(ethernet + 1);
	struct ipv6hdr *ipv6 = (void *)(ethernet + 1);
	/* The stack puts no header in between. */
	struct neighbour_message *message = (void *)(ipv6 + 1);
	struct arp *arp = arp_of(data, end);
	struct address address;

	if (arp) {
		arp_address(&address, arp->sender);
		return is_vip(&address);
	}
	if ((void *)(ethernet + 1) > end)
		return 0;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP)) {
		if ((void *)(ipv4 + 1) > end)
			return 0;
		map_ipv4(&address, ipv4->saddr);
		return is_vip(&address);
	}
	if (ethernet->h_proto != bpf_htons(ETH_P_IPV6) || (void *)(ipv6 + 1) > end)
		return 0;
	__builtin_memcpy(&address, &ipv6->saddr, sizeof(address));
	if (is_vip(&address))
		return 1;
	if (ipv6->nexthdr != IPPROTO_ICMPV6 || (void *)(message + 1) > end ||
	    message->type != NEIGHBOUR_ADVERTISEMENT)
		return 0;
	address = message->target;
	return is_vip(&address);
}
