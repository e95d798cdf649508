/*
 * lzf.c: any bytes as a block; any bytes as data, packed into any room and unpacked again.
 * Input: two bytes, a length or room; the rest.
 */
#include <stdlib.h>
#include <string.h>

#include "lzf.h"
#include "rig.h"

static void
decompress(const uint8_t *block, size_t size, size_t length)
{
	uint8_t *out = malloc(length > 0 ? length : 1);

	must(out != NULL, "memory");
	(void)hast_lzf_decompress(block, size, out, length);
	free(out);
}

static void
round_trip(const uint8_t *data, size_t size, size_t room)
{
	static uint32_t table[HAST_LZF_TABLE];
	uint8_t *packed = malloc(room > 0 ? room : 1), *out = malloc(size > 0 ? size : 1);
	size_t length;

	must(packed != NULL && out != NULL, "memory");
	memset(table, 0xee, sizeof(table));
	length = hast_lzf_compress(data, size, packed, room, table);
	must(length <= room, "longer than its room");
	if (length > 0) {
		must(hast_lzf_decompress(packed, length, out, size) == 0, "what was packed is not valid");
		must(memcmp(out, data, size) == 0, "another thing comes back");
		must(hast_lzf_decompress(packed, length, out, size - 1) != 0, "it fits into less than its length");
	} else if (size > 0) {
		must(room < size + size / 32 + 1, "no room, though there is enough");
	}
	free(packed);
	free(out);
}

static int
plain_zero(const uint8_t *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		if (data[i] != 0)
			return 0;
	return 1;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	size_t length = take16(&in);
	uint8_t *copy = malloc(in.left > 0 ? in.left : 1);

	must(copy != NULL, "memory");
	memcpy(copy, in.at, in.left);
	decompress(copy, in.left, length);
	round_trip(copy, in.left, length);
	round_trip(copy, in.left, in.left + in.left / 32 + 1);
	must(hast_is_zero(copy, in.left) == plain_zero(copy, in.left), "zeros");
	free(copy);
	return 0;
}
