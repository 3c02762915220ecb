/* The library for C, and for every language that can call C: the functions of runtime.hpp and cpu.hpp.
 *
 * A struct that is passed begins with its size; set it with the struct's _INIT value. A library that is newer than its
 * caller takes the fields that the caller does not know at their defaults; an older one refuses fields that it does not
 * know, unless they are zero. Fields are only ever added at the end.
 *
 * Functions return a status and never throw; bitdecoding_last_error() has the message of this thread's last failure,
 * which names the argument, its value and what is allowed. Pointers that are marked optional may be null. All functions
 * may be called from any thread. */
#ifndef BITDECODING_C_API_H
#define BITDECODING_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum bitdecoding_status {
  BITDECODING_OK = 0,
  BITDECODING_INVALID_ARGUMENT = 1,   /* an argument has a wrong type, shape or value */
  BITDECODING_UNSUPPORTED_CONFIG = 2, /* sound, but no kernel can exist for it */
  BITDECODING_KERNEL_NOT_FOUND = 3,   /* no registered kernel fits */
  BITDECODING_CUDA_ERROR = 4,         /* the CUDA driver is missing or returned an error */
  BITDECODING_FORMAT_ERROR = 5,       /* a kernel pack is damaged, hostile or of another version */
  BITDECODING_OUT_OF_MEMORY = 6       /* the host has no memory left */
} bitdecoding_status;

#if defined(__cplusplus)
#define BITDECODING_MUST_USE [[nodiscard]]
#elif defined(__GNUC__)
#define BITDECODING_MUST_USE __attribute__((warn_unused_result))
#else
#define BITDECODING_MUST_USE
#endif

typedef enum bitdecoding_dtype {
  BITDECODING_FLOAT16 = 0,
  BITDECODING_BFLOAT16 = 1,
  BITDECODING_FLOAT32 = 2 /* on the CPU only */
} bitdecoding_dtype;

const char* bitdecoding_last_error(void);

/* ---- what the bits of a cache mean ---- */

#define BITDECODING_CLIP_SEARCHED (-1.0f)

typedef struct bitdecoding_quant_spec {
  size_t size;
  int32_t k_bits, v_bits;           /* of a code: 8, 4 or 2 */
  int32_t k_per_token;              /* 0: a K group holds tokens of one channel; 1: channels of one token */
  int32_t k_group, v_group;         /* values of a group: 32, 64 or 128 */
  int32_t k_symmetric, v_symmetric; /* 1: codes are centred, no zero is stored */
  int32_t k_mean;                   /* 1: the mean of a block's keys is subtracted and stored once */
  int32_t rotate_k, rotate_v;       /* 1: keys (and queries) / values (and out) go through a Hadamard transform */
  float k_clip, v_clip;             /* range of a group: 0: from minimum to maximum; in (0, 1]: that times this factor;
                                     * BITDECODING_CLIP_SEARCHED: the factor of the least squared error. Quantising alone asks */
} bitdecoding_quant_spec;
#define BITDECODING_QUANT_SPEC_INIT {sizeof(bitdecoding_quant_spec), 4, 4, 0, 128, 128, 0, 0, 0, 0, 0, 0.0f, 0.0f}

/* Bytes of a block, 128 tokens of one KV head. head_dim: 64, 96, 128 or 256. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_block_bytes(int64_t head_dim, const bitdecoding_quant_spec* quant,
                                                                int64_t* bytes);

/* ---- kernels ---- */

/* Registers every kernel of a pack, or none. num_kernels: optional, how many it holds. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_load_pack(const char* path, int32_t* num_kernels);

/* The names of all registered kernels, each followed by a newline, and a null character. needed: bytes of all that,
 * which is also set where `capacity` is too small (invalid argument; names may be null if capacity is 0). */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_list_kernels(char* names, size_t capacity, size_t* needed);

/* ---- devices ---- */

typedef struct bitdecoding_device {
  size_t size;
  int32_t index;
  int32_t major, minor; /* compute capability */
  int32_t num_sms;
  char arch[16]; /* of the kernels that run there: sm80, sm86, sm89, sm90a, sm100 or sm120; "": none */
} bitdecoding_device;
#define BITDECODING_DEVICE_INIT {sizeof(bitdecoding_device), 0, 0, 0, 0, ""}

/* Where there is no driver: BITDECODING_CUDA_ERROR. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_get_device(int32_t index, bitdecoding_device* device);

/* ---- decode ---- */

