// How much static shared memory a kernel has. Its variables are static ones of the kernel's function, so each is a
// symbol of this module whose mangled name begins with the function's: _ZN..kernel..Ev has _ZZN..kernel..EvE4tile.
// Those of the device functions that it calls are not found: a kernel declares its shared memory itself.
#include <dlfcn.h>
#include <elf.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "emulator/machine.h"

namespace emulator {
namespace {

#if defined(EMULATOR_ASAN)  // see __shared__ in emulator.h
constexpr unsigned kKind = STT_OBJECT;
#else
constexpr unsigned kKind = STT_TLS;
#endif

struct Symbol {
  std::string name;
  unsigned kind;
  uintptr_t value;
  size_t bytes;
};

std::vector<Symbol> symbols_of(const char* module) {
  std::ifstream file(module, std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::vector<Symbol> symbols;
  if (image.size() < sizeof(Elf64_Ehdr)) return symbols;
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbol = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
    for (size_t left = sections[i].sh_size / sizeof *symbol; left > 0; --left, ++symbol) {
      symbols.push_back({names + symbol->st_name, ELF64_ST_TYPE(symbol->st_info), symbol->st_value, symbol->st_size});
    }
  }
  return symbols;
}

size_t find(const void* kernel) {
  Dl_info module;
  if (dladdr(kernel, &module) == 0) abort();
  static const std::vector<Symbol> symbols = symbols_of(module.dli_fname);
  const uintptr_t place = static_cast<const char*>(kernel) - static_cast<const char*>(module.dli_fbase);
  std::string prefix;
  for (const Symbol& symbol : symbols) {
    if (symbol.kind == STT_FUNC && symbol.value == place) prefix = "_ZZ" + symbol.name.substr(2) + "E";
  }
  if (prefix.empty()) {
    fprintf(stderr, "emulator: the kernel that is launched has no symbol in %s: was it stripped?\n", module.dli_fname);
    abort();
  }
  size_t bytes = 0;
  for (const Symbol& symbol : symbols) {
    constexpr size_t kAlignment = 16;  // between variables
    if (symbol.kind != kKind || symbol.name.compare(0, prefix.size(), prefix) != 0) continue;
    bytes += (symbol.bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  return bytes;
}

}  // namespace

size_t static_shared_of(const void* kernel) {
  static std::map<const void*, size_t> known;
  const auto found = known.find(kernel);
  return found != known.end() ? found->second : known[kernel] = find(kernel);
}

}  // namespace emulator
