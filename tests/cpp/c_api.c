/* A C user without a GPU: appends and decodes on the CPU, plans, and makes every mistake. Arguments: a kernel pack for
 * sm80 that holds a decode, an append and a merge kernel of the default format, and a file that is none. Prints what
 * fails; silence is success. */
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

static void plans(const char* pack, const char* no_pack) {
  bitdecoding_quant_spec quant = BITDECODING_QUANT_SPEC_INIT;
  bitdecoding_decode_problem problem = BITDECODING_DECODE_PROBLEM_INIT;
  bitdecoding_device device = BITDECODING_DEVICE_INIT;
  bitdecoding_decode_plan plan = BITDECODING_DECODE_PLAN_INIT;
  bitdecoding_decode_params params = BITDECODING_DECODE_PARAMS_INIT;
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
  CHECK(kernels == 3);
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

  problem.kernel = "decode";
  FAILS(bitdecoding_plan_decode(&problem, &device, &plan), BITDECODING_KERNEL_NOT_FOUND, "kernel='decode'");
  *strchr(names, '\n') = 0; /* the first is the decode kernel */
  problem.kernel = names;
  OK(bitdecoding_plan_decode(&problem, &device, &plan));
  problem.head_dim = 64;
  quant.v_group = 64;
  REJECTED(bitdecoding_plan_decode(&problem, &device, &plan), "is not for kind=decode, head_dim=64");
  problem.head_dim = 128;
  quant.v_group = 128;
  problem.kernel = NULL;

  bitdecoding_append_plan append_plan = BITDECODING_APPEND_PLAN_INIT;
  bitdecoding_append_params new_tokens = BITDECODING_APPEND_PARAMS_INIT;
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
  plans(argv[1], argv[2]);
  return failures != 0;
}
