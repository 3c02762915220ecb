/* A C user without a GPU: appends and decodes on the CPU, plans, and makes every mistake. Arguments: a kernel pack for
 * sm80 that holds a decode, an append, a merge and a step kernel of the default format, and a file that is none. Prints
 * what fails; silence is success. */
#include <bitdecoding/c_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void expect(int line, bitdecoding_status status, bitdecoding_status wanted, const char* text) {
  if (status == wanted && (status == BITDECODING_OK || strstr(bitdecoding_last_error(), text) != NULL)) return;
  ++failures;
  printf("line %d: status %d, wanted %d with '%s': %s\n", line, (int)status, (int)wanted, text,
         bitdecoding_last_error());
}

#define OK(call) expect(__LINE__, call, BITDECODING_OK, "")
#define REJECTED(call, text) expect(__LINE__, call, BITDECODING_INVALID_ARGUMENT, text)
#define FAILS(call, status, text) expect(__LINE__, call, status, text)
#define CHECK(condition) ((condition) ? (void)0 : (void)(++failures, printf("line %d: %s\n", __LINE__, #condition)))

#define HUGE_STRIDE (INT64_C(1) << 62) /* products of it have no room in 64 bits */

enum { BATCH = 1, HEADS = 2, DIM = 64, PAGES = 2, TAIL = 4 };

static const int32_t table[PAGES] = {1, 0}, bad_table[PAGES] = {1, 2};
static const int32_t seqlens[BATCH] = {200}, too_long[BATCH] = {261}, negative[BATCH] = {-1};

static bitdecoding_quant_spec make_quant(void) {
  bitdecoding_quant_spec quant = BITDECODING_QUANT_SPEC_INIT;
  quant.v_group = 64;
  return quant;
}

static void block_bytes(void) {
  bitdecoding_quant_spec quant = make_quant();
  int64_t bytes = 0;
  OK(bitdecoding_block_bytes(64, &quant, &bytes));
  CHECK(bytes == 8960);
  REJECTED(bitdecoding_block_bytes(64, NULL, &bytes), "quant: is null");
  REJECTED(bitdecoding_block_bytes(64, &quant, NULL), "bytes: is null");
  REJECTED(bitdecoding_block_bytes(80, &quant, &bytes), "head_dim=80");
  REJECTED(bitdecoding_block_bytes(0, &quant, &bytes), "head_dim=0");
  quant.v_group = 128;
  REJECTED(bitdecoding_block_bytes(64, &quant, &bytes), "v_group=128: must divide head_dim=64");
  quant = make_quant();
  quant.k_bits = 3;
  REJECTED(bitdecoding_block_bytes(64, &quant, &bytes), "k_bits=3: allowed are 8, 4, 2");
  quant = make_quant();
  quant.k_mean = 2;
  REJECTED(bitdecoding_block_bytes(64, &quant, &bytes), "k_mean=2: allowed are 0, 1");
  quant = make_quant();
  quant.v_clip = 1.5f;
  REJECTED(bitdecoding_block_bytes(64, &quant, &bytes), "v_clip=1.5");
  quant.v_clip = BITDECODING_CLIP_SEARCHED;
  OK(bitdecoding_block_bytes(64, &quant, &bytes));
  quant = make_quant();
  quant.size = 8;
  REJECTED(bitdecoding_block_bytes(64, &quant, &bytes), "quant: size=8");

  struct {
    bitdecoding_quant_spec known;
    int64_t later;
  } newer = {make_quant(), 0};
  newer.known.size = sizeof(newer);
  OK(bitdecoding_block_bytes(64, &newer.known, &bytes));
  newer.later = 1;
  REJECTED(bitdecoding_block_bytes(64, &newer.known, &bytes), "what follows is not zero");
}

