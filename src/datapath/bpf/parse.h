/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Ethernet, IPv4 with options, IPv6 with extension headers, TCP, UDP: from bytes to a
 * `struct packet`. It reads only, and knows neither the hook nor any map but the drop counters.
 *
 * Tagged frames are passed: they are for the VLAN's own interface, which has a hook of its own if
 * it needs one, and where they come without their tag.
 *
 * What is no IP, or IP that is neither TCP nor UDP, is `VERDICT_PASS`; of the latter `protocol` and
 * `l4` are set, for icmp.h. What claims to be and is
 * broken is marked (`broken`) and not dropped here: whether it concerns us shows later, and other
 * people's broken packets are none of our business. Only what ends within its network header is
 * dropped at once: it is nobody's.
 */
#pragma once

#include "bounds.h"
#include "counters.h"
#include "types.h"

enum fragment {
	/* All of a packet. */
	FRAGMENT_NONE = 0,
	/* The first, which has the ports. */
	FRAGMENT_FIRST,
	/* A later one, which has none. */
	FRAGMENT_LATER,
};

struct packet {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	/* ETH_P_IP or ETH_P_IPV6, host order. */
	__u16 family;
	__u8 protocol;
	/* enum fragment */
	__u8 fragment;
	/* Where the headers begin, from the first byte of Ethernet. */
	__u16 l3;
	__u16 l4;
	/* The network layer's length as its header has it, in bytes. */
	__u32 length;
	/* Of TCP, host order. */
	__u32 sequence;
	__u32 acknowledgement;
	/* The number after its last byte; SYN and FIN count as one. */
	__u32 sequence_end;
	/* Low byte of TCP's flags. */
	__u8 tcp_flags;
	/* TTL or hop limit. */
	__u8 ttl;
	/* enum drop_reason + 1 of what is wrong with it; 0: nothing. */
	__u8 broken;
	/* The XDP hook has decided on it already: its flow has seen it. */
	__u8 handed_over;
	/* Bytes of TCP's header, with options. */
	__u8 tcp_header;
	/* Of an ICMP error: where the quoted packet's transport header is; all else but the family,
	 * the offsets and the length is as of a packet of the flow that goes its way. */
	__u16 quoted_l4;
	/* Identification of the datagram that it is a fragment of. */
	__u32 fragment_id;
	/* The interface it came by. */
	__u32 ifindex;
	/* Low 32 bits of jiffies64. */
	__u32 now;
	/* Payload of each segment that it will be cut into (GSO); 0: it stays whole. */
	__u32 segment;
} WHOLE_WORDS;

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_FRAGMENT_OFFSET 0x1fff

/* Offsets stay below these, which the verifier must see again wherever they are used. */
#define L3_MASK 0x3f
#define L4_MASK 0x1ff

struct extension {
	__u8 next;
	__u8 length;
	union {
		/* Of a fragment. */
		__be16 offset;
		/* Of a routing header. */
		struct {
			__u8 type;
			__u8 segments_left;
		};
	};
	__be32 id;
};

static __always_inline int broken(struct packet *packet, enum drop_reason reason)
{
	packet->broken = reason + 1;
	return GO_ON;
}

static __always_inline void map_ipv4(struct address *address, __be32 ipv4)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	__u64 halves[] = { 0, (__u64)ipv4 << 32 | bpf_htonl(0xffff) };
#else
	__u64 halves[] = { 0, (__u64)bpf_htonl(0xffff) << 32 | ipv4 };
#endif

	__builtin_memcpy(address, halves, sizeof(halves));
}

static __always_inline int is_ipv4(const struct address *address)
{
	return !address->words[0] && !address->words[1] &&
	       address->words[2] == bpf_htonl(0xffff);
}

static __always_inline int same_address(const struct address *one, const struct address *other)
{
	return one->words[3] == other->words[3] && one->words[2] == other->words[2] &&
	       one->words[1] == other->words[1] && one->words[0] == other->words[0];
}

/* An address that no host sends from: "this network", loopback, multicast, reserved, or none. */
static __always_inline int is_bad_source(const struct packet *packet)
{
	const struct address *source = &packet->source;
	__u32 first = bpf_ntohl(source->words[0]);
	__u32 last = bpf_ntohl(source->words[3]);

	if (packet->family == ETH_P_IP)
		return last >> 24 == 0 || last >> 24 == 127 || last >> 28 >= 0xe;
	return first >> 24 == 0xff ||
	       (!source->words[0] && !source->words[1] && !source->words[2] && last <= 1);
}

/* A first fragment must have all of the transport header (RFC 1858, RFC 7112): what decides must
 * not come later. */
static __always_inline enum drop_reason too_short(const struct packet *packet,
						  enum drop_reason reason)
{
	return packet->fragment == FRAGMENT_FIRST ? DROP_TINY_FRAGMENT : reason;
}

