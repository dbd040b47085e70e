/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The datapath: one core (core.h), two thin hooks (tc.h, xdp.h), the collector (collect.h). One
 * object, so that they share their maps.
 *
 * Reading order: types.h, bounds.h, core.h, and from there what it includes.
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

#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif

#include "core.h"
#include "tc.h"
#include "xdp.h"

#include "collect.h"

/* One of each type that no map names, so that BTF has it and Rust gets it; never read. */
const volatile struct {
	enum answer answer;
	enum drop_reason drop;
	enum forward_mode mode;
	enum select_by select;
	enum backend_state state;
	enum address_use use;
	enum flow_flag flag;
	enum flow_count count;
	enum on_down on_down;
	enum counted counted;
	enum repaired repaired;
	enum sweep_how sweep_how;
	enum sweep_done sweep_done;
	enum event_kind kind;
	enum leg_flag leg;
	enum way_kind way;
	struct event event;
	struct held_fragment held;
	enum reinject reinject;
} types_for_rust;

/* The kernel gives some helpers only to programs under a licence that it takes for compatible. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
