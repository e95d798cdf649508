/* Requests and replies of the peer protocol as bytes; docs/protocol.md sections 1, 2 and 4 describe them. */

#include "wire.h"

#include <errno.h>
#include <string.h>

enum nv_type {
    NV_INT8 = 1,
    NV_UINT8 = 2,
    NV_INT16 = 3,
    NV_UINT32 = 6,
    NV_UINT64 = 8,
    NV_INT8_ARRAY = 9,
    NV_UINT8_ARRAY = 10,
    NV_STRING = 17,
};

#define ELEMENT_SIZE 6 /* type, namesize, dsize */

/* 64-bit, so that no uint32 from the wire can make it wrap, whatever the size of size_t. */
static uint64_t roundup8(uint64_t n)
{
    return (n + 7) & ~(uint64_t)7;
}

static uint64_t get_le(const uint8_t *p, size_t bytes)
{
    uint64_t value = 0;

    for (size_t i = bytes; i > 0; i--)
        value = value << 8 | p[i - 1];
    return value;
}

static void put_le(uint8_t *p, uint64_t value, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++, value >>= 8)
        p[i] = (uint8_t)(value & 0xff);
}

/* Errors. */

static const struct {
    int local;
    int wire;
} errnos[] = {
    {EDEADLK, 11}, {EAGAIN, 35}, {EINPROGRESS, 36}, {EALREADY, 37}, {ENOTSOCK, 38}, {EDESTADDRREQ, 39},
    {EMSGSIZE, 40}, {EPROTOTYPE, 41}, {ENOPROTOOPT, 42}, {EPROTONOSUPPORT, 43}, {ESOCKTNOSUPPORT, 44},
    {EOPNOTSUPP, 45}, {EPFNOSUPPORT, 46}, {EAFNOSUPPORT, 47}, {EADDRINUSE, 48}, {EADDRNOTAVAIL, 49},
    {ENETDOWN, 50}, {ENETUNREACH, 51}, {ENETRESET, 52}, {ECONNABORTED, 53}, {ECONNRESET, 54}, {ENOBUFS, 55},
    {EISCONN, 56}, {ENOTCONN, 57}, {ESHUTDOWN, 58}, {ETOOMANYREFS, 59}, {ETIMEDOUT, 60}, {ECONNREFUSED, 61},
    {ELOOP, 62}, {ENAMETOOLONG, 63}, {EHOSTDOWN, 64}, {EHOSTUNREACH, 65}, {ENOTEMPTY, 66}, {EUSERS, 68},
    {EDQUOT, 69}, {ESTALE, 70}, {EREMOTE, 71}, {ENOLCK, 77}, {ENOSYS, 78}, {EIDRM, 82}, {ENOMSG, 83},
    {EOVERFLOW, 84}, {ECANCELED, 85}, {EILSEQ, 86}, {EBADMSG, 89}, {EMULTIHOP, 90}, {ENOLINK, 91},
    {EPROTO, 92}, {ENOTRECOVERABLE, 95}, {EOWNERDEAD, 96},
};

/* 1 to 34 are the same everywhere, but for 11: EDEADLK on FreeBSD, EAGAIN on Linux. */
static int is_common(int number)
{
    return number >= 1 && number <= 34 && number != 11;
}

int hast_wire_errno_to_wire(int local)
{
    if (local == 0 || is_common(local))
        return local;
    for (size_t i = 0; i < sizeof(errnos) / sizeof(errnos[0]); i++)
        if (errnos[i].local == local)
            return errnos[i].wire;
    return 5;
}

int hast_wire_errno_from_wire(int number)
{
    if (number == 0 || is_common(number))
        return number;
    for (size_t i = 0; i < sizeof(errnos) / sizeof(errnos[0]); i++)
        if (errnos[i].wire == number)
            return errnos[i].local;
    return EIO;
}