typedef struct bitdecoding_decode_problem {
  size_t size;
  const bitdecoding_quant_spec* quant;
  int64_t head_dim;
  int32_t num_q_heads;
  int32_t num_kv_heads; /* divides num_q_heads */
  int32_t q_len;        /* new tokens per sequence */
  const char* kernel;   /* optional, the name of a registered kernel to use, see bitdecoding_list_kernels */
} bitdecoding_decode_problem;
#define BITDECODING_DECODE_PROBLEM_INIT {sizeof(bitdecoding_decode_problem), NULL, 128, 1, 1, 1, NULL}

typedef struct bitdecoding_decode_plan {
  size_t size;
  int32_t kernel; /* a registered kernel */
  int32_t device;
  int64_t workspace_bytes;
  int32_t rotate_q, rotate_out; /* of the problem's quant */
} bitdecoding_decode_plan;
#define BITDECODING_DECODE_PLAN_INIT {sizeof(bitdecoding_decode_plan), -1, 0, 0, 0, 0}

/* Chooses among the registered kernels; needs no driver if the device is filled in by hand (arch and num_sms count).
 * Nothing of the problem is kept. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_plan_decode(const bitdecoding_decode_problem* problem,
                                                                const bitdecoding_device* device,
                                                                bitdecoding_decode_plan* plan);

/* Pointers are device pointers for bitdecoding_decode and host pointers for bitdecoding_decode_cpu; all tensors are
 * contiguous (row-major, no gaps) and begin at multiples of 16 bytes, lengths and table at multiples of 4. A sequence
 * is its sink tokens, then its packed, then its tail tokens. */
typedef struct bitdecoding_decode_params {
  size_t size;
  int32_t dtype; /* a bitdecoding_dtype: that of q, tail, sinks and out */
  int32_t batch;
  int32_t q_len;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_pages;
  int32_t max_pages;          /* columns of block_table */
  int32_t tail_capacity;      /* 0: there is no tail */
  int32_t num_sink;           /* 0: there are no sinks */
  int32_t window;             /* tokens visible to a query, itself included; 0: all */
  float softmax_scale;        /* 0: 1 / sqrt(head_dim) */
  float softcap;              /* scores s become softcap * tanh(s / softcap); 0: they stay */
  const void* q;              /* dtype [batch, q_len, num_q_heads, head_dim]; the last query is the newest token */
  const void* pages;          /* uint8 [num_pages, num_kv_heads, block_bytes] with the strides below */
  int64_t page_stride_bytes;  /* multiples of 16; 0: num_kv_heads * head_stride_bytes */
  int64_t head_stride_bytes;  /* 0: block_bytes */
  const int32_t* block_table; /* [batch, max_pages]; entries beyond a sequence's packed tokens are never read */
  const int32_t* seqlens;     /* [batch], all tokens of a sequence */
  const int32_t*
      packed_lens;    /* optional [batch], tokens in pages; default: all but sinks, with a tail in full blocks */
  const void* tail_k; /* dtype [batch, tail_capacity, num_kv_heads, head_dim]; rotated where quant rotates */
  const void* tail_v;
  const void* sink_k; /* dtype [batch, num_sink, num_kv_heads, head_dim]; rotated where quant rotates */
  const void* sink_v;
  const float* sink_logits; /* optional [num_q_heads], scores with a value of zero */
  void* out;                /* dtype, like q, which it must not overlap */
  float* lse;               /* optional [batch, q_len, num_q_heads], natural logarithm of the softmax's denominator */
} bitdecoding_decode_params;
#define BITDECODING_DECODE_PARAMS_INIT \
  {sizeof(bitdecoding_decode_params),  \
   BITDECODING_FLOAT16,                \
   1,                                  \
   1,                                  \
   1,                                  \
   1,                                  \
   128,                                \
   0,                                  \
   0,                                  \
   0,                                  \
   0,                                  \
   0,                                  \
   0.0f,                               \
   0.0f,                               \
   NULL,                               \
   NULL,                               \
   0,                                  \
   0,                                  \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL}

/* Enqueues a decode and returns. The sizes that decide the plan must be the plan's problem's. Values on the device
 * (lengths, table) are trusted.
 * workspace: on the device, of plan->workspace_bytes or more, zeroed once when it is allocated; not for calls that run
 *   at the same time.
 * stream: a CUstream, null: the default stream. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_decode(const bitdecoding_decode_plan* plan,
                                                           const bitdecoding_decode_params* params, void* workspace,
                                                           int64_t workspace_bytes, void* stream);

/* The same on the CPU, done when it returns; lengths and table are checked. num_threads: at most so many, 0: one per
 * core. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_decode_cpu(const bitdecoding_quant_spec* quant,
                                                               const bitdecoding_decode_params* params,
                                                               int32_t num_threads);

/* ---- quantise and append ---- */

