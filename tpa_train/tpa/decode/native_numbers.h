/* Numbers of a packed cache: how an entry lies in memory (entries.py, quantization.py), unpacking and packing. */

#ifndef TPA_NATIVE_NUMBERS
#define TPA_NATIVE_NUMBERS

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define GROUP 32
#define LANES 16
#define MAX_SEGMENTS 64
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

/* A segment is neighbouring groups of one width (entries.Run). Both are mirrored field by field in native.py. Strides
   are in bytes; kinds: 0 float32, 1 bfloat16, 2 float16. */
typedef struct {
    char *codes, *scales; /* scales: of rounded segments */
    int64_t code_row, code_token, code_head, scale_row, scale_token, scale_head;
    int64_t high; /* from codes to those of the upper plane, where there are two: of 6 bits 4 + 2, of 3 bits 2 + 1 */
    int32_t start, count, bits, kind;
} Segment;

typedef struct {
    int32_t rows, count, segments, padded; /* rows of one token; padded: count, to a multiple of 32 */
    const char *news; /* the newest token of every sequence, [batch, rows, count], to be packed first; or NULL */
    int64_t news_kind;
    Segment segment[MAX_SEGMENTS];
} Entry;

INLINE float as_float(uint32_t w) {
    float f;
    memcpy(&f, &w, 4);
    return f;
}

/* Without float16 arithmetic, so that every compiler makes vectors of it; infinities are never stored. */
INLINE float from_half(uint16_t h) {
    const uint32_t w = (uint32_t)(h & 0x7fff) << 13;
    const float small = as_float(w + (113u << 23)) - 0x1p-14f, normal = as_float(w + (112u << 23));
    const float f = h & 0x7c00 ? normal : small;
    return h & 0x8000 ? -f : f;
}

INLINE float number(const void *p, int kind, int64_t i) {
    if (kind == 0) return ((const float *)p)[i];
    const uint16_t h = ((const uint16_t *)p)[i];
    return kind == 1 ? as_float((uint32_t)h << 16) : from_half(h);
}

INLINE vec splat(float f) { return f - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

#ifdef __clang__
#define PERMUTED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PERMUTED(v, ...) __builtin_shuffle(v, (ivec){__VA_ARGS__})
#endif

INLINE float total(vec v) {
    v += PERMUTED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += PERMUTED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += PERMUTED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

/* ---- Unpacking ---- */

/* Bits of the lower plane. */
INLINE int low_bits(const int bits) { return bits == 6 ? 4 : bits == 3 ? 2 : bits; }

/* A plane of the codes of a full group, a little-endian stream of numbers of 1, 2, 4 or 8 bits. */
INLINE void read_codes(const uint8_t *p, const int bits, ivec *first, ivec *second) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (bits == 8) {
        *first = (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
        *second = (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)));
    } else { /* every number gets the 16-bit word that it lies in (and, above it, the first one, which is masked) */
        int32_t words[LANES], shifts[LANES];
        for (int i = 0; i < LANES; i++) words[i] = i * bits / 16, shifts[i] = i * bits % 16;
        const __m512i from = _mm512_loadu_si512(words), by = _mm512_loadu_si512(shifts);
        const __m512i all = _mm512_castsi256_si512(_mm256_maskz_loadu_epi32((1 << bits) - 1, p));
        const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), half = _mm512_set1_epi16(bits);
        const __m512i one = _mm512_permutexvar_epi16(from, all), other = _mm512_permutexvar_epi16(from + half, all);
        *first = (ivec)_mm512_and_si512(_mm512_srlv_epi32(one, by), mask);
        *second = (ivec)_mm512_and_si512(_mm512_srlv_epi32(other, by), mask);
    }
#else
    int32_t codes[GROUP];
    for (int i = 0; i < GROUP; i += 8, p += bits) { /* eight numbers fill whole bytes */
        uint64_t w = 0;
        for (int k = 0; k < bits; k++) w |= (uint64_t)p[k] << 8 * k;
        for (int k = 0; k < 8; k++) codes[i + k] = (int)(w >> k * bits & ((1 << bits) - 1));
    }
    memcpy(first, codes, sizeof *first), memcpy(second, codes + LANES, sizeof *second);
#endif
}