const char *hast_wire_error_text(int error)
{
    switch (error) {
    case HAST_WIRE_OK: return "no error";
    case HAST_WIRE_EMALFORMED: return "the header is not valid name/value data";
    case HAST_WIRE_EMISSING: return "an element that the message needs is missing";
    case HAST_WIRE_ETYPE: return "an element has the wrong type";
    case HAST_WIRE_EVALUE: return "an element has a value that is not allowed";
    case HAST_WIRE_EALGORITHM: return "unknown compression or checksum, or a hash of the wrong length";
    case HAST_WIRE_EVERSION: return "the protocol version is higher than any known here";
    case HAST_WIRE_ELIMIT: return "the header is larger than allowed";
    case HAST_WIRE_ESPACE: return "the buffer is too small for the header";
    case HAST_WIRE_ESHORT: return "the message ends in its main header";
    default: return "unknown error";
    }
}

/* Writing. A writer that ran out of space stays so, and reports it at the end. */

struct writer {
    uint8_t *out;
    size_t cap;
    size_t used;
    int error;
};

static void put_element(struct writer *w, uint8_t type, const char *name, const uint8_t *value, uint32_t dsize)
{
    size_t namesize = strlen(name) + 1;
    uint64_t needed = ELEMENT_SIZE + roundup8(namesize) + roundup8(dsize);
    uint8_t *p;

    if (w->error != 0 || w->cap - w->used < needed) {
        w->error = HAST_WIRE_ESPACE;
        return;
    }
    p = w->out + w->used;
    memset(p, 0, (size_t)needed);
    p[0] = type;
    p[1] = (uint8_t)namesize;
    put_le(p + 2, dsize, 4);
    memcpy(p + ELEMENT_SIZE, name, namesize);
    memcpy(p + ELEMENT_SIZE + roundup8(namesize), value, dsize);
    w->used += (size_t)needed;
}

static void put_int(struct writer *w, uint8_t type, const char *name, uint64_t value, uint32_t bytes)
{
    uint8_t raw[8];

    put_le(raw, value, bytes);
    put_element(w, type, name, raw, bytes);
}

static void put_string(struct writer *w, const char *name, const char *text)
{
    put_element(w, NV_STRING, name, (const uint8_t *)text, (uint32_t)strlen(text) + 1);
}

/* Names of the algorithms by number; NULL for those that are not known. */

static const char *compression_name(int compression)
{
    switch (compression) {
    case HAST_WIRE_COMPRESSION_HOLE: return "hole";
    case HAST_WIRE_COMPRESSION_LZF: return "lzf";
    default: return NULL;
    }
}

static const char *checksum_name(int checksum)
{
    switch (checksum) {
    case HAST_WIRE_CHECKSUM_CRC32: return "crc32";
    case HAST_WIRE_CHECKSUM_SHA256: return "sha256";
    default: return NULL;
    }
}

int hast_wire_hash_size(int checksum)
{
    switch (checksum) {
    case HAST_WIRE_CHECKSUM_CRC32: return 4;
    case HAST_WIRE_CHECKSUM_SHA256: return 32;
    default: return 0;
    }
}

static void put_data(struct writer *w, const struct hast_wire_data *data)
{
    const char *compression = compression_name(data->compression);
    const char *checksum = checksum_name(data->checksum);

    if (data->size == 0)
        return;
    if ((compression == NULL && data->compression != HAST_WIRE_COMPRESSION_NONE) ||
        (checksum == NULL && data->checksum != HAST_WIRE_CHECKSUM_NONE)) {
        w->error = HAST_WIRE_EALGORITHM;
        return;
    }
    if (compression != NULL)
        put_string(w, "compression", compression);
    if (checksum != NULL) {
        put_string(w, "checksum", checksum);
        put_element(w, NV_UINT8_ARRAY, "hash", data->hash, (uint32_t)hast_wire_hash_size(data->checksum));
    }
    put_int(w, NV_UINT32, "size", data->size, 4);
}