static __always_inline int parse_tcp(void *data, void *end, struct packet *packet, __u32 wire)
{
	struct tcphdr *tcp = data + (packet->l4 & L4_MASK);
	__u32 header = packet->l4 - packet->l3;

	if (packet->length < header + sizeof(*tcp))
		return broken(packet, too_short(packet, DROP_TRUNCATED));
	if ((void *)(tcp + 1) > end)
		return broken(packet, DROP_TRUNCATED);
	if (packet->length > wire)
		return broken(packet, DROP_BAD_LENGTH);
	packet->source_port = tcp->source;
	packet->destination_port = tcp->dest;
	packet->sequence = bpf_ntohl(tcp->seq);
	packet->acknowledgement = bpf_ntohl(tcp->ack_seq);
	packet->tcp_flags = ((__u8 *)tcp)[13];
	packet->tcp_header = tcp->doff * 4;
	if (tcp->doff < 5)
		return broken(packet, DROP_BAD_HEADER);
	if (packet->length < header + tcp->doff * 4)
		return broken(packet, too_short(packet, DROP_BAD_HEADER));
	packet->sequence_end = packet->sequence + packet->length - header - tcp->doff * 4 +
			       !!(packet->tcp_flags & TCP_SYN) + !!(packet->tcp_flags & TCP_FIN);
	return GO_ON;
}

static __always_inline int parse_udp(void *data, void *end, struct packet *packet, __u32 wire)
{
	struct udphdr *udp = data + (packet->l4 & L4_MASK);
	__u32 header = packet->l4 - packet->l3;
	__u32 length;

	if (packet->length < header + sizeof(*udp))
		return broken(packet, too_short(packet, DROP_TRUNCATED));
	if ((void *)(udp + 1) > end)
		return broken(packet, DROP_TRUNCATED);
	packet->source_port = udp->source;
	packet->destination_port = udp->dest;
	length = bpf_ntohs(udp->len);
	if (packet->length > wire || length < sizeof(*udp) ||
	    (packet->fragment == FRAGMENT_NONE && packet->length < header + length))
		return broken(packet, DROP_BAD_LENGTH);
	return GO_ON;
}

/* `offset`: of the fragment, in bytes; 0 of a whole packet. `wire`: bytes that are there of the
 * network layer. That the transport header is cut is said before that the length is wrong, which
 * is true of whatever is cut. */
static __always_inline int parse_transport(void *data, void *end, struct packet *packet,
					   __u32 offset, __u32 wire)
{
	if (packet->fragment == FRAGMENT_LATER) {
		if (packet->length > wire || packet->length < packet->l4 - packet->l3)
			return broken(packet, DROP_BAD_LENGTH);
		/* It would be written over the header of the first (RFC 3128). */
		if (packet->protocol == IPPROTO_TCP && offset < sizeof(struct tcphdr))
			return broken(packet, DROP_TINY_FRAGMENT);
		return GO_ON;
	}
	if (packet->protocol == IPPROTO_TCP)
		return parse_tcp(data, end, packet, wire);
	return parse_udp(data, end, packet, wire);
}

/* The sum over an IPv4 header of `words` 32-bit words is 0xffff if nothing was changed on the way. */
static __always_inline int ipv4_checksum_is_wrong(void *data, void *end, struct packet *packet,
						  __u32 words)
{
	__be32 *header = data + (packet->l3 & L3_MASK);
	__u64 sum = 0;

	for (__u32 i = 0; i < 15; i++) {
		__be32 *word = header + i;

		if (i >= words)
			break;
		/* The compiler would compare in a way that the verifier does not follow. */
		barrier_var(word);
		if ((void *)(word + 1) > end)
			return 1;
		sum += *word;
	}
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum != 0xffff;
}

static __always_inline int parse_ipv4(void *data, void *end, struct packet *packet, __u32 wire)
{
	struct iphdr *ip = data + (packet->l3 & L3_MASK);
	__u32 header;
	__u16 fragment;

	if ((void *)(ip + 1) > end)
		return drop(DROP_TRUNCATED);
	map_ipv4(&packet->source, ip->saddr);
	map_ipv4(&packet->destination, ip->daddr);
	packet->protocol = ip->protocol;
	packet->ttl = ip->ttl;
	packet->length = bpf_ntohs(ip->tot_len);
	packet->fragment_id = bpf_ntohs(ip->id);
	header = ip->ihl * 4;
	packet->l4 = packet->l3 + header;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP) {
		if (ip->frag_off & bpf_htons(IPV4_MORE_FRAGMENTS | IPV4_FRAGMENT_OFFSET))
			packet->l4 = 0;
		return VERDICT_PASS;
	}
	if (ip->version != 4 || header < sizeof(*ip))
		return broken(packet, DROP_BAD_HEADER);
	if (header > wire)
		return broken(packet, DROP_TRUNCATED);
	if (packet->length < header)
		return broken(packet, DROP_BAD_LENGTH);
	if (ipv4_checksum_is_wrong(data, end, packet, ip->ihl))
		return broken(packet, DROP_BAD_CHECKSUM);
	fragment = bpf_ntohs(ip->frag_off);
	if (fragment & IPV4_FRAGMENT_OFFSET)
		packet->fragment = FRAGMENT_LATER;
	else if (fragment & IPV4_MORE_FRAGMENTS)
		packet->fragment = FRAGMENT_FIRST;
	return parse_transport(data, end, packet, (fragment & IPV4_FRAGMENT_OFFSET) * 8, wire);
}

