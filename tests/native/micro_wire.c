/* Micro-benchmarks of messages, and of what data goes through on its way. */
#include <string.h>

#include "crc32.h"
#include "lzf.h"
#include "micro.h"
#include "sha256.h"
#include "transform.h"
#include "wire.h"

#define LARGE 131072u
#define SMALL 4096u

static struct hast_wire_request request;
static struct hast_wire_reply reply;
static uint8_t request_bytes[HAST_WIRE_HEADER_MAX], reply_bytes[HAST_WIRE_HEADER_MAX];
static size_t request_size, reply_size;
static uint8_t *text, *noise, *zeros, *out, *packed;
static size_t packed_small, packed_large;
static uint8_t *packed_4k;
static uint32_t table[HAST_LZF_TABLE];
static struct hast_crc32 crc, crc_slow;
static struct hast_transform *hole;
static int sha_fast;

/* Words over and over in ever another order: about as compressible as text. */
static void
write_text(uint8_t *at, uint32_t size)
{
	static const char *const word[] = { "extent", "component", "secondary", "the", "of", "a", "written", "durable", "is",
	    "map", "flush", "order", "node", "request", "acknowledged", "before" };
	uint32_t state = 1;

	for (uint32_t n = 0; n < size;) {
		const char *w = word[micro_random(&state) % (sizeof(word) / sizeof(word[0]))];

		for (; *w != 0 && n < size; n++)
			at[n] = (uint8_t)*w++;
		if (n < size)
			at[n++] = ' ';
	}
}

void
micro_wire_set_up(void)
{
	uint32_t state = 2;

	text = micro_pages(LARGE);
	noise = micro_pages(LARGE);
	zeros = micro_pages(LARGE);
	out = micro_pages(LARGE + SMALL);
	packed = micro_pages(LARGE);
	packed_4k = micro_pages(SMALL);
	write_text(text, LARGE);
	for (uint32_t i = 0; i < LARGE; i++)
		noise[i] = (uint8_t)micro_random(&state);
	packed_large = hast_lzf_compress(text, LARGE, packed, LARGE, table);
	packed_small = hast_lzf_compress(text, SMALL, packed_4k, SMALL, table);
	MUST(packed_large > 0 && packed_small > 0);
	hast_crc32_init(&crc, 1);
	hast_crc32_init(&crc_slow, 0);
	sha_fast = hast_sha256_fast();
	hole = hast_transform_new(HAST_WIRE_COMPRESSION_HOLE, HAST_WIRE_CHECKSUM_NONE, 1);
	MUST(hole != NULL);
	request = (struct hast_wire_request){ .seq = 123456789, .offset = 4096 * 1000, .length = 4096, .cmd = HAST_WIRE_WRITE,
	    .memsync = 1, .data.size = 4096 };
	reply = (struct hast_wire_reply){ .seq = 123456789 };
	request_size = (size_t)hast_wire_encode_request(&request, 2, request_bytes, sizeof(request_bytes));
	reply_size = (size_t)hast_wire_encode_reply(&reply, 2, reply_bytes, sizeof(reply_bytes));
	MUST(request_size < HAST_WIRE_HEADER_MAX && reply_size < HAST_WIRE_HEADER_MAX);
}

static void
encode_request(uint64_t n)
{
	uint8_t to[HAST_WIRE_HEADER_MAX];

	for (uint64_t i = 0; i < n; i++) {
		request.seq = i + 1;
		micro_use((uint64_t)hast_wire_encode_request(&request, 2, to, sizeof(to)));
	}
}

static void
decode_request(uint64_t n)
{
	struct hast_wire_request got;

	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_wire_decode_request(request_bytes + HAST_WIRE_MAIN_SIZE,
		    request_size - HAST_WIRE_MAIN_SIZE, &got));
}

static void
encode_reply(uint64_t n)
{
	uint8_t to[HAST_WIRE_HEADER_MAX];

	for (uint64_t i = 0; i < n; i++) {
		reply.seq = i + 1;
		micro_use((uint64_t)hast_wire_encode_reply(&reply, 2, to, sizeof(to)));
	}
}

static void
decode_reply(uint64_t n)
{
	struct hast_wire_reply got;

	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_wire_decode_reply(reply_bytes + HAST_WIRE_MAIN_SIZE, reply_size - HAST_WIRE_MAIN_SIZE,
		    &got));
}

static void
compress_4k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_lzf_compress(text, SMALL, out, SMALL, table));
}

static void
compress_128k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_lzf_compress(text, LARGE, out, LARGE, table));
}

static void
compress_noise(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_lzf_compress(noise, LARGE, out, LARGE - 1028, table));
}

static void
decompress_4k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_lzf_decompress(packed_4k, packed_small, out, SMALL));
}

static void
decompress_128k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_lzf_decompress(packed, packed_large, out, LARGE));
}

static void
zero_4k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_is_zero(zeros, SMALL));
}

static void
zero_128k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)hast_is_zero(zeros, LARGE));
}

static void
pack_4k(uint64_t n)
{
	struct hast_wire_data info;

	for (uint64_t i = 0; i < n; i++)
		micro_use((uintptr_t)hast_transform_pack(hole, noise, SMALL, 0, out, &info));
}

static void
crc_4k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_crc32(&crc, noise, SMALL));
}

static void
crc_128k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_crc32(&crc, noise, LARGE));
}

static void
crc_tables(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use(hast_crc32(&crc_slow, noise, SMALL));
}

static void
sha_4k(uint64_t n)
{
	uint8_t hash[HAST_SHA256_SIZE];

	for (uint64_t i = 0; i < n; i++) {
		hast_sha256(sha_fast, noise, SMALL, hash);
		micro_use(hash[0]);
	}
}

static void
sha_plain(uint64_t n)
{
	uint8_t hash[HAST_SHA256_SIZE];

	for (uint64_t i = 0; i < n; i++) {
		hast_sha256(0, noise, SMALL, hash);
		micro_use(hash[0]);
	}
}

const struct micro micro_wire[] = {
	{ "message: encode a write request", encode_request, 0 },
	{ "message: decode a write request", decode_request, 0 },
	{ "message: encode a reply", encode_reply, 0 },
	{ "message: decode a reply", decode_reply, 0 },
	{ "lzf: compress 4 KiB of text", compress_4k, 0 },
	{ "lzf: compress 128 KiB of text", compress_128k, 0 },
	{ "lzf: give up on 128 KiB of noise", compress_noise, 0 },
	{ "lzf: decompress 4 KiB", decompress_4k, 0 },
	{ "lzf: decompress 128 KiB", decompress_128k, 0 },
	{ "zeros: 4 KiB", zero_4k, 0 },
	{ "zeros: 128 KiB", zero_128k, 0 },
	{ "pack: 4 KiB of noise, compression hole", pack_4k, 0 },
	{ "crc32: 4 KiB", crc_4k, 0 },
	{ "crc32: 128 KiB", crc_128k, 0 },
	{ "crc32: 4 KiB, by tables", crc_tables, 0 },
	{ "sha256: 4 KiB", sha_4k, 0 },
	{ "sha256: 4 KiB, without instructions", sha_plain, 0 },
	{ NULL, NULL, 0 }
};