typedef struct bitdecoding_append_plan {
  size_t size;
  int32_t kernel; /* a registered kernel */
  int32_t device;
  int64_t workspace_bytes;    /* a workspace of decode may be shared */
  int32_t rotate_k, rotate_v; /* of quant */
  float k_clip, v_clip;
} bitdecoding_append_plan;
#define BITDECODING_APPEND_PLAN_INIT {sizeof(bitdecoding_append_plan), -1, 0, 0, 0, 0, 0.0f, 0.0f}

/* Finds the registered kernel that appends to blocks of a format and quantises to them; as bitdecoding_plan_decode. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_plan_append(const bitdecoding_quant_spec* quant, int64_t head_dim,
                                                                const bitdecoding_device* device,
                                                                bitdecoding_append_plan* plan);

/* Pointers are device pointers for bitdecoding_append and bitdecoding_quantize and host pointers for their _cpu forms;
 * tensors and strides are multiples of 16 bytes, lengths and table of 4. For quantising, the fields from lengths on
 * that are marked "append" are null and 0. */
typedef struct bitdecoding_append_params {
  size_t size;
  int32_t dtype; /* a bitdecoding_dtype: that of k_new, v_new, tail and sinks */
  int32_t batch;
  int32_t new_tokens; /* of each sequence, at most */
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_pages;
  int32_t max_pages;     /* columns of block_table */
  int32_t tail_capacity; /* append: at least recent + 127 */
  int32_t num_sink;      /* append; 0: there are no sinks */
  int32_t recent;        /* append: newest tokens that stay in 16 bit */
  const void* k_new;     /* dtype [batch, new_tokens, num_kv_heads, head_dim] with the strides below, of which only */
  const void* v_new;     /* head_dim must have no gaps; not rotated */
  int64_t new_batch_stride_bytes; /* 0: new_tokens * new_token_stride_bytes */
  int64_t new_token_stride_bytes; /* 0: num_kv_heads * new_head_stride_bytes */
  int64_t new_head_stride_bytes;  /* 0: head_dim values */
  const int32_t* cu_seqlens;  /* optional [batch + 1]: new tokens are [all, num_kv_heads, head_dim], those of sequence
                               * b begin at cu_seqlens[b] and end before cu_seqlens[b + 1] */
  void* pages;                /* uint8 [num_pages, num_kv_heads, block_bytes] with the strides below */
  int64_t page_stride_bytes;  /* 0: num_kv_heads * head_stride_bytes */
  int64_t head_stride_bytes;  /* 0: block_bytes */
  const int32_t* block_table; /* [batch, max_pages]; a full block goes to the page that entry packed_lens / 128 names;
                               * no two blocks may go to the same */
  const int32_t* lengths;     /* append, optional [batch]: how many of the new tokens count; not with cu_seqlens */
  int32_t* seqlens;           /* append [batch], all tokens of a sequence; advanced */
  int32_t* packed_lens;       /* append [batch], multiples of 128; advanced */
  void* tail_k;               /* append, dtype [batch, tail_capacity, num_kv_heads, head_dim]; rotated where quant */
  void* tail_v;               /* rotates */
  void* sink_k;               /* append, dtype [batch, num_sink, num_kv_heads, head_dim]; rotated likewise */
  void* sink_v;
  int32_t* status; /* append, optional [1]: becomes at least 1 + b where sequence b had no page for a block, because its
                    * row of the table ends or the entry names none; such a sequence stays as it was */
} bitdecoding_append_params;
#define BITDECODING_APPEND_PARAMS_INIT \
  {sizeof(bitdecoding_append_params),  \
   BITDECODING_FLOAT16,                \
   1,                                  \
   1,                                  \
   1,                                  \
   128,                                \
   0,                                  \
   0,                                  \
   0,                                  \
   0,                                  \
   0,                                  \
   NULL,                               \
   NULL,                               \
   0,                                  \
   0,                                  \
   0,                                  \
   NULL,                               \
   NULL,                               \
   0,                                  \
   0,                                  \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL,                               \
   NULL}

