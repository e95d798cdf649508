/* Two ways to do a block: as FIPS 180-4 section 6.2 describes it, and by the processor's instructions where it has them. */

#include "sha256.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define BLOCK 64u

typedef void (*blocks_fn)(uint32_t state[8], const uint8_t *data, size_t n);

static const uint32_t k[64] __attribute__((aligned(16))) = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t
get_be(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

static void
put_be(uint8_t *p, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(value >> (24 - 8 * i));
}

static uint32_t
rotate(uint32_t x, int n)
{
	return x >> n | x << (32 - n);
}

static void
schedule(uint32_t w[64], const uint8_t *data)
{
	for (int i = 0; i < 16; i++)
		w[i] = get_be(data + 4 * i);
	for (int i = 16; i < 64; i++) {
		uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
		uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;

		w[i] = w[i - 16] + s0 + w[i - 7] + s1;
	}
}

static void
portable_blocks(uint32_t state[8], const uint8_t *data, size_t n)
{
	uint32_t w[64];

	for (; n > 0; n--, data += BLOCK) {
		uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
		uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

		schedule(w, data);
		for (int i = 0; i < 64; i++) {
			uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
			uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
			uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + k[i] + w[i];
			uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));

			h = g;
			g = f;
			f = e;
			e = d + t1;
			d = c;
			c = b;
			b = a;
			a = t1 + t2;
		}
		state[0] += a;
		state[1] += b;
		state[2] += c;
		state[3] += d;
		state[4] += e;
		state[5] += f;
		state[6] += g;
		state[7] += h;
	}
}

#if defined(__x86_64__)

#define CPUID_SHA (1u << 29)		/* leaf 7, EBX */

int
hast_sha256_fast(void)
{
	unsigned a, b, c, d;

	if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_SSE4_1) == 0 || (c & bit_SSSE3) == 0)
		return 0;
	return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & CPUID_SHA) != 0;
}

/* The instructions want the state as two vectors, ABEF and CDGH, and do four rounds with two of them. */
__attribute__((target("sha,sse4.1,ssse3"))) static void
fast_blocks(uint32_t state[8], const uint8_t *data, size_t n)
{
	const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
	const __m128i *constants = (const __m128i *)(const void *)k;
	__m128i *at = (__m128i *)(void *)state;
	__m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(at), 0xb1);
	__m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(at + 1), 0x1b);
	__m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
	__m128i feba, dchg;

	for (; n > 0; n--, data += BLOCK) {
		const __m128i *in = (const __m128i *)(const void *)data;
		const __m128i abef_before = abef, cdgh_before = cdgh;
		__m128i w[4];

		for (int i = 0; i < 4; i++)
			w[i] = _mm_shuffle_epi8(_mm_loadu_si128(in + i), big_endian);
#pragma GCC unroll 16
		for (int i = 0; i < 16; i++) {
			__m128i sum = _mm_add_epi32(w[i & 3], constants[i]);

			cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
			abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
			if (i < 12) {
				__m128i last = w[(i + 3) & 3];
				__m128i next = _mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]);

				next = _mm_add_epi32(next, _mm_alignr_epi8(last, w[(i + 2) & 3], 4));
				w[i & 3] = _mm_sha256msg2_epu32(next, last);
			}
		}
		abef = _mm_add_epi32(abef, abef_before);
		cdgh = _mm_add_epi32(cdgh, cdgh_before);
	}
	feba = _mm_shuffle_epi32(abef, 0x1b);
	dchg = _mm_shuffle_epi32(cdgh, 0xb1);
	_mm_storeu_si128(at, _mm_blend_epi16(feba, dchg, 0xf0));
	_mm_storeu_si128(at + 1, _mm_alignr_epi8(dchg, feba, 8));
}

static blocks_fn
blocks_of(int fast)
{
	return fast ? fast_blocks : portable_blocks;
}

#else

int
hast_sha256_fast(void)
{
	return 0;
}

static blocks_fn
blocks_of(int fast)
{
	(void)fast;
	return portable_blocks;
}

#endif

void
hast_sha256(int fast, const void *data, size_t length, uint8_t hash[32])
{
	uint32_t state[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab,
	    0x5be0cd19 };
	blocks_fn blocks = blocks_of(fast);
	size_t whole = length - length % BLOCK, rest = length % BLOCK;
	uint8_t tail[2 * BLOCK] = { 0 };
	size_t tail_size = rest < BLOCK - 8 ? BLOCK : 2 * BLOCK;

	blocks(state, data, whole / BLOCK);
	if (rest > 0)
		memcpy(tail, (const uint8_t *)data + whole, rest);
	tail[rest] = 0x80;
	put_be(tail + tail_size - 8, (uint32_t)((uint64_t)length >> 29));
	put_be(tail + tail_size - 4, (uint32_t)((uint64_t)length << 3));
	blocks(state, tail, tail_size / BLOCK);
	for (int i = 0; i < 8; i++)
		put_be(hash + 4 * i, state[i]);
}
