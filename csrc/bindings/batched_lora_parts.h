// A batch of many adapters as problems of lora_linear: the rows of one adapter are a Part, and one phase runs over the
// units of all the parts together. Rows that lie side by side in x are used where they are, others are gathered and
// their results scattered. Parts and units follow from shapes and route, never from the number of threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "batched_lora/route.h"
#include "bindings/lora_linear_call.h"

namespace pk {

struct Part {
  lora_linear::Problem problem{};
  std::vector<lora_linear::Member> members;
  std::vector<lora_linear::Adapter> adapters;
  std::vector<int64_t> member;    // what its members are in the call
  const int32_t* rows = nullptr;  // [M] of x
  bool in_place = true;           // they are rows[0], rows[0] + 1, ...
};

class Parts {
 public:
  // column: where each member's block of h begins, and last the width of h.
  Parts(LoraLinearCall& call, const std::vector<batched_lora::Segment>& segments, const std::vector<int64_t>& adapter,
        const std::vector<int64_t>& column)
      : call_(call) {
    parts_.reserve(segments.size() + 1);  // parts point into themselves
    for (const batched_lora::Segment& segment : segments) {
      Part& part = parts_.emplace_back();
      part.rows = segment.rows;
      part.in_place = segment.rows[segment.M - 1] - segment.rows[0] == segment.M - 1;
      part.problem = call.problem;
      part.problem.M = segment.M;
      part.problem.R = column.back();
      part.problem.base = call.is_double();
      part.problem.rows = segment.rows;
      add_entries(part, segment.adapter, adapter, column);
      if (part.members.empty()) parts_.pop_back();
    }
  }

  std::vector<Part>& all() { return parts_; }

  // A part of all rows and no adapter, for the sums of dy that every row goes into. The last part to be added.
  void add_whole() {
    Part& part = parts_.emplace_back();
    part.problem = call_.problem;
    part.problem.R = part.problem.L = 0;
    part.problem.dx = nullptr;
    part.members = call_.members;
    for (lora_linear::Member& member : part.members) member.R = 0;
    part.problem.member = part.members.data();
  }

  // Where a part finds rows of a matrix of the call: there, or gathered when gather() runs. stride and width in items
  // of `item` bytes; stride becomes that of the rows found.
  const void* gathered(const Part& part, const void* from, int64_t width, int64_t& stride, int64_t item) {
    const auto* bytes = static_cast<const char*>(from);
    if (part.in_place) return bytes + part.rows[0] * stride * item;
    char* const to = room(part.problem.M * width * item);
    for (int64_t i = 0; i < part.problem.M; ++i) {
      copies_.push_back({to + i * width * item, bytes + part.rows[i] * stride * item, width * item});
    }
    stride = width;
    return to;
  }

  // Where a part writes rows of a contiguous matrix of the call: there, or in room of its own, whose rows go there when
  // scatter() runs.
  void* scattered(const Part& part, void* to, int64_t width, int64_t item) {
    auto* bytes = static_cast<char*>(to);
    if (part.in_place) return bytes + part.rows[0] * width * item;
    char* const from = room(part.problem.M * width * item);
    for (int64_t i = 0; i < part.problem.M; ++i) {
      scatters_.push_back({bytes + part.rows[i] * width * item, from + i * width * item, width * item});
    }
    return from;
  }

  // A row to be filled when scatter() runs: with a copy of `from`, or with zeros.
  void fill(void* to, const void* from, int64_t bytes) {
    scatters_.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
  }

  void gather() { copy(copies_); }
  void scatter() { copy(scatters_); }

  // One phase over all parts; units(problem) and work(problem), in multiplications, of each.
  template <class Units, class Work>
  void run(lora_linear::Phase phase, const Units& units, const Work& work) const {
    std::vector<int64_t> first(1, 0);
    int64_t multiplications = 0;
    for (const Part& part : parts_) {
      first.push_back(first.back() + units(part.problem));
      multiplications += work(part.problem);
    }
    parallel(first.back(), multiplications, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < parts_.size(); ++i) {
        const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
        if (from < to) phase(parts_[i].problem, from - first[i], to - first[i]);
      }
    });
  }

 private:
  struct Copy {
    char* to;
    const char* from;  // null: zeros
    int64_t bytes;
  };

  // The members that the adapter touches; all of them for fp64, whose loops add the base product as well.
  void add_entries(Part& part, int64_t id, const std::vector<int64_t>& adapter, const std::vector<int64_t>& column) {
    for (int64_t g = 0; g < call_.problem.G; ++g) {
      const size_t before = part.adapters.size();
      for (size_t l = 0; id >= 0 && l < adapter.size(); ++l) {
        if (adapter[l] != id || call_.adapters[l].member != g) continue;
        part.adapters.push_back(call_.adapters[l]);
        part.adapters.back().member = static_cast<int64_t>(part.members.size());
        part.adapters.back().rank0 = column[g];
      }
      if (part.adapters.size() == before && !call_.is_double()) continue;
      part.members.push_back(call_.members[g]);
      part.members.back().R = part.adapters.size() > before ? part.adapters.back().R : 0;
      part.members.back().dbias = nullptr;  // a sum over all rows, see add_whole()
      part.member.push_back(g);
    }
    part.problem.G = static_cast<int64_t>(part.members.size());
    part.problem.L = static_cast<int64_t>(part.adapters.size());
    part.problem.member = part.members.data();
    part.problem.adapter = part.adapters.data();
  }

  char* room(int64_t bytes) { return reinterpret_cast<char*>(call_.scratch((bytes + 3) / 4)); }

  static void copy(const std::vector<Copy>& copies) {
    int64_t bytes = 0;
    for (const Copy& one : copies) bytes += one.bytes;
    parallel(static_cast<int64_t>(copies.size()), bytes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Copy& one = copies[i];
        if (one.from) {
          std::memcpy(one.to, one.from, one.bytes);
        } else {
          std::memset(one.to, 0, one.bytes);
        }
      }
    });
  }

  LoraLinearCall& call_;
  std::vector<Part> parts_;
  std::vector<Copy> copies_, scatters_;
};

}  // namespace pk
