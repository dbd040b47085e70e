/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Whom a packet is for: a service of ours, a reply from a server of ours, one of our addresses, or
 * nobody here. Userspace writes these maps; nothing here does.
 */
#pragma once

#include "bounds.h"
#include "parse.h"
#include "recent.h"
#include "types.h"

/* VIP, port, protocol -> id. A service that has no room is refused by the configuration. */
MAP(services, HASH, struct service_key, __u32, SERVICES);

/* By id. */
MAP(service_table, ARRAY, __u32, struct service, SERVICES);

/* By id. */
MAP(backend_table, ARRAY, __u32, struct backend, BACKENDS);

/* Address, port, protocol of a server -> its number, to know a reply when it comes. */
MAP(servers, HASH, struct server_key, __u32, BACKENDS);

/* What an address of ours is: bits of enum address_use. */
enum address_use {
	/* A VIP: nobody else may be spoken to while the gate is closed. */
	ADDRESS_VIP = 1,
	/* Packets to backends come from it. */
	ADDRESS_NAT = 2,
	/* A server's: not ours. */
	ADDRESS_SERVER = 4,
};

MAP(addresses, HASH, struct address, __u32, ADDRESSES);

/* What an address of ours is; 0: it is not ours. */
__noinline __u32 address_use(const struct address *address)
{
	__u32 *use = address ? bpf_map_lookup_elem(&addresses, address) : NULL;

	return use ? *use & (ADDRESS_VIP | ADDRESS_NAT) : 0;
}

__noinline int is_server_address(const struct address *address)
{
	__u32 *use = address ? bpf_map_lookup_elem(&addresses, address) : NULL;

	return use && *use & ADDRESS_SERVER;
}

/* What `map` (`services` or `servers`) says of an end; 0: nothing. */
static __always_inline __u32 look_for_end(void *map, enum recent_of of,
					  const struct service_key *key)
{
	__u32 before = changes;
	__u32 *found = bpf_map_lookup_elem(map, key);

	if (!found)
		return 0;
	keep_end(of, key, *found, before);
	return *found;
}

/* The id of the service that a packet is for; 0: none. */
__noinline __u32 look_for_service(struct packet *packet)
{
	struct service_key key = {};

	if (!packet)
		return 0;
	key.vip = packet->destination;
	key.port = packet->destination_port;
	key.protocol = packet->protocol;
	return look_for_end(&services, RECENT_SERVICES, &key);
}

/* The number of the server that a packet comes from; 0: none. */
__noinline __u32 look_for_server(struct packet *packet)
{
	struct service_key key = {};

	if (!packet)
		return 0;
	key.vip = packet->source;
	key.port = packet->source_port;
	key.protocol = packet->protocol;
	return look_for_end(&servers, RECENT_SERVERS, &key);
}

/* The same, where it was found a moment ago; 0: it has to be looked for. */
static __always_inline __u32 recent_service(const struct packet *packet)
{
	return recent_end(RECENT_SERVICES, &packet->destination, packet->destination_port,
			  packet->protocol);
}

static __always_inline __u32 recent_server(const struct packet *packet)
{
	return recent_end(RECENT_SERVERS, &packet->source, packet->source_port,
			  packet->protocol);
}
