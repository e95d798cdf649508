/*
 * What data goes through on its way: compression, then a checksum; verified and undone at the other end
 * (docs/protocol.md section 2).
 *
 * Invariants:
 * - the same bytes as hast/messages.py encode_payload() gives, and the same judgement as its decode_payload();
 * - `size` of what came is checked by the caller against what is in memory, everything else here; nothing is read or
 *   written outside the buffers;
 * - nothing is allocated but by hast_transform_new().
 */
#ifndef HAST_TRANSFORM_H
#define HAST_TRANSFORM_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

/* cffi: begin */
struct hast_transform;

/* compression, checksum: what to send with (enum hast_wire_compression, enum hast_wire_checksum); fast: 0 to do without
   the processor's own instructions. NULL and errno on failure. */
struct hast_transform *hast_transform_new(uint32_t compression, uint32_t checksum, int fast);
void hast_transform_free(struct hast_transform *t);

/*
 * For sending: fills info, returns what is to be sent, info->size bytes: data itself, or scratch (length bytes, at
 * least 4). length: not 0. zero: the data is known to be zeros; it is still to be there where compression is none.
 */
const uint8_t *hast_transform_pack(struct hast_transform *t, const uint8_t *data, uint32_t length, int zero,
    uint8_t *scratch, struct hast_wire_data *info);

/* Whether data of info->size bytes on the wire can stand for length bytes: 1 or 0. */
int hast_transform_fits(const struct hast_wire_data *info, uint64_t length);
/*
 * For receiving: wire holds info->size bytes, which fit (see above). Verifies, and leaves length bytes in out; wire may be out
 * where nothing was compressed. out NULL: a hole is verified and not written. 0, or EBADMSG: the hash is another one, or
 * the data does not give exactly length bytes.
 */
int hast_transform_unpack(struct hast_transform *t, const struct hast_wire_data *info, const uint8_t *wire,
    uint8_t *out, uint32_t length);
/* cffi: end */

#endif
