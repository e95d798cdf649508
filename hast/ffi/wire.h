/*
 * Requests and replies of the peer protocol, for the pumps (docs/protocol.md sections 1, 2 and 4).
 *
 * Invariants: nothing is read or written outside the buffers given, whatever they hold; no allocation;
 * hast/messages.py accepts, refuses and writes the very same bytes. Error numbers in the structs are this
 * host's, on the wire they are FreeBSD's.
 */
#ifndef HAST_WIRE_H
#define HAST_WIRE_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

#define HAST_WIRE_MAIN_SIZE 5        /* bytes of the main header */
#define HAST_WIRE_HEADER_MAX 384     /* no request or reply encoded here is longer, main header included */
#define HAST_WIRE_REQUEST_LIMIT 65536 /* largest nv of a request or reply that is accepted */
#define HAST_WIRE_HASH_MAX 32

enum hast_wire_cmd {
    HAST_WIRE_READ = 1,
    HAST_WIRE_WRITE = 2,
    HAST_WIRE_DELETE = 3,
    HAST_WIRE_FLUSH = 4,
    HAST_WIRE_KEEPALIVE = 5,
};

enum hast_wire_compression {
    HAST_WIRE_COMPRESSION_NONE = 0,
    HAST_WIRE_COMPRESSION_HOLE = 1,
    HAST_WIRE_COMPRESSION_LZF = 2,
};

enum hast_wire_checksum {
    HAST_WIRE_CHECKSUM_NONE = 0,
    HAST_WIRE_CHECKSUM_CRC32 = 1,
    HAST_WIRE_CHECKSUM_SHA256 = 2,
};

/* What goes wrong, as negative results; hast_wire_error_text() tells people. */
enum hast_wire_error {
    HAST_WIRE_OK = 0,
    HAST_WIRE_EMALFORMED = -1,   /* not nv */
    HAST_WIRE_EMISSING = -2,     /* an element that the message needs is not there */
    HAST_WIRE_ETYPE = -3,        /* an element has another type than it must */
    HAST_WIRE_EVALUE = -4,       /* an element has a value that is not allowed */
    HAST_WIRE_EALGORITHM = -5,   /* unknown compression or checksum, or a hash of the wrong length */
    HAST_WIRE_EVERSION = -6,     /* protocol version above the highest known */
    HAST_WIRE_ELIMIT = -7,       /* header larger than the limit */
    HAST_WIRE_ESPACE = -8,       /* the output buffer is too small */
    HAST_WIRE_ESHORT = -9,       /* fewer bytes than a main header has */
};

/* What a header says about the data behind it. size: bytes on the wire, 0 for no data. */
struct hast_wire_data {
    uint32_t size;
    uint8_t compression;
    uint8_t checksum;
    uint8_t hash[32]; /* the first hast_wire_hash_size(checksum) bytes count, the others are zero */
};

/* offset and length in bytes. */
struct hast_wire_request {
    uint64_t seq;
    uint64_t offset;
    uint64_t length;
    uint8_t cmd;
    uint8_t memsync;
    struct hast_wire_data data;
};

/* error: an errno of this host, 0 for success. */
struct hast_wire_reply {
    uint64_t seq;
    int32_t error;
    uint8_t received;
    struct hast_wire_data data;
};

/*
 * Reads the five bytes of a main header from buf (len bytes). Returns HAST_WIRE_OK, EVERSION, ELIMIT or ESHORT;
 * version and size are set only with OK.
 */
int hast_wire_parse_main(const uint8_t *buf, size_t len, uint8_t highest, uint32_t limit, uint8_t *version,
                         uint32_t *size);

/*
 * Write a whole header, main header included, to out (cap bytes; HAST_WIRE_HEADER_MAX is always enough).
 * Return its length in bytes, or ESPACE or EALGORITHM (nothing usable is in out then).
 */
int hast_wire_encode_request(const struct hast_wire_request *request, uint8_t version, uint8_t *out, size_t cap);
int hast_wire_encode_reply(const struct hast_wire_reply *reply, uint8_t version, uint8_t *out, size_t cap);

/*
 * Read an nv of len bytes (without the main header). Return HAST_WIRE_OK, or the error, and then the message
 * must not be used. A request with an unknown cmd is OK here: hast_wire_check_request() answers it.
 */
int hast_wire_decode_request(const uint8_t *nv, size_t len, struct hast_wire_request *request);
int hast_wire_decode_reply(const uint8_t *nv, size_t len, struct hast_wire_reply *reply);

/*
 * The errno (0 or EINVAL) with which a decoded request must be answered. datasize, sectorsize (a power of two)
 * and max_io (the largest read or write taken) in bytes. EINVAL for a write: close the connection too.
 */
int hast_wire_check_request(const struct hast_wire_request *request, uint64_t datasize, uint32_t sectorsize,
                            uint32_t max_io);

/* Bytes of a hash: 0, 4 or 32; 0 too for an algorithm that is not known. */
int hast_wire_hash_size(int checksum);

/* FreeBSD's number for an errno of this host and back; what the other side does not have becomes EIO. */
int hast_wire_errno_to_wire(int local);
int hast_wire_errno_from_wire(int number);

/* What people read for a negative result. Never NULL. */
const char *hast_wire_error_text(int error);

/* cffi: end */

#endif
