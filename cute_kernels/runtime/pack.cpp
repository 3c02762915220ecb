#include "pack.hpp"

#include <cstdint>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bitdecoding/block_format.hpp"
#include "error.hpp"

namespace bitdecoding {
namespace {

using Fields = std::map<std::string, std::string>;

constexpr char kMagic[] = "BDPACK 1\n";
constexpr std::size_t kImageAlign = 16;

Status damaged(const std::string& path, const std::string& why) {
  return fail(Status::format_error, path, ": not a usable kernel pack: ", why);
}

// A decimal number without sign, at most `limit`.
bool to_number(const std::string& text, std::uint64_t limit, std::uint64_t* out) {
  constexpr std::size_t kMaxDigits = 18;  // cannot overflow
  if (text.empty() || text.size() > kMaxDigits) return false;
  *out = 0;
  for (const char digit : text) {
    if (digit < '0' || digit > '9') return false;
    *out = *out * 10 + static_cast<std::uint64_t>(digit - '0');
  }
  return *out <= limit;
}

bool split_pair(const std::string& text, Fields* fields) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) return false;
  return fields->emplace(text.substr(0, equals), text.substr(equals + 1)).second;  // false: given twice
}

// One line of the index; `images` is what follows the index.
bool read_kernel(const std::string& line, const char* images, std::size_t images_size, Kernel* out) {
  Fields fields;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    if (!split_pair(word, &fields)) return false;
  }
  std::uint64_t threads = 0, smem = 0, regs = 0, ctas_per_sm = 0, offset = 0, size = 0;
  constexpr std::uint64_t kSane = 1u << 20;
  if (!to_number(fields["threads"], kSane, &threads) || !to_number(fields["smem"], kSane, &smem) ||
      !to_number(fields["regs"], kSane, &regs) || !to_number(fields["ctas_per_sm"], kSane, &ctas_per_sm) ||
      !to_number(fields["offset"], images_size, &offset) || !to_number(fields["size"], images_size - offset, &size) ||
      offset % kImageAlign != 0) {
    return false;
  }
  out->name = fields["name"];
  out->entry = fields["entry"];
  out->image.assign(images + offset, size);
  out->threads = static_cast<int>(threads);
  out->smem = static_cast<int>(smem);
  out->regs = static_cast<int>(regs);
  out->ctas_per_sm = static_cast<int>(ctas_per_sm);
  return true;
}

}  // namespace

Status validate_kernel(const Kernel& kernel) {
  KernelConfig config;
  BITDECODING_TRY(KernelConfig::parse(kernel.name, &config));
  auto reject = [&](const char* field, std::int64_t value, const char* allowed) {
    return fail(Status::invalid_argument, field, "=", value, ": ", allowed, " (kernel ", kernel.name, ")");
  };
  if (kernel.entry.empty()) return fail(Status::invalid_argument, "entry: is empty (kernel ", kernel.name, ")");
  if (kernel.image.empty()) return fail(Status::invalid_argument, "cubin: is empty (kernel ", kernel.name, ")");
  if (kernel.threads < 32 || kernel.threads > 1024 || kernel.threads % 32 != 0) {
    return reject("threads", kernel.threads, "allowed are multiples of 32 up to 1024");
  }
  if (kernel.smem < 0 || kernel.smem > smem_limit(config.arch)) {
    return reject("smem", kernel.smem, "exceeds the shared memory of the architecture");
  }
  if (kernel.regs < 0 || kernel.regs > 255) return reject("regs", kernel.regs, "allowed are 0 to 255");
  if (kernel.ctas_per_sm != config.ctas_per_sm) {
    return reject("ctas_per_sm", kernel.ctas_per_sm, "differs from the kernel's configuration");
  }
  return Status::ok;
}

Status read_pack(const std::string& path, std::vector<Kernel>* out) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return fail(Status::invalid_argument, "path='", path, "': cannot be opened");
  std::string data;
  std::vector<char> chunk(std::size_t{1} << 16);
  while (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())), file.gcount() > 0) {
    data.append(chunk.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) return fail(Status::invalid_argument, "path='", path, "': cannot be read");  // a directory, say

  const std::size_t magic = sizeof(kMagic) - 1;
  if (data.compare(0, magic, kMagic) != 0) return damaged(path, "it does not begin with 'BDPACK 1'");
  const std::size_t length_end = data.find('\n', magic);
  std::uint64_t index_size = 0;
  if (length_end == std::string::npos ||
      !to_number(data.substr(magic, length_end - magic), data.size() - length_end - 1, &index_size)) {
    return damaged(path, "the length of its index is wrong");
  }
  const std::size_t index_begin = length_end + 1;
  const char* images = data.data() + index_begin + index_size;
  const std::size_t images_size = data.size() - index_begin - index_size;

  Fields header;
  std::set<std::string> names;
  std::istringstream index(data.substr(index_begin, index_size));
  for (std::string line; std::getline(index, line);) {
    if (line.empty()) continue;
    if (line[0] == '#') {
      if (!split_pair(line.substr(1), &header)) return damaged(path, "header line '" + line + "'");
      continue;
    }
    Kernel kernel;
    if (!read_kernel(line, images, images_size, &kernel)) return damaged(path, "index line '" + line + "'");
    if (validate_kernel(kernel) != Status::ok) return damaged(path, last_error());
    if (!names.insert(kernel.name).second) return damaged(path, "it has two kernels " + kernel.name);
    out->push_back(std::move(kernel));
  }
  if (header["format_version"] != std::to_string(kFormatVersion)) {
    return damaged(path, "format_version='" + header["format_version"] + "', this library reads " +
                             std::to_string(kFormatVersion));
  }
  return Status::ok;
}

}  // namespace bitdecoding
