/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Fragments: later ones have no ports, so they have to follow what the first one chose. Until that
 * is built they go up the stack, which needs them for proxy services and, without a first one,
 * forgets them silently. A first fragment goes its way like a whole packet.
 */
#pragma once

#include "counters.h"
#include "parse.h"

/* Gives a later fragment the ports of its first. */
static __always_inline int join_fragment(struct packet *packet)
{
	(void)packet;
	return VERDICT_PASS;
}
