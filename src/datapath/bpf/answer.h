/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Answers of ours: the packet is turned round where it is and goes back to the hardware address
 * and out of the interface that it came from. A hook (answer_tc.h, answer_xdp.h) makes room and
 * sends; who is answered, how often and with which bytes is the same for both and is here.
 *
 * Never answered, only dropped (RFC 1812 §4.3.2.7, RFC 4443 §2.4 (e), RFC 9293 §3.10.7.1): a
 * fragment that is not the first, what was sent to or from a group or all, a source that is no
 * host, a RST with a RST, an ICMP error.
 */
#pragma once

#include "csum.h"
#include "icmp_message.h"
#include "parse.h"
#include "plan.h"

/* Answers of one CPU in a second (RFC 1812 §4.3.2.8, RFC 4443 §2.4 (f)); what is beyond is dropped
 * without one (DROP_ANSWER_LIMITED). A RST is no larger than what it answers, and a connection
 * that waits for it waits for long: there may be more of them. */
#define ICMP_ANSWERS_PER_SECOND 1000
#define RESETS_PER_SECOND 10000
/* After a pause as many as of this time may follow at once. */
#define ANSWER_BURST_NS 250000000ULL

/* How much of the packet an ICMP answer quotes: as fits into 576 bytes (RFC 1812 §4.3.2.3), and
 * into IPv6's smallest MTU (RFC 4443 §3). */
#define QUOTE_IPV4 (576 - 20 - 8)
#define QUOTE_IPV6 (1280 - 40 - 8)
/* Bytes that are summed up in one go. */
#define QUOTE_CHUNK 64
#define QUOTE_CHUNKS ((QUOTE_IPV6 + QUOTE_CHUNK - 1) / QUOTE_CHUNK)

enum answer_limit {
	LIMIT_ICMP = 0,
	LIMIT_RESET,
	ANSWER_LIMITS
};

/* An answer on its way: what has to outlive the bytes that it is made of. */
struct response {
	/* As it is sent: ends swapped. */
	struct ethhdr ethernet;
	/* enum answer, of those that are sent. */
	__u8 kind;
	__u8 pad;
	/* Of the network header, without options. */
	__u32 header;
	struct address source;
	/* TCP, of ANSWER_RESET, host order. */
	__u32 sequence;
	__u32 acknowledgement;
	/* Of ICMP: bytes quoted, and their sum. */
	__u32 quote;
	__u32 quote_sum;
	/* The device fills in the transport checksum, which holds the pseudo-header's sum. */
	__u32 partial;
};

/* What a CPU needs to answer; here, since the stack has no room. Not pinned. */
struct answering {
	/* Nanoseconds (of `bpf_ktime_get_ns`) at which the answers sent so far are paid for: a token
	 * bucket in one number. */
	__u64 paid_at[ANSWER_LIMITS];
	struct response response;
	__u8 chunk[QUOTE_CHUNK];
};

MAP(answering, PERCPU_ARRAY, __u32, struct answering, 1);

static __always_inline struct answering *find_answering(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&answering, &zero);
}

static __always_inline int is_over_limit(__u64 *paid_at, __u64 per_second)
{
	__u64 cost = 1000000000ULL / per_second;
	__u64 now = bpf_ktime_get_ns();

	if (*paid_at < now)
		*paid_at = now;
	if (*paid_at - now > ANSWER_BURST_NS - cost)
		return 1;
	*paid_at += cost;
	return 0;
}

/* Whether nobody may be answered who sent to this address: a group, or all. */
static __always_inline int is_group(const struct packet *packet, const struct address *address)
{
	if (packet->family == ETH_P_IP)
		return bpf_ntohl(address->words[3]) >> 28 >= 0xe;
	return bpf_ntohl(address->words[0]) >> 24 == 0xff;
}

/* What RFC 9293 §3.10.7.1 says of a segment to a connection that does not exist. */
static __always_inline int fill_reset(const struct packet *packet, struct response *response)
{
	if (packet->tcp_flags & TCP_RST)
		return -1;
	if (packet->tcp_flags & TCP_ACK) {
		response->sequence = packet->acknowledgement;
		return 0;
	}
	response->acknowledgement = packet->sequence_end;
	return 0;
}

/* Whether the packet may be answered, and with what; it is counted either way. */
static __noinline int begin_answer(void *data, void *end, struct packet *packet, struct plan *plan,
				   struct answering *answering)
{
	struct response *response = &answering->response;
	struct ethhdr *ethernet = data;
	__u32 quote = packet->family == ETH_P_IP ? QUOTE_IPV4 : QUOTE_IPV6;