static void decode(void) {
  bitdecoding_quant_spec quant = make_quant();
  bitdecoding_decode_params p = BITDECODING_DECODE_PARAMS_INIT;
  float *q = calloc(BATCH * HEADS * DIM, 4), *out = calloc(BATCH * HEADS * DIM, 4), lse[HEADS] = {0.0f, 0.0f};
  float* tail = calloc(BATCH * TAIL * HEADS * DIM, 4);
  int64_t bytes = 0;
  OK(bitdecoding_block_bytes(DIM, &quant, &bytes));
  unsigned char* pages = calloc(PAGES * HEADS, (size_t)bytes); /* all values are 0 */
  p.dtype = BITDECODING_FLOAT32;
  p.num_q_heads = p.num_kv_heads = HEADS;
  p.head_dim = DIM;
  p.num_pages = p.max_pages = PAGES;
  p.q = q;
  p.pages = pages;
  p.block_table = table;
  p.seqlens = seqlens;
  p.out = out;
  p.lse = lse;
  out[5] = 1.0f;
  OK(bitdecoding_decode_cpu(&quant, &p, 2));
  CHECK(out[5] == 0.0f);
  CHECK(fabsf(lse[1] - logf(200.0f)) < 1e-5f);

#define WITH(field, value, text)                               \
  do {                                                         \
    bitdecoding_decode_params wrong = p;                       \
    wrong.field = value;                                       \
    REJECTED(bitdecoding_decode_cpu(&quant, &wrong, 1), text); \
  } while (0)
  WITH(size, 16, "params: size=16");
  WITH(size, (size_t)1 << 40, "params: size=1099511627776");
  WITH(dtype, 3, "dtype=3: allowed are 0, 1, 2");
  WITH(batch, 0, "batch=0: must be positive");
  WITH(q_len, -1, "q_len=-1");
  WITH(q_len, 1 << 30, "q_len=1073741824");
  WITH(num_q_heads, 3, "num_q_heads=3: must be a multiple of num_kv_heads=2");
  WITH(num_kv_heads, 0, "num_kv_heads=0");
  WITH(head_dim, 72, "head_dim=72");
  p.softmax_scale = 1.0f;
  WITH(head_dim, 0, "head_dim=0");
  p.softmax_scale = 0.0f;
  WITH(num_pages, 1, "block_table[0, 0]=1: allowed are 0 to 0");
  WITH(max_pages, 1, "sequence 0 has 2 blocks in pages: allowed are 1");
  WITH(tail_capacity, -1, "tail_capacity");
  WITH(tail_capacity, 4, "tail_k: is null");
  WITH(num_sink, 4, "sink_k: is null");
  WITH(window, -1, "window=-1");
  WITH(softmax_scale, -1.0f, "softmax_scale");
  WITH(softmax_scale, NAN, "softmax_scale");
  WITH(softcap, INFINITY, "softcap=inf");
  WITH(q, NULL, "q: is null");
  WITH(q, (char*)q + 8, "q: address must be a multiple of 16 bytes");
  WITH(pages, pages + 8, "pages: address");
  WITH(pages, NULL, "pages: is null");
  WITH(page_stride_bytes, 16, "page_stride_bytes=16: must be at least block_bytes=8960");
  WITH(page_stride_bytes, 2 * 8960 + 8, "page_stride_bytes=17928: allowed are multiples of 16");
  WITH(head_stride_bytes, -8960, "head_stride_bytes=-8960");
  WITH(head_stride_bytes, HUGE_STRIDE, "head_stride_bytes=4611686018427387904: allowed are multiples of 16 from 0 to");
  WITH(page_stride_bytes, HUGE_STRIDE, "page_stride_bytes=4611686018427387904");
  WITH(max_pages, 1 << 24, "max_pages=16777216: allowed are 0 to 16777215");
  WITH(batch, INT32_MAX, "q: batch=2147483647, q_len=1, num_q_heads=2: allowed are less than 2^31 rows");
  bitdecoding_decode_params wide = p;
  wide.num_q_heads = wide.num_kv_heads = 1 << 20;
  wide.num_sink = 1 << 30;
  REJECTED(bitdecoding_decode_cpu(&quant, &wide, 1), "sink_k: batch=1, num_sink=1073741824, num_kv_heads=1048576");
  bitdecoding_decode_params many = p;
  many.batch = 4;
  many.tail_capacity = 1 << 29;
  REJECTED(bitdecoding_decode_cpu(&quant, &many, 1), "tail_k: batch=4, tail_capacity=536870912: allowed are less than");
  WITH(block_table, NULL, "block_table: is null");
  WITH(block_table, bad_table, "block_table[0, 1]=2: allowed are 0 to 1");
  WITH(seqlens, NULL, "seqlens: is null");
  WITH(seqlens, too_long, "sequence 0 has 3 blocks in pages: allowed are 2");
  WITH(seqlens, negative, "seqlens[0]=-1");
  WITH(packed_lens, too_long, "packed_lens[0]=261: allowed are 0 to 200");
  WITH(packed_lens, negative, "packed_lens[0]=-1");
  WITH(out, NULL, "out: is null");
  REJECTED(bitdecoding_decode_cpu(NULL, &p, 1), "quant: is null");
  REJECTED(bitdecoding_decode_cpu(&quant, NULL, 1), "params: is null");
  REJECTED(bitdecoding_decode_cpu(&quant, &p, -1), "num_threads=-1");
  p.tail_k = p.tail_v = tail;
  OK(bitdecoding_decode_cpu(&quant, &p, 1)); /* a tail that holds nothing is none */
  p.tail_capacity = TAIL;
  WITH(packed_lens, table, "seqlens[0]=200: allowed are at most 5"); /* 1 packed token */

  const void* outs[] = {out, q};
  const float* lses[] = {lse, lse};
  float* merged = calloc(HEADS * DIM, 4);
  OK(bitdecoding_merge_cpu(BITDECODING_FLOAT32, 2, outs, lses, HEADS, DIM, merged, lse));
  CHECK(fabsf(lse[1] - logf(400.0f)) < 1e-5f);
  REJECTED(bitdecoding_merge_cpu(7, 2, outs, lses, HEADS, DIM, merged, NULL), "dtype=7");
  REJECTED(bitdecoding_merge_cpu(0, 0, outs, lses, HEADS, DIM, merged, NULL), "num_parts=0");
  REJECTED(bitdecoding_merge_cpu(0, 2, NULL, lses, HEADS, DIM, merged, NULL), "outs: is null");
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, NULL, HEADS, DIM, merged, NULL), "lses: is null");
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, lses, HEADS, DIM, NULL, NULL), "out: is null");
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, lses, -1, DIM, merged, NULL), "rows=-1");
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, lses, INT64_MAX, DIM, merged, NULL), "rows=9223372036854775807");
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, lses, HEADS, 257, merged, NULL), "head_dim=257");
  outs[1] = NULL;
  REJECTED(bitdecoding_merge_cpu(0, 2, outs, lses, HEADS, DIM, merged, NULL), "outs[1]: is null");

  /* on a device, as far as one gets without */
  bitdecoding_decode_plan plan = BITDECODING_DECODE_PLAN_INIT;
  FAILS(bitdecoding_decode(&plan, &p, NULL, 0, NULL), BITDECODING_KERNEL_NOT_FOUND, "handle=-1");
  REJECTED(bitdecoding_decode(NULL, &p, NULL, 0, NULL), "plan: is null");
  REJECTED(bitdecoding_decode(&plan, NULL, NULL, 0, NULL), "params: is null");
  free(merged), free(tail), free(pages), free(out), free(q);
}

