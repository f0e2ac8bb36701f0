/* Decoding attention on a CPU, in one pass over a packed cache: see native.py, which compiles and calls this.

   A work item is a run of tokens of one sequence. It takes TILE tokens at a time: unpacks their cached numbers,
   rebuilds their keys (U times latents), normalises and rotates them, scores them for all heads, and adds their values
   (or latents) to sums under an online softmax (arXiv:1805.02867). `merge` joins the items of a sequence, `expand`
   multiplies latent values with their U.

   Where the CPU has bfloat16 tiles (AMX), a float32 product is three of bfloat16: x = x1 + x2 with both parts in
   bfloat16, x·y = x1·y1 + x1·y2 + x2·y1 up to 2^-17 of |x||y|. Elsewhere products are float32 vectors.
   Padding: numbers of an entry and columns of a key are padded to multiples of 32 with zeros in U and in queries, so
   that what the padding of an entry holds (finite numbers) does not count. */

#include "native_products.h"

#define LOWEST -3.0e38f

/* Mirrored field by field in native.py. */
typedef struct {
    int64_t batch, slots;
    int32_t heads, groups, dim, padded; /* padded: of a key, 2 · (dim/2 to a multiple of 16), or the entry's own */
    int32_t rebuilt, normed, products, joint;
    float scale, eps;
    const int32_t *lengths;
    const int64_t *rows; /* NULL: sequence i has row i */
    const void *queries;
    int32_t query_kind, threads; /* kind: 0 or 1 */
    const float *cosine, *sine; /* [positions, dim/2] */
    const float *bias, *weight; /* [groups, padded], [padded] */
    const void *up;             /* products > 0: see multiply_tiles; else float [groups, keys.padded, padded] */
    const void *expand;         /* U of values whose latents are summed, [groups, expanded, values.count], or NULL */
    int32_t expand_kind, expanded;
    void *out; /* [batch, heads, expanded, or values.count], in the kind of queries */
    char *workspace;
    int64_t workspace_bytes;
    char *norms; /* cached 1/rms of every key [groups], to be written for what is in keys.news; or NULL */
    int64_t norm_row, norm_token, norm_kind; /* strides in bytes, and a kind of number */
    Entry keys, values;
    /* What follows is the kernel's own. */
    int64_t chunk, splits, next, ticket, scratch;
    float *partial, *turned, *means;
} Job;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* ---- Keys ---- */

/* Adds the bias to one key and rotates it, in place; returns what its scores are to be multiplied with, for its norm.
   Columns are two halves of padded/2. */
INLINE float finish(const Job *j, float *key, const float *bias, const float *cosine, const float *sine) {
    const int half = j->padded / 2, real = j->dim / 2;
    vec square = {0};
    float last[2][LANES] = {{0}};
    for (int i = 0; i < half; i += LANES) {
        vec c, s;
        if (i + LANES <= real) {
            c = load(cosine + i), s = load(sine + i);
        } else {
            memcpy(last[0], cosine + i, 4 * (real - i)), memcpy(last[1], sine + i, 4 * (real - i));
            c = load(last[0]), s = load(last[1]);
        }
        vec a = load(key + i) + load(bias + i), b = load(key + half + i) + load(bias + half + i);
        square += a * a + b * b;
        a *= load(j->weight + i), b *= load(j->weight + half + i);
        store(key + i, a * c - b * s), store(key + half + i, b * c + a * s);
    }
    return j->normed ? 1.0f / __builtin_sqrtf(total(square) / j->dim + j->eps) : 1.0f;
}

/* scores [heads, TILE] of keys [TILE, stride] for queries [heads, padded]; `heads` is a constant. */
INLINE void score_heads(const float *q, int padded, const float *keys, int stride, float *scores, const int heads) {
    for (int t = 0; t < TILE; t += 4) {
        vec sum[4][4] = {{{0}}};
        for (int i = 0; i < padded; i += LANES) {
            vec key[4];
            for (int n = 0; n < 4; n++) key[n] = load(keys + (t + n) * stride + i);
            for (int h = 0; h < heads; h++) {
                const vec v = load(q + h * padded + i);
                for (int n = 0; n < 4; n++) sum[h][n] += v * key[n];
            }
        }
        for (int h = 0; h < heads; h++)
            for (int n = 0; n < 4; n++) scores[h * TILE + t + n] = total(sum[h][n]);
    }
}

