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
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct service_key);
	__type(value, __u32);
	__uint(max_entries, SERVICES);
} services SEC(".maps");

/* By id. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct service);
	__uint(max_entries, SERVICES);
} service_table SEC(".maps");

/* By id. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(max_entries, BACKENDS);
} backend_table SEC(".maps");

/* Address, port, protocol of a server -> its number, to know a reply when it comes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct server_key);
	__type(value, __u32);
	__uint(max_entries, BACKENDS);
} servers SEC(".maps");

/* What an address of ours is: bits of enum address_use. */
enum address_use {
	/* A VIP: nobody else may be spoken to while the gate is closed. */
	ADDRESS_VIP = 1,
	/* Packets to backends come from it. */
	ADDRESS_NAT = 2,
	/* A server's: not ours. */
	ADDRESS_SERVER = 4,
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, __u32);
	__uint(max_entries, ADDRESSES);
} addresses SEC(".maps");

/* What an address of ours is; 0: it is not ours. */
static __always_inline __u32 address_use(struct address *address)
{
	__u32 *use = bpf_map_lookup_elem(&addresses, address);

	return use ? *use & (ADDRESS_VIP | ADDRESS_NAT) : 0;
}

static __always_inline int is_server_address(struct address *address)
{
	__u32 *use = bpf_map_lookup_elem(&addresses, address);

	return use && *use & ADDRESS_SERVER;
}

/* The service that a packet is for, with its id; NULL: none. */
static __noinline struct service *find_service(struct packet *packet, __u32 *id)
{
	struct service_key key = {
		.vip = packet->destination,
		.port = packet->destination_port,
		.protocol = packet->protocol,
	};
	struct recent_end *recent = recent_end(RECENT_SERVICES, &key);
	__u32 before = changes;
	__u32 *found;

	if (recent && is_recent(recent, &key, before)) {
		*id = recent->number;
	} else {
		found = bpf_map_lookup_elem(&services, &key);
		if (!found)
			return NULL;
		*id = *found;
		if (recent)
			keep_end(recent, &key, *id, before);
	}
	return bpf_map_lookup_elem(&service_table, id);
}

/* The number of the server that a packet comes from; 0: none. */
static __noinline __u32 find_server(struct packet *packet)
{
	struct service_key key = {
		.vip = packet->source,
		.port = packet->source_port,
		.protocol = packet->protocol,
	};
	struct recent_end *recent = recent_end(RECENT_SERVERS, &key);
	__u32 before = changes;
	__u32 *found;

	if (recent && is_recent(recent, &key, before))
		return recent->number;
	found = bpf_map_lookup_elem(&servers, &key);
	if (!found)
		return 0;
	if (recent)
		keep_end(recent, &key, *found, before);
	return *found;
}