	if ((void *)(ethernet + 1) > end || packet->fragment == FRAGMENT_LATER || packet->quoted_l4 ||
	    (ethernet->h_dest[0] | ethernet->h_source[0]) & 1 || is_bad_source(packet) ||
	    is_group(packet, &packet->destination))
		return drop(plan->reason);
	__builtin_memset(response, 0, sizeof(*response));
	__builtin_memcpy(response->ethernet.h_dest, ethernet->h_source, ETH_ALEN);
	__builtin_memcpy(response->ethernet.h_source, ethernet->h_dest, ETH_ALEN);
	response->ethernet.h_proto = ethernet->h_proto;
	response->kind = plan->answer;
	response->header = packet->family == ETH_P_IP ? sizeof(struct iphdr)
						      : sizeof(struct ipv6hdr);
	if (response->kind == ANSWER_RESET && packet->protocol != IPPROTO_TCP)
		response->kind = ANSWER_UNREACHABLE;
	if (response->kind == ANSWER_RESET && fill_reset(packet, response))
		return drop(plan->reason);
	/* Who was spoken to answers. On the way to a client that is the client, and not for us to
	 * speak for: then whom it comes from in the client's eyes. */
	response->source = packet->destination;
	if (!address_use(&packet->destination) && plan->answer != ANSWER_RESET &&
	    plan->answer != ANSWER_UNREACHABLE)
		response->source = plan->source;
	response->quote = packet->length < quote ? packet->length : quote;
	if (response->kind == ANSWER_RESET
		    ? is_over_limit(&answering->paid_at[LIMIT_RESET], RESETS_PER_SECOND)
		    : is_over_limit(&answering->paid_at[LIMIT_ICMP], ICMP_ANSWERS_PER_SECOND))
		return drop(DROP_ANSWER_LIMITED);
	drop(plan->reason);
	return GO_ON;
}

/* Of a packet that is quoted: what is still to be summed up. */
struct quote {
	/* The hook's. */
	void *context;
	__u8 *chunk;
	__u32 offset;
	__u32 length;
	__u32 sum;
};

/* The sum of the nth chunk; `load` is the hook's way to read a packet. Ends a `bpf_loop` by 1. */
static __always_inline long sum_chunk(__u32 nth, struct quote *quote,
				      long (*load)(void *, __u32, void *, __u32))
{
	__u32 done = nth * QUOTE_CHUNK;
	__u32 length;

	if (done >= quote->length)
		return 1;
	length = quote->length - done;
	if (length > QUOTE_CHUNK)
		length = QUOTE_CHUNK;
	__builtin_memset(quote->chunk, 0, QUOTE_CHUNK);
	/* What is known, but not to the verifier. */
	barrier_var(length);
	if (!length || load(quote->context, quote->offset + done, quote->chunk, length))
		return 1;
	quote->sum = bpf_csum_diff(NULL, 0, (__be32 *)quote->chunk, QUOTE_CHUNK, quote->sum);
	return 0;
}

static __always_inline __u64 sum_of_address(__u16 family, const struct address *address)
{
	__u64 sum = address->words[3];

	if (family == ETH_P_IPV6)
		sum += (__u64)address->words[0] + address->words[1] + address->words[2];
	return sum;
}

/* Of the pseudo-header; IPv6's has the same fields in other widths, and so the same sum. */
static __always_inline __u64 sum_of_pseudo(const struct packet *packet,
					   const struct response *response, __u8 protocol,
					   __u32 length)
{
	return sum_of_address(packet->family, &response->source) +
	       sum_of_address(packet->family, &packet->source) + bpf_htonl(protocol) +
	       bpf_htonl(length);
}

static __always_inline void write_ipv4(struct iphdr *ip, const struct packet *packet,
				       const struct response *response, __u8 protocol,
				       __u32 length)
{
	__be32 *words = (__be32 *)ip;

	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = 5;
	/* RFC 1812 §4.3.2.5: internetwork control. */
	ip->tos = protocol == IPPROTO_ICMP ? 0xc0 : 0;
	ip->tot_len = bpf_htons(sizeof(*ip) + length);
	/* Never fragmented, so its identification does not matter (RFC 6864 §4.1). */
	ip->frag_off = bpf_htons(0x4000);
	ip->ttl = 64;
	ip->protocol = protocol;
	ip->saddr = response->source.words[3];
	ip->daddr = packet->source.words[3];
	ip->check = ~fold16((__u64)words[0] + words[1] + words[2] + words[3] + words[4]);
}