static void append(void) {
  enum { NEW = 300, RECENT = 3, CAPACITY = RECENT + 127, SINKS = 2 };
  bitdecoding_quant_spec quant = make_quant();
  bitdecoding_append_params p = BITDECODING_APPEND_PARAMS_INIT;
  int32_t lens[BATCH] = {0}, packed[BATCH] = {0}, status[1] = {0}, one_page[PAGES] = {1, -1}, length[BATCH] = {1};
  const int32_t cu_seqlens[BATCH + 1] = {0, NEW}, falling[BATCH + 1] = {261, 0}, twice[PAGES] = {1, 1};
  float *k = calloc(NEW * HEADS * DIM, 4), *v = calloc(NEW * HEADS * DIM, 4);
  float* tails = calloc(2 * CAPACITY * HEADS * DIM, 4);
  float* sinks = calloc(2 * SINKS * HEADS * DIM, 4);
  int64_t bytes = 0;
  OK(bitdecoding_block_bytes(DIM, &quant, &bytes));
  unsigned char* pages = calloc(PAGES * HEADS, (size_t)bytes);
  for (int i = 0; i < NEW * HEADS * DIM; ++i) k[i] = v[i] = (float)(i / (HEADS * DIM) % 16);
  p.dtype = BITDECODING_FLOAT32;
  p.new_tokens = NEW;
  p.num_kv_heads = HEADS;
  p.head_dim = DIM;
  p.num_pages = p.max_pages = PAGES;
  p.k_new = k;
  p.v_new = v;
  p.pages = pages;
  p.block_table = table;
  REJECTED(bitdecoding_append_cpu(&quant, &p, 1), "seqlens: is null");
  p.new_tokens = 2 * 128;
  OK(bitdecoding_quantize_cpu(&quant, &p, 2));
  p.new_tokens = NEW;
  REJECTED(bitdecoding_quantize_cpu(&quant, &p, 1), "sequence 0 needs 3 pages: allowed are 2");
  p.cu_seqlens = cu_seqlens;
  REJECTED(bitdecoding_quantize_cpu(&quant, &p, 1), "sequence 0 needs 3 pages: allowed are 2");
  p.cu_seqlens = NULL;
  p.seqlens = lens;
  p.packed_lens = packed;
  p.tail_k = tails;
  p.tail_v = tails + CAPACITY * HEADS * DIM;
  p.sink_k = sinks;
  p.sink_v = sinks + SINKS * HEADS * DIM;
  p.tail_capacity = CAPACITY;
  p.num_sink = SINKS;
  p.recent = RECENT;
  REJECTED(bitdecoding_quantize_cpu(&quant, &p, 1), "must be null with pack_all");

#define APPEND_WITH(field, value, text)                        \
  do {                                                         \
    bitdecoding_append_params wrong = p;                       \
    wrong.field = value;                                       \
    REJECTED(bitdecoding_append_cpu(&quant, &wrong, 1), text); \
  } while (0)
  APPEND_WITH(size, 16, "params: size=16");
  APPEND_WITH(dtype, -1, "dtype=-1");
  APPEND_WITH(batch, -1, "batch=-1");
  APPEND_WITH(new_tokens, 0, "new_tokens=0");
  APPEND_WITH(num_kv_heads, 0, "num_kv_heads=0");
  APPEND_WITH(head_dim, 8, "head_dim=8");
  APPEND_WITH(head_dim, 0, "head_dim=0");
  APPEND_WITH(num_pages, 1, "block_table[0, 0]=1: allowed are 0 to 0");
  APPEND_WITH(max_pages, 1, "sequence 0 needs 2 pages");
  APPEND_WITH(tail_capacity, CAPACITY - 1, "tail_capacity=129: allowed are numbers from 130");
  APPEND_WITH(k_new, NULL, "k_new: is null");
  APPEND_WITH(k_new, (char*)k + 4, "k_new: address");
  APPEND_WITH(v_new, NULL, "v_new: is null");
  APPEND_WITH(new_batch_stride_bytes, -16, "new_batch_stride_bytes=-16");
  APPEND_WITH(new_token_stride_bytes, HUGE_STRIDE, "new_token_stride_bytes=4611686018427387904");
  APPEND_WITH(new_head_stride_bytes, HUGE_STRIDE, "new_head_stride_bytes=4611686018427387904");
  APPEND_WITH(page_stride_bytes, HUGE_STRIDE, "page_stride_bytes=4611686018427387904");
  APPEND_WITH(max_pages, 1 << 24, "max_pages=16777216");
  APPEND_WITH(new_tokens, INT32_MAX, "new_tokens=2147483647: with tail_capacity=130");
  APPEND_WITH(pages, NULL, "pages: is null");
  APPEND_WITH(head_stride_bytes, 16, "head_stride_bytes=16");
  APPEND_WITH(block_table, NULL, "block_table: is null");
  APPEND_WITH(block_table, twice, "names page 1 twice");
  APPEND_WITH(lengths, negative, "lengths[0]=-1");
  APPEND_WITH(cu_seqlens, falling, "cu_seqlens[0]=261");
  APPEND_WITH(packed_lens, NULL, "packed_lens: is null");
  APPEND_WITH(tail_k, NULL, "tail_k: is null");
  APPEND_WITH(sink_v, NULL, "sink_v: is null");
  REJECTED(bitdecoding_append_cpu(NULL, &p, 1), "quant: is null");
  REJECTED(bitdecoding_append_cpu(&quant, NULL, 1), "params: is null");
  REJECTED(bitdecoding_append_cpu(&quant, &p, -1), "num_threads=-1");
  CHECK(lens[0] == 0 && packed[0] == 0);

  p.status = status;
  p.block_table = one_page;
  OK(bitdecoding_append_cpu(&quant, &p, 2));
  CHECK(status[0] == 1 && lens[0] == 0);
  p.block_table = table;
  OK(bitdecoding_append_cpu(&quant, &p, 2));
  CHECK(lens[0] == NEW && packed[0] == 256);
  p.lengths = length;
  OK(bitdecoding_append_cpu(&quant, &p, 2));
  CHECK(lens[0] == NEW + 1 && packed[0] == 256);

  /* 0 .. 15 are exact in 4 bits: equal weights give their mean */
  bitdecoding_decode_params d = BITDECODING_DECODE_PARAMS_INIT;
  float *q = calloc(HEADS * DIM, 4), *out = calloc(HEADS * DIM, 4);
  d.dtype = p.dtype;
  d.num_q_heads = d.num_kv_heads = HEADS;
  d.head_dim = DIM;
  d.num_pages = d.max_pages = PAGES;
  d.tail_capacity = CAPACITY;
  d.num_sink = SINKS;
  d.q = q;
  d.pages = pages;
  d.block_table = table;
  d.seqlens = lens;
  d.packed_lens = packed;
  d.tail_k = p.tail_k;
  d.tail_v = p.tail_v;
  d.sink_k = p.sink_k;
  d.sink_v = p.sink_v;
  d.out = out;
  OK(bitdecoding_decode_cpu(&quant, &d, 1));
  CHECK(fabsf(out[7] - (18.0f * 120 + 66) / 301) < 1e-4f); /* 300 tokens: 18 rounds and 0 .. 11; then another 0 */

  bitdecoding_append_plan plan = BITDECODING_APPEND_PLAN_INIT;
  FAILS(bitdecoding_append(&plan, &p, NULL, 0, NULL), BITDECODING_KERNEL_NOT_FOUND, "handle=-1");
  REJECTED(bitdecoding_append(NULL, &p, NULL, 0, NULL), "plan: is null");
  REJECTED(bitdecoding_quantize(&plan, NULL, NULL), "params: is null");
  free(out), free(q), free(pages), free(sinks), free(tails), free(v), free(k);
}