static void score(const float *q, int heads, int padded, const float *keys, int stride, float *scores) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) score_heads(q + h * padded, padded, keys, stride, scores + h * TILE, 4);
    for (; h + 2 <= heads; h += 2) score_heads(q + h * padded, padded, keys, stride, scores + h * TILE, 2);
    if (h < heads) score_heads(q + h * padded, padded, keys, stride, scores + h * TILE, 1);
}

/* ---- Values ---- */

/* sums [heads, padded] = sums · keep [heads] + weights [heads, TILE] times values [TILE, stride]; `heads`: constant. */
INLINE void add_heads(
    const float *w, const float *keep, const float *v, int stride, int padded, float *sums, const int heads
) {
    const int width = sizeof(block_vec) / 4;
    for (int c = 0; c < padded; c += 2 * width) {
        block_vec sum[4][2];
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 2; j++) sum[h][j] = *(const block_vec *)(sums + h * padded + c + j * width) * keep[h];
        for (int t = 0; t < TILE; t++) {
            const block_vec *x = (const block_vec *)(v + t * stride + c);
            for (int h = 0; h < heads; h++) sum[h][0] += x[0] * w[h * TILE + t], sum[h][1] += x[1] * w[h * TILE + t];
        }
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 2; j++) *(block_vec *)(sums + h * padded + c + j * width) = sum[h][j];
    }
}

static void add(const float *w, const float *keep, int heads, const float *v, int stride, int padded, float *sums) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) add_heads(w + h * TILE, keep + h, v, stride, padded, sums + h * padded, 4);
    for (; h + 2 <= heads; h += 2) add_heads(w + h * TILE, keep + h, v, stride, padded, sums + h * padded, 2);
    if (h < heads) add_heads(w + h * TILE, keep + h, v, stride, padded, sums + h * padded, 1);
}

INLINE vec larger(vec a, vec b) { return (vec)(((ivec)a & (a > b)) | ((ivec)b & ~(a > b))); }

/* e^x for x ≤ 0, to 2 units in the last place; 0 below -87. */
INLINE vec exponential(vec x) {
    vec y = larger(x, splat(-87.0f));
    vec n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = (vec)((ivec)p + (__builtin_convertvector(n, ivec) << 23));
    return (vec)((ivec)p & (x > -87.0f));
}

/* Turns scores [TILE] into weights under the highest score so far; returns what earlier sums keep. */
static float soften(float *scores, float *top, float *sum) {
    const vec a = load(scores), b = load(scores + LANES), both = larger(a, b);
    float highest = *top;
    for (int i = 0; i < LANES; i++) highest = both[i] > highest ? both[i] : highest;
    const float keep = exponential(splat(*top - highest))[0];
    const vec x = exponential(a - highest), y = exponential(b - highest);
    store(scores, x), store(scores + LANES, y);
    *top = highest, *sum = *sum * keep + total(x + y);
    return keep;
}

/* ---- Work items ---- */

INLINE const Entry *values_of(const Job *j) { return j->joint ? &j->keys : &j->values; }
INLINE int64_t tokens_of(const Job *j, int64_t b) { return j->lengths[b] < j->slots ? j->lengths[b] : j->slots; }
INLINE int64_t partial_size(const Job *j) { return (int64_t)j->heads * values_of(j)->padded + aligned(2 * j->heads); }

typedef struct {
    float *keys, *scores, *latents, *values;
    uint16_t *tiles;
} Scratch;

/* Lays out one thread's memory from `base` on; returns its size. */
static int64_t lay_out(const Job *j, char *base, Scratch *s) {
    int64_t at = 0;
    const int64_t entry = aligned(4 * (int64_t)j->keys.rows * TILE * stride_of(&j->keys));
    s->keys = (float *)(base + at), at += aligned(4 * (int64_t)TILE * j->padded);
    s->scores = (float *)(base + at), at += aligned(4 * (int64_t)j->heads * (TILE + 1));
    s->tiles = (uint16_t *)(base + at);
    at += j->products ? 2 * (int64_t)STEP(2) * j->keys.padded / 32 * j->keys.rows : 0;
    s->latents = (float *)(base + at), at += entry;
    s->values = j->joint ? s->latents : (float *)(base + at);
    if (!j->joint) at += aligned(4 * (int64_t)j->values.rows * TILE * stride_of(&j->values));
    return at;
}