/* Whether a header that is followed by another may stand there. */
static __always_inline int is_extension(__u8 header)
{
	return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING ||
	       header == IPPROTO_DSTOPTS || header == IPPROTO_FRAGMENT;
}

/* An IPv4 address in IPv6's clothes: in our tables it is IPv4's; on the wire it is nobody's. */
static __always_inline int is_mapped(const struct address *address)
{
	return !address->words[0] && !address->words[1] && address->words[2] == bpf_htonl(0xffff);
}

static __always_inline int parse_ipv6(void *data, void *end, struct packet *packet, __u32 wire)
{
	struct ipv6hdr *ip = data + (packet->l3 & L3_MASK);
	__u32 offset = packet->l3 + sizeof(*ip);
	__u16 place = 0;
	__u8 next;

	if ((void *)(ip + 1) > end)
		return drop(DROP_TRUNCATED);
	__builtin_memcpy(&packet->source, &ip->saddr, sizeof(packet->source));
	__builtin_memcpy(&packet->destination, &ip->daddr, sizeof(packet->destination));
	packet->ttl = ip->hop_limit;
	packet->length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (is_mapped(&packet->source))
		return broken(packet, DROP_BAD_SOURCE);
	if (is_mapped(&packet->destination))
		return broken(packet, DROP_BAD_HEADER);
	next = ip->nexthdr;
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		struct extension *extension = data + (offset & L4_MASK);

		if (next == IPPROTO_TCP || next == IPPROTO_UDP)
			break;
		if (!is_extension(next)) {
			packet->protocol = next;
			packet->l4 = offset;
			return VERDICT_PASS;
		}
		if ((void *)(extension + 1) > end)
			return broken(packet, DROP_TRUNCATED);
		/* It has not come to where it goes to; its checksum is over another address. */
		if (next == IPPROTO_ROUTING && extension->segments_left)
			return broken(packet, DROP_BAD_HEADER);
		if (next == IPPROTO_FRAGMENT) {
			place = bpf_ntohs(extension->offset);
			packet->fragment_id = bpf_ntohl(extension->id);
			if (place & 0xfff8)
				packet->fragment = FRAGMENT_LATER;
			else if (place & 1)
				packet->fragment = FRAGMENT_FIRST;
			offset += sizeof(*extension);
		} else {
			offset += (extension->length + 1) * 8;
		}
		next = extension->next;
		if (offset > L4_MASK)
			return broken(packet, DROP_BAD_HEADER);
		/* What follows in a later fragment is payload. */
		if (packet->fragment == FRAGMENT_LATER)
			break;
	}
	/* More of them than are looked at: what is behind them is not known, and not believed. */
	if (packet->fragment != FRAGMENT_LATER && is_extension(next))
		return broken(packet, DROP_BAD_HEADER);
	/* Of a later fragment, `next` may be an extension header that only the first has. */
	if (next != IPPROTO_TCP && next != IPPROTO_UDP &&
	    !(packet->fragment == FRAGMENT_LATER && is_extension(next)))
		return VERDICT_PASS;
	packet->protocol = next;
	packet->l4 = offset;
	if (ip->version != 6)
		return broken(packet, DROP_BAD_HEADER);
	return parse_transport(data, end, packet, place & 0xfff8, wire);
}

/* `size`: bytes of the whole packet, beyond `end` too where not all of it is linear. */
static __always_inline int parse(void *data, void *end, __u32 size, struct packet *packet)
{
	struct ethhdr *ethernet = data;
	__u32 offset = sizeof(*ethernet);

	if ((void *)(ethernet + 1) > end)
		return VERDICT_PASS;
	packet->l3 = offset;
	packet->family = bpf_ntohs(ethernet->h_proto);
	if (packet->family == ETH_P_IP)
		return parse_ipv4(data, end, packet, size - offset);
	if (packet->family == ETH_P_IPV6)
		return parse_ipv6(data, end, packet, size - offset);
	return VERDICT_PASS;
}

/* Where the transport checksum is, from the first byte of the transport header. */
static __always_inline __u32 checksum_offset(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP ? __builtin_offsetof(struct tcphdr, check)
					       : __builtin_offsetof(struct udphdr, check);
}