/* A value of a token that 4 bits do not hold. */
static float value_of(int b, int token, int i) { return (float)((token * 37 + i * 11 + b * 5) % 101) / 101.0f; }

static void step(void) {
  enum { SEQUENCES = 2, Q_LEN = 2, RECENT = 3, CAPACITY = RECENT + 127 + Q_LEN, SINKS = 2, ROW = HEADS * DIM };
  enum { FULL = SINKS + RECENT + 127, SHORT = SINKS - 1, TAILS = SEQUENCES * CAPACITY * ROW };
  bitdecoding_quant_spec quant = make_quant();
  bitdecoding_append_params append = BITDECODING_APPEND_PARAMS_INIT;
  bitdecoding_decode_params decode = BITDECODING_DECODE_PARAMS_INIT;
  const int32_t pages_of[SEQUENCES] = {1, 0}, no_page[SEQUENCES] = {-1, 0}, held[SEQUENCES] = {FULL, SHORT};
  const int32_t twice[SEQUENCES] = {1, 1}, negative_first[SEQUENCES] = {-1, 0};
  int32_t lens[SEQUENCES] = {0}, packed[SEQUENCES] = {0}, twin_lens[SEQUENCES], twin_packed[SEQUENCES], status[1] = {0};
  float *k = calloc(SEQUENCES * FULL * ROW, 4), *v = calloc(SEQUENCES * FULL * ROW, 4);
  float *tails = calloc(2 * TAILS, 4), *twin_tails = calloc(2 * TAILS, 4);
  float* sinks = calloc(2 * SEQUENCES * SINKS * ROW, 4);
  float *q = calloc(SEQUENCES * Q_LEN * ROW, 4), *out = calloc(SEQUENCES * Q_LEN * ROW, 4);
  int64_t bytes = 0;
  OK(bitdecoding_block_bytes(DIM, &quant, &bytes));
  const size_t pool = (size_t)bytes * HEADS * SEQUENCES;
  unsigned char *pages = calloc(pool, 1), *twin_pages = calloc(pool, 1);
  for (int b = 0; b < SEQUENCES; ++b) {
    for (int i = 0; i < FULL * ROW; ++i) k[b * FULL * ROW + i] = v[b * FULL * ROW + i] = value_of(b, i / ROW, i % ROW);
  }
  append.dtype = decode.dtype = BITDECODING_FLOAT32;
  append.batch = decode.batch = SEQUENCES;
  append.num_kv_heads = decode.num_kv_heads = decode.num_q_heads = HEADS;
  append.head_dim = decode.head_dim = DIM;
  append.num_pages = decode.num_pages = SEQUENCES;
  append.max_pages = decode.max_pages = 1;
  append.tail_capacity = decode.tail_capacity = CAPACITY;
  append.num_sink = decode.num_sink = SINKS;
  append.recent = RECENT;
  append.k_new = k;
  append.v_new = v;
  decode.pages = append.pages = pages;
  decode.block_table = append.block_table = pages_of;
  decode.seqlens = append.seqlens = lens;
  decode.packed_lens = append.packed_lens = packed;
  decode.tail_k = append.tail_k = tails;
  decode.tail_v = append.tail_v = tails + TAILS;
  decode.sink_k = append.sink_k = sinks;
  decode.sink_v = append.sink_v = sinks + SEQUENCES * SINKS * ROW;
  append.new_tokens = FULL;
  append.lengths = held;
  OK(bitdecoding_append_cpu(&quant, &append, 2)); /* a tail that a step fills, and sinks that it fills */
  CHECK(lens[0] == FULL && lens[1] == SHORT && packed[0] == 0);

  for (int b = 0; b < SEQUENCES; ++b) { /* keys of a step: whatever, values: the sequence goes on */
    for (int i = 0; i < Q_LEN * ROW; ++i) v[b * Q_LEN * ROW + i] = value_of(b, held[b] + i / ROW, i % ROW);
  }
  append.new_tokens = decode.q_len = Q_LEN;
  append.lengths = NULL;
  decode.q = q; /* 0: means of values */
  decode.out = out;

#define STEP_WITH(params, field, value, text)                          \
  do {                                                                 \
    const bitdecoding_decode_params sound_decode = decode;             \
    const bitdecoding_append_params sound_append = append;             \
    params.field = value;                                              \
    REJECTED(bitdecoding_step_cpu(&quant, &decode, &append, 1), text); \
    CHECK(lens[0] == FULL && lens[1] == SHORT && packed[0] == 0);      \
    decode = sound_decode, append = sound_append;                      \
  } while (0)
  STEP_WITH(decode, size, 16, "decode: size=16");
  STEP_WITH(append, size, 16, "append: size=16");
  STEP_WITH(append, head_dim, 128, "head_dim=128: allowed are 64");
  STEP_WITH(append, dtype, BITDECODING_FLOAT16, "dtype=0: allowed are 2");
  STEP_WITH(decode, num_q_heads, 3, "num_q_heads=3: must be a multiple of num_kv_heads=2");
  STEP_WITH(decode, q, NULL, "q: is null");
  STEP_WITH(append, v_new, NULL, "v_new: is null");
  STEP_WITH(append, batch, 1, "batch=1: must be decode's batch=2");
  STEP_WITH(append, new_tokens, 1, "new_tokens=1: must be decode's q_len=2");
  STEP_WITH(append, new_tokens, 0, "new_tokens=0");
  STEP_WITH(append, num_kv_heads, 1, "num_kv_heads=1: must be decode's num_kv_heads=2");
  STEP_WITH(append, num_pages, 1, "num_pages=1: must be decode's num_pages=2");
  STEP_WITH(append, max_pages, 2, "max_pages=2: must be decode's max_pages=1");
  STEP_WITH(append, tail_capacity, CAPACITY + 1, "tail_capacity=133: must be decode's tail_capacity=132");
  STEP_WITH(append, recent, RECENT + 1, "tail_capacity=132: allowed are numbers from 133 (recent + 127 + q_len)");
  STEP_WITH(append, recent, INT32_MAX, "tail_capacity=132: allowed are numbers from 2147483774");
  STEP_WITH(append, num_sink, 1, "num_sink=1: must be decode's num_sink=2");
  STEP_WITH(append, page_stride_bytes, HEADS * bytes + 16,
            "page_stride_bytes=17936: must be decode's page_stride_bytes=17920");
  STEP_WITH(append, head_stride_bytes, bytes + 16, "stride_bytes=");
  STEP_WITH(append, pages, twin_pages, "pages: must be decode's");
  STEP_WITH(append, block_table, twice, "block_table: must be decode's");
  STEP_WITH(append, seqlens, status, "seqlens: must be decode's");
  STEP_WITH(decode, packed_lens, NULL, "packed_lens: must be decode's");
  STEP_WITH(append, tail_k, twin_tails, "tail_k: must be decode's");
  STEP_WITH(decode, tail_v, twin_tails, "tail_v: must be decode's");
  STEP_WITH(append, sink_k, twin_tails, "sink_k: must be decode's");
  STEP_WITH(append, sink_v, twin_tails, "sink_v: must be decode's");
  STEP_WITH(append, lengths, held, "lengths: must be null for a step");
  STEP_WITH(append, cu_seqlens, held, "cu_seqlens: must be null for a step");
  STEP_WITH(decode, block_table = append.block_table, no_page, "block_table[0, 0]=-1: allowed are 0 to 1");
  STEP_WITH(decode, packed_lens = append.packed_lens, (int32_t*)negative_first, "packed_lens[0]=-1");
  STEP_WITH(decode, q_len = append.new_tokens, INT32_MAX / 2, "allowed");
  REJECTED(bitdecoding_step_cpu(NULL, &decode, &append, 1), "quant: is null");
  REJECTED(bitdecoding_step_cpu(&quant, NULL, &append, 1), "decode: is null");
  REJECTED(bitdecoding_step_cpu(&quant, &decode, NULL, 1), "append: is null");
  REJECTED(bitdecoding_step_cpu(&quant, &decode, &append, -1), "num_threads=-1");

  for (int with_page = 0; with_page < 2; ++with_page) {
    bitdecoding_append_params twin = append;
    memcpy(twin_lens, lens, sizeof(lens)), memcpy(twin_packed, packed, sizeof(packed));
    memcpy(twin_tails, tails, 2 * TAILS * sizeof(float)), memcpy(twin_pages, pages, pool);
    append.status = status;
    append.block_table = decode.block_table = with_page ? pages_of : no_page;
    twin.seqlens = twin_lens, twin.packed_lens = twin_packed, twin.pages = twin_pages;
    twin.tail_k = twin_tails, twin.tail_v = twin_tails + TAILS;
    twin.status = append.status, twin.block_table = append.block_table;
    memset(out, 0xff, SEQUENCES * Q_LEN * ROW * sizeof(float));
    OK(bitdecoding_step_cpu(&quant, &decode, &append, 2));
    for (int b = 0; b < SEQUENCES; ++b) { /* attention is that over 16-bit tokens */
      const int before = b == 1 && with_page ? SHORT + Q_LEN : held[b];
      for (int i = 0; i < Q_LEN * ROW; ++i) {
        double sum = 0.0;
        const int count = before + i / ROW + 1;
        for (int t = 0; t < count; ++t) sum += value_of(b, t < held[b] + Q_LEN ? t : t - Q_LEN, i % ROW);
        CHECK(fabs(out[b * Q_LEN * ROW + i] - sum / count) < 1e-5);
      }
    }
    OK(bitdecoding_append_cpu(&quant, &twin, 2)); /* the cache is that of an append */
    CHECK(status[0] == 1);                        /* once a block had no page */
    CHECK(memcmp(lens, twin_lens, sizeof(lens)) == 0 && memcmp(packed, twin_packed, sizeof(packed)) == 0);
    CHECK(lens[0] == FULL + (with_page ? Q_LEN : 0) && packed[0] == (with_page ? 128 : 0));
    CHECK(memcmp(pages, twin_pages, pool) == 0);
    for (int b = 0; b < SEQUENCES; ++b) {
      const size_t tail = (size_t)(lens[b] - SINKS - packed[b]) * ROW * sizeof(float);
      for (int i = 0; i < 2 * TAILS; i += TAILS) {
        CHECK(memcmp(tails + i + b * CAPACITY * ROW, twin_tails + i + b * CAPACITY * ROW, tail) == 0);
      }
    }
  }

  bitdecoding_step_plan plan = BITDECODING_STEP_PLAN_INIT;
  FAILS(bitdecoding_step(&plan, &decode, &append, NULL, 0, NULL), BITDECODING_KERNEL_NOT_FOUND, "handle=-1");
  REJECTED(bitdecoding_step(NULL, &decode, &append, NULL, 0, NULL), "plan: is null");
  REJECTED(bitdecoding_step(&plan, NULL, &append, NULL, 0, NULL), "decode: is null");
  REJECTED(bitdecoding_step(&plan, &decode, NULL, NULL, 0, NULL), "append: is null");
  free(twin_pages), free(pages), free(out), free(q), free(sinks), free(twin_tails), free(tails), free(v), free(k);
}