/* Unpacks TILE tokens of buffer row `row` from slot `first` on, of which n hold something. */
static void read_tile(const Job *j, const Scratch *s, int64_t row, int64_t first, int n) {
    for (int r = 0; r < j->keys.rows; r++)
        for (int t = 0; t < n; t++) {
            float *latents = s->latents + (int64_t)(r * TILE + t) * stride_of(&j->keys);
            unpack(&j->keys, row, first + t, r, latents);
#if TILES
            const int parts = j->products > 1 ? 2 : 1, steps = j->keys.padded / 32;
            if (j->products) split(latents, t, steps, parts, s->tiles + (int64_t)r * steps * STEP(parts));
#endif
        }
    for (int r = 0; r < j->values.rows; r++)
        for (int t = 0; t < n; t++)
            unpack(&j->values, row, first + t, r, s->values + (int64_t)(r * TILE + t) * stride_of(&j->values));
}

/* `norms`: where those of the token go that has just been packed, the newest-th of the tile if it is in it; or NULL. */
static void score_tile(
    const Job *j, const Scratch *s, int64_t b, int64_t position, int64_t wrap, int n, int64_t newest, char *norms
) {
    const int share = j->heads / j->groups, stride = stride_of(&j->keys);
    for (int g = 0; g < j->groups; g++) {
        const int r = j->keys.rows > 1 ? g : 0;
        const float *latents = s->latents + (int64_t)r * TILE * stride;
        const float *q = j->turned + (b * j->heads + (int64_t)g * share) * j->padded;
        float *scores = s->scores + g * share * TILE, inverse[TILE] = {0};
        if (!j->rebuilt) {
            score(q, share, j->padded, latents, stride, scores);
            continue;
        }
        const int64_t size = (int64_t)j->keys.padded * j->padded;
#if TILES
        if (j->products) {
            const int parts = j->products > 1 ? 2 : 1, steps = j->keys.padded / 32;
            const uint16_t *tiles = s->tiles + (int64_t)r * steps * STEP(parts);
            const uint16_t *up = (const uint16_t *)j->up + g * size * parts;
            const int64_t first = position * (j->dim / 2), bytes = g ? 0 : (int64_t)n * (j->dim / 2) * 4;
            multiply_tiles(
                tiles, up, steps, parts, j->padded, s->keys, j->cosine + first, j->sine + first, bytes
            );
        } else
#endif
            multiply_vectors(latents, stride, (const float *)j->up + g * size, j->keys.count, j->padded, s->keys);
        for (int t = 0; t < n; t++) {
            const int64_t p = (position + t - (t >= wrap ? j->slots : 0)) * (j->dim / 2);
            inverse[t] = finish(j, s->keys + t * j->padded, j->bias + g * j->padded, j->cosine + p, j->sine + p);
        }
        if (norms && newest >= 0 && newest < n) write_number(norms, j->norm_kind, g, inverse[newest]);
        score(q, share, j->padded, s->keys, j->padded, scores);
        for (int h = 0; h < share; h++)
            for (int t = 0; t < TILE; t++) scores[h * TILE + t] *= inverse[t];
    }
}

