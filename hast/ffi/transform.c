#include "transform.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "crc32.h"
#include "lzf.h"
#include "sha256.h"

#define PREFIX 4u			/* compressed data begins with its original length, little-endian */
#define LZF_FROM 1024u			/* data of this size or less is not worth compressing */
#define LZF_SAVES 1024u			/* what lzf must save, prefix included, to be used */

struct hast_transform {
	uint32_t compression;
	uint32_t checksum;
	int sha_fast;
	struct hast_crc32 crc;
	uint32_t table[HAST_LZF_TABLE];
};

struct hast_transform *
hast_transform_new(uint32_t compression, uint32_t checksum, int fast)
{
	struct hast_transform *t;

	if (compression > HAST_WIRE_COMPRESSION_LZF || checksum > HAST_WIRE_CHECKSUM_SHA256) {
		errno = EINVAL;
		return NULL;
	}
	t = calloc(1, sizeof(*t));
	if (t == NULL)
		return NULL;
	t->compression = compression;
	t->checksum = checksum;
	t->sha_fast = fast && hast_sha256_fast();
	hast_crc32_init(&t->crc, fast);
	return t;
}

void
hast_transform_free(struct hast_transform *t)
{
	free(t);
}

static void
put_prefix(uint8_t *to, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		to[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t
get_prefix(const uint8_t *from)
{
	return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

/* hash: room for HAST_WIRE_HASH_MAX bytes. */
static void
digest(const struct hast_transform *t, int checksum, const uint8_t *data, uint32_t size, uint8_t *hash)
{
	if (checksum == HAST_WIRE_CHECKSUM_CRC32)
		put_prefix(hash, hast_crc32(&t->crc, data, size));
	else if (checksum == HAST_WIRE_CHECKSUM_SHA256)
		hast_sha256(t->sha_fast, data, size, hash);
}

/* ---- sending ---- */

static const uint8_t *
compress(struct hast_transform *t, const uint8_t *data, uint32_t length, int zero, uint8_t *scratch,
    struct hast_wire_data *info)
{
	size_t packed;

	info->size = length;
	if (t->compression == HAST_WIRE_COMPRESSION_NONE)
		return data;
	if (zero || hast_is_zero(data, length)) {
		info->compression = HAST_WIRE_COMPRESSION_HOLE;
		info->size = PREFIX;
		put_prefix(scratch, length);
		return scratch;
	}
	if (t->compression != HAST_WIRE_COMPRESSION_LZF || length <= LZF_FROM + PREFIX)
		return data;
	packed = hast_lzf_compress(data, length, scratch + PREFIX, length - LZF_SAVES - PREFIX, t->table);
	if (packed == 0)
		return data;
	info->compression = HAST_WIRE_COMPRESSION_LZF;
	info->size = PREFIX + (uint32_t)packed;
	put_prefix(scratch, length);
	return scratch;
}

const uint8_t *
hast_transform_pack(struct hast_transform *t, const uint8_t *data, uint32_t length, int zero, uint8_t *scratch,
    struct hast_wire_data *info)
{
	const uint8_t *wire;

	memset(info, 0, sizeof(*info));
	wire = compress(t, data, length, zero, scratch, info);
	info->checksum = (uint8_t)t->checksum;
	digest(t, info->checksum, wire, info->size, info->hash);
	return wire;
}

/* ---- receiving ---- */

int
hast_transform_fits(const struct hast_wire_data *info, uint64_t length)
{
	switch (info->compression) {
	case HAST_WIRE_COMPRESSION_NONE:
		return info->size == length;
	case HAST_WIRE_COMPRESSION_HOLE:
		return info->size == PREFIX;
	default:
		return info->size > PREFIX && info->size <= length + PREFIX;
	}
}

static int
undo(const struct hast_wire_data *info, const uint8_t *wire, uint8_t *out, uint32_t length)
{
	if (info->compression == HAST_WIRE_COMPRESSION_NONE) {
		if (wire != out)
			memcpy(out, wire, length);
		return 0;
	}
	if (get_prefix(wire) != length)
		return EBADMSG;
	if (info->compression == HAST_WIRE_COMPRESSION_LZF)
		return hast_lzf_decompress(wire + PREFIX, info->size - PREFIX, out, length) == 0 ? 0 : EBADMSG;
	if (out != NULL)
		memset(out, 0, length);
	return 0;
}

int
hast_transform_unpack(struct hast_transform *t, const struct hast_wire_data *info, const uint8_t *wire, uint8_t *out,
    uint32_t length)
{
	uint8_t hash[HAST_WIRE_HASH_MAX];

	if (info->checksum != HAST_WIRE_CHECKSUM_NONE) {
		digest(t, info->checksum, wire, info->size, hash);
		if (memcmp(hash, info->hash, (size_t)hast_wire_hash_size(info->checksum)) != 0)
			return EBADMSG;
	}
	return undo(info, wire, out, length);
}