/* Mistakes in a step that a device would do; a driver is not asked. */
static void step_launches(const bitdecoding_step_plan* plan) {
  static _Alignas(16) char any[32]; /* is not looked at */
  static int32_t ints[1];
  bitdecoding_append_params append = BITDECODING_APPEND_PARAMS_INIT;
  bitdecoding_decode_params decode = BITDECODING_DECODE_PARAMS_INIT;
  decode.num_q_heads = 32;
  decode.num_kv_heads = append.num_kv_heads = 8;
  decode.tail_capacity = append.tail_capacity = 129;
  append.k_new = append.v_new = decode.q = decode.out = any;
  decode.seqlens = decode.packed_lens = append.seqlens = append.packed_lens = ints;
  decode.tail_k = decode.tail_v = append.tail_k = append.tail_v = any;
  const int64_t bytes = plan->workspace_bytes;
  REJECTED(bitdecoding_step(plan, &decode, &append, NULL, bytes, NULL), "workspace: is null");
  REJECTED(bitdecoding_step(plan, &decode, &append, any + 8, bytes, NULL), "workspace: address must be");
  append.recent = 2;
  REJECTED(bitdecoding_step(plan, &decode, &append, any, bytes, NULL),
           "tail_capacity=129: allowed are numbers from 130");
  append.recent = 0;
  append.new_tokens = 2;
  REJECTED(bitdecoding_step(plan, &decode, &append, any, bytes, NULL), "new_tokens=2: must be decode's q_len=1");
  decode.q_len = 2;
  FAILS(bitdecoding_step(plan, &decode, &append, any, bytes, NULL), BITDECODING_UNSUPPORTED_CONFIG,
        "has 4 query columns, num_q_heads / num_kv_heads * q_len is 8");
}

