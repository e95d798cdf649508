/* Raw liblzf blocks; the format is described in hast/compression.py and docs/protocol.md section 2. */

#include "lzf.h"

#include <string.h>

#define MAX_LITERALS 32
#define MAX_OFFSET 8192
#define MAX_MATCH 264
#define HASH_BITS 13

_Static_assert(1 << HASH_BITS == HAST_LZF_TABLE, "the hash addresses the whole table");

static uint32_t hash3(const uint8_t *p)
{
    uint32_t key = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];

    return (key * 2654435761u) >> (32 - HASH_BITS);
}

/* Appends literals from..to of in at *used. Returns 0, or -1 when out is full. */
static int put_literals(const uint8_t *in, size_t from, size_t to, uint8_t *out, size_t out_cap, size_t *used)
{
    while (from < to) {
        size_t run = to - from < MAX_LITERALS ? to - from : MAX_LITERALS;

        if (out_cap - *used < run + 1)
            return -1;
        out[(*used)++] = (uint8_t)(run - 1);
        memcpy(out + *used, in + from, run);
        *used += run;
        from += run;
    }
    return 0;
}

/* Appends a match of count bytes, distance bytes back. Returns 0, or -1 when out is full. */
static int put_match(size_t distance, size_t count, uint8_t *out, size_t out_cap, size_t *used)
{
    distance--;
    count -= 2;
    if (out_cap - *used < (count < 7 ? 2u : 3u))
        return -1;
    if (count < 7) {
        out[(*used)++] = (uint8_t)(count << 5 | distance >> 8);
    } else {
        out[(*used)++] = (uint8_t)(7u << 5 | distance >> 8);
        out[(*used)++] = (uint8_t)(count - 7);
    }
    out[(*used)++] = (uint8_t)(distance & 0xff);
    return 0;
}

/* How many bytes at candidate and pos agree, at most `most`; three are known to. */
static size_t match_length(const uint8_t *in, size_t candidate, size_t pos, size_t most)
{
    size_t count = 3;

    while (count < most && in[candidate + count] == in[pos + count])
        count++;
    return count;
}

size_t hast_lzf_compress(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap, uint32_t *table)
{
    size_t used = 0, anchor = 0, pos = 0;
    size_t last = in_len > 2 ? in_len - 2 : 0; /* three bytes begin at each position before this one */

    if (in_len == 0 || in_len > HAST_LZF_INPUT_MAX)
        return 0;
    memset(table, 0, HAST_LZF_TABLE * sizeof(*table)); /* 0 is "empty": position 0 is never a candidate */
    while (pos < last) {
        uint32_t slot = hash3(in + pos);
        size_t candidate = table[slot];
        size_t count;

        table[slot] = (uint32_t)pos;
        if (candidate == 0 || pos - candidate > MAX_OFFSET || last - pos < 3 ||
            memcmp(in + candidate, in + pos, 3) != 0) {
            pos++;
            /* Hopeless already: do not read on only to fail at the end. */
            if (pos - anchor > out_cap - used)
                return 0;
            continue;
        }
        count = match_length(in, candidate, pos, last - pos < MAX_MATCH ? last - pos : MAX_MATCH);
        if (put_literals(in, anchor, pos, out, out_cap, &used) != 0 ||
            put_match(pos - candidate, count, out, out_cap, &used) != 0)
            return 0;
        pos += count;
        for (size_t inside = pos - 2; inside < pos && inside < last; inside++)
            table[hash3(in + inside)] = (uint32_t)inside;
        anchor = pos;
    }
    if (put_literals(in, anchor, in_len, out, out_cap, &used) != 0)
        return 0;
    return used;
}

int hast_lzf_decompress(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    size_t pos = 0, done = 0;

    while (pos < in_len) {
        size_t control = in[pos++];
        size_t count, distance;

        if (control < MAX_LITERALS) {
            count = control + 1;
            if (in_len - pos < count || out_len - done < count)
                return -1;
            memcpy(out + done, in + pos, count);
            pos += count;
            done += count;
            continue;
        }
        count = (control >> 5) + 2;
        if (in_len - pos < (count == 9 ? 2u : 1u))
            return -1;
        if (count == 9)
            count += in[pos++];
        distance = ((control & 0x1f) << 8) + in[pos++] + 1;
        if (distance > done || count > out_len - done)
            return -1;
        if (distance >= count) {
            memcpy(out + done, out + done - distance, count);
        } else {
            /* The match overlaps what it produces: byte by byte repeats the period. */
            for (size_t i = 0; i < count; i++)
                out[done + i] = out[done + i - distance];
        }
        done += count;
    }
    return done == out_len ? 0 : -1;
}

int hast_is_zero(const void *buf, size_t len)
{
    const uint8_t *p = buf;

    if (len == 0)
        return 1;
    /* All bytes equal their neighbour and the first is zero: memcmp is the fastest loop there is. */
    return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}