static void item(const Job *j, int64_t b, int64_t split, const Scratch *s) {
    const Entry *values = values_of(j);
    const int64_t length = j->lengths[b], count = tokens_of(j, b), row = j->rows ? j->rows[b] : b;
    const int64_t start = split * j->chunk, stop = start + j->chunk < count ? start + j->chunk : count;
    if (start >= stop) return;
    const int64_t cut = length > j->slots ? length % j->slots : 0; /* the oldest token's slot in a ring */
    const int64_t base = length > j->slots ? length - cut : 0;
    float *sums = j->partial + (b * j->splits + split) * partial_size(j), *top = sums + j->heads * values->padded;
    memset(sums, 0, 4 * partial_size(j));
    for (int h = 0; h < j->heads; h++) top[h] = LOWEST;
    const int64_t last = (length - 1) % j->slots; /* the newest token's slot */
    char *norms = j->norms && j->keys.news ? j->norms + row * j->norm_row + last * j->norm_token : NULL;
    float *keep = s->scores + j->heads * TILE;
    const int share = j->heads / values->rows, stride = stride_of(values);
    for (int64_t t = start; t < stop; t += TILE) {
        const int n = stop - t < TILE ? stop - t : TILE;
        read_tile(j, s, row, t, n);
        for (int r = 0; r < values->rows; r++) /* what has no weight must be finite */
            memset(s->values + (int64_t)(r * TILE + n) * stride, 0, 4 * (size_t)(TILE - n) * stride);
        score_tile(j, s, b, base + t, length > j->slots ? cut - t : TILE, n, last - t, norms);
        for (int h = 0; h < j->heads; h++) {
            for (int i = n; i < TILE; i++) s->scores[h * TILE + i] = LOWEST;
            keep[h] = soften(s->scores + h * TILE, top + h, top + j->heads + h);
        }
        for (int r = 0; r < values->rows; r++) {
            const float *v = s->values + (int64_t)r * TILE * stride;
            const int h = r * share;
            add(s->scores + h * TILE, keep + h, share, v, stride, values->padded, sums + h * values->padded);
        }
    }
}

INLINE void deliver(const Job *j, int64_t at, const float *x, int count) {
    if (j->query_kind == 0) memcpy((float *)j->out + at, x, 4 * (size_t)count);
    else for (int i = 0; i < count; i++) ((uint16_t *)j->out)[at + i] = to_bfloat(x[i]);
}

/* Joins the items of a sequence: means [heads, padded] of its values. */
static void merge(const Job *j, int64_t b) {
    const Entry *values = values_of(j);
    const int64_t splits = (tokens_of(j, b) + j->chunk - 1) / j->chunk, size = partial_size(j);
    const int padded = values->padded;
    for (int h = 0; h < j->heads; h++) {
        const float *first = j->partial + b * j->splits * size, *tops = first + j->heads * padded + h;
        float *means = j->means + (b * j->heads + h) * padded, highest = LOWEST, sum = 0.0f;
        memset(means, 0, 4 * (size_t)padded);
        for (int64_t s = 0; s < splits; s++) highest = tops[s * size] > highest ? tops[s * size] : highest;
        for (int64_t s = 0; s < splits; s++) {
            const float share = exponential(splat(tops[s * size] - highest))[0];
            const float *sums = first + s * size + h * padded;
            sum += share * tops[s * size + j->heads];
            for (int i = 0; i < padded; i += LANES) store(means + i, load(means + i) + load(sums + i) * share);
        }
        for (int i = 0; i < padded && sum > 0.0f; i += LANES) store(means + i, load(means + i) / sum);
        memset(means + values->count, 0, 4 * (size_t)(padded - values->count));
        if (!j->expand) deliver(j, (b * j->heads + h) * values->count, means, values->count);
    }
}

/* Expands means with the i-th TILE rows of U: they are to the means what keys are to queries. */
static void expand(const Job *j, int64_t i, const Scratch *s) {
    const Entry *values = values_of(j);
    const int blocks = (j->expanded + TILE - 1) / TILE, g = i / blocks, e = i % blocks * TILE;
    const int share = j->heads / j->groups;
    const int n = j->expanded - e < TILE ? j->expanded - e : TILE, stride = stride_of(values), count = values->count;
    for (int r = 0; r < n; r++) {
        float *row = s->latents + r * stride;
        const int64_t first = ((int64_t)g * j->expanded + e + r) * count;
        if (j->expand_kind == 0) memcpy(row, (const float *)j->expand + first, 4 * (size_t)count);
        else for (int k = 0; k < count; k++) row[k] = number(j->expand, j->expand_kind, first + k);
        memset(row + count, 0, 4 * (size_t)(values->padded - count));
    }
    for (int64_t b = 0; b < j->batch; b++) {
        const int64_t head = b * j->heads + g * share;
        score(j->means + head * values->padded, share, values->padded, s->latents, stride, s->scores);
        for (int h = 0; h < share; h++) deliver(j, (head + h) * j->expanded + e, s->scores + h * TILE, n);
    }
}

