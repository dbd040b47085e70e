/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What maps hold, shared with Rust: libbpf-cargo generates the Rust types from these through BTF,
 * so that nothing is copied by hand.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d: one table for both families.
 * `__be16` and `__be32` are in network order, everything else in the host's.
 * Times are the low 32 bits of jiffies64; they are compared by difference, so that the wrap after
 * 49 days (at 1000 Hz) does no harm to anything younger than 24.
 * Records end in explicit padding: a key's bytes are all compared, so none may be left unset.
 */
#pragma once

struct address {
	__be32 words[4];
};

/* Where clients go; the key of `services`. */
struct service_key {
	struct address vip;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

enum forward_mode {
	/* Destination and source rewritten: client -> VIP becomes NAT address -> backend. */
	MODE_NAT = 1,
	/* Destination rewritten; the backend routes its replies through us. */
	MODE_DNAT = 2,
	/* Nothing rewritten but the Ethernet destination; replies go straight to the client. */
	MODE_DSR_L2 = 3,
	/* Carried to the backend inside IP. */
	MODE_DSR_IPIP = 4,
	/* Destination rewritten; the backend rewrites the source on egress. */
	MODE_DSR_NAT = 5,
	/* Goes up the stack, to a listener of ours. */
	MODE_PROXY = 6,
};

enum select_by {
	/* Both ends of the flow. */
	SELECT_FLOW = 0,
	/* The client's address alone. */
	SELECT_SOURCE = 1,
	/* A random number. */
	SELECT_RANDOM = 2,
	/* In turn. */
	SELECT_TURN = 3,
	/* Of two at random, that which has fewer flows for its weight. */
	SELECT_LEAST = 4,
};

/* What becomes of the flows of a backend that is down or gone. (Where they are to stay, userspace
 * calls it drained.) */
enum on_down {
	/* Their clients are told: a RST, an ICMP error. */
	ON_DOWN_RESET = 0,
	/* They go to another backend; TCP, which no other backend would know, is reset. */
	ON_DOWN_REMAP = 1,
};

/* A service; element `id` of `service_table`. */
struct service {
	struct address vip;
	__be16 port;
	__u8 protocol;
	/* enum forward_mode */
	__u8 mode;
	/* enum select_by */
	__u8 select;
	/* enum on_down */
	__u8 on_down;
	__u8 pad[2];
	/* From VIP, port and protocol, so the same on every node. */
	__u64 seed;
	/* Where the VIP is: the way to a client whose own is not known yet. */
	__u32 ifindex;
	/* Timeouts in jiffies: without a packet in either direction, … */
	__u32 half_open_timeout; /* … not answered or not confirmed yet; */
	__u32 idle_timeout;      /* … established; */
	__u32 half_close_timeout; /* … closed in one direction; */
	__u32 closed_timeout;    /* … closed in both, or reset. */
	/* Most established flows, of all and of one source; 0: as many as there is room for. */
	__u32 max_flows;
	__u32 max_per_source;
	/* How long a client keeps to a backend after a flow of its has begun, in jiffies; 0: not. */
	__u32 affinity;
};

enum backend_state {
	/* Not in use; its id may be given to another once no flow has it. */
	BACKEND_GONE = 0,
	/* Gets new flows, where the schedule has it. */
	BACKEND_UP = 1,
	/* Keeps its flows, gets no new ones. */
	BACKEND_DRAINED = 2,
	/* Down or disabled: its flows go the way of `service.on_down`. */
	BACKEND_DOWN = 3,
};

/* A backend of a service; element `id` of `backend_table`. Id 0 is none. */
struct backend {
	struct address address;
	/* What packets to it come from: in MODE_NAT a VIP, in MODE_DSR_IPIP this node's own address
	 * towards it (the outer header's). */
	struct address nat;
	__be16 port;
	/* enum backend_state */
	__u8 state;
	__u8 pad;
	/* Its address, port and protocol as one number: backends of several services that are the
	 * same server share it, and with it the NAT ports towards it. */
	__u32 server;
	/* The way to it. */
	__u32 ifindex;
	/* Its service. */
	__u32 service;
	/* Longest packet that the way to it takes, in bytes; 0: not known. */
	__u32 mtu;
	/* Most established flows; 0: as many as there is room for. */
	__u32 max_flows;
	/* What its flows are measured by. */
	__u32 weight;
};

/* How many flows a service or backend has: those that were established less those that ended. Each
 * only grows, so that who counts flows one by one can tell what came and went meanwhile. */
struct live {
	__u32 begun;
	__u32 ended;
	/* Of a service: whose turn it is. */
	__u32 turn;
	__u32 pad;
};

/* A client, or the network that stands for it, and the service that it uses. */
struct source_key {
	struct address prefix;
	__u16 service;
	__u16 pad;
};

/* A server's address as packets from it show it; the key of `servers`, whose value is the number. */
struct server_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

/* A flow in its original direction: the client, and the service it talks to. */
struct flow_key {
	struct address client;
	__be16 port;
	__u16 service;
};

/* Bits of `flow.flags` and `reply.flags`: what that direction has shown. */
enum flow_flag {
	FLOW_FIN = 1,
	FLOW_RST = 2,
	/* Reply only: the backend's SYN+ACK was seen, `isn` is right. */
	FLOW_SYN_ACK = 4,
	/* Learnt from a peer, or begun anew between its ends: no packet was seen here yet, and
	 * `numbers` mean nothing until then. */
	FLOW_LEARNT = 8,
	/* Ended here, by its backend's leaving or by the operator: whoever goes on gets a RST. */
	FLOW_ENDED = 16,
	/* The other end seems to have reset the flow; this one has not been heard since. */
	FLOW_DOUBT = 32,
	/* Half-open: begun in the middle, see adopt.h. */
	FLOW_ADOPTED = 64,
};

/* Of the TCP segments of one direction, in the host's byte order; see numbers.h. */
struct numbers {
	/* One past the last byte sent. */
	__u32 end;
	/* The last acknowledgement: where the other direction's next byte belongs. */
	__u32 acknowledged;
};

/* Which backend a client keeps to. Its key is a flow's with port 0. */
struct affinity {
	__u16 backend;
	__u16 pad;
	/* When its last flow began or ended. */
	__u32 since;
};

/* Bits of `flow.counted`: which counts of live flows (live.h) it is in. */
enum counted {
	/* Its service's and its backend's. */
	COUNTED = 1,
	/* Its source's. */
	COUNTED_SOURCE = 2,
};

/* The state of a flow: element of `flows` and `half_flows`. 24 bytes. */
struct flow {
	__u16 backend;
	/* In MODE_NAT the source port towards the backend; otherwise the client's own. */
	__be16 nat_port;
	/* enum flow_flag, of the client's packets */
	__u8 flags;
	/* enum counted */
	__u8 counted;
	/* Of the replication that wrote it; 0: begun here. Userspace only. */
	__u8 generation;
	__u8 pad;
	/* When the client's last packet came. */
	__u32 seen;
	/* When the flow began. */
	__u32 began;
	/* Of the client's segments. */
	struct numbers numbers;
};

/* A flow in the reply's direction: where the backend sends to, and which server it is. */
struct reply_key {
	/* The NAT address in MODE_NAT, the client in MODE_DNAT. */
	struct address address;
	__u32 server;
	__be16 port;
	__u16 pad;
};

/* What a reply needs; element of `replies`. 40 bytes. */
struct reply {
	struct address client;
	__be16 port;
	__u16 service;
	__u16 backend;
	/* enum flow_flag, of the backend's packets */
	__u8 flags;
	__u8 pad;
	/* The interface that the client's packets come by; 0: not known. */
	__u32 ifindex;
	/* When the backend's last packet came. */
	__u32 seen;
	/* Of the backend's segments. */
	struct numbers numbers;
};

/* The same before the flow is established; element of `half_replies`. */
struct half_reply {
	struct reply reply;
	/* Of the backend's SYN+ACK: what the client must confirm to be taken for real. */
	__u32 isn;
};