static __always_inline void write_ipv6(struct ipv6hdr *ip, const struct packet *packet,
				       const struct response *response, __u8 protocol,
				       __u32 length)
{
	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 6;
	ip->payload_len = bpf_htons(length);
	ip->nexthdr = protocol;
	ip->hop_limit = 64;
	__builtin_memcpy(&ip->saddr, &response->source, sizeof(response->source));
	__builtin_memcpy(&ip->daddr, &packet->source, sizeof(packet->source));
}

/* Ethernet and the network header, for so many bytes after them; where those begin. NULL: the
 * verifier can't see that there is room, which the hook has made. */
static __always_inline void *write_network(void *data, void *end, const struct packet *packet,
					   const struct response *response, __u8 protocol,
					   __u32 length)
{
	struct ethhdr *ethernet = data;
	void *header = data + sizeof(*ethernet);

	if (header > end)
		return NULL;
	*ethernet = response->ethernet;
	if (packet->family == ETH_P_IP) {
		struct iphdr *ip = header;

		if ((void *)(ip + 1) > end)
			return NULL;
		write_ipv4(ip, packet, response, protocol, length);
		return ip + 1;
	} else {
		struct ipv6hdr *ip = header;

		if ((void *)(ip + 1) > end)
			return NULL;
		write_ipv6(ip, packet, response, protocol, length);
		return ip + 1;
	}
}

static __noinline int write_reset(void *data, void *end, const struct packet *packet,
				  const struct response *response)
{
	struct tcphdr *tcp =
		write_network(data, end, packet, response, IPPROTO_TCP, sizeof(*tcp));
	__be32 *words = (__be32 *)tcp;
	__u64 sum = sum_of_pseudo(packet, response, IPPROTO_TCP, sizeof(*tcp));

	if (!tcp || (void *)(tcp + 1) > end)
		return -1;
	__builtin_memset(tcp, 0, sizeof(*tcp));
	tcp->source = packet->destination_port;
	tcp->dest = packet->source_port;
	tcp->seq = bpf_htonl(response->sequence);
	tcp->ack_seq = bpf_htonl(response->acknowledgement);
	tcp->doff = 5;
	tcp->rst = 1;
	tcp->ack = !(packet->tcp_flags & TCP_ACK);
	if (response->partial)
		tcp->check = fold16(sum);
	else
		tcp->check = ~fold16(sum + words[0] + words[1] + words[2] + words[3] + words[4]);
	return 0;
}

/* Type and code. */
static __always_inline void write_icmp_type(struct icmp_head *icmp, int ipv4, __u8 kind)
{
	switch (kind) {
	case ANSWER_TOO_BIG:
		icmp->type = ipv4 ? ICMP_DEST_UNREACH : ICMPV6_PKT_TOOBIG;
		icmp->code = ipv4 ? ICMP_FRAG_NEEDED : 0;
		break;
	case ANSWER_TIME_EXCEEDED:
		icmp->type = ipv4 ? ICMP_TIME_EXCEEDED : ICMPV6_TIME_EXCEED;
		icmp->code = 0;
		break;
	default:
		icmp->type = ipv4 ? ICMP_DEST_UNREACH : ICMPV6_DEST_UNREACH;
		icmp->code = ipv4 ? ICMP_PORT_UNREACH : ICMPV6_PORT_UNREACH;
	}
}

static __noinline int write_icmp(void *data, void *end, const struct packet *packet,
				 const struct plan *plan, const struct response *response)
{
	int ipv4 = packet->family == ETH_P_IP;
	__u8 protocol = ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	__u32 length = sizeof(struct icmp_head) + response->quote;
	struct icmp_head *icmp = write_network(data, end, packet, response, protocol, length);
	__be32 *words = (__be32 *)icmp;
	__u64 sum = response->quote_sum;

	if (!icmp || (void *)(icmp + 1) > end)
		return -1;
	write_icmp_type(icmp, ipv4, response->kind);
	icmp->checksum = 0;
	icmp->rest = response->kind == ANSWER_TOO_BIG ? bpf_htonl(plan->mtu) : 0;
	if (!ipv4)
		sum += sum_of_pseudo(packet, response, protocol, length);
	icmp->checksum = ~fold16(sum + words[0] + words[1]);
	return 0;
}
