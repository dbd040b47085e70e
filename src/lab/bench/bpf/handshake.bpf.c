/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A step of the TCP handshake of many flows, one frame each, handed to a program of the datapath:
 * flows come about as they do from the network, without the network.
 *
 * One BPF_PROG_TEST_RUN hands the same memory to this program again and again; it writes the frame
 * anew each time, of the next flow, and tail-calls the datapath.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Ethernet, IPv4, TCP, and padding. */
#define FRAME 64
#define CHECKSUM 24
#define SOURCE 26
#define DESTINATION 30
#define SOURCE_PORT 34
#define DESTINATION_PORT 36
/* Flows of one client address. */
#define PORTS 16384
#define FIRST_PORT 1024

struct step {
	__u64 words[FRAME / 8];
	/* The address of the first client, host order. */
	__u32 client;
	/* Sum of the IPv4 header's 16-bit words, without the client's address and the checksum. */
	__u32 sum;
	/* Whether it comes from the client; else it goes to it. */
	__u32 from_client;
	__u32 pad;
	/* The next flow. */
	__u64 flow;
};

struct step step = {};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} datapath SEC(".maps");

static __always_inline void write_frame(void *data)
{
	__u64 flow = step.flow++;
	__u32 client = step.client + flow / PORTS;
	__u16 port = FIRST_PORT + flow % PORTS;
	__u32 sum = step.sum + (client >> 16) + (client & 0xffff);

	for (int i = 0; i < FRAME / 8; i++)
		((__u64 *)data)[i] = step.words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*(__be16 *)(data + CHECKSUM) = bpf_htons(~sum);
	if (step.from_client) {
		*(__be16 *)(data + SOURCE) = bpf_htons(client >> 16);
		*(__be16 *)(data + SOURCE + 2) = bpf_htons(client);
		*(__be16 *)(data + SOURCE_PORT) = bpf_htons(port);
	} else {
		*(__be16 *)(data + DESTINATION) = bpf_htons(client >> 16);
		*(__be16 *)(data + DESTINATION + 2) = bpf_htons(client);
		*(__be16 *)(data + DESTINATION_PORT) = bpf_htons(port);
	}
}

SEC("tc")
int bench_handshake(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + FRAME > end)
		return TC_ACT_SHOT;
	write_frame(data);
	bpf_tail_call(skb, &datapath, 0);
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
