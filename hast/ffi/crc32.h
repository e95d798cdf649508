/*
 * CRC-32 as zlib computes it (IEEE 802.3, reflected), for the checksum crc32 of docs/protocol.md section 2.
 *
 * Invariants: both ways give the same number for the same bytes; nothing is read outside [data, data + length); the tables
 * belong to the caller, and nothing changes them after hast_crc32_init().
 */
#ifndef HAST_CRC32_H
#define HAST_CRC32_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
struct hast_crc32 {
	uint32_t fast;			/* 1: by carry-less multiplication */
	uint32_t table[8][256];
};

/* fast: 1 for what this processor can do best, 0 for tables only. */
void hast_crc32_init(struct hast_crc32 *c, int fast);
uint32_t hast_crc32(const struct hast_crc32 *c, const void *data, size_t length);
/* cffi: end */

#endif
