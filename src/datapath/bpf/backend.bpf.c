/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * On the backends of dsr services: what comes from a relay in a tunnel is taken out of it (ipip),
 * and replies of flows that came through a relay get the VIP as their source (nat). It knows
 * services by what `baton backend-setup` wrote into the maps; all other packets it leaves alone.
 *
 * Ingress looks at what arrives, egress at what this machine sends. Both are TC hooks.
 */
#include <asm-generic/errno.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "backend.h"
#include "tc_checksum.h"

#include "backend_ipip.h"
#include "backend_nat.h"

SEC("tc")
int baton_backend_ingress(struct __sk_buff *skb)
{
	struct packet packet = {};
	__u32 linear = skb->data_end - skb->data;

	if (linear < PULL_BYTES && linear < skb->len)
		bpf_skb_pull_data(skb, skb->len < PULL_BYTES ? skb->len : PULL_BYTES);
	switch (take_out_of_tunnel(skb)) {
	case VERDICT_DROP:
		return TC_ACT_SHOT;
	case VERDICT_FORWARD:
		return TC_ACT_UNSPEC;
	}
	if (parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet) == GO_ON)
		learn(skb, &packet);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int baton_backend_egress(struct __sk_buff *skb)
{
	struct packet packet = {};
	__u32 linear = skb->data_end - skb->data;

	if (linear < PULL_BYTES && linear < skb->len)
		bpf_skb_pull_data(skb, skb->len < PULL_BYTES ? skb->len : PULL_BYTES);
	if (parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet) != GO_ON ||
	    packet.broken)
		return TC_ACT_UNSPEC;
	clamp_mss(skb, &packet);
	return give_vip(skb, &packet) == VERDICT_DROP ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

const volatile enum backend_count count_for_rust;

char LICENSE[] SEC("license") = "Dual MIT/GPL";
