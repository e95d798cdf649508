/*
 * Raw liblzf blocks and the test for holes (docs/protocol.md section 2).
 *
 * Invariants: nothing is read outside [in, in + in_len) or written outside [out, out + out_cap), whatever the
 * input; no allocation; the same bytes as hast/compression.py gives.
 */
#ifndef HAST_LZF_H
#define HAST_LZF_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* Entries of the caller's hash table, and the longest input of hast_lzf_compress(). */
#define HAST_LZF_TABLE 8192
#define HAST_LZF_INPUT_MAX 0x7fffffff

/*
 * Compress in_len bytes. table has HAST_LZF_TABLE entries; what it holds does not matter.
 * Returns the length of the block, or 0 when it would be longer than out_cap (or in_len is 0 or too large).
 */
size_t hast_lzf_compress(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap, uint32_t *table);

/*
 * Undo a block. Returns 0 when it was valid and gave exactly out_len bytes, else -1 (out is then undefined).
 */
int hast_lzf_decompress(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len);

/* 1 when all len bytes are zero (also when len is 0), else 0. */
int hast_is_zero(const void *buf, size_t len);

/* cffi: end */

#endif