/* Codes of two planes, `high` those of the upper one. */
INLINE void read_both(const uint8_t *p, const uint8_t *high, const int bits, ivec *first, ivec *second) {
    const int lower = low_bits(bits), upper = bits - lower;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    /* Every number gets the 16-bit word that its lower bits lie in and, above it, the one of its upper bits. */
    int32_t words[LANES], low[LANES], up[LANES];
    for (int i = 0; i < LANES; i++) {
        words[i] = i * lower / 16 | (8 + i * upper / 16) << 16;
        low[i] = i * lower % 16, up[i] = 16 + i * upper % 16 - lower;
    }
    const __m128i one = _mm_maskz_loadu_epi32((1 << lower) - 1, p);
    const __m128i other = _mm_maskz_loadu_epi32((1 << upper) - 1, high);
    const __m512i all = _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1));
    const __m512i from = _mm512_loadu_si512(words), by = _mm512_loadu_si512(low), above = _mm512_loadu_si512(up);
    const __m512i next = _mm512_set1_epi32(lower | upper << 16); /* 16 numbers on */
    const __m512i mask = _mm512_set1_epi32((1 << lower) - 1), rest = _mm512_set1_epi32(((1 << upper) - 1) << lower);
    for (int half = 0; half < 2; half++) {
        const __m512i x = _mm512_permutexvar_epi16(half ? _mm512_add_epi32(from, next) : from, all);
        const __m512i y = _mm512_and_si512(_mm512_srlv_epi32(x, by), mask);
        *(half ? second : first) = (ivec)_mm512_or_si512(y, _mm512_and_si512(_mm512_srlv_epi32(x, above), rest));
    }
#else
    ivec a, b;
    read_codes(p, lower, first, second), read_codes(high, upper, &a, &b);
    *first += a << lower, *second += b << lower;
#endif
}

/* Numbers of a full group: scale · code + low; `high`: of the upper plane, if there is one. */
INLINE void decode(const uint8_t *p, const uint8_t *high, const int bits, float scale, float low, float *out) {
    ivec first, second;
    if (low_bits(bits) < bits) read_both(p, high, bits, &first, &second);
    else read_codes(p, bits, &first, &second);
    store(out, __builtin_convertvector(first, vec) * scale + low);
    store(out + LANES, __builtin_convertvector(second, vec) * scale + low);
}

/* `some` numbers of a plane, of which a group has fewer than 32 bytes, in a whole group. */
INLINE const uint8_t *whole(const uint8_t *p, int some, int bits, uint8_t *room) {
    if (some >= GROUP) return p;
    memset(room, 0, GROUP);
    return memcpy(room, p, (some * bits + 7) / 8);
}

/* Numbers of one token's segment; `bits` is a constant. Writes whole groups. */
INLINE void unpack_groups(
    const uint8_t *p, const uint8_t *high, const uint16_t *scales, int count, const int bits, float *out
) {
    const int lower = low_bits(bits), size = GROUP / 8 * lower, above = GROUP / 8 * (bits - lower); /* of a group */
    for (int first = 0; first < count; first += 8 * GROUP, scales += 16) {
        const int some = count - first < 8 * GROUP ? count - first : 8 * GROUP, groups = (some + GROUP - 1) / GROUP;
        float pairs[16];
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        store(pairs, (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << 2 * groups) - 1, scales)));
#else
        for (int i = 0; i < 2 * groups; i++) pairs[i] = from_half(scales[i]);
#endif
        for (int g = 0; g < groups; g++, p += size, high += above, out += GROUP) {
            uint8_t one[GROUP], other[GROUP];
            const int left = some - g * GROUP;
            decode(
                whole(p, left, lower, one), above ? whole(high, left, bits - lower, other) : 0, bits, pairs[2 * g],
                pairs[2 * g + 1], out
            );
        }
    }
}

INLINE int stride_of(const Entry *e) { return e->padded + LANES; } /* no two rows in the same sets of a cache */

