// The instruction set of the CPU kernels: the best that this processor has, chosen once per process for all families.
#pragma once

namespace pk {

// Best last, in the order of csrc/instruction_sets.txt. Other processors than x86-64 have the first only.
#if defined(__x86_64__)
constexpr int kInstructionSets = 4;
#else
constexpr int kInstructionSets = 1;
#endif

int instruction_set();  // the one in use, 0 <= index < kInstructionSets
const char* instruction_set_name();
bool use_instruction_set(const char* name);  // false: unknown, not built, or not of this processor

}  // namespace pk

#define PK_DECLARE_TABLE(set, family)        \
  namespace set {                            \
  extern const family::Table family##_table; \
  }

// Declares the tables of a family, `<family>_table` of type <family>::Table in the namespace of each set, and defines
// <family>::table(), which returns the one in use. Stands in one .cpp file of the family, inside namespace pk.
#if defined(__x86_64__)
#define PK_TABLE_IN_USE(family)                                                                                      \
  PK_DECLARE_TABLE(pk_default, family)                                                                               \
  PK_DECLARE_TABLE(pk_avx2, family)                                                                                  \
  PK_DECLARE_TABLE(pk_avx512, family)                                                                                \
  PK_DECLARE_TABLE(pk_avx512_bf16, family)                                                                           \
  const family::Table& family::table() {                                                                             \
    static const Table* const all[kInstructionSets] = {&pk_default::family##_table, &pk_avx2::family##_table,        \
                                                       &pk_avx512::family##_table, &pk_avx512_bf16::family##_table}; \
    return *all[instruction_set()];                                                                                  \
  }
#else
#define PK_TABLE_IN_USE(family)          \
  PK_DECLARE_TABLE(pk_default, family)   \
  const family::Table& family::table() { \
    return pk_default::family##_table;   \
  }
#endif
