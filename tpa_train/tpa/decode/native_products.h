/* Products of latents with U, which give keys: in bfloat16 tiles (AMX), or in float32 vectors. */

#ifndef TPA_NATIVE_PRODUCTS
#define TPA_NATIVE_PRODUCTS

#include "native_numbers.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define TILES 0
#endif

#define TILE 32 /* tokens; two AMX tiles */
/* Numbers in tiles from one step of a product to the next: not a multiple of 4096 bytes, or all steps of a token would
   share the same sets of a cache. */
#define STEP(parts) ((parts) * 1024 + 32)

INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

#if TILES
/* Splits one token's latents, the t-th of tiles [steps, parts, 2, 16 tokens, 16 pairs] of bfloat16, steps STEP apart.
   Numbers i and i + 16 of a step are a pair, so that a shift joins them. Rounding adds half of the last bit that
   stays. */
static void split(const float *latents, int t, int steps, int parts, uint16_t *tiles) {
    uint16_t *to = tiles + t / 16 * 512 + t % 16 * 32;
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    for (int k = 0; k < steps; k++, latents += 32, to += STEP(parts)) {
        const __m512i a = _mm512_loadu_si512(latents), b = _mm512_loadu_si512(latents + 16);
        const __m512i first = _mm512_and_si512(_mm512_add_epi32(a, half), upper);
        const __m512i second = _mm512_and_si512(_mm512_add_epi32(b, half), upper);
        _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
        if (parts == 1) continue;
        const __m512i x = _mm512_add_epi32((__m512i)((__m512)a - (__m512)first), half);
        const __m512i y = _mm512_add_epi32((__m512i)((__m512)b - (__m512)second), half);
        _mm512_store_si512(to + 1024, _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_and_si512(y, upper)));
    }
}

#define MULTIPLY_FOUR() \
    do { \
        _tile_dpbf16ps(0, 4, 6); \
        _tile_dpbf16ps(1, 4, 7); \
        _tile_dpbf16ps(2, 5, 6); \
        _tile_dpbf16ps(3, 5, 7); \
    } while (0)

#define FETCH(p, bytes, level) \
    for (int64_t i = 0; i < (bytes); i += 64) __builtin_prefetch((const char *)(p) + i, 0, level)

/* keys [TILE, padded] of latents in tiles and of U in tiles [padded/32, steps, parts, 2, 16 pairs, 16 columns, 2].
   Memory is idle meanwhile: it fetches `bytes` of both rotation tables, and what of U the next step reads (one part is
   read too fast for that to help). */
static void multiply_tiles(
    const uint16_t *latents, const uint16_t *up, int steps, int parts, int padded, float *keys,
    const float *cosine, const float *sine, int64_t bytes
) {
    const int64_t share = aligned(bytes / (padded / 32 * steps));
    int64_t at = 0; /* in the tables */
    __asm__ volatile("" ::: "memory"); /* compilers do not know that a tile's load reads memory */
    for (int c = 0; c < padded; c += 32) {
        const uint16_t *a = latents, *b = up + (int64_t)c / 32 * steps * parts * 1024;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < steps; k++, a += STEP(parts), b += parts * 1024, at += share) {
            if (at < bytes) {
                FETCH((const char *)cosine + at, share, 2);
                FETCH((const char *)sine + at, share, 2);
            }
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + 512, 64);
            if (parts > 1) { /* what is left of the latents first: then eight loads serve twelve products */
                _tile_loadd(4, a + 1024, 64);
                _tile_loadd(5, a + 1536, 64);
                MULTIPLY_FOUR();
            }
            if (parts > 1) FETCH(b + 2048, 2048, 3);
            _tile_loadd(4, a, 64);
            _tile_loadd(5, a + 512, 64);
            MULTIPLY_FOUR();
            if (parts > 1) {
                FETCH(b + 3072, 2048, 3);
                _tile_loadd(6, b + 1024, 64);
                _tile_loadd(7, b + 1536, 64);
                MULTIPLY_FOUR();
            }
        }
        _tile_stored(0, keys + c, 4 * padded);
        _tile_stored(1, keys + c + 16, 4 * padded);
        _tile_stored(2, keys + 16 * padded + c, 4 * padded);
        _tile_stored(3, keys + 16 * padded + c + 16, 4 * padded);
    }
    __asm__ volatile("" ::: "memory");
}
#endif

/* What many sums at a time are kept in: compilers keep vectors wider than registers in memory. */
#ifdef __AVX512F__
enum { TOKENS = 8, VECTORS = 2 }; /* of a register block */
typedef vec block_vec;
#else
enum { TOKENS = 4, VECTORS = 2 };
#ifdef __AVX__
typedef float block_vec __attribute__((vector_size(32), aligned(4), may_alias));
#else
typedef float block_vec __attribute__((vector_size(16), aligned(4), may_alias));
#endif
#endif

/* keys [TILE, padded] = latents [TILE, stride] times U [count, padded], in float32 vectors. */
static void multiply_vectors(const float *latents, int stride, const float *up, int count, int padded, float *keys) {
    const int width = sizeof(block_vec) / 4;
    for (int c = 0; c < padded; c += VECTORS * width)
        for (int t = 0; t < TILE; t += TOKENS) {
            block_vec sum[TOKENS][VECTORS] = {{{0}}};
            for (int k = 0; k < count; k++)
                for (int j = 0; j < VECTORS; j++) {
                    const block_vec u = *(const block_vec *)(up + (int64_t)k * padded + c + j * width);
                    for (int i = 0; i < TOKENS; i++) sum[i][j] += latents[(t + i) * stride + k] * u;
                }
            for (int i = 0; i < TOKENS; i++)
                for (int j = 0; j < VECTORS; j++) *(block_vec *)(keys + (t + i) * padded + c + j * width) = sum[i][j];
        }
}

#endif