static void plans(const char* pack, const char* no_pack) {
  bitdecoding_quant_spec quant = BITDECODING_QUANT_SPEC_INIT;
  bitdecoding_decode_problem problem = BITDECODING_DECODE_PROBLEM_INIT;
  bitdecoding_device device = BITDECODING_DEVICE_INIT;
  bitdecoding_decode_plan plan = BITDECODING_DECODE_PLAN_INIT;
  bitdecoding_decode_params params = BITDECODING_DECODE_PARAMS_INIT;
  bitdecoding_step_plan step_plan = BITDECODING_STEP_PLAN_INIT;
  bitdecoding_append_params new_tokens = BITDECODING_APPEND_PARAMS_INIT;
  char names[512], workspace[16];
  size_t needed = 0;
  int32_t kernels = 0;
  problem.quant = &quant;
  problem.num_q_heads = 32;
  problem.num_kv_heads = 8;
  device.num_sms = 132;
  strcpy(device.arch, "sm80");
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_KERNEL_NOT_FOUND, "load a kernel pack");
  REJECTED(bitdecoding_load_pack(NULL, NULL), "path: is null");
  REJECTED(bitdecoding_load_pack("/nowhere", NULL), "path='/nowhere': cannot be opened");
  FAILS(bitdecoding_load_pack(no_pack, NULL), BITDECODING_FORMAT_ERROR, "not a usable kernel pack");
  OK(bitdecoding_load_pack(pack, &kernels));
  CHECK(kernels == 4);
  if (kernels != 4) return;
  REJECTED(bitdecoding_list_kernels(names, 3, &needed), "capacity=3");
  REJECTED(bitdecoding_list_kernels(NULL, 3, &needed), "names: is null");
  REJECTED(bitdecoding_list_kernels(names, sizeof(names), NULL), "needed: is null");
  OK(bitdecoding_list_kernels(names, sizeof(names), &needed));
  CHECK(needed == strlen(names) + 1 && strstr(names, "sm80") != NULL);

  OK(bitdecoding_plan_decode(&problem, &device, &plan));
  CHECK(plan.kernel == 0 && plan.workspace_bytes > (1 << 20) && plan.rotate_q == 0);
  REJECTED(bitdecoding_decode(&plan, &params, workspace, 16, NULL), "workspace_bytes=16: the plan needs");
  REJECTED(bitdecoding_decode(&plan, &params, NULL, plan.workspace_bytes, NULL), "is null");
  params.head_dim = 64;
  REJECTED(bitdecoding_decode(&plan, &params, workspace, 16, NULL), "head_dim=64: allowed are 128");
  params.head_dim = 128;
  params.dtype = BITDECODING_FLOAT32;
  REJECTED(bitdecoding_decode(&plan, &params, workspace, 16, NULL), "dtype=2: allowed are 0, 1");

  params.dtype = BITDECODING_FLOAT16;

  OK(bitdecoding_plan_step(&problem, &device, &step_plan));
  CHECK(step_plan.kernel == 3 && step_plan.workspace_bytes > 4 << 20 && step_plan.k_clip == 1.0f);
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, workspace, 16, NULL),
           "workspace_bytes=16: the plan needs");
  const int64_t enough = step_plan.workspace_bytes;
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, NULL, enough, NULL), "q: is null");
  new_tokens.dtype = BITDECODING_BFLOAT16;
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, workspace, 16, NULL), "dtype=1: allowed are 0");
  params.dtype = new_tokens.dtype = BITDECODING_FLOAT32;
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, workspace, 16, NULL), "dtype=2: allowed are 0, 1");
  params.dtype = new_tokens.dtype = BITDECODING_FLOAT16;
  params.head_dim = new_tokens.head_dim = 64;
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, workspace, 16, NULL), "head_dim=64: allowed are 128");
  params.head_dim = new_tokens.head_dim = 128;
  step_launches(&step_plan);
  step_plan.kernel = plan.kernel;
  REJECTED(bitdecoding_step(&step_plan, &params, &new_tokens, NULL, enough, NULL), "allowed are those of kind=step");
  plan.kernel = 3;
  REJECTED(bitdecoding_decode(&plan, &params, NULL, plan.workspace_bytes, NULL), "are those of kind=decode");
  problem.q_len = 2; /* 8 columns */
  FAILS(bitdecoding_plan_step(&problem, &device, &step_plan), BITDECODING_KERNEL_NOT_FOUND,
        "q_len=2: kernel step_sm80_d128");
  problem.q_len = INT32_MAX;
  FAILS(bitdecoding_plan_step(&problem, &device, &step_plan), BITDECODING_KERNEL_NOT_FOUND,
        "4 query columns, num_q_heads / num_kv_heads * q_len is 8589934588");
  OK(bitdecoding_plan_decode(&problem, &device, &plan)); /* in tiles */
  problem.q_len = 1;
  REJECTED(bitdecoding_plan_step(NULL, &device, &step_plan), "problem: is null");
  REJECTED(bitdecoding_plan_step(&problem, NULL, &step_plan), "device: is null");
  REJECTED(bitdecoding_plan_step(&problem, &device, NULL), "plan: is null");
  problem.kernel = strstr(names, "step_");
  *strchr(problem.kernel, '\n') = 0; /* it is the last */
  OK(bitdecoding_plan_step(&problem, &device, &step_plan));
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "is not for kind=decode");

  problem.kernel = "decode";
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_KERNEL_NOT_FOUND, "kernel='decode'");
  *strchr(names, '\n') = 0; /* the first is the decode kernel */
  problem.kernel = names;
  OK(bitdecoding_plan_decode(&problem, &device, &plan));
  REJECTED(bitdecoding_plan_step(&problem, &device, &step_plan), "is not for kind=step");
  problem.head_dim = 64;
  quant.v_group = 64;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "is not for kind=decode, head_dim=64");
  problem.head_dim = 128;
  quant.v_group = 128;
  problem.kernel = NULL;

  bitdecoding_append_plan append_plan = BITDECODING_APPEND_PLAN_INIT;
  OK(bitdecoding_plan_append(&quant, 128, &device, &append_plan));
  CHECK(append_plan.kernel == 1 && append_plan.workspace_bytes == 4 << 20 && append_plan.k_clip == 1.0f);
  REJECTED(bitdecoding_append(&append_plan, &new_tokens, workspace, 16, NULL), "is null");
  REJECTED(bitdecoding_quantize(&append_plan, &new_tokens, NULL), "is null");
  new_tokens.dtype = BITDECODING_FLOAT32;
  REJECTED(bitdecoding_append(&append_plan, &new_tokens, workspace, 16, NULL), "dtype=2: allowed are 0, 1");
  append_plan.kernel = plan.kernel;
  new_tokens.dtype = BITDECODING_FLOAT16;
  REJECTED(bitdecoding_append(&append_plan, &new_tokens, workspace, 16, NULL), "allowed are those of kind=append");
  FAILS(bitdecoding_plan_append(&quant, 64, &device, &append_plan), BITDECODING_INVALID_ARGUMENT, "v_group=128");
  REJECTED(bitdecoding_plan_append(NULL, 128, &device, &append_plan), "quant: is null");
  REJECTED(bitdecoding_plan_append(&quant, 128, NULL, &append_plan), "device: is null");
  REJECTED(bitdecoding_plan_append(&quant, 128, &device, NULL), "plan: is null");

  float lses[2] = {0.0f, 0.0f};
  _Alignas(16) char rows[2][256] = {{0}};
  REJECTED(bitdecoding_merge(NULL, 0, 2, rows, lses, 1, 128, rows, NULL, NULL), "device: is null");
  REJECTED(bitdecoding_merge(&device, 2, 2, rows, lses, 1, 128, rows, NULL, NULL), "dtype=2: allowed are 0, 1");
  REJECTED(bitdecoding_merge(&device, 0, 0, rows, lses, 1, 128, rows, NULL, NULL), "num_parts=0");
  REJECTED(bitdecoding_merge(&device, 0, 2, NULL, lses, 1, 128, rows, NULL, NULL), "outs: is null");
  REJECTED(bitdecoding_merge(&device, 0, 2, rows, NULL, 1, 128, rows, NULL, NULL), "lses: is null");
  REJECTED(bitdecoding_merge(&device, 0, 2, rows, lses, 1, 128, NULL, NULL, NULL), "out: is null");
  REJECTED(bitdecoding_merge(&device, 0, 2, rows[0] + 2, lses, 1, 128, rows, NULL, NULL), "outs: address");
  REJECTED(bitdecoding_merge(&device, 0, 2, rows, lses, -1, 128, rows, NULL, NULL), "rows=-1");
  REJECTED(bitdecoding_merge(&device, 0, 2, rows, lses, 1, 80, rows, NULL, NULL), "head_dim=80");
  FAILS(bitdecoding_merge(&device, 0, 2, rows, lses, 1, 64, rows, NULL, NULL), BITDECODING_KERNEL_NOT_FOUND,
        "kind=merge for head_dim=64");

  strcpy(device.arch, "sm90a");
  FAILS(bitdecoding_plan_append(&quant, 128, &device, &append_plan), BITDECODING_KERNEL_NOT_FOUND, "some for sm80");
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_KERNEL_NOT_FOUND, "there are some for sm80");
  memset(device.arch, 'x', sizeof(device.arch));
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_UNSUPPORTED_CONFIG, "arch='xxx");
  strcpy(device.arch, "sm80");
  quant.k_bits = 2;
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_KERNEL_NOT_FOUND, "no arch");
  quant.k_bits = 5;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "k_bits=5");
  quant.k_bits = 4;
  problem.q_len = 0;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "q_len=0");
  problem.q_len = 1;
  problem.num_q_heads = 33;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "num_q_heads=33");
  problem.num_q_heads = 32;
  device.num_sms = 0;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "num_sms=0");
  device.num_sms = 132;
  REJECTED(bitdecoding_plan_decode(NULL, &device, &plan), "problem: is null");
  REJECTED(bitdecoding_plan_decode(&problem, NULL, &plan), "device: is null");
  REJECTED(bitdecoding_plan_decode(&problem, &device, NULL), "plan: is null");
  problem.quant = NULL;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "quant: is null");
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  block_bytes();
  decode();
  append();
  step();
  plans(argv[1], argv[2]);
  return failures != 0;
}
