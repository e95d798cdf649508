/*
 * transform.c: data as it comes off the wire, undone; data packed in each of the nine ways, and undone. The processor's own
 * instructions and the plain code for checksums must say the same.
 * Input: how (1), checksum (1), length (2), 32 bytes of hash, the rest is the data.
 */
#include <stdlib.h>
#include <string.h>

#include "rig.h"
#include "transform.h"

#define MOST 65536u

static struct hast_transform *ways[2][3][3];

static void
set_up(void)
{
	for (uint32_t i = 0; i < 18; i++) {
		ways[i / 9][i / 3 % 3][i % 3] = hast_transform_new(i / 3 % 3, i % 3, (int)(i / 9));
		must(ways[i / 9][i / 3 % 3][i % 3] != NULL, "transform");
	}
}

/* Data that a peer sent, with what it said about it. */
static void
unpack(const struct hast_wire_data *info, const uint8_t *wire, uint32_t length, int nowhere)
{
	uint8_t *out = malloc(length > 0 ? length : 1);
	int fast, slow;

	must(out != NULL, "memory");
	if (nowhere && info->compression == HAST_WIRE_COMPRESSION_HOLE) {
		free(out);
		out = NULL;
	}
	slow = hast_transform_unpack(ways[0][0][0], info, wire, out, length);
	fast = hast_transform_unpack(ways[1][0][0], info, wire, out, length);
	must(slow == fast, "fast and plain code disagree");
	free(out);
}

static void
pack(const uint8_t *data, uint32_t length, int zero)
{
	uint8_t *scratch = malloc(length + 4), *out = malloc(length);

	must(scratch != NULL && out != NULL, "memory");
	for (int i = 0; i < 9; i++) {
		struct hast_wire_data fast, slow;
		const uint8_t *wire;

		(void)hast_transform_pack(ways[0][i / 3][i % 3], data, length, zero, scratch, &slow);
		wire = hast_transform_pack(ways[1][i / 3][i % 3], data, length, zero, scratch, &fast);
		must(memcmp(&fast, &slow, sizeof(fast)) == 0, "fast and plain code disagree");
		must(hast_transform_fits(&fast, length), "what was packed does not fit");
		must(hast_transform_unpack(ways[0][0][0], &fast, wire, out, length) == 0, "it cannot be undone");
		if (!zero)
			must(memcmp(out, data, length) == 0, "another thing comes back");
		if (fast.checksum == HAST_WIRE_CHECKSUM_NONE)
			continue;
		fast.hash[length % (unsigned)hast_wire_hash_size(fast.checksum)] ^= 1;
		must(hast_transform_unpack(ways[1][0][0], &fast, wire, out, length) != 0, "a wrong hash is believed");
	}
	free(scratch);
	free(out);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	struct hast_wire_data info = { 0 };
	uint8_t how = take8(&in), *wire;
	uint32_t length;
	size_t got;
	const uint8_t *hash;

	if (ways[0][0][0] == NULL)
		set_up();
	info.compression = how % 3;
	info.checksum = take8(&in) % 3;
	length = take16(&in);
	hash = take_bytes(&in, sizeof(info.hash), &got);
	memcpy(info.hash, hash, got);
	if (in.left == 0 || in.left > MOST)
		return 0;
	info.size = (uint32_t)in.left;
	wire = malloc(in.left);
	must(wire != NULL, "memory");
	memcpy(wire, in.at, in.left);
	if ((how & 0x80) != 0 && info.compression != HAST_WIRE_COMPRESSION_NONE && in.left >= 4)
		memcpy(wire, &length, 4);	/* else the length field would hide what is behind it */
	if ((how & 0x40) != 0 && info.compression == HAST_WIRE_COMPRESSION_NONE)
		length = info.size;
	if (hast_transform_fits(&info, length)) {
		unpack(&info, wire, length, how & 0x20);
		info.checksum = HAST_WIRE_CHECKSUM_NONE;
		unpack(&info, wire, length, how & 0x20);
	}
	pack(wire, (uint32_t)in.left, 0);
	free(wire);
	return 0;
}