static struct writer begin_message(uint8_t *out, size_t cap)
{
    struct writer w = {out, cap, HAST_WIRE_MAIN_SIZE, 0};

    if (cap < HAST_WIRE_MAIN_SIZE) {
        w.used = cap;
        w.error = HAST_WIRE_ESPACE;
    }
    return w;
}

static int end_message(struct writer *w, uint8_t version)
{
    if (w->error != 0)
        return w->error;
    w->out[0] = version;
    put_le(w->out + 1, w->used - HAST_WIRE_MAIN_SIZE, 4);
    return (int)w->used;
}

int hast_wire_encode_request(const struct hast_wire_request *request, uint8_t version, uint8_t *out, size_t cap)
{
    struct writer w = begin_message(out, cap);

    put_int(&w, NV_UINT8, "cmd", request->cmd, 1);
    if (request->cmd != HAST_WIRE_KEEPALIVE) {
        put_int(&w, NV_UINT64, "seq", request->seq, 8);
        put_int(&w, NV_UINT64, "offset", request->offset, 8);
        put_int(&w, NV_UINT64, "length", request->length, 8);
        if (request->memsync)
            put_int(&w, NV_UINT8, "memsync", 1, 1);
        put_data(&w, &request->data);
    }
    return end_message(&w, version);
}

int hast_wire_encode_reply(const struct hast_wire_reply *reply, uint8_t version, uint8_t *out, size_t cap)
{
    struct writer w = begin_message(out, cap);

    put_int(&w, NV_UINT64, "seq", reply->seq, 8);
    if (reply->received)
        put_int(&w, NV_INT8, "received", 1, 1);
    if (reply->error != 0)
        put_int(&w, NV_INT16, "error", (uint64_t)hast_wire_errno_to_wire(reply->error), 2);
    put_data(&w, &reply->data);
    return end_message(&w, version);
}

/* Reading: one pass over the nv puts each known element, the first of its name, into its place. */

int hast_wire_parse_main(const uint8_t *buf, size_t len, uint8_t highest, uint32_t limit, uint8_t *version,
                         uint32_t *size)
{
    uint32_t wanted;

    if (len < HAST_WIRE_MAIN_SIZE)
        return HAST_WIRE_ESHORT;
    wanted = (uint32_t)get_le(buf + 1, 4);
    if (buf[0] > highest)
        return HAST_WIRE_EVERSION;
    if (wanted > limit)
        return HAST_WIRE_ELIMIT;
    *version = buf[0];
    *size = wanted;
    return HAST_WIRE_OK;
}

struct element {
    uint8_t type;
    uint32_t dsize;
    const char *name; /* NUL-terminated inside the buffer: next_element() has checked that */
    const uint8_t *value;
};

/* Whether a value of dsize bytes fits a type; types that are not known fit nothing. */
static int value_fits(uint8_t type, const uint8_t *value, uint32_t dsize)
{
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 8, 8};

    if (dsize == 0 || type == 0 || type > NV_STRING)
        return 0;
    if (type == NV_STRING)
        return memchr(value, 0, dsize) == value + dsize - 1;
    if (type < NV_INT8_ARRAY)
        return dsize == sizes[type - NV_INT8];
    return dsize % sizes[type - NV_INT8_ARRAY] == 0;
}

/* Takes the element at *pos. Returns 1 and moves *pos behind it, 0 at the end, or EMALFORMED. */
static int next_element(const uint8_t *nv, size_t len, size_t *pos, struct element *e)
{
    const uint8_t *p = nv + *pos;
    size_t left = len - *pos;
    uint64_t value_at, end;
    uint8_t namesize;

    if (left == 0 || p[0] == 0)
        return 0;
    if (left < ELEMENT_SIZE)
        return HAST_WIRE_EMALFORMED;
    e->type = p[0]; /* with the top bit (network order) set it is above NV_STRING: value_fits() refuses it */
    namesize = p[1];
    e->dsize = (uint32_t)get_le(p + 2, 4);
    value_at = ELEMENT_SIZE + roundup8(namesize);
    end = value_at + roundup8(e->dsize);
    if (namesize < 2 || end > left)
        return HAST_WIRE_EMALFORMED;
    e->name = (const char *)p + ELEMENT_SIZE;
    e->value = p + value_at;
    if (memchr(e->name, 0, namesize) != e->name + namesize - 1 || !value_fits(e->type, e->value, e->dsize))
        return HAST_WIRE_EMALFORMED;
    *pos += (size_t)end;
    return 1;
}

