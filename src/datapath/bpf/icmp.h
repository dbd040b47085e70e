/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * ICMP and ICMPv6 errors that belong to a flow: a router, or an end, says what became of a packet
 * that one end of the flow sent, and quotes its beginning. Whom it is for shows in the quote, and
 * the way there is that of the flow: the quote is of a packet that went the other way. It is put
 * into the words that its receiver knows: addresses and ports of the message and of the quote, and
 * every checksum in both (RFC 5508 §4.2).
 *
 * The flow is looked at only: an error begins none, keeps none alive and ends none.
 *
 * Echo requests and whatever else is for the stack, which has the address. Errors about the outer
 * packets of a tunnel are too: they quote no TCP or UDP, and are for this node's own address.
 */
#pragma once

#include "csum.h"
#include "icmp_message.h"
#include "parse.h"
#include "plan.h"
#include "service.h"

/* Of the quoted transport header, what every router quotes (RFC 792). */
#define QUOTED_TRANSPORT 8

/* Whether parse.h has seen an ICMP message where the transport header is. */
static __always_inline int is_icmp(const struct packet *packet)
{
	return packet->l4 && packet->protocol == (packet->family == ETH_P_IP ? IPPROTO_ICMP
									     : IPPROTO_ICMPV6);
}

static __always_inline int is_icmp_error(const struct packet *packet, __u8 type)
{
	if (packet->family == ETH_P_IP)
		return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
		       type == ICMP_PARAMETERPROB;
	return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
}

/* What is wrong with the message's own header: enum drop_reason + 1; 0: nothing. */
static __always_inline int broken_outside(void *data, void *end, struct packet *packet, __u32 wire)
{
	struct iphdr *ip = data + (packet->l3 & L3_MASK);

	if (packet->length > wire || packet->length < packet->l4 - packet->l3)
		return DROP_BAD_LENGTH + 1;
	if (is_bad_source(packet))
		return DROP_BAD_SOURCE + 1;
	if (same_address(&packet->source, &packet->destination))
		return DROP_LAND + 1;
	if (packet->family == ETH_P_IPV6)
		return 0;
	if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
		return DROP_BAD_HEADER + 1;
	return ipv4_checksum_is_wrong(data, end, packet, ip->ihl) ? DROP_BAD_CHECKSUM + 1 : 0;
}

/* A quoted packet, as who sent it knew it. */
struct quoted {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 later_fragment;
	/* Where its transport header begins. */
	__u16 l4;
};

static __always_inline int read_quoted_ipv4(void *data, void *end, __u32 offset,
					    struct quoted *quoted)
{
	struct iphdr *ip = data + (offset & L4_MASK);

	if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
		return -1;
	map_ipv4(&quoted->source, ip->saddr);
	map_ipv4(&quoted->destination, ip->daddr);
	quoted->protocol = ip->protocol;
	quoted->later_fragment = !!(ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET));
	quoted->l4 = offset + ip->ihl * 4;
	return 0;
}

static __always_inline int read_quoted_ipv6(void *data, void *end, __u32 offset,
					    struct quoted *quoted)
{
	struct ipv6hdr *ip = data + (offset & L4_MASK);
	__u8 next;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return -1;
	__builtin_memcpy(&quoted->source, &ip->saddr, sizeof(quoted->source));
	__builtin_memcpy(&quoted->destination, &ip->daddr, sizeof(quoted->destination));
	next = ip->nexthdr;
	offset += sizeof(*ip);
	for (int i = 0; i < EXTENSION_HEADERS && is_extension(next); i++) {
		struct extension *extension = data + (offset & L4_MASK);

		if (offset > L4_MASK || (void *)(extension + 1) > end)
			return -1;
		if (next == IPPROTO_FRAGMENT && extension->offset & bpf_htons(0xfff8))
			quoted->later_fragment = 1;
		offset += next == IPPROTO_FRAGMENT ? 8 : (extension->length + 1) * 8;
		next = extension->next;
	}
	quoted->protocol = next;
	quoted->l4 = offset;
	return 0;
}

