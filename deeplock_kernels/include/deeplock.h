/* The kernels of deeplock_kernels for C and whatever can call C. Python's `native_functions()` gives their addresses.
 *
 * A kernel takes one record of 64-bit integers (addresses, byte counts, positions), returns nothing, never fails, takes
 * no lock, allocates nothing, and calls neither Python nor the C library. Any thread may call it, with or without the
 * GIL, and several may at once. Arguments are not checked: that is up to the caller.
 *
 * An address is good in the process that asked for it, until that ends, and in its forks; never in another process.
 *
 * Common to all:
 *   target   is source, or does not overlap it
 *   offset   position of the first byte in the key stream; offset + nbytes <= 2^63
 *   key      16, 24 or 32 bytes, as the kernel's name says, and right behind them the 16 bytes of the iv; wiping them
 *            is the caller's affair
 *   rcon, box, inverse_box   as they stand in the deeplock_function
 */
#ifndef DEEPLOCK_H
#define DEEPLOCK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*deeplock_kernel)(const void *arguments);

/* One function: a kernel and what it is given at every call. */
typedef struct deeplock_function {
    deeplock_kernel kernel;
    int64_t rcon, box, inverse_box;
} deeplock_function;

/* lock_128, lock_192, lock_256, unlock_128, ...: the counter schedule */
typedef struct deeplock_counter {
    int64_t target, source, nbytes, offset, key, rcon, box;
} deeplock_counter;

/* lock_list_128, unlock_list_128, ...: many ranges in one call */
typedef struct deeplock_counter_list {
    int64_t records, count, rcon, box;
} deeplock_counter_list;

typedef struct deeplock_record {
    int64_t target, source, nbytes, offset, key;
} deeplock_record;

/* lock_sealed_128, unlock_sealed_128, ...: the same, and the seal (GMAC) of the locked bytes */
typedef struct deeplock_counter_sealed {
    int64_t records, count, rcon, box;
} deeplock_counter_sealed;

/* seal: only the seals; reads at source, and needs no target and key */
typedef struct deeplock_seal {
    int64_t records, count;
} deeplock_seal;

/* offset is a multiple of 16; seal_keys are DEEPLOCK_SEAL_KEYS_BYTES made by seal_keys, total the bytes of the whole
 * tensor, and tag a place for DEEPLOCK_TAG_BYTES; the seal is the XOR of the tags of all pieces of a tensor */
typedef struct deeplock_sealed_record {
    int64_t target, source, nbytes, offset, key, seal_keys, total, tag;
} deeplock_sealed_record;

/* seal_keys: DEEPLOCK_SEAL_KEYS_BYTES at target for each of count keys of DEEPLOCK_SEAL_KEY_BYTES at source */
typedef struct deeplock_seal_keys {
    int64_t target, source, count, rcon;
} deeplock_seal_keys;

/* rekey_128, ...: from one key to another in one pass, sealed under the new one */
typedef struct deeplock_rekey {
    int64_t records, count, rcon, box, inverse_box;
} deeplock_rekey;

typedef struct deeplock_rekey_record {
    int64_t target, source, nbytes, offset, key, seal_keys, total, tag, new_key;
} deeplock_rekey_record;

/* substitute, substitute_inverse: the S-Box alone */
typedef struct deeplock_substitute {
    int64_t target, source, nbytes, box;
} deeplock_substitute;

enum {
    DEEPLOCK_SEAL_KEY_BYTES = 32,
    DEEPLOCK_SEAL_KEYS_BYTES = 272,
    DEEPLOCK_TAG_BYTES = 16
};

/* Lock or unlock with one of lock_128 ... unlock_256. key_iv is the key and behind it the iv. */
static inline void deeplock_run(const deeplock_function *function, void *target, const void *source, uint64_t nbytes,
                                uint64_t offset, const unsigned char *key_iv)
{
    deeplock_counter arguments;
    arguments.target = (int64_t)(intptr_t)target;
    arguments.source = (int64_t)(intptr_t)source;
    arguments.nbytes = (int64_t)nbytes;
    arguments.offset = (int64_t)offset;
    arguments.key = (int64_t)(intptr_t)key_iv;
    arguments.rcon = function->rcon;
    arguments.box = function->box;
    function->kernel(&arguments);
}

/* Apply substitute or substitute_inverse. */
static inline void deeplock_run_substitute(const deeplock_function *function, void *target, const void *source,
                                           uint64_t nbytes)
{
    deeplock_substitute arguments;
    arguments.target = (int64_t)(intptr_t)target;
    arguments.source = (int64_t)(intptr_t)source;
    arguments.nbytes = (int64_t)nbytes;
    arguments.box = function->box;
    function->kernel(&arguments);
}

#ifdef __cplusplus
}
#endif

#endif
