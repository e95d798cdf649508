/*
 * Two ways: eight bytes at a time by tables ("slicing by 8"), and 64 bytes at a time by carry-less multiplication, where the
 * processor has it (V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009).
 */
#include "crc32.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define POLYNOMIAL 0xedb88320u
#define FOLD_FROM 64u			/* bytes; the tables are as fast for less */

static uint32_t
word(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint32_t
by_tables(const struct hast_crc32 *c, uint32_t crc, const uint8_t *p, size_t length)
{
	for (; length >= 8; p += 8, length -= 8) {
		uint32_t low = word(p) ^ crc, high = word(p + 4);

		crc = c->table[7][low & 0xff] ^ c->table[6][low >> 8 & 0xff] ^ c->table[5][low >> 16 & 0xff] ^
		    c->table[4][low >> 24] ^ c->table[3][high & 0xff] ^ c->table[2][high >> 8 & 0xff] ^
		    c->table[1][high >> 16 & 0xff] ^ c->table[0][high >> 24];
	}
	for (; length > 0; p++, length--)
		crc = crc >> 8 ^ c->table[0][(crc ^ *p) & 0xff];
	return crc;
}

#if defined(__x86_64__)

static int
can_fold(void)
{
	unsigned a, b, c, d;

	return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_PCLMUL) != 0 && (c & bit_SSE4_1) != 0;
}

/* x moved on by the distance that k stands for, and joined with what is there. */
__attribute__((target("pclmul,sse4.1"))) static inline __m128i
fold(__m128i x, __m128i k, __m128i next)
{
	__m128i low = _mm_clmulepi64_si128(x, k, 0x00), high = _mm_clmulepi64_si128(x, k, 0x11);

	return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* At least 64 bytes. What is left after folding is 16 bytes with the same remainder, and they go through the tables. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t
by_folding(const struct hast_crc32 *c, uint32_t crc, const uint8_t *p, size_t length)
{
	const __m128i far = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);	/* 64 bytes on */
	const __m128i near = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);	/* 16 bytes on */
	const __m128i *in = (const __m128i *)(const void *)p;
	__m128i x[4];
	uint8_t rest[16];

	for (int i = 0; i < 4; i++)
		x[i] = _mm_loadu_si128(in + i);
	x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
	for (in += 4, length -= 64; length >= 64; in += 4, length -= 64) {
		for (int i = 0; i < 4; i++)
			x[i] = fold(x[i], far, _mm_loadu_si128(in + i));
	}
	for (int i = 1; i < 4; i++)
		x[0] = fold(x[0], near, x[i]);
	for (; length >= 16; in++, length -= 16)
		x[0] = fold(x[0], near, _mm_loadu_si128(in));
	_mm_storeu_si128((__m128i *)(void *)rest, x[0]);
	return by_tables(c, by_tables(c, 0, rest, sizeof(rest)), (const uint8_t *)in, length);
}

#else

static int
can_fold(void)
{
	return 0;
}

static uint32_t
by_folding(const struct hast_crc32 *c, uint32_t crc, const uint8_t *p, size_t length)
{
	return by_tables(c, crc, p, length);
}

#endif

void
hast_crc32_init(struct hast_crc32 *c, int fast)
{
	c->fast = fast && can_fold();
	for (uint32_t n = 0; n < 256; n++) {
		uint32_t crc = n;

		for (int bit = 0; bit < 8; bit++)
			crc = (crc & 1) != 0 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
		c->table[0][n] = crc;
	}
	for (int t = 1; t < 8; t++) {
		for (uint32_t n = 0; n < 256; n++)
			c->table[t][n] = c->table[t - 1][n] >> 8 ^ c->table[0][c->table[t - 1][n] & 0xff];
	}
}

uint32_t
hast_crc32(const struct hast_crc32 *c, const void *data, size_t length)
{
	if (c->fast && length >= FOLD_FROM)
		return ~by_folding(c, ~0u, data, length);
	return ~by_tables(c, ~0u, data, length);
}