/* Queries in float32, scaled, in the columns of keys: [batch, heads, padded]. */
static void lay_out_queries(const Job *j) {
    const int parts = j->rebuilt ? 2 : 1, real = j->dim / parts, padded = j->padded / parts;
    for (int64_t i = 0; i < j->batch * j->heads * parts; i++) {
        float *to = j->turned + i * padded;
        for (int k = 0; k < real; k++) to[k] = number(j->queries, j->query_kind, i * real + k) * j->scale;
        for (int k = real; k < padded; k++) to[k] = 0.0f;
    }
}

static void attend_items(void *argument) {
    Job *j = argument;
    const int64_t mine = __atomic_fetch_add(&j->ticket, 1, __ATOMIC_RELAXED);
    if (mine >= j->threads) return; /* the others take its items */
    Scratch s;
    lay_out(j, j->workspace + mine * j->scratch, &s);
#if TILES
    if (j->products) {
        uint8_t config[64] __attribute__((aligned(64))) = {1};
        for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(config);
    }
#endif
    for (int64_t i; (i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->batch * j->splits;)
        item(j, i / j->splits, i % j->splits, &s);
#if TILES
    if (j->products) _tile_release();
#endif
}

static void expand_items(void *argument) {
    Job *j = argument;
    const int64_t mine = __atomic_fetch_add(&j->ticket, 1, __ATOMIC_RELAXED);
    if (mine >= j->threads) return;
    Scratch s;
    lay_out(j, j->workspace + mine * j->scratch, &s);
    const int64_t items = j->groups * ((j->expanded + TILE - 1) / TILE);
    for (int64_t i; (i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < items;) expand(j, i, &s);
}

static void run(Job *j, void (*items)(void *), Parallel parallel) {
    j->next = j->ticket = 0;
    if (j->threads > 1) parallel(items, j, j->threads, 0);
    else items(j);
}

/* Returns whether bfloat16 tiles may be used: the operating system grants their registers on demand. */
int tpa_tiles(void) {
#if TILES
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */);
#else
    return 0;
#endif
}

/* For whoever mirrors the struct. */
int64_t tpa_job_bytes(void) { return sizeof(Job); }

/* Attends; returns 0, or how many bytes the workspace must have (nothing was done then). */
int64_t tpa_attend(Job *j, Parallel parallel) {
    int64_t all = 0, longest = 0;
    Scratch s;
    for (int64_t b = 0; b < j->batch; b++) {
        all += tokens_of(j, b);
        if (tokens_of(j, b) > longest) longest = tokens_of(j, b);
    }
    if (!parallel) j->threads = 1;
    const int64_t wanted = all / (4 * j->threads) / TILE * TILE;
    j->chunk = wanted < TILE ? TILE : wanted > 8 * TILE ? 8 * TILE : wanted;
    j->splits = (longest + j->chunk - 1) / j->chunk;
    j->scratch = lay_out(j, NULL, &s);
    const int64_t partial = j->batch * j->splits * partial_size(j), queries = j->batch * j->heads * j->padded;
    const int64_t means = j->batch * j->heads * values_of(j)->padded;
    const int64_t bytes = 64 + j->threads * j->scratch + 4 * (partial + queries + means);
    if (bytes > j->workspace_bytes) return bytes;
    j->workspace = (char *)aligned((int64_t)j->workspace);
    j->partial = (float *)(j->workspace + j->threads * j->scratch);
    j->turned = j->partial + partial, j->means = j->turned + queries;
    for (int64_t b = 0; b < j->batch; b++)
        for (int v = 0; v < 2; v++) {
            const Entry *e = v ? &j->values : &j->keys;
            const int64_t row = j->rows ? j->rows[b] : b;
            for (int r = 0; r < e->rows && e->news && j->lengths[b]; r++)
                pack(e, b, row, (j->lengths[b] - 1) % j->slots, r);
        }
    lay_out_queries(j);
    run(j, attend_items, parallel);
    for (int64_t b = 0; b < j->batch; b++) merge(j, b);
    if (j->expand) run(j, expand_items, parallel);
    return 0;
}