/* Enqueues an append and returns. New tokens go to the sinks while these have room, the others behind the tail; as long
 * as the tail then holds recent + 128 tokens or more, its oldest 128 become a block in a page, and the others move up.
 * Values on the device are trusted, but entries of the table that name no page. workspace and stream as for
 * bitdecoding_decode. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_append(const bitdecoding_append_plan* plan,
                                                           const bitdecoding_append_params* params, void* workspace,
                                                           int64_t workspace_bytes, void* stream);

/* Enqueues the quantisation of all new tokens, each sequence from the beginning of its first block on, and returns; the
 * last block may be partial. A block that has no page is left out. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_quantize(const bitdecoding_append_plan* plan,
                                                             const bitdecoding_append_params* params, void* stream);

/* The same on the CPU, bit for bit, done when they return; lengths and table are checked before anything is written. A
 * sequence without a page for a block is an error, unless `status` is given. num_threads: at most so many, 0: one per
 * core. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_append_cpu(const bitdecoding_quant_spec* quant,
                                                               const bitdecoding_append_params* params,
                                                               int32_t num_threads);
BITDECODING_MUST_USE bitdecoding_status bitdecoding_quantize_cpu(const bitdecoding_quant_spec* quant,
                                                                 const bitdecoding_append_params* params,
                                                                 int32_t num_threads);

/* ---- step ---- */

typedef struct bitdecoding_step_plan {
  size_t size;
  int32_t kernel; /* a registered kernel */
  int32_t device;
  int64_t workspace_bytes;    /* a workspace of decode that has so many may be shared */
  int32_t rotate_k, rotate_v; /* of the problem's quant */
  float k_clip, v_clip;
} bitdecoding_step_plan;
#define BITDECODING_STEP_PLAN_INIT {sizeof(bitdecoding_step_plan), -1, 0, 0, 0, 0, 0.0f, 0.0f}

/* Chooses among the registered kernels that append the tokens of the queries themselves; as bitdecoding_plan_decode,
 * but where num_q_heads / num_kv_heads * q_len is more than the widest one's query columns:
 * BITDECODING_KERNEL_NOT_FOUND; append and decode do that. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_plan_step(const bitdecoding_decode_problem* problem,
                                                              const bitdecoding_device* device,
                                                              bitdecoding_step_plan* plan);

/* Enqueues a step, one kernel, and returns: appends the tokens of the queries, attends, and packs the blocks that then
 * are full (so the attention saw their tokens in 16 bit). decode and append: as for bitdecoding_decode and
 * bitdecoding_append, of one cache: new_tokens is q_len, lengths and cu_seqlens are null, tail_capacity is at least
 * recent + 127 + q_len. A sequence without a page for a block stays as it was, its attention counts. workspace and
 * stream as for bitdecoding_decode. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_step(const bitdecoding_step_plan* plan,
                                                         const bitdecoding_decode_params* decode,
                                                         const bitdecoding_append_params* append, void* workspace,
                                                         int64_t workspace_bytes, void* stream);

/* The same on the CPU, the cache bit for bit, done when it returns; checked as by bitdecoding_append_cpu and
 * bitdecoding_decode_cpu. Where it fails, lengths and all tokens that they count are as before. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_step_cpu(const bitdecoding_quant_spec* quant,
                                                             const bitdecoding_decode_params* decode,
                                                             const bitdecoding_append_params* append,
                                                             int32_t num_threads);

/* ---- merge ---- */

/* Combines attention over disjoint sets of keys. head_dim: 64, 96, 128 or 256. dtype: float16 or bfloat16.
 * outs: dtype [num_parts, rows, head_dim]; lses: [num_parts, rows], -inf where a part has no key.
 * out: dtype [rows, head_dim]; lse: optional [rows]. Zeros and -inf where no part has a key. Device pointers, outs and
 * out multiples of 16 bytes. Enqueued on a stream of the device, for which a kernel must be registered; the device is
 * one that bitdecoding_get_device has filled. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_merge(const bitdecoding_device* device, int32_t dtype,
                                                          int32_t num_parts, const void* outs, const float* lses,
                                                          int64_t rows, int64_t head_dim, void* out, float* lse,
                                                          void* stream);

/* The same on the CPU, done when it returns; head_dim: 1 to 256, any dtype.
 * outs: num_parts pointers to dtype [rows, head_dim]; lses: num_parts pointers to [rows]; out and lse may be among
 * them. */
BITDECODING_MUST_USE bitdecoding_status bitdecoding_merge_cpu(int32_t dtype, int32_t num_parts, const void* const* outs,
                                                              const float* const* lses, int64_t rows, int64_t head_dim,
                                                              void* out, float* lse);

#ifdef __cplusplus
}
#endif

#endif /* BITDECODING_C_API_H */
