/*
 * SHA-256 (FIPS 180-4), for the checksum sha256 of docs/protocol.md section 2.
 *
 * Invariants: both ways give the same hash for the same bytes; nothing is read outside [data, data + length).
 */
#ifndef HAST_SHA256_H
#define HAST_SHA256_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define HAST_SHA256_SIZE 32

/* 1 when this processor has instructions for it. */
int hast_sha256_fast(void);
/* fast: what hast_sha256_fast() said, or 0. */
void hast_sha256(int fast, const void *data, size_t length, uint8_t hash[32]);
/* cffi: end */

#endif