/* Fails where the quote is cut off before it says whose it is. */
static __always_inline int read_quoted(void *data, void *end, const struct packet *packet,
				       struct quoted *quoted)
{
	__u32 offset = packet->l4 + sizeof(struct icmp_head);
	__be16 *ports;

	if (packet->family == ETH_P_IP ? read_quoted_ipv4(data, end, offset, quoted)
				       : read_quoted_ipv6(data, end, offset, quoted))
		return -1;
	if (quoted->l4 + QUOTED_TRANSPORT > packet->l3 + packet->length ||
	    quoted->l4 > L4_MASK - QUOTED_TRANSPORT)
		return -1;
	ports = data + (quoted->l4 & L4_MASK);
	if ((void *)ports + QUOTED_TRANSPORT > end)
		return -1;
	quoted->source_port = ports[0];
	quoted->destination_port = ports[1];
	return 0;
}

/* Makes of an error the packet of the flow that goes the same way: from whom the quoted packet
 * went to, to whom it came from. `VERDICT_PASS`: it is none, or for the stack to look at. */
static __noinline int parse_error(void *data, void *end, __u32 size, struct packet *packet)
{
	struct icmp_head *icmp = data + (packet->l4 & L4_MASK);
	__u32 ours = address_use(&packet->destination);
	struct quoted quoted = {};
	int broken;

	if ((void *)(icmp + 1) > end || !is_icmp_error(packet, icmp->type) || packet->fragment)
		return VERDICT_PASS;
	broken = broken_outside(data, end, packet, size - packet->l3);
	if (broken)
		return ours ? drop(broken - 1) : VERDICT_PASS;
	if (read_quoted(data, end, packet, &quoted))
		return ours ? drop(DROP_TRUNCATED) : VERDICT_PASS;
	if (quoted.protocol != IPPROTO_TCP && quoted.protocol != IPPROTO_UDP)
		return VERDICT_PASS;
	/* Nobody is told of a packet that another has sent. */
	if (!same_address(&quoted.source, &packet->destination))
		return ours ? drop(DROP_ICMP_FORGED) : VERDICT_PASS;
	/* Where its ports should be is payload. */
	if (quoted.later_fragment)
		return ours ? drop(DROP_ICMP_NO_FLOW) : VERDICT_PASS;
	packet->source = quoted.destination;
	packet->source_port = quoted.destination_port;
	packet->destination_port = quoted.source_port;
	packet->protocol = quoted.protocol;
	packet->quoted_l4 = quoted.l4;
	return GO_ON;
}

/* A transport checksum in a quote, if it was quoted, follows the change; gives what that changes
 * in the sum over the message. */
static __always_inline __u64 rewrite_quoted_checksum(void *data, void *end,
						     const struct packet *packet, __u64 change)
{
	__u32 offset = (packet->quoted_l4 & L4_MASK) + checksum_offset(packet);
	__u16 *checksum = data + offset;
	__u16 before, after;

	if (offset + sizeof(*checksum) > packet->l3 + packet->length ||
	    (void *)(checksum + 1) > end)
		return 0;
	before = *checksum;
	/* There is none. */
	if (packet->protocol == IPPROTO_UDP && !before)
		return 0;
	after = adjust(before, change);
	if (packet->protocol == IPPROTO_UDP && !after)
		after = 0xffff;
	*checksum = after;
	return difference(0, before, after);
}

/* Both network headers of an IPv4 error; what it changes in the quote's pseudo-header, and in
 * `*sum` over the message. */
