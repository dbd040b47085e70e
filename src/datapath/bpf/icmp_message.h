/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * ICMP (RFC 792) and ICMPv6 (RFC 4443) messages as bytes.
 */
#pragma once

#include <linux/icmpv6.h>

/* linux/icmp.h, which has these, can't be included without the C library of another target. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
/* Codes of ICMP_DEST_UNREACH. */
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4

struct icmp_head {
	__u8 type;
	__u8 code;
	__u16 checksum;
	/* The MTU in ICMPv6; in ICMP it is the lower half (RFC 1191 §4). Otherwise not used. */
	__be32 rest;
};
