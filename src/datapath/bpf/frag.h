/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Fragments: later ones have no ports, so they follow what the first one chose. Until that is
 * built they are dropped and counted. A first fragment goes its way like a whole packet.
 */
#pragma once

#include "counters.h"
#include "parse.h"

/* Gives a later fragment the ports of its first. */
static __always_inline int join_fragment(struct packet *packet)
{
	if (packet->fragment == FRAGMENT_LATER)
		return drop(DROP_FRAGMENT);
	return GO_ON;
}
