/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Programs that the bench runs around those of the datapath, to see what a packet costs.
 *
 * A run hands the same memory to the program again and again, as the run before left it
 * (BPF_PROG_TEST_RUN with `repeat`; XDP's live frames are recycled in the same way). So every frame
 * is written anew, headers and all, by `bench_xdp` or `bench_tc`, and is of the next flow in turn;
 * they then tail-call what is measured. The same with a program that does nothing gives what
 * writing and calling cost, to be subtracted.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Ethernet, IPv4, TCP and what pads them to a frame. */
#define FRAME 64
/* Where in it the IPv4 checksum and source and the two ports are. */
#define CHECKSUM 24
#define SOURCE 26
#define SOURCE_PORT 34
#define DESTINATION_PORT 36
/* Flows of one source address. */
#define PORTS 16384
#define FIRST_PORT 1024

struct template {
	__u64 words[FRAME / 8];
	/* The source address of the first flow, host order. */
	__u32 source;
	/* Sum of the IPv4 header's 16-bit words, without source and checksum. */
	__u32 sum;
	/* Whether the port that differs by flow is the source's; else the destination's. */
	__u32 from_client;
	/* How many flows there are in turn. */
	__u32 flows;
	/* The service that they are of. */
	__u32 service;
	__u32 pad;
};

struct template template = {};
/* Frames written so far. */
__u64 written = 0;
/* Frames that came out at the far end. */
__u64 arrived = 0;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} xdp_next SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} tc_next SEC(".maps");

/* The datapath's own table, and as much of its records as is needed to look into it. */
struct flow_key {
	__be32 client[4];
	__be16 port;
	__u16 service;
};

struct flow {
	__u32 words[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct flow_key);
	__type(value, struct flow);
	__uint(max_entries, 1);
} flows SEC(".maps");

/* A flow's number: one after the other, but for neighbours that are far from each other. */
static __always_inline __u32 next_flow(void)
{
	__u64 number = written++ * 0x9e3779b97f4a7c15ULL;

	return (number >> 32) % (template.flows ? template.flows : 1);
}

static __always_inline void write_frame(void *data)
{
	__u32 flow = next_flow();
	__u32 source = template.source + flow / PORTS;
	__u16 port = FIRST_PORT + flow % PORTS;
	__u32 sum = template.sum + (source >> 16) + (source & 0xffff);

	for (int i = 0; i < FRAME / 8; i++)
		((__u64 *)data)[i] = template.words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*(__be16 *)(data + CHECKSUM) = bpf_htons(~sum);
	*(__be16 *)(data + SOURCE) = bpf_htons(source >> 16);
	*(__be16 *)(data + SOURCE + 2) = bpf_htons(source);
	if (template.from_client)
		*(__be16 *)(data + SOURCE_PORT) = bpf_htons(port);
	else
		*(__be16 *)(data + DESTINATION_PORT) = bpf_htons(port);
}

SEC("xdp.frags")
int bench_xdp(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;

	if (data + FRAME > end)
		return XDP_ABORTED;
	write_frame(data);
	bpf_tail_call(xdp, &xdp_next, 0);
	return XDP_ABORTED;
}

/* Nothing but sent back: what no balancer can be faster than. */
SEC("xdp.frags")
int bench_xdp_tx(struct xdp_md *xdp)
{
	return XDP_TX;
}

/* Sent back when its flow was found, and that is all: what no balancer that knows its flows from a
 * table of the kernel's can be faster than. */
SEC("xdp.frags")
int bench_xdp_find(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct flow_key key = { .client = { 0, 0, bpf_htonl(0xffff) } };
	struct flow *flow;

	if (data + FRAME > end)
		return XDP_ABORTED;
	/* Two halves, since it is not aligned. */
	__builtin_memcpy(&key.client[3], data + SOURCE, sizeof(key.client[3]));
	key.port = *(__be16 *)(data + SOURCE_PORT);
	key.service = template.service;
	flow = bpf_map_lookup_elem(&flows, &key);
	/* All of the entry is fetched. */
	return flow && *(volatile __u32 *)&flow->words[0] ? XDP_TX : XDP_ABORTED;
}

/* The far end. */
SEC("xdp.frags")
int bench_xdp_sink(struct xdp_md *xdp)
{
	arrived++;
	return XDP_DROP;
}

SEC("tc")
int bench_tc(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + FRAME > end)
		return TC_ACT_SHOT;
	write_frame(data);
	bpf_tail_call(skb, &tc_next, 0);
	return TC_ACT_SHOT;
}

SEC("tc")
int bench_tc_empty(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
