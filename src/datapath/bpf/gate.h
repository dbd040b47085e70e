/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The gate: packets of VIPs and flows go through only while the lease holds. Userspace renews it
 * with stores into mapped memory; nobody has to close it: it closes by itself when nobody
 * renews. The map outlives the daemon.
 */
#pragma once

#include "bounds.h"

struct gate {
	/* jiffies64 from which on it is closed; 0 at the start: closed. */
	__u64 open_until;
	/* Who opened it (the fencing number of the lease); not looked at here. */
	__u64 epoch;
	/* The same moment as `open_until` or a little later, on the monotonic clock. */
	__u64 open_until_ns;
	/* jiffies64 until which flows of the node before are adopted (adopt.h). */
	__u64 adopt_until;
};

/* In a section, so in a map, of its own: its place must not move with other variables. */
volatile struct gate gate SEC(".data.gate");

/* jiffies cost nothing per packet, ktime 34 ns; the grain is 1/HZ. */
static __always_inline __u64 now_jiffies(void)
{
	return bpf_jiffies64();
}

/* Exact, also where the CPU that counts jiffies does not run (a host that takes it away): for what is
 * rare, and says where the VIP is. */
static __always_inline int lease_is_over(void)
{
	return (__s64)(gate.open_until_ns - bpf_ktime_get_ns()) <= 0;
}

/* For what comes by the million. The deadline in jiffies is early by up to two of them, and so over all
 * the time where the lease is only a few milliseconds long: then the exact clock tells. */
static __always_inline int gate_is_closed(__u64 now)
{
	return (__s64)(gate.open_until - now) <= 0 && lease_is_over();
}
