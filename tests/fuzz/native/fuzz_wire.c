/*
 * wire.c: main header, requests and replies, from any bytes; what was understood is written and read again.
 * Input: the first byte chooses; the rest is the nv.
 */
#include <stdlib.h>
#include <string.h>

#include "rig.h"
#include "wire.h"

static void
main_header(const uint8_t *data, size_t size)
{
	uint8_t version = 0;
	uint32_t length = 0;
	int error = hast_wire_parse_main(data, size, 2, HAST_WIRE_REQUEST_LIMIT, &version, &length);

	must(hast_wire_error_text(error) != NULL, "no text");
	if (error == 0)
		must(size >= HAST_WIRE_MAIN_SIZE && version <= 2 && length <= HAST_WIRE_REQUEST_LIMIT, "main header");
}

static void
same_data(const struct hast_wire_data *a, const struct hast_wire_data *b)
{
	must(a->size == b->size, "size");
	if (a->size == 0)
		return;	/* what is said about no data is not written */
	must(a->compression == b->compression && a->checksum == b->checksum, "algorithms");
	must(memcmp(a->hash, b->hash, sizeof(a->hash)) == 0, "hash");
}

static void
request(const uint8_t *nv, size_t size)
{
	struct hast_wire_request r, again;
	uint8_t out[HAST_WIRE_HEADER_MAX];
	int error = hast_wire_decode_request(nv, size, &r), length;

	if (error != 0) {
		must(error < 0 && error >= HAST_WIRE_ESHORT, "an error that there is not");
		return;
	}
	error = hast_wire_check_request(&r, 1 << 20, 512, 131072);
	if (error == 0 && r.cmd >= HAST_WIRE_READ && r.cmd <= HAST_WIRE_DELETE) {
		must(r.length > 0 && r.length <= 1 << 20 && r.offset <= (1 << 20) - r.length, "range");
		must(r.cmd == HAST_WIRE_DELETE || r.length <= 131072, "length");
		must(r.cmd != HAST_WIRE_WRITE || (r.data.size > 0 && r.data.size <= r.length + 4), "data");
	}
	length = hast_wire_encode_request(&r, 2, out, sizeof(out));
	must(length > HAST_WIRE_MAIN_SIZE, "a request that was read cannot be written");
	must(hast_wire_decode_request(out + HAST_WIRE_MAIN_SIZE, (size_t)length - HAST_WIRE_MAIN_SIZE, &again) == 0,
	    "a request that was written cannot be read");
	must(again.cmd == r.cmd, "cmd");
	if (r.cmd == HAST_WIRE_KEEPALIVE)
		return;
	must(again.seq == r.seq && again.offset == r.offset && again.length == r.length, "numbers");
	must(again.memsync == r.memsync, "memsync");
	same_data(&r.data, &again.data);
	for (int cap = 0; cap < length; cap += 7)
		must(hast_wire_encode_request(&r, 2, out, (size_t)cap) == HAST_WIRE_ESPACE, "space");
}

static void
reply(const uint8_t *nv, size_t size)
{
	struct hast_wire_reply r, again;
	uint8_t out[HAST_WIRE_HEADER_MAX];
	int length;

	if (hast_wire_decode_reply(nv, size, &r) != 0)
		return;
	must(r.error >= 0 && r.seq != 0, "reply");
	length = hast_wire_encode_reply(&r, 2, out, sizeof(out));
	must(length > HAST_WIRE_MAIN_SIZE, "a reply that was read cannot be written");
	must(hast_wire_decode_reply(out + HAST_WIRE_MAIN_SIZE, (size_t)length - HAST_WIRE_MAIN_SIZE, &again) == 0,
	    "a reply that was written cannot be read");
	must(again.seq == r.seq && again.received == r.received && again.error == r.error, "reply differs");
	same_data(&r.data, &again.data);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy;

	if (size == 0)
		return 0;
	/* Of its own size: a read past its end is seen. */
	copy = malloc(size);
	must(copy != NULL, "memory");
	memcpy(copy, data, size);
	main_header(copy + 1, size - 1);
	if (copy[0] & 1)
		reply(copy + 1, size - 1);
	else
		request(copy + 1, size - 1);
	free(copy);
	return 0;
}