/* Writes row r of one token's numbers into `out`. */
static void unpack(const Entry *e, int64_t row, int64_t token, int r, float *out) {
    for (int s = 0; s < e->segments; s++) {
        const Segment *g = &e->segment[s];
        const char *codes = g->codes + row * g->code_row + token * g->code_token + r * g->code_head;
        const uint8_t *low = (const uint8_t *)codes, *high = low + g->high;
        const void *scales = g->scales + row * g->scale_row + token * g->scale_token + r * g->scale_head;
        float *to = out + g->start;
        switch (g->bits) {
        case 2: unpack_groups(low, high, scales, g->count, 2, to); break;
        case 3: unpack_groups(low, high, scales, g->count, 3, to); break;
        case 4: unpack_groups(low, high, scales, g->count, 4, to); break;
        case 6: unpack_groups(low, high, scales, g->count, 6, to); break;
        case 8: unpack_groups(low, high, scales, g->count, 8, to); break;
        default:
            if (g->kind == 0) memcpy(to, codes, 4 * (size_t)g->count);
            else if (g->kind == 1) for (int i = 0; i < g->count; i++) to[i] = number(codes, 1, i);
            else for (int i = 0; i < g->count; i++) to[i] = number(codes, 2, i);
            for (int i = g->count; i % GROUP; i++) to[i] = 0.0f;
        }
    }
}

/* ---- Packing: as quantization.quantize and pack_codes do, to the bit ---- */

/* Rounds to the nearest, to even in a tie, as do the following. */
INLINE uint16_t to_half(float f) {
    uint32_t w;
    memcpy(&w, &f, 4);
    const uint32_t sign = w >> 16 & 0x8000, size = w & 0x7fffffff;
    if (size >= 0x477ff000) return sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (size < 0x38800000) return sign | (uint32_t)__builtin_rintf(as_float(size) * 0x1p24f);
    return sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
}

INLINE uint16_t to_bfloat(float f) {
    uint32_t w;
    memcpy(&w, &f, 4);
    return f != f ? 0x7fc0 : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}

/* Writes the i-th number; kinds as above. */
INLINE void write_number(void *p, int kind, int64_t i, float x) {
    if (kind == 0) ((float *)p)[i] = x;
    else ((uint16_t *)p)[i] = kind == 1 ? to_bfloat(x) : to_half(x);
}

/* Packs `bits` bits of codes, from bit `from` on; bytes hold whole numbers. */
static void pack_plane(const uint8_t *codes, int count, int from, int bits, uint8_t *to) {
    memset(to, 0, (count * bits + 7) / 8);
    for (int i = 0; i < count; i++) to[i * bits / 8] |= (codes[i] >> from & ((1 << bits) - 1)) << i * bits % 8;
}

static void pack_group(const float *x, int count, int bits, uint8_t *codes, uint8_t *upper, uint16_t *pair) {
    float low = x[0], high = x[0];
    const int levels = (1 << bits) - 1;
    for (int i = 1; i < count; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    low = low < -6e4f ? -6e4f : low > 6e4f ? 6e4f : low;
    pair[1] = to_half(low), low = from_half(pair[1]);
    float scale = (high - low) / levels;
    scale = scale < 6e-8f ? 6e-8f : scale > 6e4f ? 6e4f : scale;
    pair[0] = to_half(scale), scale = from_half(pair[0]);
    uint8_t found[GROUP];
    for (int i = 0; i < count; i++) {
        const float step = __builtin_rintf((x[i] - low) / scale);
        found[i] = !(step > 0) ? 0 : step > levels ? levels : (int)step;
    }
    const int lower = low_bits(bits);
    pack_plane(found, count, 0, lower, codes);
    if (lower < bits) pack_plane(found, count, lower, bits - lower, upper);
}

/* Packs row r of sequence b's newest token to slot `token` of buffer row `row`. */
static void pack(const Entry *e, int64_t b, int64_t row, int64_t token, int r) {
    for (int s = 0; s < e->segments; s++) {
        const Segment *g = &e->segment[s];
        char *codes = g->codes + row * g->code_row + token * g->code_token + r * g->code_head;
        const int64_t first = (b * e->rows + r) * e->count + g->start;
        if (g->bits == 16) {
            for (int i = 0; i < g->count; i++)
                write_number(codes, g->kind, i, number(e->news, e->news_kind, first + i));
            continue;
        }
        uint16_t *pair = (uint16_t *)(g->scales + row * g->scale_row + token * g->scale_token + r * g->scale_head);
        for (int i = 0; i < g->count; i += GROUP, pair += 2) {
            float x[GROUP];
            const int some = g->count - i < GROUP ? g->count - i : GROUP;
            for (int k = 0; k < some; k++) x[k] = number(e->news, e->news_kind, first + i + k);
            const int lower = low_bits(g->bits);
            uint8_t *to = (uint8_t *)codes, *high = to + g->high + i / 8 * (g->bits - lower);
            pack_group(x, some, g->bits, to + i / 8 * lower, high, pair);
        }
    }
}

#endif