static __always_inline int rewrite_error_ipv4(void *data, void *end, const struct packet *packet,
					      const struct plan *plan, int keep_source,
					      __u64 *pseudo, __u64 *sum)
{
	struct iphdr *ip = data + (packet->l3 & L3_MASK);
	struct iphdr *quoted = data + ((packet->l4 + sizeof(struct icmp_head)) & L4_MASK);
	__be32 source;
	__u64 outer;
	__u16 before;

	if ((void *)(ip + 1) > end || (void *)(quoted + 1) > end)
		return -1;
	source = keep_source ? ip->saddr : plan->source.words[3];
	outer = difference(0, bpf_htons(0x0100), 0);
	outer = difference(outer, ip->saddr, source);
	outer = difference(outer, ip->daddr, plan->destination.words[3]);
	ip->saddr = source;
	ip->daddr = plan->destination.words[3];
	ip->ttl--;
	ip->check = adjust(ip->check, outer);
	*pseudo = difference(0, quoted->saddr, plan->destination.words[3]);
	*pseudo = difference(*pseudo, quoted->daddr, plan->source.words[3]);
	quoted->saddr = plan->destination.words[3];
	quoted->daddr = plan->source.words[3];
	before = quoted->check;
	quoted->check = adjust(before, *pseudo);
	*sum = *pseudo + difference(0, before, quoted->check);
	return 0;
}

/* The same of IPv6, whose own addresses are in the message's checksum as well. */
static __always_inline int rewrite_error_ipv6(void *data, void *end, const struct packet *packet,
					      const struct plan *plan, int keep_source,
					      __u64 *pseudo, __u64 *sum)
{
	struct ipv6hdr *ip = data + (packet->l3 & L3_MASK);
	struct ipv6hdr *quoted = data + ((packet->l4 + sizeof(struct icmp_head)) & L4_MASK);
	const struct address *to = &plan->destination, *from = &plan->source;

	if ((void *)(ip + 1) > end || (void *)(quoted + 1) > end)
		return -1;
	*pseudo = difference_of_addresses(0, (struct address *)&quoted->saddr, to);
	*pseudo = difference_of_addresses(*pseudo, (struct address *)&quoted->daddr, from);
	__builtin_memcpy(&quoted->saddr, to, sizeof(*to));
	__builtin_memcpy(&quoted->daddr, from, sizeof(*from));
	*sum = difference_of_addresses(*pseudo, (struct address *)&ip->daddr, to);
	__builtin_memcpy(&ip->daddr, to, sizeof(*to));
	if (!keep_source) {
		*sum = difference_of_addresses(*sum, (struct address *)&ip->saddr, from);
		__builtin_memcpy(&ip->saddr, from, sizeof(*from));
	}
	ip->hop_limit--;
	return 0;
}

/* Carries a plan out on an error. Its own source becomes what the flow's packets come from where
 * the plan changes that; where clients show as they are, so does a router on the way to them. A
 * sum over all of it stays what it was, so a device's is still right. */
static __always_inline int rewrite_error(void *data, void *end, const struct packet *packet,
					 const struct plan *plan)
{
	struct icmp_head *icmp = data + (packet->l4 & L4_MASK);
	__be16 *ports = data + (packet->quoted_l4 & L4_MASK);
	int keep_source = !plan->outbound && plan->mode != MODE_NAT;
	__u64 pseudo, sum, change;

	if ((void *)(icmp + 1) > end || (void *)(ports + 2) > end)
		return -1;
	if (packet->family == ETH_P_IP
		    ? rewrite_error_ipv4(data, end, packet, plan, keep_source, &pseudo, &sum)
		    : rewrite_error_ipv6(data, end, packet, plan, keep_source, &pseudo, &sum))
		return -1;
	change = difference(0, ports[0], plan->destination_port);
	change = difference(change, ports[1], plan->source_port);
	ports[0] = plan->destination_port;
	ports[1] = plan->source_port;
	sum += change;
	sum += rewrite_quoted_checksum(data, end, packet, pseudo + change);
	icmp->checksum = adjust(icmp->checksum, sum);
	return 0;
}