/* The first element of each name that a request or a reply may have; type 0 where there is none. */
enum known { CMD, SEQ, OFFSET, LENGTH, MEMSYNC, RECEIVED, ERROR, COMPRESSION, CHECKSUM, HASH, SIZE, KNOWN };

static const struct {
    const char *name;
    uint8_t type;
} known[KNOWN] = {
    [CMD] = {"cmd", NV_UINT8},
    [SEQ] = {"seq", NV_UINT64},
    [OFFSET] = {"offset", NV_UINT64},
    [LENGTH] = {"length", NV_UINT64},
    [MEMSYNC] = {"memsync", NV_UINT8},
    [RECEIVED] = {"received", NV_INT8},
    [ERROR] = {"error", NV_INT16},
    [COMPRESSION] = {"compression", NV_STRING},
    [CHECKSUM] = {"checksum", NV_STRING},
    [HASH] = {"hash", NV_UINT8_ARRAY},
    [SIZE] = {"size", NV_UINT32},
};

static int scan(const uint8_t *nv, size_t len, struct element found[KNOWN])
{
    struct element e;
    size_t pos = 0;
    int more;

    if (len > HAST_WIRE_REQUEST_LIMIT)
        return HAST_WIRE_ELIMIT;
    memset(found, 0, KNOWN * sizeof(found[0]));
    while ((more = next_element(nv, len, &pos, &e)) > 0) {
        for (int k = 0; k < KNOWN; k++) {
            if (strcmp(e.name, known[k].name) != 0)
                continue;
            if (found[k].type == 0)
                found[k] = e;
            break;
        }
    }
    return more;
}

/* Reads an integer element to *value; absent: leaves it, and returns `absent`. */
static int take_int(const struct element found[KNOWN], enum known k, uint64_t *value, int absent)
{
    if (found[k].type == 0)
        return absent;
    if (found[k].type != known[k].type)
        return HAST_WIRE_ETYPE;
    *value = get_le(found[k].value, found[k].dsize);
    return HAST_WIRE_OK;
}

/* Which of the names 1 and 2 an algorithm element holds; absent: 0. Negative on error. */
static int take_algorithm(const struct element found[KNOWN], enum known k, const char *(*name_of)(int))
{
    if (found[k].type == 0)
        return 0;
    if (found[k].type != NV_STRING)
        return HAST_WIRE_ETYPE;
    for (int number = 1; number <= 2; number++)
        if (strcmp((const char *)found[k].value, name_of(number)) == 0)
            return number;
    return HAST_WIRE_EALGORITHM;
}

static int take_data(const struct element found[KNOWN], struct hast_wire_data *data)
{
    int compression = take_algorithm(found, COMPRESSION, compression_name);
    int checksum = take_algorithm(found, CHECKSUM, checksum_name);
    uint64_t size = 0;
    int error;

    if (compression < 0)
        return compression;
    if (checksum < 0)
        return checksum;
    if (checksum != HAST_WIRE_CHECKSUM_NONE) {
        if (found[HASH].type == 0)
            return HAST_WIRE_EMISSING;
        if (found[HASH].type != NV_UINT8_ARRAY)
            return HAST_WIRE_ETYPE;
        if (found[HASH].dsize != (uint32_t)hast_wire_hash_size(checksum))
            return HAST_WIRE_EALGORITHM;
        memcpy(data->hash, found[HASH].value, found[HASH].dsize);
    }
    error = take_int(found, SIZE, &size, HAST_WIRE_OK);
    data->size = (uint32_t)size;
    data->compression = (uint8_t)compression;
    data->checksum = (uint8_t)checksum;
    return error;
}

