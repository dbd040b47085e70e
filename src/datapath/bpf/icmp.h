/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * ICMP and ICMPv6: errors that belong to a flow are translated and sent on to the right end. Echo
 * requests to a VIP are answered by the kernel's own stack, which has the address. Until errors
 * are built, all of ICMP goes up the stack: parse.h passes it.
 */
#pragma once