int hast_wire_decode_request(const uint8_t *nv, size_t len, struct hast_wire_request *request)
{
    struct element found[KNOWN];
    uint64_t cmd = 0, memsync = 0;
    int absent, error;

    memset(request, 0, sizeof(*request));
    if ((error = scan(nv, len, found)) != 0 || (error = take_int(found, CMD, &cmd, HAST_WIRE_EMISSING)) != 0)
        return error;
    request->cmd = (uint8_t)cmd;
    if (cmd == HAST_WIRE_KEEPALIVE)
        return HAST_WIRE_OK;
    absent = cmd == HAST_WIRE_READ || cmd == HAST_WIRE_WRITE || cmd == HAST_WIRE_DELETE ? HAST_WIRE_EMISSING : 0;
    if ((error = take_int(found, SEQ, &request->seq, HAST_WIRE_EMISSING)) != 0 ||
        (error = take_int(found, OFFSET, &request->offset, absent)) != 0 ||
        (error = take_int(found, LENGTH, &request->length, absent)) != 0 ||
        (error = take_int(found, MEMSYNC, &memsync, 0)) != 0 || (error = take_data(found, &request->data)) != 0)
        return error;
    request->memsync = memsync != 0;
    /* Data behind anything but a write would be read as the next message. */
    if (request->seq == 0 || (cmd == HAST_WIRE_WRITE) != (request->data.size != 0))
        return HAST_WIRE_EVALUE;
    return HAST_WIRE_OK;
}

int hast_wire_decode_reply(const uint8_t *nv, size_t len, struct hast_wire_reply *reply)
{
    struct element found[KNOWN];
    uint64_t received = 0, number = 0;
    int error;

    memset(reply, 0, sizeof(*reply));
    if ((error = scan(nv, len, found)) != 0 ||
        (error = take_int(found, SEQ, &reply->seq, HAST_WIRE_EMISSING)) != 0 ||
        (error = take_int(found, RECEIVED, &received, 0)) != 0 ||
        (error = take_int(found, ERROR, &number, 0)) != 0 || (error = take_data(found, &reply->data)) != 0)
        return error;
    reply->received = received != 0;
    /* A negative int16 is above 0x7fff here: no errno, so EIO. */
    reply->error = hast_wire_errno_from_wire((int)number);
    return reply->seq == 0 ? HAST_WIRE_EVALUE : HAST_WIRE_OK;
}

/* Whether data of this size on the wire can stand for length bytes. */
static int data_size_fits(const struct hast_wire_data *data, uint64_t length)
{
    switch (data->compression) {
    case HAST_WIRE_COMPRESSION_NONE: return data->size == length;
    case HAST_WIRE_COMPRESSION_HOLE: return data->size == 4;
    default: return data->size > 4 && data->size <= length + 4;
    }
}

int hast_wire_check_request(const struct hast_wire_request *request, uint64_t datasize, uint32_t sectorsize,
                            uint32_t max_io)
{
    uint64_t offset = request->offset, length = request->length;

    switch (request->cmd) {
    case HAST_WIRE_FLUSH:
    case HAST_WIRE_KEEPALIVE:
        return 0;
    case HAST_WIRE_READ:
    case HAST_WIRE_WRITE:
    case HAST_WIRE_DELETE:
        break;
    default:
        return EINVAL;
    }
    if (length == 0 || ((offset | length) & (sectorsize - 1)) != 0 || length > datasize ||
        offset > datasize - length)
        return EINVAL;
    if (request->cmd != HAST_WIRE_DELETE && length > max_io)
        return EINVAL;
    if (request->cmd == HAST_WIRE_WRITE && !data_size_fits(&request->data, length))
        return EINVAL;
    return 0;
}
